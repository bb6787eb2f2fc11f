"""A compile can be repeated by the recipe that its artifact holds."""

from __future__ import annotations

import filecmp
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from detectors import Yolo, yolo_file
from torch import nn
from typer.testing import CliRunner

import spacompiler
from spacompiler.cli.main import app
from spacompiler.errors import SpaError, UsageError
from spacompiler.models_zoo import load
from spacompiler.pipeline.resolved import check_hashes
from spacompiler.request.recipe import Recipe
from spacompiler.torch_backend import machine

GALLERY = Path(__file__).parents[2] / "docs" / "recipes"
QUICK = {"importance": "magnitude", "onnx": False, "prove": False, "latency": False}


def files(folder):
    return {str(Path(at, n).relative_to(folder)) for at, _, names in os.walk(folder) for n in names}


def same(one, other):
    assert files(one) == files(other)
    return filecmp.cmpfiles(one, other, files(one), shallow=False)[1:] == ([], [])


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 32, 3), nn.ReLU(),
                         nn.Flatten(), nn.Linear(32 * 4, 4))


def test_an_artifact_is_made_again_by_its_recipe(tmp_path):
    told = []
    spacompiler.compile("zoo:mlp", target="params~70%", latency=False, onnx=False,
                        out=tmp_path / "a")
    made = Recipe.read(tmp_path / "a" / "recipe.yaml")
    assert made.importance == "taylor(per='token')" and made.lanes in (8, 16)
    assert made.automatic == ("importance", "allocation", "repair")
    spacompiler.compile(made, out=tmp_path / "b", progress=lambda *a: told.append(a))
    assert same(tmp_path / "a", tmp_path / "b")


