"""Where models come from: what is read, what is asked, and what a source is said to be."""

import builtins
import fnmatch
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError
from spacompiler.sources import named as source
from spacompiler.sources.checkpoints import example_inputs

transformers = pytest.importorskip("transformers")

QUICK = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False, "repair": "none",
         "prove": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama with a tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(40)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(tmp_path, checkpoint):
    return shutil.copytree(checkpoint, tmp_path / "copied")


@pytest.fixture
def no_network(monkeypatch):
    """Any look-up or connection is an error, and is remembered."""
    asked = []

    def ask(*what, **more):
        asked.append(what)
        raise AssertionError(f"asked the network: {what}")

    for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"),
                        (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(place, name, ask)
    yield asked
    assert not asked


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_an_encoder_and_decoder_of_two_configurations_gets_inputs_for_both():
    """The decoder's own configuration, which holds the vocabulary, says nothing of an encoder."""
    part = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=24)
    module = transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(part, part)).eval()
    inputs = example_inputs(module)
    assert module(**inputs).logits.shape == (*inputs["decoder_input_ids"].shape, 50)


@pytest.mark.parametrize("text, kind", {
    "zoo:mlp": "zoo", "a/net.onnx": "onnx", "nets:make": "factory", ".": "directory",
    "./gone": "directory", "/gone/too": "directory", "a/b/c": "directory", "owner/model": "hub",
    "gpt2": "hub"}.items())
def test_a_name_says_what_kind_of_model_it_is(text, kind):
    assert source.kind_of(text) == kind


def test_a_module_of_the_users_own_is_looked_for_nowhere(tmp_path, no_network):
    """Its class has a name, which a stranger's repository might have, too."""
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    spacompiler.compile(net, (torch.randn(4, 6),), target="params=50%", out=tmp_path / "out",
                        **QUICK)
    with pytest.raises(SpaError, match="cannot be built"):
        spacompiler.load(tmp_path / "out")
    spacompiler.verify(tmp_path / "out")
    spacompiler.load(tmp_path / "out", model=net)
    entries = json.loads((tmp_path / "out" / "structure.json").read_text())
    assert entries["source"]["kind"] == "module"


@pytest.mark.parametrize("layout", ["uniform", "any"])
def test_nothing_local_asks_the_hub(tmp_path, checkpoint, no_network, layout):
    spacompiler.compile(str(checkpoint), target="body=70%", layout=layout, out=tmp_path / "out",
                        **QUICK)
    spacompiler.load(tmp_path / "out")
    assert all(c.passed is not False for c in spacompiler.verify(tmp_path / "out"))


def test_what_an_artifact_names_is_not_fetched(tmp_path, checkpoint, no_network, monkeypatch):
    """A model of the hub is taken from its cache only, when an artifact is checked again."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SpaError, match="none could be fetched"):
        source.load("nobody/nothing-of-this-name", kind="hub", local=True)


@pytest.fixture
def repository(copied, tmp_path, monkeypatch):
    """A model of the hub: what is asked for is copied into a cache."""
    import huggingface_hub

    asked = []

    def snapshot(name, *, revision, allow_patterns, local_files_only):
        asked.append((name, revision, local_files_only))
        made = tmp_path / "cache" / "snapshots" / "0123abc"
        made.mkdir(parents=True, exist_ok=True)
        for file in copied.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, made)
        return str(made)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (copied / "pytorch_model.bin").write_text("a pickle")
    (copied / "code.py").write_text("raise SystemExit")
    (copied / "consolidated.safetensors").write_text("the same again")
    return asked


def test_of_the_hub_only_what_is_read_is_fetched(repository):
    found = source.load("owner/model")
    assert (found.kind, found.facts["class"]) == ("hub", "LlamaForCausalLM")
    names = {p.name for p in found.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "code.py", "consolidated.safetensors"}
    assert repository == [("owner/model", None, False), ("owner/model", "0123abc", False)]


def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(copied, monkeypatch):
    (copied / "words.py").write_text("raise SystemExit('run')")
    change(copied / "tokenizer_config.json", tokenizer_class="Mine",
           auto_map={"AutoTokenizer": ["words.Mine", None]})
    (copied / "tokenizer.json").unlink()
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *what: asked.append(what) or "n")
    found = source.load(str(copied))
    assert found.tokenizer is None and not asked
    assert any("tokenizer cannot be loaded" in note for note in found.notes)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MyConfig(LlamaConfig):
    model_type = "mine"

class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_code_of_a_checkpoint_runs_when_trusted_and_never_goes_along(tmp_path, copied, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (copied / "mine.py").write_text(CODE)
    change(copied / "config.json", model_type="mine", architectures=["MyForCausalLM"], auto_map={
        "AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyForCausalLM"})
    with pytest.raises(SpaError) as caught:
        source.load(str(copied))
    assert "--trust-remote-code" in caught.value.fix
    result = spacompiler.compile(str(copied), target="body=70%", out=tmp_path / "out",
                                 trust_remote_code=True, **QUICK)
    assert type(result.module).__name__ == "MyForCausalLM"
    assert result.report["files"]["left"]["mine.py"] == "code and pickles are not carried"
    assert not [*(tmp_path / "out").rglob("*.py")]
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def pickled(folder):
    """Weights that are pickled, beside an array file of something else."""
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def outside(folder):
    """An index that names a file out of the directory."""
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def absolute(folder):
    outside(folder)
    place = str(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_of_pickles(folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    pickled(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder):
    """An adapter's directory."""
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')


