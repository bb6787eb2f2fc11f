"""ONNX files: what the table says holds on ONNX's own node tests, models in text are pruned and
proved, torch and ONNX give one IR, and hostile files end in one error."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

import spacompiler
from spacompiler import api, models_zoo
from spacompiler.cli.main import app
from spacompiler.deploy.export import export_onnx
from spacompiler.deploy.inputs import axis_names
from spacompiler.errors import ControlError, ProofError, SpaError, TargetError, UsageError
from spacompiler.groups.solution import Solution, solve
from spacompiler.onnx_backend import backend as onnx_backend
from spacompiler.onnx_backend.read.file import open_model
from spacompiler.onnx_backend.read.lower import trace
from spacompiler.onnx_backend.run import double as onnx_double
from spacompiler.onnx_backend.run import observe
from spacompiler.onnx_backend.run.observe import fresh_context
from spacompiler.onnx_backend.run.session import Session
from spacompiler.rows import aten_table as aten
from spacompiler.rows import onnx_table as onnx_ops
from spacompiler.torch_backend.emit.program import rewrite as rewrite_program
from spacompiler.torch_backend.read import export as torch_export

RNG = np.random.default_rng(0)


def weights(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Add seeded initialisers (a name ending in `s_` is positive, as a scale is)."""
    for name, shape in shapes.items():
        array = RNG.standard_normal(shape).astype(np.float32)
        array = np.abs(array) + 0.1 if name.endswith("s_") else array
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def numbers(model: onnx.ModelProto, **arrays: Any) -> onnx.ModelProto:
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def parsed(text: str, opset: int = 18) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')


# --- models in text ---------------------------------------------------------------------------


def conv_pair() -> onnx.ModelProto:
    return weights(parsed("""m (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
        a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        h = Relu(a)
        y = Conv<pads=[1,1,1,1]>(h, w2)
    }"""), w1=(64, 3, 3, 3), b1=(64,), w2=(4, 64, 3, 3))


def reshape_computed() -> onnx.ModelProto:
    """Heads by Concat(Shape..., constants): only the constants may change."""
    model = weights(parsed("""m (float[N, T, 12] x) => (float[N, T, 12] y) {
        q = MatMul(x, wq)
        s = Shape(x)
        n = Gather(s, zero)
        t = Gather(s, one)
        n1 = Unsqueeze(n, axis)
        t1 = Unsqueeze(t, axis)
        heads = Concat<axis=0>(n1, t1, h, d)
        q4 = Reshape(q, heads)
        qt = Transpose<perm=[0,2,1,3]>(q4)
        r = Relu(qt)
        back = Transpose<perm=[0,2,1,3]>(r)
        flat = Concat<axis=0>(n1, t1, all)
        o = Reshape(back, flat)
        y = MatMul(o, wo)
    }"""), wq=(12, 96), wo=(96, 12))
    return numbers(model, zero=np.int64(0), one=np.int64(1), axis=[0], h=[24], d=[4], all=[96])


def split_implied() -> onnx.ModelProto:
    return weights(parsed("""m (float[N, 6] x) => (float[N, 5] y) {
        a = MatMul(x, w1)
        l, r = Split<axis=1, num_outputs=2>(a)
        g = Sigmoid(l)
        p = Mul(g, r)
        y = MatMul(p, w2)
    }"""), w1=(6, 128), w2=(64, 5))


def quantised() -> onnx.ModelProto:
    """Weights of eight bits, a scale and zero point for each output channel."""
    model = weights(parsed("""m (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
        w1 = DequantizeLinear<axis=0>(q1, s_, z)
        a = Conv<pads=[1,1,1,1]>(x, w1)
        h = Relu(a)
        y = Conv<pads=[1,1,1,1]>(h, w2)
    }"""), s_=(64,), w2=(4, 64, 3, 3))
    return numbers(model, q1=RNG.integers(-9, 9, (64, 3, 3, 3)).astype(np.int8),
                   z=np.zeros(64, np.int8))


