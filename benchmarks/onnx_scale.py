"""What an ONNX file costs as its nodes grow: reading, solving, and a whole compile.

    python benchmarks/onnx_scale.py                     # chains, residual networks, transformers
    python benchmarks/onnx_scale.py --kinds chain --sizes 1000 10000
    python benchmarks/onnx_scale.py --kinds resnet --before ../checkout-of-another-commit
    python benchmarks/onnx_scale.py --large 2           # a file of 2 GB, its arrays beside it

Each file is generated with so many nodes and little else: narrow layers, so that the work is that
of the graph. In a process of its own, with one thread, run: `open`, `trace` and `solve`, and
`compile(target="params=70%", importance="wanda")` with its proof and its checks, without latency.
Cells: CPU seconds (solving: the least of three times), and the largest resident memory in MB.

A large file is one of wide linear layers with external data; it is compiled by
`importance="magnitude"`, proved in float64, and its peak memory is compared with its size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZES = (1000, 2000, 4000, 10000)
COLUMNS = ("open", "trace", "solve", "compile", "memory")
REPEATS = 3


class Builder:
    """Writes nodes one after the other; every value and array gets a name of its own."""

    def __init__(self, shape: tuple[object, ...]) -> None:
        self.shape = shape
        self.draws = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: list[onnx.TensorProto] = []

    def fixed(self, array: Any) -> str:
        """Store an array."""
        self.arrays.append(numpy_helper.from_array(np.asarray(array), f"w{len(self.arrays)}"))
        return self.arrays[-1].name

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        """Store random numbers that multiply the size of what they are given by `scale`."""
        fan = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        array = self.draws.standard_normal(shape) * (scale / fan**0.5)
        return self.fixed(array.astype(np.float32))

    def gains(self, width: int) -> str:
        """Store numbers about one."""
        return self.fixed(self.draws.uniform(0.5, 1.5, width).astype(np.float32))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; returns its result."""
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], f"n{len(self.nodes)}",
                                           **attributes))
        return out

    def model(self, out: str) -> onnx.ModelProto:
        """Return the file with one input and one result of the same shape."""
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, self.shape)], self.arrays)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def chain(nodes: int) -> onnx.ModelProto:
    """Products, biases and nonlinearities, added to one stream: a bare chain goes out."""
    b, x, small = Builder(("N", 16)), "x", 0.1
    while len(b.nodes) < nodes - 1:
        y = b.op("Relu", b.op("Add", b.op("MatMul", x, b.weight(16, 16)), b.gains(16)))
        x = b.op("Add", x, b.op("MatMul", y, b.weight(16, 16, scale=small)))
    return b.model(b.op("MatMul", x, b.weight(16, 16)))


def resnet(nodes: int) -> onnx.ModelProto:
    """Blocks of two convolutions with batch norms, on one stream."""
    b = Builder(("N", 8, 4, 4))

    def conv(x: str) -> str:
        y = b.op("Conv", x, b.weight(8, 8, 3, 3), pads=[1] * 4)
        zeros = b.fixed(b.draws.standard_normal(8).astype(np.float32) / 4)
        return b.op("BatchNormalization", y, b.gains(8), zeros, zeros, b.gains(8))

    x = conv("x")
    while len(b.nodes) < nodes - 1:
        y = b.op("Mul", conv(b.op("Relu", conv(x))), b.fixed(np.float32(0.1)))
        x = b.op("Relu", b.op("Add", x, y))
    return b.model(b.op("Conv", x, b.weight(8, 8, 1, 1)))