def adapter_inside(folder):
    """An adapter in a model's directory, which transformers puts on it."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')


def deep(folder):
    (folder / "config.json").write_text('{"a":' * 100_000)


def quantised(method, **more):
    return lambda folder: change(folder / "config.json", quantization_config={
        "quant_method": method, **more})


@pytest.mark.parametrize("make, said", [
    (pickled, "pickled weights (pytorch_model.bin) are not read"),
    (outside, "names '../model.safetensors'"),
    (absolute, "outside the model's directory"),
    (shard_of_pickles, "only safetensors are read"),
    (no_shard, "model-00001-of-00001.safetensors is missing"),
    (adapter, "spacompiler compile owner/base --adapter"),
    (adapter_inside, "holds a model and an adapter"),
    (deep, "config.json cannot be read"),
    (quantised("gptq", bits=4), "quantised (gptq)"),
    (quantised("bitsandbytes", load_in_4bit=True), "quantised (bitsandbytes)"),
    (quantised("compressed-tensors", format="float-quantized"), "quantised (compressed-tensors)"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_directory_that_cannot_be_read_is_told_apart(copied, make, said):
    make(copied)
    with pytest.raises(SpaError) as caught:
        source.load(str(copied))
    assert said in str(caught.value) and caught.value.fix


@pytest.fixture
def eight_bits(copied):
    """The checkpoint in 8-bit floats with one scale a layer."""
    from safetensors.torch import load_file, save_file

    arrays = {}
    for name, array in load_file(copied / "model.safetensors").items():
        arrays[name] = array.bfloat16()
        if name.endswith("proj.weight"):
            scale = array.abs().max() / 448
            arrays[name] = (array / scale).to(torch.float8_e4m3fn)
            arrays[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(arrays, copied / "model.safetensors", metadata={"format": "pt"})
    change(copied / "config.json", dtype="bfloat16", quantization_config={
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
    return copied


def test_a_quantised_checkpoint_says_so_and_what_shares_are_of(tmp_path, eight_bits):
    pytest.importorskip("accelerate")
    result = spacompiler.compile(str(eight_bits), target="body=70%", out=tmp_path / "out", **QUICK)
    facts = result.report["source"]
    assert (facts["quantised"], facts["dtype"]) == ("fp8", "bfloat16")
    assert facts["bytes"] == (eight_bits / "model.safetensors").stat().st_size
    assert any("quantised (fp8)" in note for note in result.report["notes"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert next(spacompiler.load(tmp_path / "out").parameters()).dtype == torch.bfloat16


def test_another_type_than_the_stored_one_is_told(copied):
    change(copied / "config.json", dtype="bfloat16")
    found = source.load(str(copied))
    assert found.notes == ["the checkpoint is stored in float32 and loaded in bfloat16, as its "
                           "configuration says"]


def test_a_directory_with_brackets_in_its_name_is_written_and_shown(tmp_path, checkpoint):
    """Names are text: terminals' markup is not read out of them."""
    from typer.testing import CliRunner

    from spacompiler.cli.main import app

    folder = shutil.copytree(checkpoint, tmp_path / "a[bold]b")
    done = CliRunner().invoke(app, [
        "compile", str(folder), "--target", "body=70%", "--importance", "magnitude", "--align",
        "1", "--no-latency", "--no-onnx", "--no-prove", "--out", str(tmp_path / "out[/red]")])
    assert done.exit_code == 0, done.output
    assert Path(tmp_path / "out[/red]" / "report.md").exists() and "a[bold]b" in done.stdout


@pytest.fixture(scope="module")
def lora(tmp_path_factory, checkpoint):
    """An adapter that names the checkpoint beside it as its base."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    folder = checkpoint.parent / "lora"
    get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"])).save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=checkpoint.name)
    return folder


def test_an_adapter_given_as_the_model_is_merged_into_the_base_that_it_names(lora, no_network):
    made = spacompiler.compile(str(lora), target="body=70%", **QUICK)
    assert made.job.recipe.adapters == (str(lora),)
    assert any("is an adapter: the model is" in note for note in made.job.notes)
    assert spacompiler.inspect(str(lora)).groups


@pytest.mark.parametrize("named, said", [
    ("owner/base", "spacompiler compile owner/base --adapter"), (None, "as --adapter")])
def test_an_adapter_whose_base_is_not_here_says_what_to_give(
        tmp_path, lora, no_network, named, said):
    folder = shutil.copytree(lora, tmp_path / "alone")
    change(folder / "adapter_config.json", base_model_name_or_path=named)
    with pytest.raises(SpaError, match="holds an adapter, not a model") as caught:
        source.load(str(folder))
    assert said in caught.value.fix and "BASE" not in str(caught.value)


def test_the_numbers_of_a_directory_are_looked_at_once(monkeypatch, copied):
    from spacompiler.store import completeness
    from spacompiler.torch_backend import backend, pretrained

    calls = []
    for place in (backend, pretrained):
        monkeypatch.setattr(place, "unsound", lambda module: calls.append(module) or
                            completeness.unsound(module))
    spacompiler.compile(str(copied), target="body=70%", **QUICK)
    assert len(calls) == 1
