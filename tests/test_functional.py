"""Writes into operands become pure operators only where no other reader could tell."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import ProofError
from spacompiler.frontends import functional
from spacompiler.frontends.functional import make_functional


def _chain(x):
    y = torch.relu_(x * 2)
    y += x
    return torch.nn.functional.hardswish(y, inplace=True)


def _slices(x):
    y = x * 2
    y[1:] += 3
    y[0].mul_(2)
    y[:, 1] = x[:, 0]
    return y, y + 1


def _nested_slices(x):
    y = torch.zeros(4, 5)
    y[1:3, 2:] = 7
    y[:, 0] += x[:, 0]
    return y


def _view_read_after(x):
    y = x * 2
    v = y.view(-1)
    y.add_(1)
    return v


def _base_read_after(x):
    y = x * 2
    y.view(-1).add_(1)
    return y


def _through_dropout(x):
    y = x * 2
    torch.dropout(y, 0.1, False).relu_()
    return y


def _input_written(x):
    return x.add_(1)


def _other_type(x):
    return (x * 2).add_(x.double())


class _Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _export(function):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    return torch.export.export(_Call(function).eval(), (x.clone(),), strict=False), x


@pytest.mark.parametrize("function", [_chain, _slices, _nested_slices])
def test_writes_become_pure(function):
    program, x = _export(function)
    assert make_functional(program)
    assert all(functional._is_pure(node) for node in program.graph.nodes)
    program.graph.lint()
    program.graph_module.recompile()
    want, got = function(x.clone()), program.module()(x.clone())
    pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("function", [_view_read_after, _base_read_after, _through_dropout,
                                      _input_written, _other_type])
def test_aliases_are_left_to_torch(function):
    program, _ = _export(function)
    before = str(program.graph)
    assert not make_functional(program)
    assert str(program.graph) == before


class _Hidden(nn.Module):
    """What tracing sees is not what runs: a stand-in for an alias that torch overlooks."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 3)

    def forward(self, x):
        y = torch.relu(self.up(x))
        return self.down(y * (1 if torch.compiler.is_exporting() else 2))


def test_a_program_that_is_not_the_module_is_refused():
    with pytest.raises(ProofError, match="does not compute what the module does"):
        spacompiler.compile(_Hidden(), (torch.randn(4, 4),), target="params=60%",
                            importance="magnitude", align=1)


def test_pure_operators_are_known():
    program, _ = _export(_chain)
    kinds = {node.target for node in program.graph.nodes if not functional._is_pure(node)}
    assert torch.ops.aten.relu_.default in kinds
    assert operator.getitem not in kinds
