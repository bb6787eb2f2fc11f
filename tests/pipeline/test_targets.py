"""Targets that are met or missed, layouts that are taken, and what is said about either."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import spacompiler
from spacompiler.axes.choices import Choice
from spacompiler.errors import SpaError, TargetError
from spacompiler.pipeline import layouts
from spacompiler.request.targets import parse_target
from spacompiler.torch_backend.emit import stock, stock_search

Q: dict[str, Any] = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False,
                     "repair": "none"}
IDS = {"input_ids": torch.arange(18).reshape(2, 9), "use_cache": False}


def convs() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


def compiled(target: str, module: nn.Module | None = None, inputs: Any = None,
             **options: Any) -> Any:
    inputs = (torch.randn(2, 3, 8, 8),) if inputs is None else inputs
    return spacompiler.compile(module or convs(), inputs, **{"target": target, **Q, **options})


def test_the_nearest_share_will_do_where_it_is_asked_for() -> None:
    assert parse_target("params~60%") == ("params", 0.6)
    result = compiled("params~60%")
    assert result.module[0].out_channels == 2
    assert any("params~60%: the nearest" in note for note in result.job.notes)
    pruner = spacompiler.Pruner(convs(), (torch.randn(2, 3, 8, 8),), target="params~60%",
                                importance="magnitude")
    pruner.finish()
    assert pruner.kept == {"0.weight:0": 2}


def test_a_target_that_is_missed_offers_the_nearest() -> None:
    with pytest.raises(TargetError, match="cannot be met") as caught:
        compiled("params=60%")
    assert "--target 'params~0.6'" in caught.value.fix


def test_a_nearest_share_that_leaves_all_is_an_error() -> None:
    with pytest.raises(TargetError, match="cannot be met") as caught:
        compiled("params~97%")
    assert "~" not in caught.value.fix and caught.value.fix.startswith("let less stay")


class Recurrent(nn.Module):
    """Behind the only width stands a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm = nn.LSTM(4, 6, batch_first=True), nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.rnn(x)[0]))


def test_where_nothing_may_go_the_reason_and_all_options_are_said() -> None:
    with pytest.raises(TargetError, match="nothing to prune") as caught:
        compiled("params=60%", Recurrent(), (torch.randn(2, 5, 4),))
    assert caught.value.why == "groups found: 1; 1 of role hidden, not asked for"
    assert caught.value.fix.endswith("--role hidden --approximate")
    with pytest.raises(TargetError, match="nothing to prune") as caught:
        compiled("params=60%", Recurrent(), (torch.randn(2, 5, 4),), roles=("hidden",))
    assert "1 under a norm that would take other statistics" in caught.value.why


