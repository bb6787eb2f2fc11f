"""ONNX files as exporters, quantisers and optimisers write them are read, pruned and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

import spacompiler
from spacompiler.api import Result
from spacompiler.errors import ProofError, SpaError
from spacompiler.onnx_backend.read.examples import guess
from spacompiler.onnx_backend.read.file import open_model
from spacompiler.sources.named import load as load_source

RNG = np.random.default_rng(0)


def weights(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Add seeded initialisers."""
    return numbers(model, **{name: (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:])))
                             .astype(np.float32) for name, shape in shapes.items()})


def numbers(model: onnx.ModelProto, **arrays: Any) -> onnx.ModelProto:
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def parsed(text: str, opset: int = 18, ir_version: int = 8) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}')


def pruned(model: onnx.ModelProto | Path, folder: Path, **options: Any) -> Result:
    """Compile a model and write it: the file is checked as it lies there."""
    if not isinstance(model, Path):
        onnx.save(model, folder / "m.onnx")
        model = folder / "m.onnx"
    asked = {"target": "params=70%", "importance": "magnitude", "align": 1, "latency": False}
    return spacompiler.compile(str(model), out=folder / "out", **asked | options)


def stored(folder: Path, name: str) -> tuple[int, ...]:
    """The sizes of an array of the written file."""
    graph = onnx.load(folder / "out" / "model.onnx").graph
    return next(tuple(i.dims) for i in graph.initializer if i.name == name)


def mlp(hidden: int = 64) -> onnx.ModelProto:
    return weights(parsed("""m (float[N, 8] x) => (float[N, 40] y) {
        a = Gemm(x, w1, b1)
        h = Relu(a)
        c = Gemm(h, w2, b2)
        t = Tanh(c)
        y = MatMul(t, w3)
    }"""), w1=(8, hidden), b1=(hidden,), w2=(hidden, 40), b2=(40,), w3=(40, 40))


# --- arrays beside the file -------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 1000])
def test_small_arrays_may_lie_beside_the_file(threshold: int, tmp_path: Path) -> None:
    """Whatever the current folder is; arrays that stay whole are written, too."""
    onnx.save(mlp(), tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data",
              size_threshold=threshold)
    result = pruned(tmp_path / "m.onnx", tmp_path, only=["w1:1"])
    assert result.job.proof.error < 1e-10
    assert all(check.passed for check in spacompiler.verify(
        tmp_path / "out", str(tmp_path / "m.onnx")))
    assert "m.onnx.data" not in str(onnx.load(tmp_path / "out/model.onnx",
                                              load_external_data=False))


def test_the_hash_of_a_file_is_over_small_arrays_beside_it_as_well(tmp_path: Path) -> None:
    digests = []
    for seed in (1, 2):
        model = numbers(parsed("m (float[N, 2] x) => (float[N, 2] y) {y = MatMul(x, w)}"),
                        w=np.full((2, 2), seed, np.float32))
        onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="d",
                  size_threshold=0)
        digests.append(load_source(str(tmp_path / "m.onnx")).module.digest)
    assert digests[0] != digests[1]


# --- what a file says of shapes ---------------------------------------------------------------


def detector(opset: int, size: str = "8, 8") -> onnx.ModelProto:
    """Split and Concat, as detectors have them, with the shapes of every value inside."""
    cut = "(s, cut)" if opset >= 13 else "(s)"
    sizes = "" if opset >= 13 else ", split=[16, 16]"
    model = weights(parsed(f"""m (float[1, 3, {size}] x) => (float[1, 8, 8, 8] y) {{
        a = Conv<pads=[1,1,1,1]>(x, w1)
        s = Relu(a)
        l, r = Split<axis=1{sizes}>{cut}
        c = Conv<pads=[1,1,1,1]>(r, w2)
        e = Add(c, r)
        k = Concat<axis=1>(l, r, e)
        f = Relu(k)
        y = Conv(f, w3)
    }}""", opset), w1=(32, 3, 3, 3), w2=(16, 16, 3, 3), w3=(8, 48, 1, 1))
    return numbers(model, cut=[16, 16]) if opset >= 13 else model


