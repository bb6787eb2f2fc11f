"""What a sweep of four sizes costs, how well targets in time are met, and what alignment is worth.

    python benchmarks/sizes.py [sweep] [latency] [limits] [align] [MODEL ...]

`sweep`: CPU seconds of four sizes over those of one compile (with its files); `NAME.onnx` is the
ONNX file of a network. `latency`: the share of the dense network's time that is left at
latency=60%, timed anew after the compile, turn by turn. `limits`: params and latency together, and
which one binds. `align`: the time of a network at 60% of its multiplications, widths as a compile
takes them, over the best of three that round the same unaligned widths down, to the nearest and up,
each brought to the same number of multiplications as near as steps allow.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

import spacompiler
from spacompiler.deploy.export import export_onnx
from spacompiler.deploy.inputs import feed, timed_inputs
from spacompiler.groups.cost import cost
from spacompiler.models_zoo import load
from spacompiler.models_zoo.resnet import Residual
from spacompiler.plan.legal import step
from spacompiler.plan.plan import make_plan
from spacompiler.runtime.latency import compare_latency, ratio
from spacompiler.torch_backend.emit.program import rewrite
from spacompiler.torch_backend.machine import lanes

SIZES = (0.9, 0.75, 0.6, 0.5)
SHARE = 0.6
Built = tuple[Any, Any, dict[str, Any]]


def _tokens(vocabulary: int, length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, vocabulary, (2, length), generator=generator)}
            for _ in range(4)]


def _cnn() -> Built:
    """Residual stages of 64 and 128 channels."""
    def conv(a: int, b: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b))

    def block(width: int) -> Residual:
        return Residual(nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width)))

    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 64, 2), nn.ReLU(), block(64), block(64), conv(64, 128, 2),
                        nn.ReLU(), block(128), block(128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(128, 10))
    return net.eval(), (torch.randn(2, 3, 64, 64),), {"importance": "magnitude"}


SMALL = {"vocab_size": 4000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}


def _bert() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    net = BertForMaskedLM(BertConfig(**SMALL, intermediate_size=1024))
    batches = _tokens(4000, 64)
    return net.eval(), batches[0], {"calibration": batches}


def _llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=704, num_key_value_heads=4))
    batches = _tokens(4000, 64)
    return net.eval(), batches[0], {"calibration": batches}


OWN: Mapping[str, Callable[[], Built]] = {"cnn": _cnn, "bert-4-layers": _bert,
                                          "llama-4-layers": _llama}
"""Networks of some milliseconds beside those of the zoo, which take less than one."""


def given(name: str) -> Built:
    """A network, its inputs, and what it is compiled with."""
    if name in OWN:
        return OWN[name]()
    module, inputs = load(name).build()
    more = {"calibration": _tokens(60, 12)} if {*inputs} == {"input_ids"} else {}
    return module, inputs, {"align": 1, **more}


def _file(name: str, folder: Path) -> Built:
    """The ONNX file of a network, and batches for it."""
    module, inputs, _ = given(name)
    place = folder / f"{name}.onnx"
    torch.onnx.export(module, inputs, place, dynamo=True, verbose=False, external_data=False)
    names = [value.name for value in onnx.load(place).graph.input]
    batches = [dict(zip(names, (torch.randn_like(x) for x in inputs), strict=True))
               for _ in range(8)]
    return str(place), None, {"align": 1, "calibration": batches, "importance": "wanda"}


def sweep(name: str) -> None:
    """Print the cost of four sizes over that of one compile."""
    with tempfile.TemporaryDirectory() as folder:
        module, inputs, more = _file(name.removesuffix(".onnx"), Path(folder)) \
            if name.endswith(".onnx") else given(name)
        spacompiler.compile(module, inputs, target="params~75%", dry_run=True, **more)
        started = time.process_time()
        spacompiler.compile(module, inputs, target="params~75%", out=Path(folder, "o"), **more)
        one = time.process_time() - started
        started = time.process_time()
        spacompiler.sweep(module, inputs, sizes=SIZES, **more)
        four = time.process_time() - started
    print(f"{name:14} one compile {one:5.1f} s, four sizes {four:5.1f} s: {four / one:.2f}",
          flush=True)


def _compiled(name: str, target: str) -> tuple[spacompiler.Result, float]:
    """A compile, and the share of the dense network's CPU time that its file takes."""
    module, inputs, more = given(name)
    with tempfile.TemporaryDirectory() as folder:
        found = spacompiler.compile(module, inputs, target=target, out=Path(folder, "o"), **more)
        times = found.report["latency"]
    return found, times["pruned"]["cpu_median_ms"] / times["dense"]["cpu_median_ms"]