def recurrent() -> onnx.ModelProto:
    return numbers(weights(parsed("""m (float[5, N, 6] x) => (float[5, N, 3] y) {
        all, last = LSTM<hidden_size=64>(x, w, r, b)
        one = Squeeze(all, axis)
        y = MatMul(one, wo)
    }"""), w=(1, 256, 6), r=(1, 256, 64), b=(1, 512), wo=(64, 3)), axis=[1])


def rms_norm() -> onnx.ModelProto:
    """A decomposed RMSNorm over a hidden axis: exact, gain and eps corrected."""
    return numbers(weights(parsed("""m (float[N, 6] x) => (float[N, 5] y) {
        h = MatMul(x, w1)
        sq = Pow(h, two)
        m = ReduceMean<keepdims=1>(sq, axes)
        e = Add(m, eps)
        s = Sqrt(e)
        r = Div(h, s)
        g = Mul(r, gain)
        y = MatMul(g, w2)
    }"""), w1=(6, 64), gain=(64,), w2=(64, 5)), two=np.float32(2), axes=[-1],
        eps=np.float32(1e-5))


def fills() -> onnx.ModelProto:
    """Weights that are no initialisers: a constant fill, a transposed and a cast array."""
    return numbers(weights(parsed("""m (float[N, 6] x) => (float[N, 5] y) {
        w1 = ConstantOfShape<value = float[1] {0.5}>(shape)
        a = MatMul(x, w1)
        b = Add(a, bias)
        t = Transpose<perm=[1,0]>(w2)
        i = Identity(t)
        h = Relu(b)
        y = MatMul(h, i)
    }"""), bias=(64,), w2=(5, 64)), shape=[6, 64])


def branches() -> onnx.ModelProto:
    """An If whose branches are entered."""
    return weights(parsed("""m (float[N, 6] x, bool c) => (float[N, 5] y) {
        a = MatMul(x, w1)
        h = If (c) <then_branch = t () => (float[N, 64] p) { p = Relu(a) },
                    else_branch = e () => (float[N, 64] q) { q = Tanh(a) }>
        y = MatMul(h, w2)
    }"""), w1=(6, 64), w2=(64, 5))


def old_softmax() -> onnx.ModelProto:
    return weights(parsed("""m (float[N, 6] x) => (float[N, 16] y) {
        a = Gemm<transB=1>(x, w1, b1)
        d = Dropout(a)
        u = Unsqueeze<axes=[1]>(d)
        q = Squeeze<axes=[1]>(u)
        y0 = Gemm(q, w2)
        y = Softmax(y0)
    }""", 11), w1=(24, 6), b1=(24,), w2=(24, 16))


def scale_of_shape() -> onnx.ModelProto:
    """The softmax scale is computed from a size that shrinks: it must stay what it was."""
    return numbers(weights(parsed("""m (float[N, 4, 6] x) => (float[N, 4, 5] y) {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        s = Shape(q)
        d = Gather(s, two)
        f = Cast<to=1>(d)
        r = Sqrt(f)
        kt = Transpose<perm=[0,2,1]>(k)
        p = MatMul(q, kt)
        z = Div(p, r)
        a = Softmax<axis=-1>(z)
        v = MatMul(x, wv)
        o = MatMul(a, v)
        y = MatMul(o, wo)
    }"""), wq=(6, 64), wk=(6, 64), wv=(6, 64), wo=(64, 5)), two=np.int64(2))


