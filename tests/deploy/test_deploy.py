"""Deployment: decoders with a cache, onnxruntime-genai's file, int8, and the comparison in time."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import spacompiler
from spacompiler.artifact import deployed as deploy
from spacompiler.artifact.write import write
from spacompiler.cli.main import app
from spacompiler.deploy import decoder as decoders
from spacompiler.deploy import int8
from spacompiler.deploy.cases import Sizes, declared, synthetic
from spacompiler.deploy.decoder_parity import DecoderParity, decoder_parity
from spacompiler.deploy.export import Form, export_onnx
from spacompiler.deploy.int8 import difference, integer_kernels, quantize
from spacompiler.errors import ProofError, SpaError, UsageError
from spacompiler.models_zoo import load
from spacompiler.request.recipe import Recipe
from spacompiler.runtime.decoder import Decoder
from spacompiler.runtime.latency import Latency, compare_cases, ratio
from spacompiler.runtime.session import open_session, run_session
from spacompiler.stages.tolerances import ONNX
from spacompiler.torch_backend.read.export import trace

FAST = {"importance": "magnitude", "latency": False, "align": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A pruned grouped-query model as an artifact with a cached decoder and int8 weights."""
    out = tmp_path_factory.mktemp("llama") / "out"
    result = spacompiler.compile("zoo:llama-gqa", target="body=60%", out=out, decoder=True,
                                 int8=True, **FAST)
    return result, out


def generated(model, ids, tokens, mask=None):
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return made[:, ids.shape[1]:].numpy()


def prompt(batch, length, seed=0):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch, length, tokens", [(1, 1, 30), (1, 9, 20), (4, 6, 8)])
def test_the_loop_in_onnxruntime_writes_what_torch_generates(llama, batch, length, tokens):
    result, out = llama
    ids = prompt(batch, length)
    want = generated(result.module, ids, tokens)
    assert want.shape == (batch, tokens)
    assert np.array_equal(Decoder(out).generate(ids, tokens), want)


