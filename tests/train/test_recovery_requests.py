"""What a training is asked for, where there is nothing to train on, or another loss than before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError, UsageError


def compiled(net: nn.Module, recovery: str, data: Any, **given: Any) -> Any:
    return spacompiler.compile(net, (torch.zeros(8, 16),), target="params=50%", align=1,
                               importance="magnitude", recovery=recovery, calibration=data,
                               onnx=False, latency=False, prove=False, quiet=True, **given)


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, outputs))


DATA = [{"input": torch.randn(8, 16), "labels": torch.arange(8) % 4} for _ in range(8)]


def test_one_value_without_labels_is_nothing_to_train_on() -> None:
    data = [(torch.randn(8, 16),) for _ in range(8)]
    with pytest.raises(UsageError, match="nothing to train on"):
        compiled(network(1), "full(epochs=1)", data)
    made = compiled(network(1), "full(task=0,logits=1,epochs=1,lr=1e-3)", data)
    assert made.job.trained["after"]["loss"] <= made.job.trained["before"]["loss"]


@pytest.mark.parametrize("options", [
    "task=0", "task=0,logits=0", "logits=-1", "accumulate=0", "epochs=0"])
@pytest.mark.parametrize("name", ["full", "lora", "lisa"])
def test_options_that_train_nothing_are_refused(name: str, options: str) -> None:
    with pytest.raises(UsageError):
        compiled(network(4), f"{name}({options})", DATA)


def test_a_checkpoint_is_of_one_loss(tmp_path: Path) -> None:
    def others(results: list[torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
        return (results[0] - 3).square().mean()

    compiled(network(4), "full(epochs=1)", DATA, checkpoint=tmp_path)
    with pytest.raises(SpaError, match="checkpoint"):
        compiled(network(4), "full(epochs=1)", DATA, checkpoint=tmp_path, loss=others)
