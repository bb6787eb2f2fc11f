"""Requests from Python that are malformed: one clear error, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError, UsageError
from spacompiler.request.recipe import Recipe

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
FAST = {"importance": "magnitude", "align": 1, "onnx": False, "latency": False, "dry_run": True}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(),
                         nn.Linear(24, 3))


@pytest.mark.parametrize("options, what", [
    ({"target": 0.5}, "a target is text, not 0.5"),
    ({"target": "params=60%", "floor": "low"}, "floor must be a number, not 'low'"),
    ({"target": "params=60%", "align": 1.5}, "align must be a whole number or None, not 1.5"),
    ({"target": "params=60%", "onnx": "no"}, "onnx must be True or False, not 'no'"),
    ({"target": "params=60%", "only": 3}, "only must be a list of texts, not 3"),
    ({"target": "params=60%", "ignore": [0]}, r"ignore must be a list of texts, not \(0,\)"),
    ({"target": "params=60%", "sample": 3}, "there is no option 'sample'"),
    ({"target": "params=60%", "adapters": ("a",)}, "there is no option 'adapters'"),
])
def test_an_option_of_another_type_or_name_is_a_usage_error(options, what):
    with pytest.raises(UsageError, match=what):
        spacompiler.compile(net(), (X,), **{**FAST, **options})


def test_a_misspelt_option_of_a_pruner_is_a_usage_error():
    with pytest.raises(UsageError, match="no option 'rolse'") as problem:
        spacompiler.Pruner(net(), (X,), target="params=60%", rolse=("channel",))
    assert "did you mean 'roles'?" in problem.value.fix


def test_a_module_without_example_inputs_is_a_usage_error():
    for call in (lambda: spacompiler.compile(net(), target="params=60%", **FAST),
                 lambda: spacompiler.inspect(net())):
        with pytest.raises(UsageError, match="no example inputs for Sequential"):
            call()


def test_one_pattern_is_a_list_of_one():
    assert Recipe(target="params=60%", ignore="2.*", only=["0.*"]).only == ("0.*",)
    result = spacompiler.compile(net(), (X,), target="params=80%", ignore="0.*", **FAST)
    assert list(result.plan.kept) == ["2.weight:0"]


class Words(nn.Module):
    """Adds two tables, one of them looked up by place."""

    def __init__(self, places=8):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 12), nn.Embedding(places, 12)
        self.body = net()

    def forward(self, ids):
        return self.body(self.words(ids) + self.places(torch.arange(ids.shape[1])))


@pytest.mark.parametrize("where", ["example", "calibration"])
def test_tokens_beyond_the_vocabulary_are_named(where):
    good, bad = torch.randint(20, (2, 6)), torch.full((2, 6), 23)
    with pytest.raises(SpaError, match=r"token 23 is beyond words\.weight, which has 20") as found:
        spacompiler.compile(Words(), (bad if where == "example" else good,), target="params=80%",
                            calibration=[(good,), (bad,)], **{**FAST, "importance": "taylor"})
    assert where in found.value.where


def test_places_beyond_a_table_are_an_error_that_says_so():
    ids = torch.randint(20, (2, 6))
    with pytest.raises(SpaError, match="beyond a table"):
        spacompiler.compile(Words(), (ids,), target="params=80%",
                            calibration=[(torch.randint(20, (2, 11)),)],
                            **{**FAST, "importance": "taylor"})


def test_a_network_that_does_not_run_on_the_example_is_an_error():
    with pytest.raises(SpaError, match="does not run on the example inputs") as problem:
        spacompiler.compile(net(), (X[:, :7],), target="params=80%",
                            **{**FAST, "importance": "taylor"})
    assert "shapes cannot be multiplied" in problem.value.why
