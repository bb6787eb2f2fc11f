"""What a compile of a large checkpoint costs beside reading, slicing and writing it by hand.

    python benchmarks/scale.py --size 0.4B              # one of SIZES, in a temporary folder
    python benchmarks/scale.py --size 1.2B --turns 2
    python benchmarks/scale.py --size 1.2B --before ~/checkout-of-another-commit
    python benchmarks/scale.py --meta                   # 80 layers of a 70B, without weights
    python benchmarks/scale.py --defaults zoo:smollm2-135m --target body=75% --before ~/checkout

The checkpoint is a Llama with random bf16 weights, a file a layer. Turn by turn, each in a process
of its own with one thread, run: a plain stream (squares of the weights of heads and channels
summed, the better half kept, written file by file), a float32 forward pass (each matrix once,
widened, times 18 rows), and `compile(target="body=50%", importance="magnitude",
calibration="none")` with its proof, without ONNX. `--defaults` compiles a model as it is typed
without options, ONNX and latency with it, here and at another commit. Cells: CPU seconds of the
work (of child processes, too) and with Python's imports, the largest resident memory in MB (Linux).
The least of the turns counts. Both commits are run from a copy with its bytecode beside it, as an
installation has it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from compileall import compile_dir
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SIZES = {"0.2B": (1024, 2816, 12, 16, 4), "0.4B": (1280, 3456, 20, 20, 4),
         "1.2B": (2048, 5632, 22, 32, 8), "3B": (3072, 8192, 26, 24, 8),
         "7B": (4096, 11008, 32, 32, 32)}
"""Hidden size, channels, layers, heads, key/value heads."""
LIBRARIES = ("torch.export._trace", "onnxscript.function_libs.torch_lib.ops", "onnxruntime",
             "torch.onnx._internal.exporter._core")
"""What a process loads once, on first use, however many models it compiles."""
VOCABULARY, ROWS = 32000, 18
INDEX = "model.safetensors.index.json"


def configuration(size: str) -> Any:
    """Return the configuration of a Llama of a size."""
    from transformers import LlamaConfig

    hidden, channels, layers, heads, groups = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=channels, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, vocab_size=VOCABULARY,
        max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"])


def make(folder: Path, size: str) -> None:
    """Write a checkpoint of random weights, a file a layer."""
    from transformers import LlamaForCausalLM

    config = configuration(size)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(config).state_dict().items()}
    draws, places = torch.Generator().manual_seed(0), dict[str, str]()
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        places[name] = f"model-{layer}.safetensors"
    for file in dict.fromkeys(places.values()):
        save_file({n: torch.ones(shapes[n], dtype=torch.bfloat16) if len(shapes[n]) == 1 else
                   torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02, generator=draws)
                   for n in places if places[n] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


# --- the three that are compared ------------------------------------------------------------------


def _files(folder: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            yield file.name, {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118


def _squares(array: torch.Tensor, dim: int) -> torch.Tensor:
    return array.float().square().sum(dim)


def plain(source: Path, out: Path) -> None:
    """The limit: score, slice and write one layer after the other, and nothing else."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    groups = config["num_key_value_heads"]
    for name, arrays in _files(source):
        by_end = {n.rpartition("layers.")[2].partition(".")[2]: n for n in arrays}
        for rows, column in ((("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
                             (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                              "self_attn.o_proj")):
            if f"{column}.weight" in by_end:
                _halve(arrays, [by_end[f"{r}.weight"] for r in rows],
                       by_end[f"{column}.weight"], groups if "attn" in column else 0)
        save_file(arrays, out / name)


def _halve(arrays: dict[str, torch.Tensor], rows: list[str], column: str, groups: int) -> None:
    """Keep the better half of the slices that rows and a column share."""
    count = groups or len(arrays[rows[0]])
    score = sum(_squares(arrays[n], 1).view(count, -1).sum(1) for n in rows)
    score = score + _squares(arrays[column], 0).view(count, -1).sum(1)
    kept = torch.topk(score, count // 2).indices.sort().values

    def places(width: int) -> torch.Tensor:
        each = width // count
        return (kept[:, None] * each + torch.arange(each)).flatten()

    for name in rows:
        arrays[name] = arrays[name][places(len(arrays[name]))]
    arrays[column] = arrays[column][:, places(arrays[column].shape[1])].contiguous()


def forward(source: Path, out: Path) -> None:
    """Each matrix once, in float32, times as many rows as the proof's example has."""
    del out
    for _, arrays in _files(source):
        for array in arrays.values():
            if array.dim() > 1:
                torch.nn.functional.linear(torch.ones(ROWS, array.shape[1]), array.float())


def compiled(source: Path, out: Path) -> None:
    """The compile."""
    import spacompiler

    spacompiler.compile(str(source), target="body=50%", importance="magnitude", out=out,
                        calibration="none", onnx=False, latency=False)


def defaults(source: Path, out: Path) -> None:
    """A compile as it is typed without options: `source` is MODEL@TARGET."""
    import spacompiler

    model, _, target = str(source).rpartition("@")
    made = spacompiler.compile(model, target=target, out=out)
    quality, proof = made.report.get("quality") or {}, made.report.get("proof") or {}
    print({"perplexity": (quality.get("perplexity") or {}).get("pruned"),
           "proof": proof.get("relative_error"), "latency": "latency" in made.report},
          file=sys.stderr)


def solved(source: Path, out: Path) -> float:
    """Trace and solve a 70B Llama of 80 layers on the meta device; returns when that began."""
    del source, out
    from transformers import LlamaConfig, LlamaForCausalLM

    import spacompiler

    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                         num_attention_heads=64, num_key_value_heads=8, vocab_size=VOCABULARY)
    with torch.device("meta"):
        module = LlamaForCausalLM(config).eval()
    start = spent()
    spacompiler.inspect(module, {"input_ids": torch.zeros(2, 9, dtype=torch.long),
                                 "use_cache": False})
    return start


WAYS: dict[str, Callable[[Path, Path], float | None]] = {
    "plain": plain, "forward": forward, "compiled": compiled, "solved": solved,
    "defaults": defaults}


# --- running them ---------------------------------------------------------------------------------


def spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def one(way: str, source: Path, out: Path) -> dict[str, float]:
    """Carry out one way in this process; what it took."""
    if way in ("compiled", "defaults"):
        import transformers.models.llama.modeling_llama  # noqa: F401

        import spacompiler.artifact.write  # noqa: F401
    if way == "defaults":
        for name in LIBRARIES:
            import_module(name)
    start = spent()
    with torch.no_grad():
        start = WAYS[way](source, out) or start
    return {"work": spent() - start, "all": spent(),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


@cache
def installed(code: Path) -> Path:
    """Copy the package of a checkout, with its bytecode, to a folder of its own."""
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place)
    shutil.copytree(code / "spacompiler", place / "spacompiler")
    compile_dir(place, quiet=2)
    return place


def run(way: str, source: Path, code: Path) -> dict[str, float]:
    """Carry out one way in a process of its own, with the package of a checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(installed(code))}
    with tempfile.TemporaryDirectory(dir=source.parent if source.is_dir() else None) as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--one", way, str(source), str(Path(folder) / "out")],
            capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if way == "defaults":
        print(code.name, done.stderr.splitlines()[-1], found, flush=True)
    return found


def table(source: Path, turns: int, before: Path | None) -> None:
    """Print a row for each way, and the ratios."""
    here = Path(__file__).resolve().parents[1]
    ways = {"plain stream": ("plain", here), "float32 forward": ("forward", here),
            "compile": ("compiled", here)}
    if "@" in str(source):
        ways = {"compile": ("defaults", here)}
    if before is not None:
        ways["compile, before"] = (ways["compile"][0], before.resolve())
    best: dict[str, dict[str, float]] = {}
    for _ in range(turns):
        for name, (way, code) in ways.items():
            found = run(way, source, code)
            known = best.setdefault(name, found)
            best[name] = {key: min(value, known[key]) for key, value in found.items()}
    print("| | CPU s, the work | with imports | peak RSS MB |\n|---|---|---|---|")
    for name, row in best.items():
        print(f"| {name} | {row['work']:.1f} | {row['all']:.1f} | {row['memory']:.0f} |")
    if "plain stream" in best:
        limit = best["plain stream"]["work"] + best["float32 forward"]["work"]
        print(f"\ncompile / (plain stream + forward): {best['compile']['work'] / limit:.2f} of CPU")
    if before is not None:
        old, new = best["compile, before"], best["compile"]
        print(f"compile / before: {new['work'] / old['work']:.2f} of CPU, with imports "
              f"{new['all'] / old['all']:.2f}, {new['memory'] / old['memory']:.2f} of memory")


def traced(turns: int, before: Path | None) -> None:
    """Print what tracing and solving takes here and at another commit: the least of the turns."""
    codes = {"here": Path(__file__).resolve().parents[1]}
    if before is not None:
        codes["before"] = before.resolve()
    nowhere, spent = Path(tempfile.gettempdir()) / "none", dict[str, float]()
    for _ in range(turns):
        for name, code in codes.items():
            found = run("solved", nowhere, code)["work"]
            spent[name] = min(found, spent.get(name, found))
    print(", ".join(f"{name} {seconds:.2f} CPU s" for name, seconds in spent.items()))
    if before is not None:
        print(f"here / before: {spent['here'] / spent['before']:.3f}")


def main() -> int:
    """Make a checkpoint, measure, and remove it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.4B")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made and kept")
    parser.add_argument("--meta", action="store_true", help="trace and solve 80 layers of a 70B")
    parser.add_argument("--defaults", metavar="MODEL", help="compile this as typed without options")
    parser.add_argument("--target", default="body=75%", help="of --defaults")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one[0], Path(asked.one[1]), Path(asked.one[2]))))
        return 0
    if asked.defaults:
        table(Path(f"{asked.defaults}@{asked.target}"), asked.turns, asked.before)
        return 0
    if asked.meta:
        traced(asked.turns, asked.before)
        return 0
    place = asked.folder or Path(tempfile.mkdtemp())
    source = place / asked.size
    try:
        if not (source / INDEX).exists():
            make(source, asked.size)
        table(source, asked.turns, asked.before)
    finally:
        if asked.folder is None:
            shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
