"""Writes into operands become pure operators only where no other reader could tell."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import ProofError
from spacompiler.torch_backend.emit.program import rewrite
from spacompiler.torch_backend.read import functional
from spacompiler.torch_backend.read.functional import make_functional


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


class Running(nn.Module):
    """Keeps a running mean of a hidden layer, which it writes in every call."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x):
        h = self.a(x)
        self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        return self.b((h - self.mean).relu())


def test_an_array_that_is_written_back_shrinks_with_what_is_written():
    torch.manual_seed(0)
    dense, x = Running().eval(), torch.randn(4, 8)
    result = spacompiler.compile(dense, (x,), target="params=51%", importance="magnitude",
                                 align=1, onnx=False, latency=False)
    group = result.solution.groups["a.weight:0"]
    kept = torch.from_numpy(result.job.choices[group.atom].table)
    small = result.module
    assert result.job.emission == "module" and small.mean.shape == (kept.sum(),)
    assert "mean:0" in {str(member) for member in group.members}
    assert torch.equal(dense.mean, torch.zeros(12))  # tracing and proving wrote nothing
    with torch.no_grad():
        for _ in range(2):
            dense(x)
            small(x)
    assert torch.allclose(small.mean, dense.mean[kept], atol=1e-6)
    program = rewrite(result.job.trace, result.solution, result.job.choices).module()
    with torch.no_grad():
        program(x)
    assert program.mean.shape == small.mean.shape and not torch.equal(
        program.mean, torch.zeros_like(program.mean))


class Lazy(nn.Module):
    """Scales a layer down in its first call, for good."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.done = nn.Linear(8, 12), nn.Linear(12, 3), False

    def forward(self, x):
        if not self.done:
            with torch.no_grad():
                self.a.weight.div_(2)
            self.done = True
        return self.b(self.a(x).relu())


def test_a_module_that_changes_its_parameters_once_is_called_first():
    torch.manual_seed(0)
    dense, x = Lazy().eval(), torch.randn(4, 8)
    before, want = dense.a.weight.clone(), copy.deepcopy(dense)(x)
    result = spacompiler.compile(dense, (x,), target="params=51%", importance="magnitude",
                                 align=1, onnx=False, latency=False)
    assert torch.equal(dense.a.weight, before / 2) and dense.done
    assert torch.equal(dense(x), want)
    assert result.module.done and result.job.emission == "module"
    assert result.job.trace.graph.written == {}