def transformer(nodes: int) -> onnx.ModelProto:
    """Attention and two linear layers, on one stream; heads are cut out by shared constants."""
    b, width, heads = Builder(("N", 4, 16)), 16, 4
    split, join = b.fixed([0, 0, heads, width // heads]), b.fixed([0, 0, width])
    scale, small = b.fixed(np.float32(0.5)), b.fixed(np.float32(0.1))

    def normal(x: str) -> str:
        return b.op("LayerNormalization", x, b.gains(width), b.gains(width))

    def linear(x: str, i: int, o: int) -> str:
        return b.op("Add", b.op("MatMul", x, b.weight(i, o)), b.gains(o))

    def by_head(x: str, order: list[int]) -> str:
        return b.op("Transpose", b.op("Reshape", linear(x, width, width), split), perm=order)

    x = linear("x", width, width)
    while len(b.nodes) < nodes - 2:
        y = normal(x)
        q, k, v = (by_head(y, order) for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
        weights = b.op("Softmax", b.op("Mul", b.op("MatMul", q, k), scale), axis=-1)
        mixed = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        x = b.op("Add", x, b.op("Mul", linear(b.op("Reshape", mixed, join), width, width), small))
        inner = b.op("Relu", linear(normal(x), width, 32))
        x = b.op("Add", x, b.op("Mul", linear(inner, 32, width), small))
    return b.model(linear(x, width, width))


KINDS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "chain": chain, "resnet": resnet, "transformer": transformer}


def write_large(folder: Path, size: float) -> Path:
    """Write a file of residual blocks of about `size` GB, an array at a time."""
    width, inner = 2048, 8192
    shape, draws = ("N", width), np.random.default_rng(0)
    arrays, nodes, x, at = [], [], "x", 0
    with (folder / "model.data").open("wb") as data:
        for block in range(max(1, round(size * 2**30 / (8 * width * inner)))):
            for name, sizes in (("up", (width, inner)), ("down", (inner, width))):
                array = draws.standard_normal(sizes, np.float32)
                array *= np.float32((0.3 if name == "down" else 1.0) / sizes[0] ** 0.5)
                data.write(array)
                arrays.append(TensorProto(
                    name=f"{name}{block}", data_type=TensorProto.FLOAT, dims=sizes,
                    data_location=TensorProto.EXTERNAL))
                for key, value in (("location", "model.data"), ("offset", at),
                                   ("length", array.nbytes)):
                    arrays[-1].external_data.add(key=key, value=str(value))
                at += array.nbytes
            nodes += [helper.make_node("MatMul", [x, f"up{block}"], [f"u{block}"]),
                      helper.make_node("Relu", [f"u{block}"], [f"r{block}"]),
                      helper.make_node("MatMul", [f"r{block}", f"down{block}"], [f"d{block}"]),
                      helper.make_node("Add", [x, f"d{block}"], [f"s{block}"])]
            x = f"s{block}"
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", x)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], arrays)
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString())
    return path


def large(path: Path) -> dict[str, Any]:
    """Compile a large file in this process: CPU seconds, peak memory, and how it was proved."""
    import torch

    import spacompiler

    torch.set_num_threads(1)
    size = sum(p.stat().st_size for p in path.parent.iterdir()) / 2**20
    start = time.process_time()
    result = spacompiler.compile(str(path), target="params=70%", importance="magnitude",
                                 latency=False, out=path.parent / "out")
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"MB": round(size), "CPU s": round(seconds, 1), "peak MB": round(peak),
            "peak / file": round(peak / size, 2), "proof": str(result.report["proof"])[:300]}


def one(path: Path, profile: str) -> dict[str, float]:
    """Open, trace, solve and compile a file in this process; what each took."""
    import torch

    import spacompiler
    from spacompiler.groups.solution import solve
    from spacompiler.onnx_backend.read.file import open_model
    from spacompiler.onnx_backend.read.lower import trace
    from spacompiler.rows.onnx_table import TABLE

    torch.set_num_threads(1)
    found, start = {}, time.process_time()

    def lap(name: str) -> None:
        nonlocal start
        now = time.process_time()
        found[name] = min(found.get(name, now - start), now - start)
        start = time.process_time()

    file = open_model(path)
    lap("open")
    traced = trace(file)
    lap("trace")
    for _ in range(REPEATS):
        solve(traced.graph, TABLE)
        lap("solve")

    def compiled() -> None:
        spacompiler.compile(str(path), target="params=70%", importance="wanda", align=1,
                            latency=False, out=path.parent / "out")

    if profile:
        _profiled(compiled, profile)
    else:
        start = time.process_time()
        compiled()
        lap("compile")
    return {**found, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _profiled(work: Callable[[], None], place: str) -> None:
    import cProfile

    profile = cProfile.Profile()
    profile.runcall(work)
    profile.dump_stats(place)


def run(path: Path, code: Path, *more: str) -> dict[str, Any]:
    """Measure a file with the package of a checkout, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    done = subprocess.run([sys.executable, __file__, "--one", str(path), *more],
                          capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(kind: str, name: str, sizes: list[int], code: Path, profile: str) -> None:
    """Print a row for each size of a kind, and how much more the last took than the first."""
    rows = []
    for nodes in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(KINDS[kind](nodes), path)
            rows.append(run(path, code, profile))
        cells = [f"{rows[-1].get(c, 0):.{0 if c == 'memory' else 2}f}" for c in COLUMNS]
        print(f"| {kind}{name} | {nodes} | {' | '.join(cells)} |", flush=True)
    times = [f"{rows[-1].get(c, 0) / (rows[0].get(c) or 1):.1f}" for c in COLUMNS]
    print(f"| {kind}{name} | {sizes[-1]} / {sizes[0]} | {' | '.join(times)} |", flush=True)


def main() -> int:
    """Print a row for each kind and size, and how much more the largest took than the smallest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--profile", default="", help="write a profile of the compiles here")
    parser.add_argument("--large", type=float, help="GB of a file of wide layers, and nothing else")
    parser.add_argument("--folder", type=Path, help="where the large file is made for the while")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        path, what = Path(asked.one[0]), asked.one[1]
        print(json.dumps(large(path) if what == "large" else one(path, what)))
        return 0
    codes = {"": Path(__file__).resolve().parents[1]}
    if asked.before is not None:
        codes[" before"] = asked.before.resolve()
    if asked.large:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            path = write_large(Path(folder), asked.large)
            for name, code in codes.items():
                print(f"large{name}", run(path, code, "large"), flush=True)
        return 0
    print("| file | nodes | " + " | ".join(COLUMNS) + " |\n" + "|---" * 7 + "|", flush=True)
    for kind in asked.kinds:
        for name, code in codes.items():
            table(kind, name, asked.sizes, code, asked.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