@pytest.mark.parametrize("opset", [11, 17])
def test_stale_shapes_inside_are_not_handed_on(opset: int, tmp_path: Path) -> None:
    """Neither to the dense model that is run for statistics, nor to what is written."""
    model = onnx.shape_inference.infer_shapes(detector(opset))
    for value in model.graph.value_info:
        value.type.tensor_type.shape.dim[1].dim_value += 3
    result = pruned(model, tmp_path, importance="wanda", target="params=60%")
    assert result.job.proof.error < 1e-10
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    assert {v.name for v in graph.value_info} <= {t.name for t in graph.initializer}


def test_results_of_free_sizes_are_declared_so(tmp_path: Path) -> None:
    """A file whose inputs were made free later says fixed sizes of its results."""
    pruned(detector(17, "H, W"), tmp_path, target="params=60%")
    shape = onnx.load(tmp_path / "out/model.onnx").graph.output[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 8, 0, 0]


def test_a_result_needs_no_shape_in_the_file(tmp_path: Path) -> None:
    model = mlp()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    pruned(model, tmp_path)
    shape = onnx.load(tmp_path / "out/model.onnx").graph.output[0].type.tensor_type.shape
    assert len(shape.dim) == 2


# --- what ONNX Runtime runs and ONNX's checker does not know ----------------------------------


def test_a_withdrawn_operator_is_read_and_written(tmp_path: Path) -> None:
    """GroupNormalization of opset 18: a gain for each group."""
    model = numbers(weights(parsed("""m (float[N, 3, 4, 4] x) => (float[N, 4, 4, 4] y) {
        a = Conv(x, w1)
        n = GroupNormalization<num_groups=4>(a, g, b)
        d = Conv(n, w2)
        r = Relu(d)
        y = Conv(r, w3)
    }"""), w1=(32, 3, 1, 1), w2=(24, 32, 1, 1), w3=(4, 24, 1, 1)),
        g=np.full(4, 1.5, np.float32), b=np.zeros(4, np.float32))
    assert {"w1:0.0", "w2:0"} <= pruned(model, tmp_path).job.solution.groups.keys()
    assert all(check.passed for check in spacompiler.verify(
        tmp_path / "out", str(tmp_path / "m.onnx")))


def decoder() -> onnx.ModelProto:
    """A block as onnxruntime-genai's builder writes it, the size of a head left to a symbol."""
    return weights(parsed("""m (float[batch, seq, 16] x, int32[batch, total_seq] mask,
            float[batch, 2, past_seq, dim] pk, float[batch, 2, past_seq, dim] pv)
            => (float[batch, seq, 16] y, float[batch, 2, total_seq, dim] nk,
                float[batch, 2, total_seq, dim] nv) {
        n = SimplifiedLayerNormalization<axis=-1, epsilon=1e-6>(x, g)
        qkv = MatMul(n, wqkv)
        each = ReduceSum<keepdims=0>(mask, one_axis)
        last = Sub(each, one)
        sizes = Shape(mask)
        all = Gather(sizes, one_at)
        total = Cast<to=6>(all)
        o, nk, nv = com.microsoft.GroupQueryAttention<num_heads=8, kv_num_heads=2, scale=0.5>(
            qkv, , , pk, pv, last, total)
        p = MatMul(o, wo)
        s = Add(x, p)
        u = MatMul(s, wu)
        r = Relu(u)
        d = MatMul(r, wd)
        y = Add(s, d)
    }"""), g=(16,), wqkv=(16, 96), wo=(64, 16), wu=(16, 64), wd=(64, 16))