def test_the_command_line_takes_a_recipe_and_replaces_parts(tmp_path):
    path = tmp_path / "r.yaml"
    Recipe("macs=60%", model="zoo:mlp", align=1, **QUICK, approximate=True).write(path)
    done = CliRunner().invoke(app, ["compile", "--recipe", str(path), "--floor", "0.2",
                                    "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.stderr
    made = Recipe.read(tmp_path / "a" / "recipe.yaml")
    assert (made.floor, made.approximate, made.onnx) == (0.2, True, False)
    for arguments, what in (([], "no model is named"), (["zoo:mlp"], "there is no target")):
        done = CliRunner().invoke(app, ["compile", *arguments, "--dry-run", *(
            [] if arguments else ["--target", "params=50%"])])
        assert done.exit_code == 2 and what in done.stderr


def test_widths_do_not_depend_on_the_machine_that_repeats(tmp_path, monkeypatch):
    inputs = (torch.randn(2, 3, 6, 6),)
    monkeypatch.setattr("spacompiler.pipeline.layouts.lanes", lambda: 16)
    monkeypatch.setattr("spacompiler.pipeline.resolved.lanes", lambda: 16)
    first = spacompiler.compile(net(), inputs, target="params~60%", dry_run=True, **QUICK)
    recipe = Recipe(**first.plan.recipe)
    for place in ("layouts", "resolved"):
        monkeypatch.setattr(f"spacompiler.pipeline.{place}.lanes", lambda: 8)
    other = spacompiler.compile(net(), inputs, target="params~60%", dry_run=True, **QUICK)
    again = spacompiler.compile(net(), inputs, recipe=recipe, dry_run=True)
    assert machine.lanes() in (8, 16) and first.plan.kept != other.plan.kept
    assert again.plan.to_json() == first.plan.to_json()


def test_data_that_was_handed_over_is_asked_for_again(tmp_path):
    inputs, batches = (torch.randn(2, 3, 6, 6),), [(torch.ones(2, 3, 6, 6),)]
    first = spacompiler.compile(net(), inputs, target="params~60%", dry_run=True, onnx=False,
                                importance="wanda", calibration=batches)
    recipe = Recipe(**first.plan.recipe)
    assert recipe.calibration == "given" and recipe.model == ""
    assert recipe.hashes[0].startswith("calibration=")
    again = spacompiler.compile(net(), inputs, recipe=recipe, dry_run=True, calibration=batches)
    assert again.plan.to_json() == first.plan.to_json()
    with pytest.raises(UsageError, match="was given in Python"):
        spacompiler.compile(net(), inputs, recipe=recipe, dry_run=True)
    with pytest.raises(UsageError, match="names no model"):
        spacompiler.compile(recipe, dry_run=True)


def test_a_file_that_changed_since_is_refused(tmp_path):
    place = tmp_path / "x.npy"
    import numpy as np

    np.save(place, np.ones((2, 3, 6, 6), "float32"))
    inputs = (torch.randn(2, 3, 6, 6),)
    first = spacompiler.compile(net(), inputs, target="params~60%", dry_run=True, onnx=False,
                                importance="wanda", calibration=str(place))
    recipe = Recipe(**first.plan.recipe)
    np.save(place, np.zeros((2, 3, 6, 6), "float32"))
    with pytest.raises(UsageError, match="not what the recipe was carried out with"):
        spacompiler.compile(net(), inputs, recipe=recipe, dry_run=True)
    assert spacompiler.compile(net(), inputs, recipe=recipe.but({"calibration": "none"}),
                               dry_run=True).plan.recipe["hashes"] == ()


# What takes long (a mixture's experts, the files) is carried out by benchmarks/gallery.py.
SMALL = {"importance": "magnitude", "calibration": "none", "repair": "none", "align": 1}


@pytest.mark.parametrize("name, model, more", [
    ("convolutional", "", {}), ("hidden-dimension", "", {}),
    ("text-classifier", "", SMALL), ("vision-transformer", "", SMALL),
    ("language-model", "zoo:llama-gqa", {**SMALL, "allocation": "uniform"}),
    ("depth", "zoo:llama-gqa", {**SMALL, "blocks": "model.layers.1"}),
    ("lora-guided", "zoo:llama-gqa", {
        "schedule": "lora-prune(steps=2)", "align": 1,
        "calibration": [{"input_ids": torch.arange(24).reshape(2, 12)}] * 3}),
    ("onnx-file", "zoo:mlp", {})])
def test_recipes_of_the_gallery_come_to_a_plan(name, model, more):
    planned(name, model, **more)


def planned(name, model="", inputs=None, **more):
    recipe = Recipe.read(GALLERY / f"{name}.yaml")
    found = spacompiler.compile(model or recipe.model, inputs, recipe=recipe, dry_run=True,
                                onnx=False, prove=False, latency=False, **more)
    cost = found.plan.costs["params"]
    assert cost["pruned"] < cost["dense"]


def test_recipes_for_models_that_are_given_come_to_a_plan(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, num_labels=5)
    batches = [{"input_ids": torch.randint(0, 100, (4, 12)),
                "attention_mask": torch.ones(4, 12).long()} for _ in range(2)]
    named = [{**batch, "labels": torch.randint(0, 5, (4, 12))} for batch in batches]
    planned("token-classifier", transformers.BertForTokenClassification(config), calibration=named)
    planned("sentence-embeddings", transformers.BertModel(config, add_pooling_layer=False),
            calibration=batches, align=1)
    planned("yolo", Yolo().eval(), (torch.randn(2, 3, 64, 64),))
    planned("onnx-detector", yolo_file(tmp_path / "yolo.onnx"),
            input_shape=("images=1x3x64x64",))


def test_every_recipe_stands_in_the_list_and_is_carried_out():
    listed = (GALLERY / "README.md").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    for place in GALLERY.glob("*.yaml"):
        assert f"({place.name})" in listed, place.name
        assert f'"{place.stem}"' in tests or place.stem == "experts", place.name


def test_a_hash_that_names_no_option_is_a_mistake_in_the_recipe() -> None:
    recipe = Recipe("params=70%", hashes=("nonsense",))
    with pytest.raises(UsageError, match="cannot read 'nonsense' among the recipe's hashes"):
        check_hashes(recipe)


class Letters:
    """A tokenizer called as those of transformers are, which cannot be saved."""

    def __call__(self, text, *, return_tensors, add_special_tokens, verbose):
        return types.SimpleNamespace(input_ids=torch.tensor([[c % 61 for c in text.encode()]]))


def test_how_much_was_read_stands_in_the_recipe(tmp_path):
    """So that it is read again whatever the defaults are by then."""
    text, arrays = tmp_path / "text.txt", tmp_path / "arrays.npz"
    text.write_text("every good boy deserves fudge; " * 60)
    module, inputs = load("llama-gqa").build()
    quick = {"target": "body=70%", "dry_run": True, "length": 12, "tokenizer": Letters(), **QUICK}
    for given, want in (({}, (8, 16)), ({"samples": 3}, (3, 0)),
                        ({"samples": 3, "further_samples": 2}, (3, 2))):
        plan = spacompiler.compile(module, inputs, calibration=str(text), **quick, **given).plan
        assert (plan.recipe["samples"], plan.recipe["further_samples"]) == want
    again = spacompiler.compile(module, inputs, **{**quick, **{
        name: plan.recipe[name] for name in ("samples", "further_samples", "calibration")}})
    assert len(again.job.calibration.beside) == 1 and len(again.job.calibration.batches) == 2
    np.savez(arrays, x=np.zeros((40, 3, 6, 6), np.float32))
    for data, want in ((str(arrays), 16), ([(torch.zeros(2, 3, 6, 6),)] * 3, None), ("none", None)):
        plan = spacompiler.compile(net(), (torch.randn(2, 3, 6, 6),), target="params~60%",
                                   calibration=data, dry_run=True, **QUICK).plan
        assert (plan.recipe["samples"], plan.recipe["further_samples"]) == (want, None)


@pytest.mark.parametrize("layout", ["uniform", "any"])
def test_a_tokenizer_that_cannot_be_saved_is_told_of(tmp_path, layout):
    module, inputs = load("llama-gqa").build()
    made = spacompiler.compile(module, inputs, target="body~70%", layout=layout,
                               tokenizer=Letters(), calibration="none", **QUICK)
    made.save(tmp_path / "a")
    told = [note for note in made.job.notes if "tokenizer" in note]
    assert told == ["the tokenizer is not saved: a Letters has no save_pretrained"]
    assert told[0] in (tmp_path / "a" / "report.md").read_text()


@pytest.mark.parametrize("tokenizer", [lambda text: [1], object()])
def test_what_is_no_tokenizer_is_refused(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("every good boy deserves fudge; " * 60)
    module, inputs = load("llama-gqa").build()
    with pytest.raises(SpaError, match="cannot be read by this tokenizer"):
        spacompiler.compile(module, inputs, target="body=70%", tokenizer=tokenizer,
                            calibration=str(tmp_path / "text.txt"), **QUICK)
