"""Run in one runtime's own environment: load dense and pruned, compare, time in turn.

    python inside.py NAME JOB.json

The job names files of pairs (dense, pruned), their inputs and what torch or ONNX Runtime computed
for them. One line of JSON an artifact is printed: errors of both, and the ratio of CPU times.
Nothing of spacompiler is imported.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TURNS = 7
SECONDS = 2.0


def onnxruntime(path, feeds):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)


def qdq(path, feeds):
    """Static quantisation with the inputs themselves as calibration data."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(feeds)

        def get_next(self):
            return next(self.left, None)

    place = tempfile.mkdtemp()
    quant_pre_process(path, f"{place}/pre.onnx", skip_symbolic_shape=True)
    quantize_static(f"{place}/pre.onnx", f"{place}/q.onnx", Reader(), quant_format=QuantFormat.QDQ)
    return onnxruntime(f"{place}/q.onnx", feeds)


def reference(path, feeds):
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(path)
    return lambda given: evaluator.run(None, given)


def onnxslim(path, feeds):
    import onnx
    import onnxslim as slim

    place = tempfile.mkdtemp() + "/slim.onnx"
    onnx.save(slim.slim(path), place)
    return onnxruntime(place, feeds)


def onnxsim(path, feeds):
    import onnx
    import onnxsim as sim

    made, good = sim.simplify(onnx.load(path))
    assert good
    place = tempfile.mkdtemp() + "/sim.onnx"
    onnx.save(made, place)
    return onnxruntime(place, feeds)


def openvino(path, feeds):
    import openvino as ov

    compiled = ov.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1,
                                              "INFERENCE_PRECISION_HINT": "f32"})
    return lambda given: [np.array(v) for v in compiled(given).values()]


def nncf(path, feeds):
    import nncf as compression
    import openvino as ov

    model = compression.compress_weights(ov.Core().read_model(path))
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda given: [np.array(v) for v in compiled(given).values()]


def mnn(path, feeds):
    import MNN
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    held = {i.name for i in graph.initializer}
    ins = [i.name for i in graph.input if i.name not in held]
    outs = [o.name for o in graph.output]
    made = tempfile.mkdtemp() + "/m.mnn"
    subprocess.run([sys.executable, "-m", "MNN.tools.mnnconvert", "-f", "ONNX", "--modelFile",
                    path, "--MNNModel", made, "--bizCode", "x"], check=True, capture_output=True)
    net = MNN.nn.load_module_from_file(made, ins, outs)

    def run(given):
        types = {np.dtype("int64"): np.int32}
        fed = []
        for name in ins:
            array = given[name].astype(types.get(given[name].dtype, given[name].dtype))
            kind = MNN.numpy.int32 if array.dtype == np.int32 else MNN.numpy.float32
            var = MNN.expr.const(array.tobytes(), list(array.shape), MNN.expr.NCHW, kind)
            fed.append(var)
        return [np.array(MNN.expr.convert(v, MNN.expr.NCHW).read()) for v in net.forward(fed)]

    return run


def iree(path, feeds):
    import iree.compiler.tools as tools
    import iree.runtime as runtime

    place = tempfile.mkdtemp()
    subprocess.run([sys.executable, "-m", "iree.compiler.tools.import_onnx", path, "-o",
                    f"{place}/m.mlir", "--opset-version", "20"], check=True, capture_output=True)
    binary = tools.compile_file(f"{place}/m.mlir", target_backends=["llvm-cpu"],
                                input_type="onnx",
                                extra_args=["--iree-llvmcpu-target-cpu=host"])
    config = runtime.Config("local-sync")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, binary))
    names = [n for n in context.modules.module.vm_module.function_names if n[0] != "_"]
    entry = context.modules.module[next(n for n in names if not n.endswith("$async"))]

    def run(given):
        got = entry(*given.values())
        return [np.asarray(g) for g in (got if isinstance(got, (list, tuple)) else [got])]

    return run


def tvm(path, feeds):
    import onnx
    import tvm as t
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.load(path)
    built = {}

    def run(given):
        key = tuple(a.shape for a in given.values())
        if key not in built:
            for one in model.graph.input:
                for dim, size in zip(one.type.tensor_type.shape.dim, given[one.name].shape,
                                     strict=True):
                    dim.dim_value = size
            module = from_onnx(model, shape_dict={k: list(a.shape) for k, a in given.items()},
                               keep_params_in_input=False)
            module = relax.transform.DecomposeOpsForInference()(module)
            built[key] = relax.VirtualMachine(t.compile(module, target="llvm"), t.cpu())
        got = built[key]["main"](*(t.runtime.tensor(a) for a in given.values()))
        many = hasattr(got, "__len__") and not hasattr(got, "numpy")
        return [g.numpy() for g in got] if many else [got.numpy()]

    return run


def tinygrad(path, feeds):
    os.environ.setdefault("DEV", "CPU")
    from tinygrad import Tensor
    from tinygrad.nn.onnx import OnnxRunner

    runners = {}  # one keeps to the sizes that it met first

    def run(given):
        key = tuple(a.shape for a in given.values())
        if key not in runners:
            runners[key] = OnnxRunner(path)
        return [v.numpy() for v in
                runners[key]({k: Tensor(a) for k, a in given.items()}).values()]

    return run