# --- layouts of transformers models -------------------------------------------------------------


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, **changes})).eval()


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose first layer alone is cut, where no configuration can say so; its artifact."""
    def cannot(*args: Any) -> Any:
        raise SpaError("no configuration describes it")

    out = tmp_path_factory.mktemp("any") / "out"
    with pytest.MonkeyPatch.context() as patch, \
            pytest.warns(UserWarning, match="stock transformers does not load") as seen:
        patch.setattr(layouts, "per_layer", cannot)
        result = compiled("body=80%", llama(), IDS, only=("*layers.0.mlp*",), floor=0.01, out=out)
    assert result.job.layout == "any"
    assert {w.filename for w in seen if "stock" in str(w.message)} == {__file__}  # the user's line
    return result, out


@pytest.mark.parametrize("asked, only, taken", [
    ("auto", (), "per-layer"), ("uniform", (), "uniform"), ("any", (), ""),
    ("auto", ("*layers.0.mlp*",), "per-layer")])
def test_layers_are_unequal_where_that_is_clearly_better_or_nothing_else_reaches_the_target(
        asked: str, only: Any, taken: str) -> None:
    torch.manual_seed(0)  # whatever tests were before
    model = llama()
    model.model.layers[0].mlp.down_proj.weight.data *= 1e-3
    result = compiled("body~80%", model, IDS, importance=FirstMattersLess(), allocation="global",
                      calibration=[IDS], repair="none", layout=asked, only=only, dry_run=True)
    assert result.job.stock == taken
    said = " ".join(result.job.notes)
    assert ("layout per-layer" in said) == (asked == "auto")
    if asked == "auto":
        assert ("diverge" in said) == (not only) and ("out of reach" in said) == bool(only)


@dataclass(frozen=True)
class FirstMattersLess:
    """Slices of the first layer are worth a thousandth of the others, on one scale."""

    name = "first"
    needs = ()
    absolute = True

    def score(self, group: Any, ctx: Any) -> torch.Tensor:
        return torch.arange(1.0, 1 + math.prod(group.shape)).reshape(group.shape) * (
            1e-3 if ".layers.0." in group.name else 1.0)


def test_a_model_that_no_config_describes_refuses_to_be_saved_as_one(
        unequal: Any, tmp_path: Any) -> None:
    result, out = unequal
    for module in (result.module, spacompiler.load(out)):
        with pytest.raises(SpaError, match="stock transformers cannot load") as caught:
            module.save_pretrained(tmp_path / "saved")
        assert "load_state_dict" in caught.value.fix
    assert not (tmp_path / "saved").exists()


def test_many_entries_of_one_size_are_searched_one_at_a_time() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {f"size_{i}": 8 for i in range(20)}

    right = {f"size_{i}": 6 if i % 3 else 4 for i in range(0, 20, 2)}
    calls = []

    def wrong(changes: dict[Any, Any]) -> int:
        calls.append(changes)
        return sum(changes.get(f"size_{i}", 8) != right.get(f"size_{i}", 8) for i in range(20))

    found = list(stock_search.candidates(Config(), {8: {4, 6}}, wrong))
    assert right in found and len(calls) < 256


def test_numbers_of_a_list_are_entries_of_their_own() -> None:
    class Config:
        widths = (8, 8, 3)

        def to_dict(self) -> dict[str, Any]:
            return {"size": 8, "widths": self.widths}

    def made(changes: dict[Any, Any]) -> Any:
        config = Config()
        stock_search.put(config, changes)  # type: ignore[arg-type]
        return config.widths

    def wrong(changes: dict[Any, Any]) -> int:
        return sum(a != b for a, b in zip(made(changes), (6, 4, 3), strict=True))

    found = next(c for c in stock_search.candidates(  # type: ignore[arg-type]
        Config(), {8: {4, 6}}, wrong) if not wrong(c))
    least = stock_search.least(found, lambda some: not wrong(some))
    assert stock_search.spelt(Config(), least) == {"widths": [6, 4, 3]}  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [1, stock_search.LIMIT])
def test_fewer_heads_are_not_taken_for_narrower_ones(
        monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Arrays say heads times width alone; the rotary frequencies say the width."""
    monkeypatch.setattr(stock_search, "LIMIT", limit)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, head_dim=8)).eval()
    solution = spacompiler.inspect(module)
    group = next(g for g in solution.groups.values() if g.role == "head")
    choices = {group.atom: Choice(np.arange(8) < 4, group.outers)}
    made = stock.uniform_config(module, solution, choices,
                                stock.pruned_shapes(module, {}, solution, choices))
    assert (made.head_dim, made.num_attention_heads, made.num_key_value_heads) == (8, 4, 4)


def test_a_config_with_entries_for_single_layers_is_uniform() -> None:
    config = transformers.Gemma4TextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, vocab_size=40, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=40, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        per_layer_config={1: {"head_dim": 8}})
    model = transformers.Gemma4ForCausalLM(config).eval()
    result = compiled("body~70%", model, IDS, prove=False)
    assert result.job.layout == "uniform"
    again = type(model)(result.module.config)
    assert {n: p.shape for n, p in again.state_dict().items()} == {
        n: p.shape for n, p in result.module.state_dict().items()}
