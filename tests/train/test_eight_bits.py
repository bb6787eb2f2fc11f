"""Frozen weights in 8 bits while adapters train: less memory, and weights of full precision after.

Most of it needs bitsandbytes, which is installed by an extra.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.losses import labelled
from spacompiler.passes.cores import LoraSb
from spacompiler.passes.lora import Lora
from spacompiler.stages.proof import relative_error
from spacompiler.train.eight_bits import eight_bits
from spacompiler.train.loop import Training


class Net(nn.Module):
    """Two residual blocks between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
                                    for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def task(**options: Any) -> Training:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 5, generator=draws)
    xs = torch.randn(12, 16, 8, generator=draws)
    batches = [((x,), {"labels": (x @ teacher).argmax(-1)}) for x in xs]
    return Training(Net(), None, batches[:-4], batches[-4:],
                    lambda results, args, kwargs: labelled(results[0], kwargs["labels"]), **options)


FAST: dict[str, Any] = {"lr": 2e-2, "epochs": 4, "accumulate": 2, "evaluations": 4}


@pytest.mark.parametrize("given", [
    "lora(bits=4)", "lora(bits=8, dora=True)", "ggpo(bits=8)", "full(bits=8)", "norms(bits=8)",
    "lisa(bits=8)"])
def test_bits_are_refused_where_weights_are_trained_or_read(given: str) -> None:
    with pytest.raises(UsageError, match="bits"):
        spacompiler.compile(Net(), (torch.zeros(4, 8),), target="params=60%", recovery=given,
                            recover_data=[(torch.zeros(4, 8),)] * 4, quiet=True)


def test_without_the_library_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SpaError, match="need bitsandbytes") as error:
        spacompiler.compile(Net(), (torch.zeros(4, 8),), target="params=60%", quiet=True,
                            recovery="lora(bits=8)", recover_data=[(torch.zeros(4, 8),)] * 4)
    assert "spacompiler[eight-bits]" in error.value.fix


@pytest.mark.parametrize("row", [Lora, LoraSb])
def test_adapters_are_merged_into_the_weights_that_were_there(row: type[Lora]) -> None:
    pytest.importorskip("bitsandbytes")
    t = task()
    before = copy.deepcopy(t.module)
    facts = row(**FAST, norms=False, bits=8).run(t)
    assert facts["layers in 8 bits"] == 6
    assert facts["after"]["loss"] < 0.9 * facts["before"]["loss"]
    for name, part in t.module.named_modules():
        if isinstance(part, nn.Linear):
            moved = part.weight - before.get_submodule(name).get_parameter("weight")
            assert type(part) is nn.Linear and part.weight.dtype == torch.float32
            ranks = torch.linalg.matrix_rank(moved, rtol=1e-3)  # an error of rounding has all
            assert 0 < ranks <= 8 or min(moved.shape) <= 8
    plain = task()
    row(**FAST, norms=False).run(plain)
    x = t.batches[0][0][0]
    assert not torch.equal(plain.module(x), t.module(x))
    assert torch.allclose(plain.module(x), t.module(x), atol=0.3)


def test_weights_in_8_bits_are_judged_as_they_train_and_come_back() -> None:
    library = pytest.importorskip("bitsandbytes")
    net, x = Net(), torch.randn(16, 8)
    weights = {name: p.clone() for name, p in net.named_parameters()}
    want, first = net(x), net.first
    for p in net.parameters():
        p.requires_grad_(p.ndim < 2)
    with eight_bits(net) as count:
        assert count == 6 and isinstance(net.first, library.nn.Linear8bitLt)
        assert net.first.weight.dtype == torch.int8 and net.first.bias is first.bias
        assert torch.equal(net.train()(x), net.eval()(x))
        assert 0 < relative_error([net(x)], [want]) < 0.02
        net(x).sum().backward()
        assert first.bias.grad is not None
    assert net.first is first
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    assert torch.equal(net(x), want)


def test_a_network_without_frozen_linear_layers_has_none_to_hold() -> None:
    with pytest.raises(SpaError, match="no linear layer is frozen"), eight_bits(nn.Linear(4, 4)):
        pass


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    net = Net().requires_grad_(False)
    with pytest.raises(SpaError, match="no room") as error, eight_bits(net):
        pass
    assert "TMPDIR" in error.value.fix and type(net.first) is nn.Linear


class Stop(Exception):
    """The user's interruption."""


def test_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    def stop(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise Stop

    recipe, whole = Lora(**FAST, bits=8), task(key="k")
    facts = recipe.run(whole)
    with pytest.raises(Stop):
        recipe.run(task(key="k", checkpoint=tmp_path, progress=stop))
    again = task(key="k", checkpoint=tmp_path)
    assert recipe.run(again)["history"] == facts["history"]
    want = whole.module.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in again.module.state_dict().items())
