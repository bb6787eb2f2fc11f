"""Layout per-layer: models whose layers have widths of their own load with stock transformers."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import spacompiler
from spacompiler.artifact.load import load_folder
from spacompiler.errors import SpaError, UsageError
from spacompiler.passes.magnitude import Magnitude
from spacompiler.pipeline.layouts import layouts
from spacompiler.request.recipe import Recipe
from spacompiler.torch_backend import own_layers, registered

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "vocab_size": 40}
DECODER = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", {**DECODER, "attention_bias": True,
                                       "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "ForCausalLM", {**DECODER, "head_dim": 8}),
    "mistral": ("Mistral", "ForCausalLM", {**DECODER, "sliding_window": 4}),
    "gemma3": ("Gemma3", "ForCausalLM", {**DECODER, **SLIDING, "head_dim": 8}),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40,
                                     "bos_token_id": 1, "eos_token_id": 2}),
    "bert": ("Bert", "ForMaskedLM", SIZES),  # heads of it and of ViT are no entries of theirs
    "vit": ("ViT", "ForImageClassification", {**SIZES, "image_size": 8, "patch_size": 4}),
    "t5": ("T5", "ForConditionalGeneration", {
        "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 40,
        "decoder_start_token_id": 0}),
}
AUTO = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM",
        "ForMaskedLM": "AutoModelForMaskedLM", "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "ForImageClassification": "AutoModelForImageClassification"}
IDS = torch.arange(18).reshape(2, 9) % 40


class Sums(Magnitude):
    """Magnitudes as if they were losses, larger in later layers, which are then wider."""

    absolute = True

    def score(self, group: Any, ctx: Any) -> Any:
        (layer,) = re.findall(r"[.](\d+)[.]", group.name)[:1] or ("0",)
        return super().score(group, ctx) * 10 ** int(layer)


QUICK = {"importance": Sums(), "allocation": "global", "align": 1, "onnx": False,
         "latency": False, "prove": False}


def network(name: str) -> tuple[Any, dict[str, torch.Tensor], str]:
    """A tiny model, inputs, its automatic class."""
    family, head, sizes = MODELS[name]
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(config(**sizes)).eval()
    inputs: dict[str, Any] = {"input_ids": IDS}
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "t5":
        inputs["decoder_input_ids"] = IDS[:, :5]
    return model, inputs, AUTO[head]


def compiled(name: str, out: Path, **options: Any) -> tuple[Any, dict[str, torch.Tensor], Any]:
    model, inputs, auto = network(name)
    fixed = {} if name in ("vit", "bert") else {"use_cache": False}
    result = spacompiler.compile(model, {**inputs, **fixed}, out=out, **{
        "target": "body=80%", "layout": "per-layer", **QUICK, **options})
    return result, inputs, getattr(transformers, auto)


@pytest.fixture(autouse=True)
def cached_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that transformers copies lies in the test's own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("llama") / "out"
    return *compiled("llama", out, prove=True), out


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_stock_transformers_loads_runs_trains_saves_and_reloads_it(
        name: str, tmp_path: Path) -> None:
    first = {"only": ("*layer*.0.*",), "target": "body=90%"} if name in ("bert", "vit") else {}
    result, inputs, auto = compiled(name, tmp_path / "out", **first)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert result.job.layout == "per-layer" and said["per_layer_config"]
    model = auto.from_pretrained(tmp_path / "out", trust_remote_code=True)
    want = result.module(**inputs).logits
    assert torch.equal(model(**inputs).logits, want)
    if model.can_generate() and name != "bert":
        made, other = (model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                                      use_cache=cache) for cache in (True, False))
        assert torch.equal(made, other) and made.shape[1] > 6
    with pytest.raises(RuntimeError, match=r"per-layer attribute|mismatch"):
        auto.from_pretrained(tmp_path / "out")
    trained = model.train()(**inputs).logits.square().mean()
    trained.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval().save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(again(**inputs).logits, want)
    for file in ("config.json", own_layers.FILE):
        assert (tmp_path / "again" / file).read_text() == (tmp_path / "out" / file).read_text()


def test_without_the_flag_it_is_an_error_and_no_layer_is_drawn_anew(
        llama: Any, tmp_path: Path) -> None:
    """Heads are read by LlamaConfig's own checks: where they differ, sizes are compared instead."""
    _, _, auto, heads = llama
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto.from_pretrained(heads)
    compiled("llama", tmp_path / "out", only=("*mlp*",), target="body=90%")
    for more in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(RuntimeError, match="per-layer attribute"):
            auto.from_pretrained(tmp_path / "out", **more)


def test_no_code_of_the_directory_is_run_here(llama: Any, tmp_path: Path) -> None:
    result, inputs, _, out = llama
    copied = tmp_path / "copied"
    shutil.copytree(out, copied)
    (copied / own_layers.FILE).write_text("raise AssertionError('it was run')")
    model = load_folder(copied)
    assert torch.equal(model(**inputs).logits, result.module(**inputs).logits)
    said = json.loads((copied / "config.json").read_text())
    said["auto_map"]["AutoModel"] = "another.Model"
    (copied / "config.json").write_text(json.dumps(said))
    with pytest.raises(SpaError, match="cannot be used"):
        load_folder(copied)


def test_it_is_verified(llama: Any) -> None:
    *_, out = llama
    assert {c.name: c.passed for c in spacompiler.verify(out)} == {
        "hashes": True, "reload": True, "modelling file": True, "plan identity": None}


def test_after_register_transformers_loads_it_without_the_flag(
        llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, inputs, auto, out = llama
    monkeypatch.setattr(registered, "_ON", [])
    spacompiler.register()
    model = auto.from_pretrained(out)
    assert torch.equal(model(**inputs).logits, result.module(**inputs).logits)
    assert type(model.base_model) is transformers.LlamaModel
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert type(again).__name__ == "PerLayerLlamaModel"
    assert type(network("bert")[0]) is transformers.BertForMaskedLM


def test_the_file_is_short_plain_python(llama: Any) -> None:
    *_, out = llama
    text = (out / own_layers.FILE).read_text()
    docs = [ast.get_docstring(node, clean=False) or "" for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    code = [line for line in text.splitlines() if line.strip()]
    assert len(code) - sum(len(doc.splitlines()) for doc in docs) <= 40
    assert max(map(len, text.splitlines())) <= 100
    assert "spacompiler" not in text.replace(docs[0], "")


def test_a_pruned_model_is_pruned_again(llama: Any, tmp_path: Path) -> None:
    *_, out = llama
    result = spacompiler.compile(str(out), target="body=90%", layout="per-layer",
                                 out=tmp_path / "out", **QUICK)
    assert result.job.layout == "per-layer"
    want = result.module(IDS).logits
    assert torch.equal(spacompiler.load(tmp_path / "out")(IDS).logits, want)
    asked = SimpleNamespace(recipe=Recipe("body=90%", layout="uniform"), name="pruned")
    with pytest.raises(UsageError, match="widths of their own"):
        next(layouts(asked, SimpleNamespace(model=result.module), None, None))


def test_a_changed_file_is_told_of(llama: Any, tmp_path: Path) -> None:
    from spacompiler.artifact.torch_checks import modelling

    result, *_, out = llama
    assert modelling(out, result.module).passed
    (tmp_path / own_layers.FILE).write_text((out / own_layers.FILE).read_text() + "\nprint(1)\n")
    assert modelling(tmp_path, result.module).passed is None
