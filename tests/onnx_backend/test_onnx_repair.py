"""Repair of ONNX files: least squares known by hand, arrays laid over the file's, proof, verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

import spacompiler
from spacompiler import api
from spacompiler.errors import SpaError, UsageError
from spacompiler.onnx_backend.run.session import Session

RNG = np.random.default_rng(0)
X, MAPS = RNG.standard_normal((400, 6)), RNG.standard_normal((24, 4, 6, 6))
EXACT = "refit(damping=0)"


def model(body: str, x: str, y: str, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A file of a few lines, its arrays seeded."""
    rng = np.random.default_rng(1)
    made = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18]>\nm (float[{x}] x) => (float[{y}] y) {{{body}}}')
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32)
        array = np.abs(array) + 0.5 if name.endswith("_") else array
        made.graph.initializer.append(numpy_helper.from_array(array, name))
    return made


def dense(last: str, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Two products with a tanh between; the second is `last`, of h."""
    return model(f"a = Gemm<transB=1>(x, w1, b1) h = Tanh(a) {last}", "N, 6", "N, 5",
                 w1=(64, 6), b1=(64,), **shapes)


def convolved(last: str, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Two convolutions; the second is `last`, of h."""
    return model(f"a = Conv<pads=[1,1,1,1]>(x, w1, b1) h = Tanh(a) {last}", "N, 4, 6, 6",
                 "N, 6, P, Q", w1=(48, 4, 3, 3), b1=(48,), **shapes)


def compiled(made: onnx.ModelProto, folder: Path, data: np.ndarray | None = None,
             **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    onnx.save(made, folder / "m.onnx")
    batches = None if data is None else [
        {"x": part.astype(np.float32)}
        for part in (data if data.ndim == 3 else np.split(data, 4))]
    return api.compile(str(folder / "m.onnx"), **{
        "target": "params=70%", "importance": "wanda", "align": 1, "latency": False,
        "calibration": batches, **options})


def values(job: Any, *names: str, pruned: bool = True,
           data: np.ndarray = X) -> list[np.ndarray]:
    found = job.pruned if pruned else job.module.model
    return [np.asarray(v, np.float64) for v in Session(found, names).run(
        {"x": data.astype(np.float32)}, list(names))]


def stored(job: Any, name: str) -> np.ndarray:
    return np.asarray(job.pruned.graph.initializers[name].const_value.numpy(), np.float64)


PRODUCTS: dict[str, tuple[Callable[[], onnx.ModelProto], str, bool]] = {
    "Gemm, transposed, with a bias": (
        lambda: dense("y = Gemm<transB=1>(h, w2, b2)", w2=(5, 64), b2=(5,)), "y", True),
    "Gemm without a bias": (lambda: dense("y = Gemm(h, w2)", w2=(64, 5)), "y", False),
    "Gemm that scales": (lambda: dense(
        "y = Gemm<alpha=2.0, beta=2.0>(h, w2, b2)", w2=(64, 5), b2=(5,)), "y", True),
    "Gemm that scales its bias otherwise": (lambda: dense(
        "y = Gemm<alpha=2.0, beta=0.5>(h, w2, b2)", w2=(64, 5), b2=(5,)), "y", False),
    "MatMul": (lambda: dense("y = MatMul(h, w2)", w2=(64, 5)), "y", False),
    "MatMul and Add": (lambda: dense(
        "p = MatMul(h, w2) y = Add(b2, p)", w2=(64, 5), b2=(5,)), "y", True),
    "MatMul whose product is read twice": (lambda: dense(
        "p = MatMul(h, w2) s = Add(p, b2) y = Mul(s, p)", w2=(64, 5), b2=(5,)), "p", False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_stays_is_least_squares(name: str, tmp_path: Path) -> None:
    make, result, free = PRODUCTS[name]
    job = compiled(make(), tmp_path / "f", X, repair=EXACT).job
    (want,) = values(job, result, pruned=False)
    h, got = values(job, "h", result)
    assert h.shape[1] < 64 and job.proof.holds
    known = 0.0 if free or "b2" not in job.trace.graph.tensors or result == "p" else \
        0.5 * stored(job, "b2")
    columns = np.concatenate([h, np.ones((len(h), 1))], 1) if free else h
    best = np.linalg.lstsq(columns, want - known, rcond=None)[0]
    np.testing.assert_allclose(got, columns @ best + known, atol=2e-4)
    assert ("b2" in job.trace.repaired) == free


def test_what_is_added_across_outputs_is_no_bias(tmp_path: Path) -> None:
    made = model("a = MatMul(w1, x) h = Tanh(a) p = MatMul(w2, h) y = Add(p, b2)",
                 "6, 5", "5, 5", w1=(64, 6), w2=(5, 64), b2=(5,))
    data = np.split(RNG.standard_normal((6, 400)), 80, axis=1)
    job = compiled(made, tmp_path / "f", np.stack(data), repair=EXACT).job
    want = [values(job, "p", pruned=False, data=x)[0] for x in data]
    h, got = zip(*(values(job, "h", "p", data=x) for x in data), strict=True)
    columns = np.concatenate(h, 1).T
    best = np.linalg.lstsq(columns, np.concatenate(want, 1).T, rcond=None)[0]
    np.testing.assert_allclose(np.concatenate(got, 1).T, columns @ best, atol=2e-4)
    assert {*job.trace.repaired} == {"w2"}


CONVOLUTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "with a bias": ("y = Conv<pads=[1,1,1,1]>(h, w2, b2)", {"w2": (6, 48, 3, 3), "b2": (6,)},
                    {"padding": 1}),
    "without": ("y = Conv<strides=[2,2]>(h, w2)", {"w2": (6, 48, 1, 1)}, {"stride": 2}),
    "in groups": ("y = Conv<group=2>(h, w2, b2)", {"w2": (6, 24, 3, 3), "b2": (6,)},
                  {"groups": 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_what_a_convolution_misses_is_orthogonal_to_what_it_reads(name: str,
                                                                  tmp_path: Path) -> None:
    last, shapes, window = CONVOLUTIONS[name]
    job = compiled(convolved(last, **shapes), tmp_path / "f", MAPS, repair=EXACT).job
    (want,) = values(job, "y", pruned=False, data=MAPS)
    h, got = values(job, "h", "y", data=MAPS)
    kernel = job.pruned.graph.initializers["w2"].const_value.numpy().shape
    h, want, missed = (torch.from_numpy(a) for a in (h, want, want - got))

    def slope(of: torch.Tensor) -> torch.Tensor:
        return torch.nn.grad.conv2d_weight(h, kernel, of, **window)

    assert h.shape[1] < 48 and missed.square().mean() < want.square().mean() / 2
    assert slope(missed).abs().max() < 1e-4 * slope(want).abs().max()
    if "b2" in shapes:
        assert missed.mean((0, 2, 3)).abs().max() < 1e-5 and "b2" in job.trace.repaired


def test_the_file_keeps_its_arrays_and_the_artifact_is_verified(tmp_path: Path) -> None:
    made = dense("y = Gemm<transB=1>(h, w2, b2)", w2=(5, 64), b2=(5,))
    result = compiled(made, tmp_path / "f", X, out=tmp_path / "out")
    arrays = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    for name, value in result.job.module.model.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), arrays[name])
    assert {*result.job.trace.repaired} == {"w2", "b2"} and result.report["repair"] != "none"
    found = {c.name: c for c in spacompiler.verify(tmp_path / "out", str(tmp_path / "f/m.onnx"))}
    assert all(c.passed for c in found.values())
    assert "2 repaired" in found["plan identity"].detail
    written = ir.load(tmp_path / "out/model.onnx").graph.initializers["w2"].const_value
    np.testing.assert_array_equal(written.numpy(), stored(result.job, "w2").astype(np.float32))


@pytest.mark.parametrize(("importance", "data", "repairs"), [
    ("wanda", X, True), ("wanda", None, False), ("magnitude", X, False)])
def test_repair_goes_by_what_scoring_reads(importance: str, data: Any, repairs: bool,
                                           tmp_path: Path) -> None:
    made = dense("y = MatMul(h, w2)", w2=(64, 5))
    job = compiled(made, tmp_path / "f", data, importance=importance).job
    assert bool(job.trace.repaired) == repairs == (job.compensation is not None)


@pytest.mark.parametrize("options", [{"importance": "wanda"},
                                     {"importance": "magnitude", "repair": "refit"},
                                     {"importance": "magnitude",
                                      "repair": "refit(sequential=True)"}])
def test_what_is_made_inside_a_branch_is_not_observed(options: Any, tmp_path: Path) -> None:
    made = model("""a = MatMul(x, w1) h = Tanh(a) s = ReduceSum<keepdims=0>(x) c = Greater(s, zero)
        y = If (c) <then_branch = t () => (float[N, 5] p) { g = Relu(h) p = MatMul(g, w2) },
                    else_branch = e () => (float[N, 5] q) { q = MatMul(h, w3) }>""",
                 "N, 6", "N, 5", w1=(6, 64), w2=(64, 5), w3=(64, 5), zero=())
    with pytest.raises(SpaError, match=r"'g(_masked)?' cannot be observed") as caught:
        compiled(made, tmp_path / "f", X, **options)
    assert "inside a branch" in caught.value.why


def test_a_file_is_sampled_by_example_inputs_alone(tmp_path: Path) -> None:
    onnx.save(dense("y = MatMul(h, w2)", w2=(64, 5)), tmp_path / "m.onnx")
    options: dict[str, Any] = {"target": "params=70%", "importance": "wanda", "align": 1,
                               "calibration": "sampled", "latency": False}
    with pytest.raises(UsageError, match="cannot be made up"):
        api.compile(str(tmp_path / "m.onnx"), **options)
    job = api.compile(str(tmp_path / "m.onnx"), {"x": X[:8].astype(np.float32)}, **options).job
    drawn = {np.asarray(kwargs["x"]).tobytes() for _, kwargs in job.calibration.batches}
    assert len(drawn) == len(job.calibration.batches) > 2 and job.trace.repaired


def test_a_bias_is_added_where_an_operator_may_have_one(tmp_path: Path) -> None:
    made = convolved("c = Conv(h, w2) g = Relu(c) y = Conv(g, w3)", w2=(24, 48, 3, 3),
                     w3=(6, 24, 1, 1))
    result = compiled(made, tmp_path / "f", MAPS, repair="bias", out=tmp_path / "out")
    job = result.job
    assert {*job.trace.repaired} == {"w2", "c_bias", "w3", "y_bias"}
    (want,) = values(job, "c", pruned=False, data=MAPS)
    (got,) = values(job, "c", data=MAPS)
    assert got.shape[1] == len(stored(job, "c_bias")) < want.shape[1]
    want, got = want.mean((0, 2, 3)), got.mean((0, 2, 3))
    assert all(np.abs(want - mean).min() < 1e-4 for mean in got)
    assert all(c.passed for c in spacompiler.verify(tmp_path / "out", str(tmp_path / "f/m.onnx")))


def test_a_bias_that_cannot_be_added_is_said(tmp_path: Path) -> None:
    made = dense("y = MatMul(h, w2)", w2=(64, 5))
    result = compiled(made, tmp_path / "f", X, repair="bias", out=tmp_path / "out")
    assert any("no bias to repair" in note and "MatMul" in note
               for note in result.report["notes"])


def test_batch_norms_are_taken_anew_from_what_they_read_now(tmp_path: Path) -> None:
    made = convolved("c = Conv(h, w2) n = BatchNormalization(c, g, b, m, v_) y = Relu(n)",
                     w2=(6, 48, 3, 3), g=(6,), b=(6,), m=(6,), v_=(6,))
    job = compiled(made, tmp_path / "f", MAPS, repair="batch-norm").job
    (c,) = values(job, "c", data=MAPS)
    np.testing.assert_allclose(stored(job, "m"), c.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(stored(job, "v_"), c.var((0, 2, 3), ddof=1), rtol=1e-4)
    assert {*job.trace.repaired} == {"m", "v_"} and job.proof.holds


def test_a_sequential_repair_reads_what_the_repaired_file_gives(tmp_path: Path) -> None:
    made = model("a = Gemm(x, w1) h = Tanh(a) c = Gemm(h, w2, b2) g = Tanh(c) y = MatMul(g, w3)",
                 "N, 6", "N, 5", w1=(6, 32), w2=(32, 24), b2=(24,), w3=(24, 5))
    errors = {}
    for repair in ("none", EXACT, "refit(damping=0, leash=0, sequential=True, residual=True)"):
        job = compiled(made, tmp_path / "f", X, repair=repair).job
        (want,), (g, got) = values(job, "y", pruned=False), values(job, "g", "y")
        errors[repair] = float(np.square(got - want).mean())
    none, one, both = errors.values()
    assert both < one < none
    best = np.linalg.lstsq(g, want, rcond=None)[0]
    np.testing.assert_allclose(got, g @ best, atol=1e-3)


@pytest.mark.parametrize("last", [
    "t = Transpose(w2) y = MatMul(h, t)",
    "g = Sigmoid(a) p = Gemm<transB=1>(h, w2) q = Gemm<transB=1>(g, w2) y = Add(p, q)"])
def test_shared_and_computed_weights_stay_and_are_named(last: str, tmp_path: Path) -> None:
    made = model(f"a = Gemm(x, w1) h = Tanh(a) {last}", "N, 6", "N, 5", w1=(6, 64), w2=(5, 64))
    with pytest.raises(SpaError, match="nothing to repair") as caught:
        compiled(made, tmp_path / "f", X, repair="refit")
    assert "computed or used twice" in caught.value.why