def test_files_of_the_builder_of_onnxruntime_genai(tmp_path: Path) -> None:
    """Query heads may go, the same count in each group; the cache's sizes are read off."""
    model = numbers(decoder(), one_axis=[1], one=np.ones(1, np.int32), one_at=np.int64(1))
    result = pruned(model, tmp_path, target="params=75%")
    feeds = result.job.trace.feeds
    assert feeds["pk"].shape[1:] == (2, 8, 8) and feeds["mask"].shape[1] == 16
    heads = next(n for n in onnx.load(tmp_path / "out/model.onnx").graph.node
                 if n.op_type == "GroupQueryAttention")
    assert {a.name: a.i for a in heads.attribute}["num_heads"] in (4, 6)


def test_symbols_of_inputs_may_be_sums(tmp_path: Path) -> None:
    onnx.save(parsed("""m (float[batch, past] p, float[batch, seq] s, float[batch, all] a)
        => (float[batch, all] y) { c = Concat<axis=1>(p, s)
                                   y = Add(c, a) }"""), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "past + seq"
    onnx.save(model, tmp_path / "m.onnx")
    assert guess(open_model(tmp_path / "m.onnx"), 0) == {"p": (2, 8), "s": (2, 8), "a": (2, 16)}


# --- versions and operators that ONNX Runtime does not know yet -------------------------------


def gated(opset: int, ir_version: int) -> onnx.ModelProto:
    product = "p = SwiGLU(a, b)" if opset > 27 else "s = Swish(a)\n p = Mul(s, b)"
    return weights(parsed(f"""m (float[N, 12] x) => (float[N, 5] y) {{
        a = MatMul(x, w1)
        b = MatMul(x, w2)
        {product}
        y = MatMul(p, w3)
    }}""", opset, ir_version), w1=(12, 64), w2=(12, 64), w3=(64, 5))


@pytest.mark.parametrize(("opset", "ir_version", "said"), [
    (24, 14, "IR version 1"), (25, 10, "does not run the model"),
    (28, 14, "does not run the model")])
def test_newer_versions_are_written_and_said(opset: int, ir_version: int, said: str,
                                             tmp_path: Path) -> None:
    result = pruned(gated(opset, ir_version), tmp_path)
    assert result.job.proof.error < 1e-10 and any(said in note for note in result.job.notes)
    assert all(check.passed for check in spacompiler.verify(
        tmp_path / "out", str(tmp_path / "m.onnx")))


def linear_attention() -> onnx.ModelProto:
    return weights(parsed("""m (float[2, 6, 12] x) => (float[2, 6, 5] y) {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        b = MatMul(x, wb)
        rate = Sigmoid(b)
        d = MatMul(x, wd)
        e = Sigmoid(d)
        decay = Neg(e)
        o, s = LinearAttention<q_num_heads=8, kv_num_heads=4, update_rule="gated_delta">(
            q, k, v, , decay, rate)
        y = MatMul(o, wo)
    }""", 27), wq=(12, 48), wk=(12, 24), wv=(12, 32), wb=(12, 4), wd=(12, 4), wo=(64, 5))


def causal_conv() -> onnx.ModelProto:
    return weights(parsed("""m (float[2, 6, 12] x) => (float[2, 6, 5] y) {
        q = MatMul(x, wq)
        t = Transpose<perm=[0,2,1]>(q)
        c, s = CausalConvWithState<activation="silu">(t, w, b)
        r = Transpose<perm=[0,2,1]>(c)
        y = MatMul(r, wo)
    }""", 27), wq=(12, 48), w=(48, 1, 4), b=(48,), wo=(48, 5))


def tensor_scatter() -> onnx.ModelProto:
    return numbers(weights(parsed("""m (float[2, 2, 12] x, int64[2] at) => (float[2, 6, 5] y) {
        q = MatMul(x, wq)
        f = Expand(cache, size)
        c = TensorScatter<axis=1>(f, q, at)
        r = Relu(c)
        y = MatMul(r, wo)
    }""", 24), wq=(12, 48), cache=(1, 6, 48), wo=(48, 5)), size=[2, 6, 48])


@pytest.mark.parametrize(("make", "sizes"), [
    (linear_attention, {2, 4, 6, 8}), (causal_conv, {48}), (tensor_scatter, {48})])
def test_operators_with_states(make: Any, sizes: set[int], tmp_path: Path) -> None:
    result = pruned(make(), tmp_path, roles=["channel", "head", "head dim"], target="params=69%")
    assert result.job.proof.error < 1e-10
    assert {group.size for group in result.job.solution.groups.values()} == sizes


# --- what is taken unasked --------------------------------------------------------------------


@pytest.mark.parametrize(("given", "taken"), [(False, "magnitude"), (True, "wanda")])
def test_the_default_importance_of_a_file_needs_no_gradients(given: bool, taken: str,
                                                             tmp_path: Path) -> None:
    batches = [{"x": RNG.standard_normal((4, 8)).astype(np.float32)}] if given else None
    result = pruned(mlp(), tmp_path, importance="auto", calibration=batches)
    assert result.job.importance.name == taken
    assert any(f"importance: {taken}" in note for note in result.job.notes)


def test_the_default_looks_at_weights_where_no_product_reads_a_group(tmp_path: Path) -> None:
    model = weights(parsed("""m (float[2, 6, 12] x) => (float[2, 6, 6] y) {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        t = Transpose<perm=[0,2,1]>(k)
        y = MatMul(q, t)
    }"""), wq=(12, 48), wk=(12, 48))
    result = pruned(model, tmp_path, importance="auto", roles=["head dim"],
                    calibration=[{"x": RNG.standard_normal((2, 6, 12)).astype(np.float32)}])
    assert result.job.importance.name == "magnitude"


# --- integers ---------------------------------------------------------------------------------


def quantised(folder: Path, **options: Any) -> Path:
    """A small classifier whose products ONNX Runtime made products of integers."""
    base = weights(parsed("""m (float[N, 3, 8, 8] x) => (float[N, 5] y) {
        a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        r = Relu(a)
        c = Conv<pads=[1,1,1,1]>(r, w2, b2)
        g = GlobalAveragePool(c)
        f = Flatten(g)
        h = Gemm(f, w3, b3)
        t = Relu(h)
        y = MatMul(t, w4)
    }""", 13), w1=(32, 3, 3, 3), b1=(32,), w2=(24, 32, 3, 3), b2=(24,), w3=(24, 40), b3=(40,),
        w4=(40, 5))
    onnx.save(base, folder / "float.onnx")
    quantize_dynamic(folder / "float.onnx", folder / "int.onnx",
                     op_types_to_quantize=["Conv", "MatMul", "Gemm"], **options)
    return folder / "int.onnx"


@pytest.mark.parametrize(("kind", "per_channel"), [("QInt8", True), ("QUInt8", False)])
def test_products_of_integers_are_entered(kind: str, per_channel: bool, tmp_path: Path) -> None:
    """What is removed reads as the zero point, so that masked and pruned are equal."""
    path = quantised(tmp_path, weight_type=getattr(QuantType, kind), per_channel=per_channel)
    result = pruned(path, tmp_path)
    assert result.job.proof.error < 1e-10
    assert sorted(g.size for g in result.job.solution.groups.values()) == [24, 32, 40]


def test_integers_are_scored_from_their_zero_point_on(tmp_path: Path) -> None:
    """Criteria see unsigned weights as the floats that they stand for, but for the scale."""
    path = quantised(tmp_path, weight_type=QuantType.QUInt8)
    job = pruned(path, tmp_path, dry_run=True).job
    found = job.backend.context(job.trace, job.solution, 0).stored("w3_quantized").numpy()
    dense = {t.name: t for t in onnx.load(tmp_path / "float.onnx").graph.initializer}
    want = numpy_helper.to_array(dense["w3"])
    scale = (found * want).sum() / (found**2).sum()
    np.testing.assert_allclose(found * scale, want, atol=2 * scale)


def test_products_of_integers_with_fixed_scales(tmp_path: Path) -> None:
    model = numbers(parsed("""m (uint8[N, 3, 4, 4] x) => (float[N, 4, 4, 4] y) {
        a = QLinearConv<pads=[1,1,1,1]>(x, s, zx, w1, ws, zw, s, z, b)
        c = QLinearConv(a, s, z, w2, s, zero, s, z)
        y = DequantizeLinear(c, s, z)
    }"""), s=np.float32(0.05), ws=np.full(32, 0.02, np.float32), zx=np.uint8(7), z=np.uint8(100),
        zw=np.zeros(32, np.int8), zero=np.int8(0), b=RNG.integers(-9, 9, 32).astype(np.int32),
        w1=RNG.integers(-90, 90, (32, 3, 3, 3)).astype(np.int8),
        w2=RNG.integers(-90, 90, (4, 32, 1, 1)).astype(np.int8))
    result = pruned(model, tmp_path, target="params=69%")
    assert {g.size for g in result.job.solution.groups.values()} == {32}


# --- damaged files ----------------------------------------------------------------------------


def untyped(tensor: onnx.TensorProto) -> None:
    tensor.data_type = 0


def far(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "a" * 5000), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def untyped_constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    node.attribute[0].t.CopyFrom(onnx.TensorProto(dims=[1]))
    return node


@pytest.mark.parametrize(("damage", "what"), [
    (untyped, "have no type"), (far, "aaa...aaa"), (untyped_constant, "cannot be read")])
def test_damaged_arrays_are_one_clear_error(damage: Any, what: str, tmp_path: Path) -> None:
    model = mlp()
    node = damage(model.graph.initializer[0])
    model.graph.node.extend([node] if node else [])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SpaError) as caught:
        open_model(tmp_path / "m.onnx")
    assert what in caught.value.what + caught.value.why and len(str(caught.value)) < 600


