"""Damaged and hostile ONNX files: each must end in a result or in one clear error.

    python benchmarks/onnx_fuzz.py [--seconds 600] [--seed 0]

Mutates valid files (bytes flipped, cut, doubled; fields of the protobuf set to hostile values) and
compiles each. An exception other than SpaError, or a file outside the output's folder, is a fault.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from spacompiler import api
from spacompiler.errors import SpaError

Random = random.Random


def seeds() -> list[onnx.ModelProto]:
    """Small valid models of several kinds."""
    texts = {
        18: """m (float[N, 3, 8, 8] x) => (float[N, 4] y) {
            a = Conv<pads=[1,1,1,1]>(x, w1, b1)  h = Relu(a)  p = GlobalAveragePool(h)
            f = Flatten(p)  y = Gemm<transB=1>(f, w2) }""",
        13: """m (float[N, T, 12] x) => (float[N, T, 12] y) {
            q = MatMul(x, wq)  s = Shape(x)  z = Constant<value_int=0>()
            n = Gather(s, z)  u = Constant<value_ints=[0]>()  n1 = Unsqueeze(n, u)
            r = Constant<value_ints=[-1, 24, 4]>()  t = Concat<axis=0>(n1, r)
            v = Reshape(q, t)  w = Transpose<perm=[0,2,1,3]>(v)  e = Relu(w)
            k = Transpose<perm=[0,2,1,3]>(e)  d = Constant<value_ints=[0, 0, 96]>()
            o = Reshape(k, d)  y = MatMul(o, wo) }""",
        17: """m (float[N, 6] x, bool c) => (float[N, 5] y) {
            a = MatMul(x, v1)
            h = If (c) <then_branch = t () => (float[N, 64] p) { p = Relu(a) },
                        else_branch = e () => (float[N, 64] q) { q = Tanh(a) }>
            l = LayerNormalization(h, g, g)  y = MatMul(l, v2) }""",
    }
    shapes = {"w1": (64, 3, 3, 3), "b1": (64,), "w2": (4, 64), "wq": (12, 96), "wo": (96, 12),
              "v1": (6, 64), "v2": (64, 5), "g": (64,)}
    rng, made = np.random.default_rng(0), []
    for opset, text in texts.items():
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
        used = {i for n in model.graph.node for i in n.input}
        model.graph.initializer.extend(
            numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n)
            for n, s in shapes.items() if n in used)
        made.append(model)
    return made


# --- mutations of bytes -----------------------------------------------------------------------


def flip(data: bytes, rng: Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.randint(1, 20)):
        made[rng.randrange(len(made))] = rng.randrange(256)
    return bytes(made)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def double(data: bytes, rng: Random) -> bytes:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:b] + data[a:]


# --- mutations of the protobuf ----------------------------------------------------------------

NUMBERS = (-2**63, -1, 0, 1, 2, 7, 2**31, 2**40, 2**62)
PATHS = ("../x.bin", "/etc/passwd", "~/x", "a/../../x", "", ".", "model.onnx", "x\0y")


def dims(model: onnx.ModelProto, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    if tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)


def input_dims(model: onnx.ModelProto, rng: Random) -> None:
    shape = rng.choice(model.graph.input).type.tensor_type.shape.dim
    if shape:
        rng.choice(shape).dim_value = rng.choice(NUMBERS)


def outside(model: onnx.ModelProto, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", rng.choice(PATHS)), ("offset", str(rng.choice(NUMBERS))),
                       ("length", str(rng.choice(NUMBERS)))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def attribute(model: onnx.ModelProto, rng: Random) -> None:
    node = rng.choice(model.graph.node)
    if node.attribute:
        found = rng.choice(node.attribute)
        if found.ints:
            found.ints[rng.randrange(len(found.ints))] = rng.choice(NUMBERS)
        found.i = rng.choice(NUMBERS)


def wire(model: onnx.ModelProto, rng: Random) -> None:
    """Connect an input to any value: cycles, wrong types, missing values."""
    names = [o for n in model.graph.node for o in n.output] + ["", "nothing"]
    node = rng.choice(model.graph.node)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)


def rename(model: onnx.ModelProto, rng: Random) -> None:
    node = rng.choice(model.graph.node)
    node.op_type = rng.choice(["Reshape", "Loop", "Conv", "Nothing", "Split", "", "Scan", "Tile",
                               "Expand", "Pad", "Resize", "LSTM", "Gather", "TopK", "Einsum"])


def values(model: onnx.ModelProto, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, 0, 1e38])
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def kind(model: onnx.ModelProto, rng: Random) -> None:
    rng.choice(model.graph.initializer).data_type = rng.randrange(30)


def version(model: onnx.ModelProto, rng: Random) -> None:
    model.opset_import[0].version = rng.choice(NUMBERS)
    model.ir_version = rng.choice([1, 3, 8, 13, 99])


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (flip, cut, double)
FIELDS = (dims, input_dims, outside, attribute, wire, rename, values, kind, version)


def mutated(model: onnx.ModelProto, rng: Random) -> bytes:
    """One to three mutations of fields, or one of bytes."""
    if rng.random() < 0.3:
        return rng.choice(BYTES)(model.SerializeToString(), rng)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for _ in range(rng.randint(1, 3)):
        try:
            rng.choice(FIELDS)(made, rng)
        except Exception:
            continue  # the protobuf itself refuses
    return made.SerializeToString()


def attempt(data: bytes, folder: Path) -> str:
    """Compile one file; pruned, refused, or the fault."""
    (folder / "in").mkdir()
    (folder / "in/model.onnx").write_bytes(data)
    before = {p.name for p in folder.iterdir()}
    try:
        api.compile(str(folder / "in/model.onnx"), target="params=70%", importance="magnitude",
                    out=folder / "out", align=1, latency=False)
        result = "pruned"
    except SpaError as problem:
        result = "refused: " + re.sub(r"'.*?'|\\[.*?\\]|[\\d.]+%", "…", problem.what)[:40]
    except Exception as problem:
        result = "FAULT " + "".join(traceback.format_exception(problem)[-3:])
    extra = {p.name for p in folder.iterdir()} - before - {"out"}
    shutil.rmtree(folder / "in")
    shutil.rmtree(folder / "out", ignore_errors=True)
    return f"FAULT wrote {extra}" if extra else result


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # ONNX Runtime reports each refusal by itself
    rng, found, models = Random(options.seed), Counter(), seeds()
    folder = Path(tempfile.mkdtemp())
    end, count = time.monotonic() + options.seconds, 0
    while time.monotonic() < end:
        data = mutated(rng.choice(models), rng)
        result = attempt(data, folder)
        count += 1
        if result.startswith("FAULT"):
            place = Path(tempfile.gettempdir()) / f"fuzz-{options.seed}-{count}.onnx"
            place.write_bytes(data)
            print(place, result, flush=True)
            result = "FAULT"
        found[result] += 1
    print(f"{count} files in {options.seconds:.0f} s (seed {options.seed}): "
          f"{dict(found.most_common())}")


if __name__ == "__main__":
    main()
