"""Odd requests: each is done, or one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import ProofError, SpaError, TargetError, UsageError


def compiled(net: nn.Module, inputs: Any, target: str = "params=60%") -> spacompiler.Result:
    return spacompiler.compile(net.eval(), inputs, target=target, importance="magnitude", align=1,
                               latency=False, onnx=False)


def mlp(**kind: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32, **kind), nn.Tanh(), nn.Linear(32, 4, **kind))


class Scaled(nn.Module):
    """Results of a network, times a number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.net, self.by = mlp(), by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.by


def test_one_tensor_is_the_only_input() -> None:
    assert compiled(mlp(), torch.randn(4, 8)).module(torch.randn(3, 8)).shape == (3, 4)


def test_complex_networks_are_proved_in_double_precision() -> None:
    made = compiled(mlp(dtype=torch.complex64), (torch.randn(4, 8, dtype=torch.complex64),))
    assert made.job.proof.error < 1e-12


def test_inputs_of_another_type_are_an_error() -> None:
    with pytest.raises(SpaError, match="does not run on the example inputs"):
        compiled(mlp(), (torch.randint(0, 3, (4, 8)),))


def test_results_that_are_no_numbers_are_named_as_such() -> None:
    with pytest.raises(ProofError, match="no result of the network is a finite number"):
        compiled(Scaled(float("nan")), (torch.randn(4, 8),))


@pytest.mark.parametrize("target", ["params~99%", "params=99%"])
def test_a_target_that_takes_nothing_away_is_an_error(target: str) -> None:
    net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(TargetError):
        compiled(net, (torch.randn(4, 2),), target)


def test_an_empty_name_is_no_request() -> None:
    for asked in ({"calibration": " "}, {"adapter": " "}):
        with pytest.raises(UsageError, match="is empty"):
            spacompiler.compile(mlp(), (torch.randn(4, 8),), target="params=60%", **asked)
    with pytest.raises(UsageError, match="is empty"):
        spacompiler.inspect("")


def test_an_empty_option_of_the_command_line_is_named() -> None:
    from typer.testing import CliRunner

    from spacompiler.cli.main import app

    for option in ("--calibration", "--adapter", "--only"):
        found = CliRunner().invoke(app, ["compile", "zoo:mlp", "--target", "params=60%",
                                         "--dry-run", option, ""])
        assert found.exit_code == 2 and f"{option} is empty" in found.output


def test_a_result_prints_as_a_few_lines() -> None:
    made = compiled(mlp(), (torch.randn(4, 8),))
    made.job.notes.extend(f"note {i}" for i in range(30))
    said = repr(made)
    assert said.count("\n") < 20 and "parameters: 420 -> " in said and "22 more notes" in said
    assert max(map(len, said.splitlines())) < 200
    for part in (made.solution, made.plan):  # what else a notebook may show
        assert "groups" in repr(part) and len(repr(part)) < 100
    dry = spacompiler.compile(mlp(), (torch.randn(4, 8),), target="params~60%", dry_run=True,
                              importance="magnitude")
    assert "a dry run" in repr(dry)
