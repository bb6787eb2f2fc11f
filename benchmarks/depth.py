"""A Llama of 70 billion parameters on the meta device, at 10, 20, 40 and 80 layers.

    python benchmarks/depth.py

Tracing and solving look at shapes only, so no weight is ever made. Each depth has a process of
its own. Seconds are CPU seconds (solving: the best of three); memory is the process's peak, of
which torch and transformers take some 370 MB before anything is traced.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch

DEPTHS = (10, 20, 40, 80)
BARS = {"all_s": 60.0, "solve_s": 2.0, "peak_mb": 2048.0}


def measure(depth: int) -> dict[str, float]:
    """Trace and solve one depth of the 70B shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from spacompiler.groups.solution import solve
    from spacompiler.rows.aten_table import TABLE
    from spacompiler.torch_backend.read.export import trace

    torch.set_num_threads(1)
    with torch.device("meta"):
        module = LlamaForCausalLM(LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=depth,
            num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)).to(torch.bfloat16)
        ids = torch.zeros(2, 9, dtype=torch.long)
    start = time.process_time()
    traced = trace(module, {"input_ids": ids, "use_cache": False})
    middle = time.process_time()
    traced_s, solving = middle - start, []
    for _ in range(3):
        begin = time.process_time()
        solution = solve(traced.graph, TABLE)
        solving.append(time.process_time() - begin)
    return {"layers": depth, "parameters": sum(p.numel() for p in module.parameters()),
            "groups": len(solution.groups), "trace_s": traced_s, "solve_s": min(solving),
            "all_s": traced_s + min(solving),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _row(values: dict[str, float]) -> str:
    return (f"| {values['layers']:.0f} | {values['parameters'] / 1e9:.1f} | "
            f"{values['groups']:.0f} | {values['trace_s']:.2f} | {values['solve_s']:.3f} | "
            f"{values['peak_mb']:.0f} |")


def _picture(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3))
    for axis, key in zip(axes, ("trace_s", "solve_s"), strict=True):
        axis.plot([r["layers"] for r in rows], [r[key] for r in rows], marker="o")
        axis.set(xlabel="layers", ylabel=f"{key.removesuffix('_s')}, CPU s", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Print the table and whether the bars hold; draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="write a plot here (.svg or .png)")
    options = parser.parse_args()
    context: Any = multiprocessing.get_context("spawn")
    rows = []
    print("| layers | 10^9 parameters | groups | trace, s | solve, s | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for depth in DEPTHS:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (depth,)))
        print(_row(rows[-1]), flush=True)
    for key, bar in BARS.items():
        print(f"{key} at {DEPTHS[-1]} layers: {rows[-1][key]:.3g} (at most {bar:g})")
    growth = rows[-1]["solve_s"] / rows[-2]["solve_s"]
    print(f"solving 80 layers takes {growth:.2f} times as long as 40")
    if options.picture:
        _picture(rows, options.picture)


if __name__ == "__main__":
    main()
