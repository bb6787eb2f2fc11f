"""Tokens further ahead: their loss trains the network, their heads go with the training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from threads import in_threads
from torch import nn

import spacompiler
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.calls import as_call
from spacompiler.evidence.losses import cross_entropy, default_loss, later
from spacompiler.models_zoo import load
from spacompiler.passes.full import Full
from spacompiler.passes.lora import Lora
from spacompiler.system.group import Team
from spacompiler.torch_backend.gather.heads import fitting
from spacompiler.train.ahead import Ahead, check
from spacompiler.train.loop import Training


def texts(length: int = 12) -> list[tuple[tuple[()], dict[str, torch.Tensor]]]:
    """Batches in which each token follows from the one before."""
    draws = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 61, (24, 2, 1), generator=draws)]
    while len(ids) < length:
        ids.append((ids[-1] * 3 + 1) % 61)
    return [((), {"input_ids": part}) for part in torch.cat(ids, 2)]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    module: nn.Module = load("llama-gqa").build()[0]
    return module


def task(module: nn.Module, **options: Any) -> Training:
    calls = texts()
    return Training(copy.deepcopy(module), None, calls[:-4], calls[-4:], default_loss, **options)


FAST: dict[str, Any] = {"lr": 1e-2, "epochs": 2, "evaluations": 4}


@pytest.mark.parametrize("row", [Lora, Full])
def test_what_is_further_ahead_is_learnt_and_the_heads_are_gone(
        row: type[Lora | Full], dense: nn.Module) -> None:
    one, three = task(dense), task(dense)
    alone, facts = row(**FAST).run(one), row(**FAST, ahead=3).run(three)
    further = [h["further"] for h in facts["history"]]
    assert facts["ahead"] == 3 and further[-1] < 0.9 * further[0]
    assert facts["before"]["objective"] == alone["before"]["objective"]  # judged by the same
    assert facts["parameters"] == alone["parameters"]
    assert facts["after"]["loss"] < 0.98 * facts["before"]["loss"]
    got, plain = three.module.state_dict(), one.module.state_dict()
    assert got.keys() == dense.state_dict().keys()
    assert any(not torch.equal(value, plain[name]) for name, value in got.items())
    assert not any(m._forward_hooks for m in three.module.modules())


def test_heads_begin_as_the_output_layer_of_what_it_reads(dense: nn.Module) -> None:
    batch = texts()[0]
    heads = Ahead(dense, default_loss, [batch], 3)
    with heads.reading():
        logits = dense(**batch[1]).logits
    ids = batch[1]["input_ids"]
    want = (cross_entropy(logits, later(ids, 2)) + cross_entropy(logits, later(ids, 3))) / 2
    assert torch.allclose(heads.loss(batch), want)
    assert later(ids, 2)[0].tolist() == [*ids[0, 2:].tolist(), -100, -100]


class Stop(Exception):
    """The user's interruption."""


def test_heads_resume_to_the_same_bits(dense: nn.Module, tmp_path: Path) -> None:
    recipe = Lora(**FAST, ahead=2)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise Stop

    whole = task(dense, key="k")
    facts = recipe.run(whole)
    with pytest.raises(Stop):
        recipe.run(task(dense, key="k", checkpoint=tmp_path, progress=stop))
    steps: list[int] = []
    again = task(dense, key="k", checkpoint=tmp_path,
                 progress=lambda stage, done, total: steps.append(done))
    assert recipe.run(again)["history"] == facts["history"]
    assert steps[0] > 1, "it started anew"
    want = whole.module.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in again.module.state_dict().items())


def test_processes_that_share_the_steps_have_the_bits_of_one() -> None:
    def trained(team: Team) -> tuple[dict[str, torch.Tensor], Any]:
        torch.manual_seed(0)
        t = task(nn.Sequential(nn.Embedding(61, 8), nn.Linear(8, 61)), team=team)
        for calls in (t.batches, t.held_out):
            calls[:] = [((kwargs["input_ids"],), {"labels": kwargs["input_ids"]})  # type: ignore
                        for _, kwargs in calls]
        facts = Full(**FAST, ahead=3).run(t)
        return t.module.state_dict(), facts["history"]

    want, history = trained(Team())
    for found, seen in in_threads(2, trained):
        assert seen == history
        assert all(torch.equal(value, want[name]) for name, value in found.items())


@pytest.mark.parametrize("loss", [None, lambda results, args, kwargs: results[0].sum()],
                         ids=["classes", "a loss of one's own"])
def test_it_is_refused_where_nothing_is_ahead(loss: Any) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(UsageError, match="there are none here"):
        spacompiler.compile(net, (torch.zeros(8, 8),), target="params=60%", importance="magnitude",
                            recovery=Full(ahead=3), recover_data=[(torch.zeros(8, 8),)] * 4,
                            quiet=True, loss=loss)


@pytest.mark.parametrize("name, following", [("llama-gqa", True), ("bert", False), ("t5", False)])
def test_what_is_ahead_is_said_by_the_head_that_was_found(name: str, following: bool) -> None:
    module, inputs = load(name).build()
    args, kwargs = as_call(inputs)
    loss = fitting(module, inputs)
    if not following:
        with pytest.raises(UsageError, match="there are none here"):
            check(loss, [(args, kwargs)], 2)
        return
    check(loss, texts(3), 2)
    with pytest.raises(UsageError, match="longer texts"):
        check(loss, texts(3), 3)
    labels = torch.full((2, 12), -100)
    with pytest.raises(UsageError, match="longer texts"):
        check(loss, [((), {**texts()[0][1], "labels": labels})], 2)


@pytest.mark.parametrize("options", ["ahead=0", "ahead=2, further=0"])
def test_options_that_foretell_nothing_are_refused(options: str) -> None:
    with pytest.raises(UsageError):
        spacompiler.compile(nn.Linear(2, 2), (torch.ones(1, 2),), target="params=60%",
                            recovery=f"full({options})", quiet=True)


class Folded(nn.Module):
    """A language model whose logits no layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(61, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        read: torch.Tensor = self.words(input_ids)
        return read @ self.words.weight.T


def test_without_an_output_layer_nothing_is_foretold() -> None:
    with pytest.raises(SpaError, match="output layer"):
        Full(ahead=2).run(task(Folded()))
