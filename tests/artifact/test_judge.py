"""Pruned models are dense ones without slices, judged by their values alone; wrong ones are not."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import spacompiler


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "judge_benchmark", Path(__file__).parents[2] / "benchmarks/judge.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCH = _benchmark()
F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(("name", "roles", "criterion", "dtype", "seed"), [
    ("mlp", ("channel",), "taylor", F32, 1),
    ("grouped-conv", ("channel",), "geometric-median", BF16, 2),
    ("shufflenet", ("channel",), "magnitude", F32, 3),
    ("llama-gqa", ("channel", "head"), "wanda", F32, 4),
    ("vit", ("head dim",), "magnitude", BF16, 5),
])
def test_a_zoo_model_is_the_dense_one_without_slices(
        name: str, roles: tuple[str, ...], criterion: str, dtype: torch.dtype, seed: int) -> None:
    stays, gap = BENCH.one(name, roles, criterion, dtype, seed)
    assert stays < 0.97 and gap <= BENCH.NEAR


# --- the judge is no friend of wrong models -----------------------------------------------------

INPUTS = (torch.zeros(4, 12),)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A dense model and its pruned one, which is right."""
    dense = BENCH.drawn(nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.BatchNorm1d(32),
                                      nn.Linear(32, 3)), 0).eval()
    made = spacompiler.compile(copy.deepcopy(dense), (torch.randn(4, 12),), target="params=60%",
                               importance="magnitude", align=1, latency=False, onnx=False)
    assert BENCH.judge(dense, made.module, INPUTS)[1] <= BENCH.NEAR
    return dense, made.module


def test_a_value_that_changed_is_found(pair: tuple[nn.Module, nn.Module]) -> None:
    wrong = copy.deepcopy(pair[1])
    wrong[0].weight.data[2, 3] *= 1.001
    with pytest.raises(BENCH.Wrong, match=r"0\.weight: a number changed"):
        BENCH.judge(pair[0], wrong, INPUTS)


@pytest.mark.parametrize("name", ["0.weight", "2.running_var", "3.weight"])
def test_slices_in_another_order_in_one_array_are_found(
        name: str, pair: tuple[nn.Module, nn.Module]) -> None:
    wrong = copy.deepcopy(pair[1])
    array = wrong.state_dict(keep_vars=True)[name].data
    dim = 1 if name == "3.weight" else 0
    array.copy_(array.roll(1, dim))
    with pytest.raises(BENCH.Wrong, match="results differ"):
        BENCH.judge(pair[0], wrong, INPUTS)


def test_a_slice_that_should_be_gone_is_found(pair: tuple[nn.Module, nn.Module]) -> None:
    dense, wrong = pair[0], copy.deepcopy(pair[1])
    stays = BENCH.find(dense[0].weight.detach().numpy(), wrong[0].weight.detach().numpy())
    gone = np.flatnonzero(~stays.any(1))[0]
    wrong[0].weight.data[0] = dense[0].weight.data[gone]
    with pytest.raises(BENCH.Wrong, match="results differ"):
        BENCH.judge(dense, wrong, INPUTS)


def test_code_that_computes_otherwise_is_found(pair: tuple[nn.Module, nn.Module]) -> None:
    wrong = copy.deepcopy(pair[1])
    wrong[1] = nn.LeakyReLU(0.05)
    with pytest.raises(BENCH.Wrong, match="results differ"):
        BENCH.judge(pair[0], wrong, INPUTS)


def test_a_network_that_reads_nothing_of_what_is_gone_is_no_proof(
        pair: tuple[nn.Module, nn.Module]) -> None:
    dense, small = map(copy.deepcopy, pair)
    for net in (dense, small):
        net[2] = nn.Sequential(net[2], nn.Hardtanh(0.0, 1e-9))
    with pytest.raises(BENCH.Wrong, match="nothing was judged"):
        BENCH.judge(dense, small, INPUTS)


def test_slices_of_slices_are_searched_one_by_one() -> None:
    dense = torch.randn(4, 6, 3).numpy()
    small = np.stack([dense[0][[0, 2]], dense[3][[1, 5]]])
    stays = BENCH.find(dense, small)
    assert stays.sum() == small.size and (dense[stays] == small.ravel()).all()