# text -> role that goes, and arrays that must have shrunk
MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str, tuple[str, ...]]] = {
    "conv": (conv_pair, "channel", ("w1", "b1", "w2")),
    "computed reshape": (reshape_computed, "channel", ("wq", "wo")),
    "implied split": (split_implied, "channel", ("w1", "w2")),
    "eight bits": (quantised, "channel", ("q1", "s_", "z", "w2")),
    "lstm": (recurrent, "channel", ("w", "r", "b", "wo")),
    "rms norm": (rms_norm, "hidden", ("w1", "gain", "w2")),
    "fills": (fills, "channel", ("w1", "bias", "w2")),
    "branches": (branches, "channel", ("w1", "w2")),
    "opset 11": (old_softmax, "channel", ("w1", "b1", "w2")),
    "scale of a size": (scale_of_shape, "head dim", ("wq", "wk")),
}


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def compiled(path: Path, out: Path | None = None, **options: Any) -> api.Result:
    return api.compile(str(path), target="params=70%", importance="magnitude", out=out, align=1,
                       **{"latency": False, **options})


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_text_is_pruned_and_proved(name: str, tmp_path: Path) -> None:
    make, role, arrays = MODELS[name]
    path = saved(make(), tmp_path)
    result = compiled(path, tmp_path / "out", roles=(role,))
    assert {w["array"] for w in result.report["widths"]} == set(arrays)
    written = onnx.load(tmp_path / "out/model.onnx")
    assert written.opset_import == onnx.load(path).opset_import
    names = [n.op_type for n in onnx.load(path).graph.node if n.op_type != "Constant"]
    assert {n.op_type for n in written.graph.node} <= {*names, "Mul", "Div"}
    assert [i.name for i in written.graph.input] == [i.name for i in onnx.load(path).graph.input]
    checks = spacompiler.verify(tmp_path / "out", str(path))
    assert all(c.passed for c in checks), checks


