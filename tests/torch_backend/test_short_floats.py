"""Where a processor only emulates short floats, calibration computes in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import spacompiler
from spacompiler.models_zoo import load
from spacompiler.pipeline.analyse import analyse
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.score import score
from spacompiler.request.recipe import Recipe
from spacompiler.torch_backend import machine


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.nn.Module, Any]:
    """A language model in bfloat16, on a processor that has no arithmetic of it."""
    monkeypatch.setattr(machine, "_emulated", lambda dtype: True)
    module, inputs = load("llama-gqa").build()
    return module.bfloat16(), inputs


@pytest.mark.parametrize("criterion", ["taylor", "taylor-element"])
def test_scores_are_those_of_the_same_weights_in_float32(
        short: tuple[torch.nn.Module, Any], criterion: str) -> None:
    module, inputs = short
    found = []
    for net in (module, copy.deepcopy(module).float()):
        ask, subject = make_request(net, inputs, Recipe("params=80%", importance=criterion),
                                    Given(calibration=[inputs], owned=True))
        found.append(score(*analyse(ask, subject)).scores)
    assert found[0].keys() == found[1].keys()
    for name, scores in found[0].items():
        assert scores.ravel() == pytest.approx(found[1][name].ravel(), rel=1e-5), name


def test_what_is_repaired_is_rounded_once(short: tuple[torch.nn.Module, Any]) -> None:
    module, inputs = short
    found = []
    for net in (module, copy.deepcopy(module).float()):
        result = spacompiler.compile(net, inputs, target="body=70%", importance="wanda", align=1,
                                     repair="refit(sequential=True, damping=0.1)",
                                     calibration=[inputs] * 2, onnx=False, latency=False)
        found.append(result.module.state_dict())
    for name, array in found[0].items():
        assert array.dtype == torch.bfloat16
        want = found[1][name].bfloat16()
        off = (array.float() - want.float()).abs().max()
        assert off <= 0.01 * want.float().abs().max(), name