def opencv(path, feeds):
    import cv2

    net = cv2.dnn.readNetFromONNX(path)
    cv2.setNumThreads(1)

    def run(given):
        for name, array in given.items():
            net.setInput(array, name)
        got = net.forward(net.getUnconnectedOutLayersNames())
        return list(got) if isinstance(got, (list, tuple)) else [got]

    return run


def tract(path, feeds):
    import tract as t

    model = t.onnx().load(path)
    runnable = (model.into_model() if hasattr(model, "into_model") else model).into_runnable()

    def run(given):
        got = runnable.run([t.Tensor.from_numpy(a) if hasattr(t, "Tensor") else
                            t.Value.from_numpy(a) for a in given.values()])
        return [g.to_numpy() for g in got]

    return run


def ncnn(path, feeds):
    import ncnn as n

    place, first = tempfile.mkdtemp(), feeds[0]
    sizes = [f"[{','.join(map(str, a.shape))}]" + {"f": "f32", "i": "i64"}[a.dtype.kind]
             for a in first.values()]
    subprocess.run(["cp", path, f"{place}/m.onnx"], check=True)
    tool = Path(sys.executable).parent / "pnnx"
    subprocess.run([sys.executable, str(tool), f"{place}/m.onnx", "fp16=0",
                    "inputshape=" + ",".join(sizes)], check=True, capture_output=True, cwd=place)
    net = n.Net()
    net.opt.num_threads, net.opt.use_fp16_storage = 1, False
    assert not net.load_param(f"{place}/m.ncnn.param")
    assert not net.load_model(f"{place}/m.ncnn.bin")

    def run(given):
        arrays = list(given.values())
        rows = []
        for i in range(len(arrays[0])):  # ncnn has no batch
            with net.create_extractor() as extractor:
                for k, array in enumerate(arrays):
                    extractor.input(f"in{k}", n.Mat(np.ascontiguousarray(array[i])).clone())
                rows.append(np.array(extractor.extract("out0")[1]))
        return [np.stack(rows)]

    return run


def onnx2torch(path, feeds):
    import onnx
    import torch

    kinds = torch.library.Library("torchvision", "DEF")  # its own are built for another torch
    kinds.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    kinds.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from onnx2torch import convert

    module = convert(onnx.load(path)).eval()

    def run(given):
        with torch.no_grad():
            got = module(*(torch.from_numpy(a) for a in given.values()))
        return [g.numpy() for g in (got if isinstance(got, (list, tuple)) else [got])]

    return run


OPEN = {f.__name__: f for f in (onnxruntime, qdq, reference, onnxslim, onnxsim, openvino, nncf,
                                mnn, iree, tvm, tinygrad, opencv, tract, ncnn, onnx2torch)}


def loaded(folder, prefix):
    """The sets of arrays that a job stored, in their order."""
    with np.load(folder / f"{prefix}.npz") as held:
        sets = {}
        for key in held.files:
            number, name = key.split("|", 1)
            sets.setdefault(int(number), {})[name] = held[key]
    return [sets[i] for i in sorted(sets)]


def error(got, want):
    """The largest difference over the largest result; infinite where shapes differ."""
    worst = 0.0
    for g, w in zip(got, want, strict=False):
        g = np.asarray(g, np.float64)
        g = g.reshape(w.shape) if g.size == w.size else g
        if g.shape != w.shape:
            return float("inf")
        worst = max(worst, float(np.abs(g - w).max() / (np.abs(w).max() or 1)))
    return worst


def one(name, folder):
    """What came of one pair of files: for each an error by shape, or what it failed with."""
    said, runs, last = {}, {}, {}
    for which in ("dense", "pruned"):
        own = (folder / f"{which}_inputs.npz").exists()
        feeds = loaded(folder, f"{which}_inputs" if own else "inputs")
        last[which] = feeds[-1]
        want = [list(w.values()) for w in loaded(folder, f"{which}_outputs")]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                runs[which] = OPEN[name](str(folder / f"{which}.onnx"), feeds)
                said[which] = [error(runs[which](f), w) for f, w in zip(feeds, want, strict=True)]
        except Exception as problem:
            tail = getattr(problem, "stderr", b"") or b""
            text = str(problem) + " " + (tail.decode() if isinstance(tail, bytes) else str(tail))
            said[which] = f"{type(problem).__name__}: {' '.join(text.split())[-160:]}"
            runs.pop(which, None)
    if len(runs) == 2:
        said["ratio"] = ratio(runs, last)
    return said


def ratio(runs, feeds):
    """CPU time pruned : dense, the median over turns."""
    found, end = [], time.monotonic() + SECONDS
    while len(found) < TURNS and (time.monotonic() < end or len(found) < 3):
        spent = {}
        for which, run in runs.items():
            start = time.process_time()
            run(feeds[which])
            spent[which] = time.process_time() - start
        found.append(spent["pruned"] / max(spent["dense"], 1e-9))
    return float(np.median(found))


def main(name, job):
    for artifact, folder in json.loads(Path(job).read_text()).items():
        print("ROW " + json.dumps({"artifact": artifact, **one(name, Path(folder))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