def test_sizes_that_vary_stay_in_the_file(tmp_path: Path) -> None:
    result = compiled(saved(reshape_computed(), tmp_path), tmp_path / "out")
    assert result.report["onnx"], "the file ran at no other size than the traced one"
    shapes = onnx.load(tmp_path / "out/model.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shapes.dim] == ["N", "T", 12]


def test_a_wrong_index_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spacompiler.onnx_backend import prove as onnx_proof
    from spacompiler.onnx_backend.emit import rewrite
    from spacompiler.stages.proof import swap

    def wrong(trace: Any, solution: Solution, choices: Any, given: Any = None,
              **options: Any) -> ir.Model:
        _, bad = swap(lambda n: torch.from_numpy(np.array(trace.stored(n))), solution, choices, 0)
        return rewrite(trace, solution, choices, given or bad, **options)

    monkeypatch.setattr(onnx_proof, "rewrite", wrong)
    with pytest.raises(ProofError, match="not the masked dense model"):
        compiled(saved(conv_pair(), tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- every operator ---------------------------------------------------------------------------


def benchmark(name: str = "onnx_ops") -> ModuleType:
    place = Path(__file__).parents[2] / f"benchmarks/{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_slicing_commutes_with_every_operator(tmp_path: Path) -> None:
    """ONNX's own node tests, their inputs as stored arrays."""
    bench = benchmark()
    assert set(bench.LISTED) <= onnx_ops.OPS.keys()
    found = bench.property_of_rows(tmp_path / "model.onnx", expanded=False)
    assert found["slicing commutes"] > 450
    assert found["differs"] == found["crashed"] == 0, found


WINDOW = {"kernel_shape": [3, 2]}
KERNELS: list[tuple[str, int, dict[str, Any]]] = [
    *((op, opset, {} if axis is None else {"axis": axis})
      for op in ("Softmax", "LogSoftmax") for opset in (11, 13) for axis in (None, 0, 1, -2)),
    *((op, 11, {**WINDOW, **more}) for op in ("AveragePool", "MaxPool") for more in (
        {}, {"strides": [2, 1], "pads": [1, 0, 2, 1]}, {"auto_pad": "SAME_UPPER"},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, {"auto_pad": "VALID"})),
    ("AveragePool", 11, {**WINDOW, "pads": [1, 0, 2, 1], "count_include_pad": 1}),
    ("MaxPool", 11, {**WINDOW, "dilations": [2, 1]}),
]


def test_kernels_of_the_proof_are_those_of_onnx_runtime() -> None:
    """Old Softmax included: ONNX's reference implementation has only that of opset 13."""
    x = RNG.standard_normal((2, 3, 7, 5)).astype(np.float32)
    for op, opset, attributes in KERNELS:
        model = parsed("m (float[2, 3, 7, 5] x) => (float[A, B, C, D] y) { y = Relu(x) }", opset)
        model.graph.node[0].CopyFrom(onnx.helper.make_node(op, ["x"], ["y"], **attributes))
        read = ir.from_proto(model)
        want, = Session(read).run({"x": x})
        got, = onnx_double.evaluate(read, {"x": x})
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"{op} {opset} {attributes}")


# --- whole files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_a_light_model_is_pruned_and_proved(name: str, tmp_path: Path) -> None:
    bench = benchmark("onnx_files")
    light = Path(onnx.__file__).parent / f"backend/test/data/light/light_{name}.onnx"
    kind, what = bench.one(bench.randomised(light, tmp_path), 70)
    assert (kind, what[:6]) == ("pruned", "70.0% "), what


def test_an_uncaught_control_is_a_refusal(tmp_path: Path) -> None:
    model = conv_pair()  # its result is taken from itself: no weight matters, however drawn
    last = model.graph.node[-1]
    result, last.output[0] = last.output[0], "computed"
    model.graph.node.append(onnx.helper.make_node("Sub", ["computed", "computed"], [result]))
    with pytest.raises(ControlError, match="control was not caught"):
        compiled(saved(model, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert benchmark("onnx_files").one(tmp_path / "model.onnx", 70)[0] == "refused"


# --- one IR -----------------------------------------------------------------------------------


def structure(solution: Solution) -> list[Any]:
    """Groups up to names: size, what they are fibred under, how many products they lie in."""
    return sorted((g.size, tuple(o.size for o in g.outers), sum(m.role != "carrier"
                   for m in g.members)) for g in solution.groups.values() if not g.approximate)


@pytest.mark.parametrize("name", ["resnet", "shufflenet", "grouped-conv", "llama-gqa", "bert"])
def test_torch_and_onnx_give_equal_groups(name: str, tmp_path: Path) -> None:
    module, inputs = models_zoo.load(name).build()
    traced = torch_export.trace(module, inputs)
    solution = solve(traced.graph, aten.TABLE)
    export_onnx(rewrite_program(traced, solution, {}), tmp_path / "m.onnx",
                input_names=traced.graph.inputs, axes=axis_names(traced))
    other = trace(open_model(tmp_path / "m.onnx"))
    assert structure(solve(other.graph, onnx_ops.TABLE)) == structure(solution)


@pytest.mark.parametrize("importance", ["wanda", "fluctuation", "obs(damping=0.1)"])
def test_statistics_are_those_of_torch(importance: str, tmp_path: Path) -> None:
    """Forward-only criteria score alike, from batches in .npz files.

    Of few batches, the inverses of covariances need damping: without, they show each rounding.
    """
    torch.manual_seed(0)
    module, inputs = models_zoo.load("vgg").build()
    traced = torch_export.trace(module, inputs)
    path = tmp_path / "m.onnx"
    export_onnx(traced.program, path, input_names=["x"], axes={"x": {0: "batch"}})
    batches = [torch.randn(3, *inputs[0].shape[1:]) for _ in range(2)]
    (tmp_path / "data").mkdir()
    for i, batch in enumerate(batches):
        np.savez(tmp_path / f"data/{i}.npz", x=batch.numpy())
    options: dict[str, Any] = {"target": "params=70%", "importance": importance, "align": 1,
                               "dry_run": True}
    one = api.compile(module, inputs, calibration=[(b,) for b in batches], **options)
    other = api.compile(str(path), calibration=str(tmp_path / "data"), **options)
    assert one.job.scores.keys() == other.job.scores.keys()
    for name, scores in one.job.scores.items():
        np.testing.assert_allclose(other.job.scores[name], scores, rtol=1e-3)


def test_streaming_gives_the_same_statistics_and_drops_them(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "EXPOSED", 1)
    module, inputs = models_zoo.load("vgg").build()
    export_onnx(torch_export.trace(module, inputs).program, tmp_path / "m.onnx",
                input_names=["x"], axes={})
    traced, solution = onnx_backend.analyse(open_model(tmp_path / "m.onnx"), None)
    whole, streamed = (fresh_context(traced, solution) for _ in range(2))
    groups, batches = list(solution.groups.values()), [((), {})]
    whole.calibrate(("covariance",), batches, None, groups=groups)
    held = []
    for group in streamed.stream(("covariance",), batches, groups):
        held.append(len(streamed._inputs))
        for a, b in zip(whole.consumers(group), streamed.consumers(group), strict=True):
            assert torch.equal(a.covariance.gram, b.covariance.gram)
    assert len(held) == len(groups) > 2
    assert held == sorted(held, reverse=True) and held[-1] == 1 and not streamed._inputs


# --- errors -----------------------------------------------------------------------------------


def external(location: str, length: int = 64 * 27 * 4) -> onnx.ModelProto:
    model = conv_pair()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model


def cyclic() -> onnx.ModelProto:
    model = conv_pair()
    model.graph.node[1].input[0] = "y"
    return model


def absurd() -> onnx.ModelProto:
    model = conv_pair()
    model.graph.initializer[0].dims[0] = 2**60
    return model


def newer() -> onnx.ModelProto:
    model = conv_pair()
    model.opset_import[0].version = 999
    return model


def not_finite() -> onnx.ModelProto:
    model = conv_pair()
    array = numpy_helper.to_array(model.graph.initializer[0]).copy()
    array[0] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w1"))
    return model


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no ONNX operators|cannot be read|no valid"),
    "text": (lambda: b"hello, this is no model at all", "cannot be read"),
    "truncated": (lambda: conv_pair().SerializeToString()[:-300], "cannot be read|no valid"),
    "a cycle": (lambda: cyclic().SerializeToString(), "no valid ONNX model"),
    "absurd dims": (lambda: absurd().SerializeToString(), "absurd shape"),
    "a newer opset": (lambda: newer().SerializeToString(), "needs opset 999"),
    "not finite": (lambda: not_finite().SerializeToString(), "NaN or infinity"),
    "data above the folder": (lambda: external("../secret.bin").SerializeToString(),
                              "outside the model's folder"),
    "data at an absolute path": (lambda: external("/etc/passwd").SerializeToString(),
                                 "outside the model's folder"),
    "data missing": (lambda: external("none.bin").SerializeToString(), "is missing"),
    "data short": (lambda: external("short.bin").SerializeToString(), "too short"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_ends_in_one_error(name: str, tmp_path: Path) -> None:
    make, message = HOSTILE[name]
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64 * 27 * 4))
    (folder / "short.bin").write_bytes(bytes(100))
    (folder / "model.onnx").write_bytes(make())
    with pytest.raises(SpaError, match=message):
        compiled(folder / "model.onnx", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "secret.bin"]


def test_a_criterion_of_gradients_names_those_that_do_without(tmp_path: Path) -> None:
    path = saved(conv_pair(), tmp_path)
    with pytest.raises(UsageError, match="no gradients") as caught:
        api.compile(str(path), target="params=70%", importance="taylor")
    assert "magnitude" in caught.value.fix and "wanda" in caught.value.fix
    assert "taylor" not in caught.value.fix


def test_nothing_to_prune_says_why(tmp_path: Path) -> None:
    model = weights(parsed("m (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }"), w=(6, 5))
    with pytest.raises(TargetError, match="nothing to prune"):
        compiled(saved(model, tmp_path))


def test_the_command_line_reads_files(tmp_path: Path) -> None:
    path, out = saved(conv_pair(), tmp_path), tmp_path / "out"
    run = CliRunner().invoke
    shown = run(app, ["inspect", str(path), "--json"])
    assert [g["size"] for g in json.loads(shown.stdout)["groups"]] == [64]
    made = run(app, ["compile", str(path), "--target", "params=70%", "--importance", "magnitude",
                     "--align", "1", "--no-latency", "--out", str(out), "--json"])
    assert made.exit_code == 0, made.output
    assert run(app, ["verify", str(out), "--source", str(path)]).exit_code == 0
    assert run(app, ["verify", str(out)]).exit_code == 3  # it does not know where the source lies
    module = spacompiler.load(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = module(torch.zeros(5, 3, 8, 8))
    assert result.shape == (5, 4, 8, 8)