# --- branches and bodies ----------------------------------------------------------------------


def branching(constants: bool) -> onnx.ModelProto:
    """A network in each branch, with arrays of its own; a name of one is a value of the other."""
    model = parsed("""m (float[N, 8] x, int64 rate) => (float[N, 4] y) {
        k = Constant<value_int=16000>()
        e = Equal(rate, k)
        y = If (e) <then_branch = t () => (float[N, 4] p) {
                        a = MatMul(x, w1) r = Relu(a) p = MatMul(r, w2) },
                    else_branch = f () => (float[N, 4] q) {
                        w1 = MatMul(x, u1) s = Tanh(w1) q = MatMul(s, u2) }> }""")
    for branch, names in zip(model.graph.node[2].attribute, ("w1 w2", "u1 u2"), strict=True):
        for name, shape in zip(names.split(), ((8, 32), (32, 4)), strict=True):
            array = numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)
            if constants:
                node = onnx.helper.make_node("Constant", [], [name], value=array)
                branch.g.node.insert(0, node)
            else:
                branch.g.initializer.append(array)
    return model


@pytest.mark.parametrize("constants", [False, True])
def test_what_is_stored_in_branches_goes_too(tmp_path: Path, constants: bool) -> None:
    made = pruned(branching(constants), tmp_path, target="params~70%")
    assert {(g.size, g.role) for g in made.solution.groups.values()} == {(32, "channel")}
    assert len(made.plan.kept) == 2
    assert all(c.passed for c in spacompiler.verify(tmp_path / "out", str(tmp_path / "m.onnx")))