def latency(name: str) -> None:
    """Print what a target in time comes to."""
    found, share = _compiled(name, f"latency~{SHARE}")
    said = next(n for n in found.job.notes if n.startswith("latency at"))
    dense = found.report["latency"]["dense"]["median_ms"]
    print(f"{name:14} latency~60%: {share:.1%} of {dense:.2f} ms, measured anew; {said}",
          flush=True)


def limits(name: str) -> None:
    """Print which of two limits binds, and what both come to."""
    found, share = _compiled(name, f"params=80%,latency={SHARE}")
    params = found.plan.costs["params"]
    said = next(n for n in found.job.notes if n.startswith("of the limits"))
    print(f"{name:14} {params['pruned'] / params['dense']:.1%} of the parameters, {share:.1%} of "
          f"the time; {said}", flush=True)


ROUNDINGS: Mapping[str, Callable[[float], int]] = {"down": math.floor, "nearest": round,
                                                   "up": math.ceil}


def _rounded(job: Any, fine: Mapping[str, int], how: Callable[[float], int],
             wanted: float) -> dict[str, int]:
    """Unaligned counts, scaled so that they come to the target once they are rounded.

    What is still missing or too much is made up by single steps of single groups.
    """
    price = cost(job.solution, "macs")
    steps = {g.name: step(job.solution, g, None, lanes()) for g in job.candidates}
    sizes = {g.name: g.size for g in job.candidates}

    def within(name: str, count: int) -> int:
        return min(sizes[name], max(steps[name], count))

    def counts(scale: float) -> dict[str, int]:
        return {n: within(n, how(scale * fine[n] / m) * m) for n, m in steps.items()}

    def miss(found: Mapping[str, int]) -> float:
        return abs(price.set({g.atom: found[g.name] for g in job.candidates}) - wanted)

    best = min(map(counts, np.linspace(0.6, 1.5, 361)), key=miss)
    while True:
        nearer = min(({**best, n: within(n, best[n] + sign * m)} for n, m in steps.items()
                      for sign in (1, -1)), key=miss)
        if miss(nearer) >= miss(best):
            return best
        best = nearer


def align(name: str) -> None:
    """Print the time of aligned widths over the best of three roundings."""
    module, inputs, more = given(name)
    asked = {**more, "target": f"macs~{SHARE}", "allocation": "uniform", "dry_run": True}
    ours = spacompiler.compile(module, inputs, **{**asked, "align": None}).job
    fine = spacompiler.compile(module, inputs, **{**asked, "align": 1}).job

    def kept(job: Any) -> dict[str, int]:
        return {g.name: job.choices[g.atom].count if g.atom in job.choices else g.size
                for g in job.candidates}

    price, trace = cost(ours.solution, "macs"), ours.trace
    reached = price.set({g.atom: kept(ours)[g.name] for g in ours.candidates})
    plans = {"as compiled": kept(ours), "unaligned": kept(fine), **{
        word: _rounded(ours, kept(fine), how, reached) for word, how in ROUNDINGS.items()}}
    shares, paths = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for word, counts in plans.items():
            plan = make_plan(ours.scored.candidates, ours.scores, counts)
            paths[word] = Path(folder, f"{word}.onnx")
            export_onnx(rewrite(trace, ours.solution, plan.choices(ours.solution), {}),
                        paths[word], input_names=trace.graph.inputs)
            shares[word] = price.set({g.atom: counts[g.name] for g in ours.candidates}) \
                / cost(ours.solution, "macs").total
        times = compare_latency(paths, feed(trace, *timed_inputs(trace, 1, 128)), repeats=40)
    best = min(ROUNDINGS, key=lambda word: times[word].cpu_median)
    rows = ", ".join(f"{word} {t.cpu_median:.2f} ms ({shares[word]:.1%})"
                     for word, t in times.items())
    over = ratio(times["as compiled"], times[best], cpu=True).median
    print(f"{name:14} as compiled over the best rounding ({best}) {over:.3f}: {rows}", flush=True)


KINDS: Mapping[str, tuple[Callable[[str], None], tuple[str, ...]]] = {
    "sweep": (sweep, ("llama-gqa", "resnet", "vit", "resnet.onnx", "cnn.onnx")),
    "latency": (latency, ("resnet", "bert", "llama-gqa", *OWN)),
    "limits": (limits, ("cnn",)),
    "align": (align, tuple(OWN))}


def main(arguments: list[str]) -> int:
    """Run what is asked for, or all."""
    named = [a for a in arguments if a not in KINDS]
    for kind in [a for a in arguments if a in KINDS] or KINDS:
        run, models = KINDS[kind]
        for name in named or models:
            run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
