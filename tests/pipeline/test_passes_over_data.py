"""How often the network is run on calibration data: no more often than is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.passes.tried import Tried
from spacompiler.pipeline import score
from spacompiler.torch_backend.run.observe import ProgramNetwork


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
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    def lost(self, problem: object, kept: dict[str, int], batches: int, skip: int = 0) -> float:
        self.asked.append((kept["a"], batches, skip))
        return self.says[kept["a"]]


def test_what_lost_much_on_the_first_batch_is_not_looked_at_further() -> None:
    measure = Asked({1: 1.0, 2: 1.2, 3: 2.0})
    lost, close = Tried()._lost(None, measure, {  # type: ignore[arg-type]
        name: {"a": i} for i, name in enumerate(("one", "two", "three"), 1)})
    assert close == ["one", "two"]
    assert lost == pytest.approx({"one": 1.0, "two": 1.2, "three": 2.0})
    assert measure.asked == [(1, 1, 0), (2, 1, 0), (3, 1, 0), (1, 3, 1), (2, 3, 1)]
