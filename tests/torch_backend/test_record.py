"""A program recorded without data is the one that torch.export makes, and finds the same groups."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.evidence.calls import as_call
from spacompiler.groups.solution import solve
from spacompiler.rows.aten_table import TABLE
from spacompiler.sources import named as source
from spacompiler.store import room
from spacompiler.system.process import quiet
from spacompiler.torch_backend.read import export as torch_export
from spacompiler.torch_backend.read import record
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.run.runner import Runner
from spacompiler.torch_backend.trace import Recorded
from spacompiler.torch_backend.untouched import untouched

_LAYOUT = ("aten._assert_tensor_metadata", "aten.contiguous")
ZOO = "mobilenet swin moe t5".split()


def _operators(program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"
            and n.target is not operator.getitem and not str(n.target).startswith(_LAYOUT)]


@pytest.mark.parametrize("name", ["resnet", "llama-gqa"])
def test_operators_and_shapes_are_the_exporters(name):
    found = source.load(f"zoo:{name}")
    args, kwargs = as_call(found.inputs)
    with untouched(found.module), quiet(), torch.no_grad():
        ours = record.record(found.module, args, kwargs)
        theirs = torch.export.export(found.module, args, kwargs, strict=False)
    assert _operators(ours) == _operators(theirs)
    results = [[tuple(v.shape) for v in torch.utils._pytree.tree_leaves(n.meta["val"])
                if isinstance(v, torch.Tensor)]
               for program in (ours, theirs) for n in program.graph.nodes
               if n.op == "call_function" and not str(n.target).startswith(_LAYOUT)]
    assert results[: len(results) // 2] == results[len(results) // 2 :]


@pytest.mark.parametrize("name", ZOO)
def test_groups_are_those_of_the_whole_trace(name):
    found = source.load(f"zoo:{name}")
    before = {k: v.data_ptr() for k, v in found.module.state_dict().items()}
    quick, whole = (solve(trace(found.module, found.inputs, quick=q).graph, TABLE, rewire=True)
                    for q in (True, False))
    assert {n: (g.size, g.role, sorted((m.weight, m.dim) for m in g.members))
            for n, g in quick.groups.items()} == {
        n: (g.size, g.role, sorted((m.weight, m.dim) for m in g.members))
        for n, g in whole.groups.items()}
    assert {k: v.data_ptr() for k, v in found.module.state_dict().items()} == before


class _Net(nn.Module):
    def __init__(self, then) -> None:
        super().__init__()
        self.first, self.last, self.then = nn.Linear(4, 8), nn.Linear(8, 2), then
        self.offset = torch.ones(8)  # not registered

    def forward(self, x):
        return self.last(self.then(self, self.first(x).relu()))


def _by_data(net, h):
    return h + 1 if h.sum() > 0 else h


def _counted(net, h):
    return h * int(h.argmax())


def _into_an_array(net, h):
    net.offset.add_(1)
    return h


FOLLOWED = {
    "an array that is no buffer": lambda net, h: h + net.offset,
    "one made on the way": lambda net, h: h + torch.tensor([1.0] * 8),
    "a factory": lambda net, h: h + torch.arange(8, device=h.device),
    "a factory without a device": lambda net, h: h + torch.zeros(8),
    "another device named": lambda net, h: h.to("cpu") * 2,
    "pieces": lambda net, h: torch.cat(h.chunk(2, -1)[::-1], -1),
    "written in place": lambda net, h: h.mul_(2).add_(1),
    "a shape changed in place": lambda net, h: h.unsqueeze_(1).squeeze(1),
}
LEFT = {"a branch on data": _by_data, "a number out of data": _counted,
        "an array that is written": _into_an_array}


@pytest.mark.parametrize("what", FOLLOWED)
def test_a_recorded_program_computes_what_the_module_does(what):
    net, x = _Net(FOLLOWED[what]).eval(), torch.randn(3, 4)
    traced = trace(net, (x,), quick=True)
    assert isinstance(traced.program, Recorded)
    with torch.no_grad():
        torch.testing.assert_close(Runner(traced.program).call((x,), {})[0], net(x))
    assert net.first.weight.device.type == "cpu"


def test_no_code_is_made_of_a_program_that_nobody_runs():
    traced = trace(_Net(lambda net, h: h).eval(), (torch.randn(3, 4),), quick=True)
    assert "graph_module" not in vars(traced.program) and not traced.shared


@pytest.mark.parametrize("what", LEFT)
def test_what_needs_data_is_left_to_the_exporter(what):
    net, x = _Net(LEFT[what]).eval(), torch.randn(3, 4)
    assert torch_export._record(net, (x,), {}) is None


@pytest.mark.parametrize("prove", [False, True])
def test_a_compile_that_looks_at_weights_alone_records(monkeypatch, prove):
    def exported(*args, **kwargs):
        raise AssertionError("exported")

    net, x = _Net(lambda net, h: h).eval(), torch.randn(3, 4)
    monkeypatch.setattr(torch.export, "export", exported)
    monkeypatch.setattr(room, "LARGE", 1 if prove else room.LARGE)
    given = {"target": "params=64%", "importance": "magnitude", "latency": False, "align": 1}
    result = spacompiler.compile(net, (x,), prove=prove, onnx=False, **given)
    assert result.module(x).shape == (3, 2)
    assert (result.job.proof is not None) == prove
    monkeypatch.undo()
    monkeypatch.setattr(torch.export, "export", exported)
    with pytest.raises(spacompiler.errors.TraceError):  # a small one is exported to be proved
        spacompiler.compile(net, (x,), onnx=False, **given)


def test_a_program_that_was_recorded_wrong_is_exported_before_it_is_proved(monkeypatch):
    """Code that asks where its values lie computes something else where nothing is computed."""
    def forward(net, h):
        return h * 2 if h.device.type == "meta" else h

    monkeypatch.setattr(room, "LARGE", 1)
    net, x = _Net(forward).eval(), torch.randn(3, 4)
    result = spacompiler.compile(net, (x,), target="params=64%", importance="magnitude",
                                 onnx=False, latency=False, align=1)
    assert not isinstance(result.job.trace.program, Recorded)
    assert result.job.proof.holds


def test_a_recorded_compile_that_needs_the_program_traces_again():
    """What attributes cannot say is emitted as a program, which only the exporter makes."""
    def forward(net, h):
        return h.reshape(3, 2, 2 + 2).flatten(1)  # a size that no attribute holds

    net, x = _Net(forward).eval(), torch.randn(3, 4)
    made = {quick: spacompiler.compile(net, (x,), target="params=52%", importance="magnitude",
                                       prove=not quick, onnx=False, latency=False, align=1)
            for quick in (True, False)}
    torch.testing.assert_close(made[True].module(x), made[False].module(x))
