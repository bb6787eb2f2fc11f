"""A model that is too large for memory goes through files, and comes out the same to the byte."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spacompiler
from spacompiler.store import room
from spacompiler.system import pages
from spacompiler.torch_backend.emit import slicer
from spacompiler.torch_backend.emit.stock_search import alike
from spacompiler.torch_backend.emit.stock_shapes import Built, built

GIVEN = {"target": "body=50%", "importance": "magnitude", "calibration": "none", "onnx": False,
         "latency": False, "align": 1}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("large") / "model"
    LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96)).bfloat16().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def small(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "out"
    spacompiler.compile(str(checkpoint), out=out, **GIVEN)
    return out


def test_arrays_on_the_disk_give_the_same_files(checkpoint, small, tmp_path, monkeypatch):
    made = []
    empty = room.Room.empty
    monkeypatch.setattr(room, "LARGE", 1)
    monkeypatch.setattr(slicer, "BLOCK", 16)
    monkeypatch.setattr(pages, "LEAST", 1)
    monkeypatch.setattr(room.Room, "empty", lambda self, shape, kind: made.append(
        tuple(shape)) or empty(self, shape, kind))
    spacompiler.compile(str(checkpoint), out=tmp_path / "out", **GIVEN)
    assert len(made) > 4 * 3
    for file in (WEIGHTS, "plan.json", "slices.json", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (small / file).read_bytes(), file
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_module_in_memory_gives_the_same_plan(checkpoint, small):
    module = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    for p in module.parameters():
        p.data = p.data.clone()
    plan = spacompiler.compile(module, dry_run=True, **GIVEN).plan
    told = json.loads((small / "plan.json").read_text())
    assert (plan.kept, plan.weights_hash) == (told["kept"], told["weights_hash"])


def test_weights_lie_in_several_files_where_one_would_be_too_large(checkpoint, small, tmp_path):
    out = tmp_path / "out"
    spacompiler.compile(str(checkpoint), out=out, shard_size="20KB", **GIVEN)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1 and all(p.stat().st_size < 22_000 for p in shards)
    assert not (out / WEIGHTS).exists()
    one, other = (spacompiler.load(p).state_dict() for p in (small, out))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert all(check.passed is not False for check in spacompiler.verify(out))


@pytest.mark.parametrize("size", ["", "5", "-1GB", "0.0001KB", "many"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(spacompiler.UsageError):
        spacompiler.compile("zoo:mlp", shard_size=size, **GIVEN)


def test_two_layers_say_what_all_layers_hold(checkpoint):
    config = LlamaConfig.from_pretrained(checkpoint)
    module = LlamaForCausalLM(config)
    few, whole = Built(module), Built(module, whole=True)
    counted = []
    few._class = lambda config: counted.append(config.num_hidden_layers) or LlamaForCausalLM(config)
    for changes in ({}, {"intermediate_size": 24}, {"num_key_value_heads": 1, "head_dim": 8},
                    {"num_hidden_layers": 3}, {"hidden_size": 40}):
        asked = LlamaConfig.from_dict({**config.to_dict(), **changes})
        assert few.shapes(asked) == whole.shapes(asked), changes
        few.shapes(asked)
    assert counted == [2, 2, 2, 3, 2]


def test_what_a_class_makes_of_configurations_is_known_to_all_that_ask(checkpoint):
    module = LlamaForCausalLM(LlamaConfig.from_pretrained(checkpoint))
    known = built(module)
    assert built(module) is known
    module.config.intermediate_size *= 2
    assert built(module) is not known


@pytest.mark.parametrize(("entries", "sizes", "said"), [
    (("intermediate_size",), {48: {24}, 7: {5}}, {"intermediate_size": 24}),
    (("intermediate_size",), {48: {24, 16}}, {}), (("intermediate_size",), {7: {5}}, {}),
    (("num_attention_heads", "head_dim"), {4: {3}}, {"num_attention_heads": 3, "head_dim": 8}),
    (("no_entry",), {48: {24}}, {})])
def test_entries_that_said_one_width_are_asked_first_of_another(entries, sizes, said):
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4,
                         num_key_value_heads=2)
    config.head_dim = None
    assert alike(config, dict.fromkeys(entries), sizes) == said
