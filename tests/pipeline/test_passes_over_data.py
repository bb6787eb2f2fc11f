"""How often the network is run on calibration data: no more often than is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isnan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.passes.tried import Tried
from spacompiler.pipeline import score
from spacompiler.torch_backend.run.observe import ProgramNetwork
from spacompiler.trials import compared
from spacompiler.trials.measure import Measure


def repaired() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(),
                        nn.Linear(24, 5))
    x = torch.randn(96, 8)
    made = spacompiler.compile(net, (x[:4],), target="params=60%", importance="taylor", align=1,
                               allocation="uniform", calibration=[(p,) for p in x.split(32)],
                               repair="refit", onnx=False, latency=False, prove=False)
    return made.module.state_dict()


def test_covariances_are_gathered_beside_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    plain = ProgramNetwork.observe

    def counted(self: ProgramNetwork, *given: Any, **more: Any) -> Any:
        runs.append(1)
        return plain(self, *given, **more)

    monkeypatch.setattr(ProgramNetwork, "observe", counted)
    beside = repaired()
    assert not runs
    monkeypatch.setattr(score, "HELD", 0)
    apart = repaired()
    assert runs, "what does not fit is gathered in a pass of its own"
    assert all(torch.equal(beside[name], apart[name]) for name in apart)


@dataclass
class Asked:
    """A measurement that says what it is told and notes what it is asked."""

    says: dict[int, float]
    batches: tuple[int, ...] = (0, 1, 2)
    first: dict[int, float] = field(default_factory=dict)
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    def lost(self, problem: object, kept: dict[str, int], batches: int, skip: int = 0) -> float:
        self.asked.append((kept["a"], batches, skip))
        return self.says[kept["a"]]

    def glances(self, problem: object, plans: list[dict[str, int]]) -> list[float]:
        return [self.first.get(kept["a"], float("nan")) for kept in plans]

    def few(self, most: int, positions: int) -> int:
        return min(most, len(self.batches), positions)


PLANS = {name: {"a": i} for i, name in enumerate(("one", "two", "three"), 1)}


@pytest.mark.parametrize(("says", "taken", "asked"), [
    ((1.0, 1.02, 2.0), ["one", "two"], "1 2 3 1 2 1 2"),
    ((1.0, 1.2, 2.0), ["one"], "1 2 3 1 2"),  # the margin shrinks
    ((1.0, 1.3, 2.0), ["one"], "1 2 3")])
def test_what_lost_much_is_not_looked_at_further(says, taken, asked) -> None:
    measure, problem = Asked(dict(enumerate(says, 1))), SimpleNamespace(bound=float("inf"))
    lost, close = Tried()._lost(problem, measure, PLANS)  # type: ignore[arg-type]
    assert close == taken
    assert list(lost.values()) == pytest.approx(says)
    assert " ".join(str(plan) for plan, *_ in measure.asked) == asked
    assert all(skip == batches - 1 for _, batches, skip in measure.asked)


def test_what_is_far_behind_on_one_text_meets_no_batch() -> None:
    measure = Asked({1: 1.0, 2: 1.1, 3: 1.0}, first={1: 1.0, 2: 1.4, 3: 1.6})
    lost, close = Tried()._lost(  # type: ignore[arg-type]
        SimpleNamespace(bound=float("inf")), measure, PLANS)
    assert {plan for plan, *_ in measure.asked} == {1, 2}
    assert lost == pytest.approx({"one": 1.0, "two": 1.1, "three": 1.6}) and close == ["one"]


def test_no_further_batch_is_run_where_nothing_can_be_won_or_enough_was_seen() -> None:
    near = {1: 1.0, 2: 1.01, 3: 1.02}
    for bound, positions, each in ((0.9, 512, 1), (1.1, 2, 2), (1.1, 512, 3)):
        measure = Asked(near)
        Tried(positions=positions)._lost(  # type: ignore[arg-type]
            SimpleNamespace(bound=bound), measure, PLANS)
        assert len(measure.asked) == 3 * each


def test_a_plan_meets_a_batch_once_whichever_layout_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Measure] = []
    asked: list[int] = []
    results, lost = Measure.results, Measure.lost

    def run(self: Measure, *given: Any) -> list[torch.Tensor]:
        runs.append(self)
        return results(self, *given)

    plan: list[Any] = []

    def ask(self: Measure, problem: Any, kept: Any, batches: int, skip: int = 0) -> float:
        asked.append(batches - skip)
        plan[:] = problem, kept
        return lost(self, problem, kept, batches, skip)

    monkeypatch.setattr(Measure, "results", run)
    monkeypatch.setattr(Measure, "lost", ask)
    draws = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 60, (2, 8), generator=draws), "use_cache": False}
            for _ in range(2)]
    made = spacompiler.compile("zoo:llama-gqa", target="body=75%", calibration=data,
                               repair="none", onnx=False, latency=False, prove=False)
    assert any("layers alike diverge" in n for n in made.job.notes)
    assert len({id(measure) for measure in runs}) == 1
    assert len(runs) == len(runs[0]._lost) < sum(asked)  # the dense network ran in calibration
    assert len(runs[0]._answers) == len(runs[0].batches)
    for batch in runs[0].batches:
        with torch.no_grad():
            assert torch.equal(runs[0]._dense(batch), results(runs[0], batch)[0])
    _look_at_one_text_first(runs[0], plan, monkeypatch)


def _look_at_one_text_first(measure: Measure, plan: list[Any],
                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A glance is of the first text, and no text is run again by who looks at the batch."""
    problem, kept = plan
    plans = [kept, problem.least(), {u.name: u.legal[-1] for u in problem.units}]
    assert all(map(isnan, measure.glances(problem, plans))), "eight tokens say little"
    monkeypatch.setattr(compared, "TELLING", 8)
    whole, rows = measure.lost(problem, kept, 1), list[int]()
    measure._lost.clear()
    run = measure._run
    monkeypatch.setattr(Measure, "_run", lambda self, batch, **given: (
        rows.append(len(batch[1]["input_ids"])), run(batch, **given))[1])
    abreast = measure.glances(problem, plans)
    assert measure.lost(problem, kept, 1) == pytest.approx(whole, rel=1e-4)
    assert measure.glances(problem, plans) == abreast and rows == [3, 1]
    measure._glances.clear()
    monkeypatch.setattr(Measure, "abreast", compared.Compared.abreast)
    assert measure.glances(problem, plans) == pytest.approx(abreast, rel=1e-3, abs=1e-6)
    assert len({round(value, 6) for value in abreast}) == 3