def test_padding_on_the_left_changes_nothing(llama):
    _, out = llama
    decoder, ids = Decoder(out), prompt(2, 5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert np.array_equal(decoder.generate(padded, 10, mask=mask), decoder.generate(ids, 10))
    wrong = decoder.run(padded.numpy())[0][:, -1]
    assert not np.allclose(wrong, decoder.run(ids.numpy())[0][:, -1], atol=1e-3)


def test_a_stopped_row_repeats_its_last_token(llama):
    _, out = llama
    decoder, ids = Decoder(out), prompt(3, 5)
    free = decoder.generate(ids, 12)
    stop = int(free[0, 3])
    made = decoder.generate(ids, 12, stop=[stop])
    for row, whole in zip(made, free, strict=True):
        at = np.flatnonzero(whole == stop)
        end = at[0] if len(at) else len(whole)
        assert np.array_equal(row[:end], whole[:end][: len(row)])
        assert (row[end:] == stop).all()
    assert decoder.generate(ids, 12, stop=range(61)).shape == (3, 1)
    assert decoder.generate(ids, 0).shape == (3, 0)


def test_tokens_and_masks_that_do_not_fit_are_usage_errors(llama):
    decoder = Decoder(llama[1])
    _, cache = decoder.run([[1, 2]])
    for ids, options in (([1, 2], {}), ([[]], {}), ([[1]], {"mask": [[1, 1]]}),
                         ([[1], [2]], {"cache": cache})):
        with pytest.raises(UsageError):
            decoder.run(ids, **options)
    with pytest.raises(SpaError, match="does not run"):
        decoder.run([[10**6]])


def test_the_runtime_imports_no_torch(llama):
    code = ("import sys; from spacompiler.runtime import Decoder; "
            f"print(Decoder({str(llama[1])!r}).generate([[5, 6, 7]], 4).tolist()); "
            "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want = generated(llama[0].module, torch.tensor([[5, 6, 7]]), 4)
    assert json.loads(done.stdout) == want.tolist()


def test_report_and_verify_say_what_was_checked(llama):
    result, out = llama
    checks = [DecoderParity(**row) for row in result.report["decoder"]]
    assert [(c.batch, c.padding) for c in checks] == [(1, 0), (3, 2)]
    assert all(c.same == c.tokens > 20 and c.max_rel < 1e-4 for c in checks)
    page = (out / "report.md").read_text()
    assert "with its cache" in page and "int8 against float" in page
    assert {c.name: c.passed for c in spacompiler.verify(out)}["onnx"] is True


def test_another_models_file_is_caught(llama, tmp_path):
    """The negative control: a decoder with one gain changed is not the model's."""
    result, out = llama
    model = ir.load(out / "model.onnx")
    gain = next(v for n, v in model.graph.initializers.items() if "norm.weight" in n)
    gain.const_value = ir.tensor(gain.const_value.numpy() * 1.05, name=gain.name)
    ir.save(model, tmp_path / "model.onnx")
    found = decoder_parity(result.module, tmp_path / "model.onnx", steps=4)
    assert max(check.max_rel for check in found) > ONNX.value


def test_a_wrong_decoder_is_not_written(llama, tmp_path, monkeypatch):
    result, out = llama
    honest = decoder_parity
    monkeypatch.setattr(deploy, "export_decoder",
                        lambda model, path, **options: shutil.copy(out / "model.onnx", path))
    monkeypatch.setattr(deploy, "decoder_parity", lambda *args: [
        dataclasses.replace(check, max_rel=0.1) for check in honest(*args)])
    with pytest.raises(ProofError, match="differs from torch"):
        write(result.job, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_decoder_with_sliding_windows(tmp_path):
    model, _ = load("gemma").build()
    decoders.export_decoder(model, tmp_path / "model.onnx")
    assert model.config.get_text_config().sliding_window < 16
    ids = prompt(2, 4)
    made = Decoder(tmp_path / "model.onnx").generate(ids, 16)
    assert np.array_equal(made, generated(model, ids, 16))
    assert model.config._attn_implementation == load("gemma").build()[0].config._attn_implementation


@pytest.mark.parametrize("name, why", [("mlp", "input_ids"), ("bert", "past_key_values")])
def test_what_is_no_decoder_is_refused_before_anything_is_computed(name, why, tmp_path):
    with pytest.raises(SpaError, match="as a decoder with a cache") as caught:
        spacompiler.compile(f"zoo:{name}", target="body=60%", out=tmp_path / "o", decoder=True,
                            **FAST)
    assert why in caught.value.why


def test_genai_config_has_the_files_own_sizes(llama):
    result, out = llama
    config = json.loads((out / "genai_config.json").read_text())["model"]
    decoder = config["decoder"]
    inputs = declared(out / decoder["filename"])
    for layer in range(decoder["num_hidden_layers"]):
        for kind in ("past_key_names", "past_value_names"):
            _, shape = inputs[decoder["inputs"][kind] % layer]
            assert (shape[1], shape[3]) == (decoder["num_key_value_heads"], decoder["head_size"])
    assert decoder["num_attention_heads"] == result.module.config.num_attention_heads < 6
    assert config["vocab_size"] == 61


def test_onnxruntime_genai_writes_the_same_tokens(llama):
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra spacompiler[genai]")
    result, out = llama
    model = genai.Model(str(out))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=20, do_sample=False)
    writer = genai.Generator(model, options)
    ids = prompt(1, 6)
    writer.append_tokens(ids[0].numpy().astype(np.int32))
    while not writer.is_done():
        writer.generate_next_token()
    made = writer.get_sequence(0)[6:]
    assert len(made) >= 2
    assert np.array_equal(made, generated(result.module, ids, len(made))[0])


def test_int8_is_smaller_and_its_difference_is_measured(llama, tmp_path):
    result, out = llama
    facts = result.report["int8"]
    assert facts["bytes"] == (out / "model.int8.onnx").stat().st_size < facts["float_bytes"]
    assert 0 < facts["rms_rel"] < 0.2 and facts["same"] > 0.8
    assert (facts["bits"], facts["kernels"]) == (7, integer_kernels())
    ids = prompt(2, 5)
    assert Decoder(out / "model.int8.onnx").generate(ids, 3).shape == (2, 3)
    inputs = synthetic(out / "model.onnx", Sizes(2, 4))
    same = difference(out / "model.onnx", out / "model.onnx", inputs)
    assert (same["same"], same["rms_rel"]) == (1.0, 0.0)


def _pair_sums(path):
    """The largest sum of two products that a kernel adds in 16 bits, over all weights of a file.

    Activations are at their largest, 255; a product's weights are (reduced, columns).
    """
    values = [v.const_value.numpy().astype(np.int64)
              for v in ir.load(path).graph.initializers.values()
              if v.const_value is not None and v.const_value.dtype == ir.DataType.INT8]
    tables = [v for v in values if v.ndim == 2 and v.shape[0] > 1]
    assert tables
    return max(int(np.abs(255 * (v[0:-1:2] + v[1::2])).max())
               for v in (t[:len(t) // 2 * 2] for t in tables))


@pytest.mark.parametrize(("bits", "fits"), [(7, True), (8, False)])
def test_products_of_seven_bits_fit_where_sums_of_two_are_kept_in_sixteen(bits, fits, llama,
                                                                          tmp_path):
    quantize(llama[1] / "model.onnx", tmp_path / "q.onnx", bits)
    assert (_pair_sums(tmp_path / "q.onnx") <= np.iinfo(np.int16).max) is fits


def test_int8_of_other_widths_is_refused():
    with pytest.raises(UsageError, match="7 or 8 bits"):
        Recipe("params=50%", int8=True, int8_bits=4)


def test_large_int8_weights_go_beside_the_file(llama, tmp_path, monkeypatch):
    _, out = llama
    monkeypatch.setattr(int8, "INLINE_BYTES", 1000)
    quantize(out / "model.onnx", tmp_path / "q.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.onnx", "q.onnx.data"]
    inputs = synthetic(out / "model.onnx", Sizes(2, 4))
    same = difference(out / "model.int8.onnx", tmp_path / "q.onnx", inputs)
    assert (same["same"], same["rms_rel"]) == (1.0, 0.0)
    assert same["bytes"] > 0.8 * same["float_bytes"]


def test_what_has_no_weights_cannot_be_quantised(tmp_path):
    x = ir.Value(name="x", shape=ir.Shape(["batch", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    node.outputs[0].name, node.outputs[0].shape = "y", x.shape
    node.outputs[0].type = x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(SpaError, match="nothing in the ONNX file"):
        quantize(tmp_path / "m.onnx", tmp_path / "q.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# --- bench --------------------------------------------------------------------------------------


def test_bench_compares_an_artifact_with_its_dense_model(llama):
    done = CliRunner().invoke(app, ["bench", str(llama[1]), "--length", "6", "--repeats", "3",
                                    "--threads", "1", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(r["phase"], r["batch"]) for r in rows] == [
        ("prefill", 1), ("decode", 1), ("prefill", 8), ("decode", 8)]
    for row in rows:
        assert list(row["models"]) == ["dense", "pruned", "int8"]
        wall = row["ratios"]["pruned"]["wall"]
        assert 0 < wall["low"] <= wall["median"] <= wall["high"]
    assert {r["models"]["dense"]["repeats"] for r in rows} == {3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A file without a cache."""
    model, inputs = load("mlp").build()
    path = tmp_path_factory.mktemp("plain") / "plain.onnx"
    export_onnx(trace(model, inputs).program, path)
    return path


def test_bench_of_two_files_without_a_cache(plain, tmp_path):
    other = shutil.copy(plain, tmp_path / "other.onnx")
    done = CliRunner().invoke(app, ["bench", str(plain), str(other), "--batch", "2",
                                    "--threads", "1", "--repeats", "3"])
    assert done.exit_code == 0, done.output
    assert "batch 2" in done.stdout and " to " in done.stdout


@pytest.mark.parametrize("arguments, message", [
    (["nothing.onnx"], "nothing at"),
    (["{out}", "--batch", "0"], "at least 1"),
    (["{out}", "{plain}"], "cannot be compared"),
    (["{out}/config.json"], "cannot be read")])
def test_bench_refuses_what_it_cannot_compare(llama, plain, arguments, message):
    filled = [a.format(out=llama[1], plain=plain) for a in arguments]
    done = CliRunner().invoke(app, ["bench", *filled])
    assert done.exit_code in (1, 2) and message in done.output


def test_ratios_are_taken_turn_by_turn():
    """A slow turn that hits both models leaves the ratio alone."""
    one, other = Latency((1.0, 10.0, 1.0), (1, 1, 1)), Latency((2.0, 20.0, 2.0), (4, 4, 4))
    assert ratio(one, other) == (0.5, 0.5, 0.5)
    assert ratio(one, other, cpu=True).median == 0.25


def test_time_budget_stops_after_five_turns(llama):
    file = llama[1] / "model.onnx"
    inputs = synthetic(file, Sizes(1, 2))
    found = compare_cases({"m": file}, {"c": {"m": inputs}}, repeats=50, seconds=0.0,
                          isolate=False)
    assert found["c", 1]["m"].repeats == 5


def test_a_rewritten_program_has_no_cache_to_export(llama, tmp_path):
    job = llama[0].job
    job = dataclasses.replace(
        job, emitted=dataclasses.replace(job.made, emission="program"),
        ask=dataclasses.replace(job.ask, notes=["sizes in the code"]))
    with pytest.raises(SpaError, match="as a decoder with a cache") as caught:
        write(job, tmp_path / "o")
    assert "sizes in the code" in caught.value.why and not (tmp_path / "o").exists()


@pytest.mark.parametrize("shift, files", [
    (0, ["model.onnx"]), (1, ["model.onnx", "model.onnx.data"])], ids=["equal", "other"])
def test_large_files_read_weights_from_equal_safetensors_beside_them(tmp_path, shift, files):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 80), nn.ReLU(), nn.Linear(80, 60, bias=False))
    save_file({n: a + shift for n, a in model.state_dict().items()}, tmp_path / "model.safetensors")
    x = torch.randn(3, 4, 70)  # three axes: a product with a transposed weight, not a Gemm
    made = export_onnx(trace(model, (x,)).program, tmp_path / "model.onnx",
                       form=Form(external=10_000), beside=[tmp_path / "model.safetensors"])
    assert [p.name for p in made] == files and made[0].stat().st_size < 5_000
    got = run_session(open_session(made[0]), {bench_input(made[0]): x.numpy()})[0]
    assert np.allclose(got, model(x).detach().numpy(), atol=1e-5)


def bench_input(path):
    return next(iter(declared(path)))
