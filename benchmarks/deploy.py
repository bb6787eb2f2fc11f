"""What a pruned model gains in ONNX Runtime, and that it still says the same, part by part.

    python benchmarks/deploy.py tokens     # SmolLM2 at body=50%: the loop in ONNX Runtime against
                                           # torch's generate, 32 tokens, and onnxruntime-genai
    python benchmarks/deploy.py prefill    # its prefill latency ratio against its ratio of MACs
    python benchmarks/deploy.py resnet50   # a ResNet-50 at half inner width, one thread
    python benchmarks/deploy.py            # all of them; exit code 1 if a bar is missed

Times are CPU times of interleaved runs (`spacompiler bench` prints wall times as well): they hold
on a machine that others use too. Artifacts are kept under out/ and used again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import spacompiler
from spacompiler.artifact.report import deployed
from spacompiler.cli import bench
from spacompiler.deploy.cases import LENGTH
from spacompiler.errors import SpaError
from spacompiler.runtime.decoder import Decoder

OUT = Path("out/benchmark-deploy")
PROMPT = "The Python programming language is"
TOKENS = 32
PREFILL_BAR = 1.08
RESNET_BAR = 2.1


def main() -> int:
    """Run the parts that are named, or all; print one line a bar."""
    parts = sys.argv[1:] or list(PARTS)
    return 0 if all([PARTS[part]() for part in parts]) else 1


def say(met: bool, text: str) -> bool:
    print(f"{'met' if met else 'MISSED':7}{text}", flush=True)
    return met


def language_model() -> Path:
    """SmolLM2-135M at half of its body, as a decoder with its cache."""
    out = OUT / "smollm2-body50"
    if not out.exists():
        data = spacompiler.compile("zoo:smollm2-135m", target="body=50%", out=out, decoder=True,
                                   int8=True, latency=False).report
        for check, result in deployed(data):
            print(f"       {check}: {result}")
    return out


def tokens() -> bool:
    """The same tokens from torch's generate, from our loop, and from onnxruntime-genai."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = language_model()
    model, tokenizer = (c.from_pretrained(out) for c in (AutoModelForCausalLM, AutoTokenizer))
    decoder, met = Decoder(out), True
    for text in (PROMPT, "Once upon a time", "1, 2, 3, 4, 5,"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        want = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS,
            min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].numpy()
        for name, write in (("spacompiler.runtime", lambda i: decoder.generate(i, TOKENS)[0]),
                            ("onnxruntime-genai", lambda i: genai(out, i[0]))):
            made = write(ids.numpy())
            if made is None:
                print(f"skipped {name}: pip install 'spacompiler[genai]'")
                continue
            same = int((made[:TOKENS] == want[: len(made)]).sum())
            met &= say(same == TOKENS, f"{name}: {same} of {TOKENS} tokens are torch's, after "
                                       f"{text!r}")
    return met


def genai(folder: Path, ids: np.ndarray) -> np.ndarray | None:
    """Tokens after a prompt by onnxruntime-genai; None where it is not installed."""
    try:
        import onnxruntime_genai as og
    except ImportError:
        return None
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    length = len(ids) + TOKENS
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return np.asarray(generator.get_sequence(0)[len(ids):])


def prefill() -> bool:
    """Latency ratio of a 128-token prompt against the ratio of MACs for that prompt."""
    out = language_model()
    share = _mac_share(out)
    rows = bench.run(out, batches=(1,), threads=(1,), repeats=12, seconds=240.0)
    for row in rows:
        times = ", ".join(f"{t['cpu_median_ms']:.1f} ms {n}" for n, t in row["models"].items())
        ratios = ", ".join(f"{n} {r['cpu']['median']:.3f} ({r['cpu']['low']:.3f} to "
                           f"{r['cpu']['high']:.3f})" for n, r in row["ratios"].items())
        print(f"       {row['case']}: {times}; ratios {ratios}")
    ratio = rows[0]["ratios"]["pruned"]["cpu"]["median"]
    return say(ratio <= PREFILL_BAR * share,
               f"prefill ratio {ratio:.3f}, ratio of MACs {share:.3f}: {ratio / share:.3f} times "
               f"it (bar {PREFILL_BAR})")


def _mac_share(out: Path) -> float:
    """MACs of the pruned over the dense model for one prompt of 128 tokens, counted by torch."""
    from transformers import AutoModelForCausalLM

    from spacompiler.sources.named import load

    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    models = (AutoModelForCausalLM.from_pretrained(out), load("zoo:smollm2-135m").module)
    pruned, dense = (_operations(model, input_ids=ids) for model in models)
    return pruned / dense


def _operations(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*args, **kwargs)
    return counter.get_total_flops()


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with a shortcut, as in ResNet-50; `inner` is the width of the 3×3."""

    def __init__(self, wide_in: int, inner: int, wide: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, wide, 1, bias=False), nn.BatchNorm2d(wide))
        self.shortcut = nn.Identity() if stride == 1 and wide_in == wide else nn.Sequential(
            nn.Conv2d(wide_in, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """The shape of ResNet-50; `share` scales the inner widths, not the residual stream."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64),
                                  nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks, width = [], 64
        for inner, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                blocks.append(Bottleneck(width, int(inner * share), inner * 4,
                                         stride if i == 0 else 1))
                width = inner * 4
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet50_source() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The model and example images, as `benchmarks.deploy:resnet50_source`."""
    torch.manual_seed(0)
    return ResNet50().eval(), (torch.randn(2, 3, 224, 224),)


def resnet50() -> bool:
    """Half of all inner channels removed by the compiler, then timed against the dense model."""
    image = torch.zeros(1, 3, 224, 224)
    share = _operations(ResNet50(0.5), image) / _operations(ResNet50(), image)
    out = OUT / "resnet50-half"
    if not out.exists():
        spacompiler.compile("benchmarks.deploy:resnet50_source", target=f"macs={share:.1%}",
                            out=out, importance="magnitude", align=16, latency=False,
                            ignore=("stem.*", "*.shortcut.*", "head.*"))
    blocks: Any = spacompiler.load(out).blocks
    widths = sorted({c.out_channels for b in blocks for c in (b.body[0], b.body[3])})
    row = bench.run(out, batches=(1,), threads=(1,), repeats=30, seconds=120.0)[0]
    found = row["ratios"]["pruned"]["cpu"]
    speed = 1 / found["median"]
    dense, cut = row["models"]["dense"], row["models"]["pruned"]
    print(f"       inner widths {widths}, MACs {share:.1%}; best of {dense['repeats']} runs "
          f"{dense['cpu_best_ms']:.1f} ms dense, {cut['cpu_best_ms']:.1f} ms pruned: "
          f"{dense['cpu_best_ms'] / cut['cpu_best_ms']:.2f} times faster")
    return say(speed >= RESNET_BAR, f"{speed:.2f} times faster ({1 / found['high']:.2f} to "
                                    f"{1 / found['low']:.2f}), bar {RESNET_BAR}")


PARTS: dict[str, Callable[[], bool]] = {
    "tokens": tokens, "prefill": prefill, "resnet50": resnet50}

if __name__ == "__main__":
    try:
        sys.exit(main())
    except SpaError as error:
        sys.exit(f"error: {error}")
