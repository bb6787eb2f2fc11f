"""Lean gradients: cross-entropy in pieces, activations computed again; the same numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch.nn import functional

from spacompiler.evidence.losses import CHUNK, cross_entropy, next_token
from spacompiler.live import probe
from spacompiler.pipeline.analyse import analyse
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.score import score
from spacompiler.request import registry
from spacompiler.request.recipe import Recipe
from spacompiler.sources import named as source
from spacompiler.stages.records import Request, Scored, Subject, Traced
from spacompiler.torch_backend.gather import gradients
from spacompiler.torch_backend.run import recompute, runner
from spacompiler.torch_backend.run.recompute import LEAST, Budget, borders, budget, segments
from spacompiler.torch_backend.run.runner import OverridingRunner

CASES = [("zoo:llama-gqa", "taylor"), ("zoo:llama-gqa", "taylor-element(per='batch')"),
         ("zoo:llama-gqa", "curvature"), ("zoo:llama-gqa", "gblm"), ("zoo:resnet", "taylor"),
         ("zoo:resnet", "taylor-vector"), ("zoo:llama-gqa", "lora-gradient")]


@lru_cache
def analysed(model: str) -> tuple[Request, Subject, Traced]:
    found = source.load(model)
    ask, subject = make_request(found.module, found.inputs, Recipe("params=80%"), Given(
        calibration=[found.inputs], tokenizer=found.tokenizer, owned=True))
    return analyse(ask, subject)


def scored(model: str, criterion: str) -> Scored:
    torch.manual_seed(0)  # of the adapters
    ask, subject, traced = analysed(model)
    return score(replace(ask, importance=registry.find("importance", criterion)), subject, traced)


@pytest.mark.parametrize("left, whole", [(0, 0.0), (1 << 40, 0.5)], ids=["nothing", "products"])
@pytest.mark.parametrize("model, criterion", CASES)
def test_what_is_computed_again_is_the_same(model: str, criterion: str, left: int, whole: float,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scored(model, criterion).scores
    asked: list[Budget] = []

    def given(*call: object) -> Budget:
        asked.append(Budget(left, whole))
        return asked[-1]

    monkeypatch.setattr(gradients, "budget", given)
    monkeypatch.setattr(probe, "budget", given)
    lean = scored(model, criterion).scores
    assert plain.keys() == lean.keys()
    assert all((plain[name] == lean[name]).all() for name in plain)
    assert asked
    assert all(b.left < left or not left for b in asked), "segments did run under the budget"


def test_segments_are_the_program_in_order() -> None:
    graph = analysed("zoo:llama-gqa")[2].trace.program.graph
    parts = segments(graph)
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    assert [n for part in parts for n in part] == nodes
    assert len(parts) > 4
    seen = {n for n in graph.nodes if n.op == "placeholder"}
    for part in parts:
        entering, leaving = borders(part)
        assert set(entering) <= seen
        seen |= set(leaving)


def test_what_is_small_is_held() -> None:
    found = analysed("zoo:llama-gqa")[2]
    graph, traced = found.solution.graph, (found.trace.args, found.trace.kwargs)
    assert budget(graph, traced, traced) is None
    many = {"input_ids": torch.zeros(400, 4000, dtype=torch.int8)}
    budgeted = budget(graph, traced, ((), many))
    assert budgeted is not None
    assert budgeted.left == LEAST  # its weights are few
    some = {"input_ids": torch.zeros(40, 1000, dtype=torch.int8)}
    more = budget(graph, traced, ((), some))
    assert more is not None
    assert more.whole == pytest.approx(min(1.0, 40 * budgeted.whole), rel=1e-6)
    assert [Budget(0, share).last(9) for share in (0.0, 0.3, 1.0)] == [1, 3, 9]


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("classes", [7, CHUNK // 2 + 3])
def test_cross_entropy_is_torchs(dtype: torch.dtype, near: float, classes: int) -> None:
    x = torch.randn(2, 3, classes, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, classes, (2, 3))
    ours = next_token(x, ids)
    theirs = functional.cross_entropy(x[:, :-1].reshape(-1, classes), ids[:, 1:].reshape(-1))
    assert ours.item() == pytest.approx(theirs.item(), rel=near)
    (a,), (b,) = (torch.autograd.grad(loss, x) for loss in (ours, theirs))
    assert torch.allclose(a, b, rtol=0, atol=near)


def test_cross_entropy_has_two_derivatives_and_leaves_rows_out() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, -100, 1, 2])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), x)
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, targets), x)
    (found,) = torch.autograd.grad(cross_entropy(x, targets), x)
    assert not found[2].any()
    assert found[0].any()


@pytest.mark.parametrize("criterion", ["taylor", "curvature"])
def test_a_batch_leaves_nothing_behind(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the collector of cycles, what a run held is given back all the same."""
    import gc
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    class Watched(OverridingRunner):
        def _execute(self, n: torch.fx.Node) -> object:
            result = super()._execute(n)
            if isinstance(result, torch.Tensor) and n.op == "call_function":
                held.append(weakref.ref(result))
            return result

    monkeypatch.setattr(gradients, "OverridingRunner", Watched)
    gc.collect()
    gc.disable()
    try:
        scored("zoo:llama-gqa", criterion)
        assert held and not [r for r in held if r() is not None]
    finally:
        gc.enable()


def test_backward_gives_memory_back_segment_by_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time a segment is run again; and a runner holds no results while backward runs."""
    calls: list[bool] = []
    ended: list[int] = []
    before_the_head: list[bool] = []

    class Watched(OverridingRunner):
        def call(self, *inputs: tuple[object, ...]) -> list[object]:
            found = super().call(*inputs)
            ended.append(len(self.env))
            return found

    monkeypatch.setattr(recompute, "give_back", lambda: calls.append(True))
    monkeypatch.setattr(runner, "give_back", lambda: before_the_head.append(True))
    monkeypatch.setattr(gradients, "OverridingRunner", Watched)
    monkeypatch.setattr(gradients, "budget", lambda *call: Budget(0))
    scored("zoo:llama-gqa", "taylor")
    batches = len(analysed("zoo:llama-gqa")[0].calibration.batches)
    assert ended == [0] * batches
    assert len(calls) >= 4 * batches
    assert len(before_the_head) == batches


def test_the_heap_is_given_back_once_the_last_block_has_run(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is the head and its logits, where memory peaks."""
    done: list[str] = []
    monkeypatch.setattr(recompute, "give_back", lambda: done.append("given back"))
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with recompute.lean_blocks([first, second], Budget(0)):
        first(torch.ones(1, 4, requires_grad=True))
        done.append("first")
        second(torch.ones(1, 4, requires_grad=True))
    assert done == ["first", "given back"]


def test_blocks_let_go_of_their_arrays_forward_and_backward(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's pages need not stay until all of backward is done."""
    left: list[list[torch.Tensor]] = []
    monkeypatch.setattr(recompute, "let_go", lambda arrays: left.append(list(arrays)))
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with recompute.lean_blocks([first, second], Budget(0)):
        result = second(first(torch.ones(1, 4, requires_grad=True)))
        assert [[*first.parameters()], [*second.parameters()]] == left
        left.clear()
        result.sum().backward()
    assert [*second.parameters()] in left
    assert left[-1] == [*first.parameters(), *second.parameters()]