class HeadsFirst(nn.Module):
    """Three heads stand before the batch, and results are multiplied by a number that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out, self.last = nn.Linear(16, 24), nn.Linear(12, 20), nn.Linear(20, 3)
        self.heads = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up(x)).unflatten(-1, (3, 8)).permute(2, 0, 1, 3)
        y = torch.einsum("hbni,hio->hbno", y, self.heads)
        y = y.permute(1, 2, 0, 3).flatten(2)
        return self.last(torch.relu(self.out(y))) * scale  # type: ignore[no-any-return]


def test_plans_side_by_side_measure_what_they_do_one_by_one(
        monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    abreast = Measure.abreast

    def both(self: Measure, batch: Any, plans: Any) -> list[torch.Tensor]:
        found = abreast(self, batch, plans)
        seen.append((found, compared.Compared.abreast(self, batch, plans)))
        return found

    monkeypatch.setattr(Measure, "abreast", both)
    torch.manual_seed(0)
    data = [(torch.randn(2, 70, 16), torch.tensor([1.5])) for _ in range(2)]
    spacompiler.compile(HeadsFirst(), data[0], target="params=60%", importance="wanda",
                        allocation="tried", calibration=data, align=1, repair="none", onnx=False,
                        latency=False, prove=False)
    assert seen and all(torch.allclose(a, b, atol=1e-5) for pair in seen
                        for a, b in zip(*pair, strict=True))
