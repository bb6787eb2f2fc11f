"""What a training is asked for, where there is nothing to train on, or another loss than before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError, UsageError
from spacompiler.models_zoo import load


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
    assert made.job.trained["after"]["objective"] < made.job.trained["before"]["objective"]


@pytest.mark.parametrize("options", [
    "task=0", "task=0,logits=0", "logits=-1", "accumulate=0", "epochs=0"])
@pytest.mark.parametrize("name", ["full", "lora", "lisa"])
def test_options_that_train_nothing_are_refused(name: str, options: str) -> None:
    with pytest.raises(UsageError):
        compiled(network(4), f"{name}({options})", DATA)


@pytest.mark.parametrize("given, words", [
    ({"input": torch.randn(8, 16), "x": torch.ones(1)}, "unexpected keyword argument 'x'"),
    ((torch.randn(8, 16), torch.randn(8, 16), torch.randn(8, 16)), "too many positional"),
    ({"labels": torch.arange(8) % 4}, "missing a required argument: 'input'")])
def test_training_data_that_are_no_call_of_the_network_are_refused(given: Any, words: str) -> None:
    with pytest.raises(SpaError, match="training data do not fit") as error:
        compiled(network(4), "full(epochs=1)", [*DATA, given])
    assert words in error.value.why and error.value.where == "batch 8"


def test_one_tensor_as_example_and_as_training_data_is_a_call() -> None:
    made = spacompiler.compile(
        network(4), torch.zeros(8, 16), target="params=50%", align=1, importance="magnitude",  # type: ignore[arg-type]
        recovery="full", recover_data=[torch.randn(8, 16) for _ in range(4)], onnx=False,
        latency=False, prove=False, quiet=True)
    assert made.job.trained["amount"] == 24


def test_a_language_model_is_trained_on_inputs_that_it_has() -> None:
    module, inputs = load("llama-gqa").build()
    with pytest.raises(SpaError, match="training data do not fit"):
        spacompiler.compile(module, inputs, target="body=60%", importance="magnitude", quiet=True,
                            recovery="full", recover_data=[{"ids": inputs["input_ids"]}] * 4)


class Of(nn.Module):
    """A network whose results are made of its logits."""

    def __init__(self, results: Any) -> None:
        super().__init__()
        self.body, self.results = network(4), results

    def forward(self, input: torch.Tensor) -> Any:
        return self.results(self.body(input))


def test_whole_numbers_alone_are_nothing_to_learn_from() -> None:
    net = Of(lambda y: y.argmax(1))
    data = [(torch.randn(8, 16),) for _ in range(4)]
    with pytest.raises(SpaError, match="no result of the network is in floating point"):
        compiled(net, "full", data)
    with pytest.raises(SpaError, match="no result of the network is in floating point"):
        spacompiler.compile(net, (torch.zeros(8, 16),), target="params=60%", schedule="factors",
                            calibration=data, quiet=True)


def test_a_single_number_is_no_result_to_compare_classes_of() -> None:
    draws = torch.Generator().manual_seed(0)
    xs = torch.randn(12, 8, 16, generator=draws)
    named = [{"input": x, "labels": x[:, :4].argmax(-1)} for x in xs]
    made = compiled(Of(lambda y: (y.mean(), y)), "full(epochs=4, lr=1e-2, accumulate=1)", named)
    assert made.job.trained["after"]["loss"] < made.job.trained["before"]["loss"]
    assert made.job.quality["divergence"] > 0
    alone = Of(lambda y: y.square().mean())
    data = [(x,) for x in xs]
    with pytest.raises(UsageError, match="nothing to train on"):
        compiled(alone, "full", data)
    made = compiled(alone, "full(task=0, logits=1, lr=1e-2, accumulate=1)", data)
    assert made.job.trained["after"]["objective"] < made.job.trained["before"]["objective"]


def test_an_error_of_a_list_is_not_blamed_on_tables() -> None:
    def broken(results: list[torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
        return results[3].mean()

    with pytest.raises(IndexError):
        compiled(network(4), "full(epochs=1)", DATA, loss=broken)


def test_a_checkpoint_is_of_one_loss(tmp_path: Path) -> None:
    def others(results: list[torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
        return (results[0] - 3).square().mean()

    compiled(network(4), "full(epochs=1)", DATA, checkpoint=tmp_path)
    with pytest.raises(SpaError, match="checkpoint"):
        compiled(network(4), "full(epochs=1)", DATA, checkpoint=tmp_path, loss=others)