@pytest.mark.parametrize("rate", [16000, 8000])
def test_the_branch_that_inputs_do_not_take_is_proved_too(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    """A wrong order of what stays in one branch is found, whichever branch the inputs take."""
    from spacompiler.onnx_backend import prove

    onnx.save(branching(False), tmp_path / "m.onnx")
    rewritten = prove.rewrite

    def wrong(trace: Any, *args: Any, **kwargs: Any) -> Any:
        made = rewritten(trace, *args, **kwargs)
        value = made.graph.initializers["u2"]
        value.const_value = onnx_ir.tensor(value.const_value.numpy()[::-1].copy())
        return made

    monkeypatch.setattr(prove, "rewrite", wrong)
    with pytest.raises(ProofError, match="not the masked dense model"):
        spacompiler.compile(
            str(tmp_path / "m.onnx"), {"x": RNG.standard_normal((3, 8)), "rate": rate},
            target="params~70%", importance="magnitude", align=1, latency=False)


def test_a_value_that_both_branches_read_is_masked_in_each(tmp_path: Path) -> None:
    model = weights(parsed("""m (float[N, 8] x, bool c) => (float[N, 4] y) {
        a = MatMul(x, w1)
        y = If (c) <then_branch = t () => (float[N, 4] p) { b = Relu(a) p = MatMul(a, v) },
                    else_branch = f () => (float[N, 4] q) { q = MatMul(a, v) }> }"""),
        w1=(8, 32), v=(32, 4))
    assert pruned(model, tmp_path, target="params~70%").job.proof.holds


def loop() -> onnx.ModelProto:
    """Three steps of a state that also come out stacked."""
    return weights(parsed("""m (float[2, 8] x, int64 n) => (float[2, 4] y, float[steps, 2, 3] z) {
        c = Constant<value_int=1>()
        go = Cast<to=9>(c)
        h = MatMul(x, w0)
        g, z = Loop(n, go, h) <body = b (int64 i, bool k, float[2, 40] s) =>
                               (bool k2, float[2, 40] s2, float[2, 3] o) {
            k2 = Identity(k)
            u = MatMul(s, wl)
            t = Tanh(u)
            s2 = Add(s, t)
            o = MatMul(s2, wo) }>
        y = MatMul(g, w2) }"""), w0=(8, 40), wl=(40, 40), wo=(40, 3), w2=(40, 4))


def scan() -> onnx.ModelProto:
    """A recurrent layer, spelt out."""
    return weights(parsed("""m (float[5, 2, 8] x) => (float[5, 2, 4] y) {
        h = ConstantOfShape(size)
        e = MatMul(x, w0)
        last, every = Scan(h, e) <num_scan_inputs=1, body = b (float[2, 40] s, float[2, 40] v) =>
                                                     (float[2, 40] s2, float[2, 40] o) {
            u = MatMul(s, wl)
            a = Add(u, v)
            s2 = Tanh(a)
            o = Identity(s2) }>
        y = MatMul(every, w2) }"""), w0=(8, 40), wl=(40, 40), w2=(40, 4))


@pytest.mark.parametrize("make", [loop, scan])
def test_a_state_that_a_body_carries_from_step_to_step_loses_channels(make: Any,
                                                                      tmp_path: Path) -> None:
    model = make()
    if make is scan:
        numbers(model, size=[2, 40])
    onnx.save(model, tmp_path / "m.onnx")
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": RNG.standard_normal(shape).astype(np.float32)}
    if make is loop:
        feeds["n"] = np.array(3)
    result = pruned(tmp_path / "m.onnx", tmp_path, example_inputs=feeds, target="params~70%")
    kept = stored(tmp_path, "wl")
    assert result.job.proof.error < 1e-10 and kept[0] == kept[1] < 40
    assert stored(tmp_path, "w2")[0] == stored(tmp_path, "w0")[1] == kept[0]


def test_a_body_that_is_not_entered_stays_with_its_reason(tmp_path: Path) -> None:
    model = weights(parsed("""m (float[2, 8] x) => (float[M, 4] y) {
        n = Constant<value_int=3>()
        c = Cast<to=9>(n)
        h = MatMul(x, w0)
        g = Loop(n, c, h) <body = b (int64 i, bool k, float[P, 16] s) =>
                           (bool k2, float[Q, 16] s2) {
            k2 = Identity(k)
            s2 = Concat<axis=0>(s, s) }>
        y = MatMul(g, w2) }"""), w0=(8, 16), w2=(16, 4))
    onnx.save(model, tmp_path / "m.onnx")
    said = str(spacompiler.inspect(str(tmp_path / "m.onnx")))
    assert "frozen w0:1  unknown operator Loop (its body is not understood in every value)" in said


def few_bits(zeros: tuple[int, ...]) -> onnx.ModelProto:
    """Two products of four-bit integers, 16 inputs a scale; zero points if a shape is given."""
    second = f"h, b2, s2{', z2' if zeros else ''}"
    model = weights(parsed(f"""m (float[N, 16] x) => (float[N, 4] y) {{
        h = com.microsoft.MatMulNBits<K=16, N=64, bits=4, block_size=16>(x, b1, s1, , , c)
        q = com.microsoft.MatMulNBits<K=64, N=32, bits=4, block_size=16>({second})
        y = MatMul(q, w2) }}"""), c=(64,), w2=(32, 4), s1=(64,), s2=(32, 4))
    return numbers(model, b1=RNG.integers(0, 255, (64, 1, 8)).astype(np.uint8),
                   b2=RNG.integers(0, 255, (32, 4, 8)).astype(np.uint8),
                   **({"z2": RNG.integers(0, 255, zeros).astype(np.uint8)} if zeros else {}))


@pytest.mark.parametrize("zeros", [(), (32, 2)])
def test_products_of_four_bit_integers_lose_whole_blocks(zeros: tuple[int, ...],
                                                         tmp_path: Path) -> None:
    result = pruned(few_bits(zeros), tmp_path, target="params~60%")
    assert result.job.proof.holds
    b2 = stored(tmp_path, "b2")
    # packed zero points belong to two blocks: then only outputs go
    assert b2[1] == 4 if zeros else b2[1] < 4
    assert b2[0] < 32


def test_experts_in_one_operator_lose_channels_inside(tmp_path: Path) -> None:
    model = weights(parsed("""m (float[6, 8] x) => (float[6, 8] y) {
        r = MatMul(x, wr)
        y = com.microsoft.MoE<activation_type="swiglu", k=2, swiglu_fusion=1>(
            x, r, w1, , w2) }"""), wr=(8, 4), w1=(4, 48, 8), w2=(4, 8, 24))
    result = pruned(model, tmp_path, target="params~70%")
    w1, w2 = stored(tmp_path, "w1"), stored(tmp_path, "w2")
    assert result.job.proof.holds and w2[:2] == (4, 8) and w2[2] < 24
    assert w1 == (4, 2 * w2[2], 8)  # gates lie beside what they gate


# --- what lies beside the file ----------------------------------------------------------------


def test_files_beside_the_file_go_along_and_those_of_sizes_are_told(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json", "preprocessor_config.json", "holiday.txt",
                 "run.py", "other.onnx"):
        (tmp_path / name).write_text("{}")
    made = pruned(mlp(), tmp_path)
    gone = ["config.json", "preprocessor_config.json", "tokenizer.json"]
    assert made.report["files"] == {"carried": gone, "adapted": [], "left": {}}
    assert {p.name for p in (tmp_path / "out").iterdir()} >= set(gone)
    assert not {"holiday.txt", "run.py", "other.onnx"} & {
        p.name for p in (tmp_path / "out").iterdir()}
    assert any("config.json went along as it lay" in note for note in made.report["notes"])


# --- the control ------------------------------------------------------------------------------


def test_a_branch_without_effect_is_proved_on_weights_drawn_anew(tmp_path: Path) -> None:
    """A gain of zero hides what is wrong in its branch."""
    model = numbers(weights(parsed("""m (float[N, 8] x) => (float[N, 8] y) {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        g = Mul(b, gain)
        y = Add(x, g) }"""), w1=(8, 32), w2=(32, 8)), gain=np.zeros(8, np.float32))
    proof = pruned(model, tmp_path).job.proof
    assert proof.redrawn and proof.holds and proof.control > 0.01
