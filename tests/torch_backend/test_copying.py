"""A copy of a module is what copy.deepcopy makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from spacompiler.torch_backend.copying import copied


class Itself(nn.Linear):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
        return self


class Kept(nn.Linear):
    """Leaves an attribute out of its state."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "cache"}


class Net(nn.Module):
    """Arrays, parts and values that stand in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.none = {"heads": [2, 3], "empty": {}}, []
        self.same = self.none
        self.one = nn.Linear(3, 3)
        self.two = nn.ModuleList([self.one, nn.BatchNorm1d(3), Itself(2, 2)])
        self.two[1].weight = self.one.bias
        self.register_buffer("own", torch.ones(2), persistent=False)
        self.home = [self.one, self]
        self.left = Kept(2, 2)
        self.left.cache = 5
        self.register_forward_hook(self.hook)

    def hook(self, *given: object) -> None:
        """Watch a call."""


@pytest.fixture(scope="module")
def pair() -> tuple[Net, Net]:
    net = Net().eval()
    net.one.weight.requires_grad_(False)
    return net, copied(net)


def test_a_copy_holds_what_a_deep_copy_holds(pair):
    net, made = pair
    want = copy.deepcopy(net)
    for (path, part), (there, other) in zip(made.named_modules(remove_duplicate=False),
                                            want.named_modules(remove_duplicate=False),
                                            strict=True):
        assert (path, type(part), list(vars(part))) == (there, type(other), list(vars(other)))
        assert part.training == other.training
        assert part._non_persistent_buffers_set == other._non_persistent_buffers_set
    for name, array in want.state_dict().items():
        assert torch.equal(made.state_dict()[name], array)
    assert made.sizes == net.sizes
    assert not made.one.weight.requires_grad


def test_what_is_shared_in_a_module_is_shared_in_its_copy_and_with_nothing_else(pair):
    net, made = pair
    assert made.one is made.two[0] and made.home[0] is made.one and made.home[1] is made
    assert made.two[1].weight is made.one.bias
    assert made.same is made.none and made.none is not net.none
    assert made.sizes["heads"] is not net.sizes["heads"]
    assert made.sizes["empty"] is not net.sizes["empty"]
    assert made.one is not net.one and made.one.weight is not net.one.weight
    made._forward_pre_hooks[0] = print
    assert not net._forward_pre_hooks
    (hook,) = made._forward_hooks.values()
    assert hook.__self__ is made


def test_classes_say_themselves_how_they_are_copied(pair):
    net, made = pair
    assert made.two[2] is net.two[2]
    assert not hasattr(made.left, "cache")


def test_a_memo_says_what_takes_the_place_of_arrays():
    net, other = nn.Linear(2, 2), nn.Parameter(torch.zeros(1, 2))
    assert copied(net, {id(net.weight): other}).weight is other
