"""What is taken where passes are left open: three points between time and quality."""

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import UsageError
from spacompiler.evidence.calibration import Calibration
from spacompiler.pipeline.defaults import EFFORTS, allocation_for, importance_for, repair_for
from spacompiler.request import recipe, registry

NET, FILE = nn.Linear(2, 2), object()
REAL, MADE_UP = Calibration("text"), Calibration("none", real=False)


@pytest.mark.parametrize("effort, module, file", [
    ("quick", ("wanda", "uniform"), ("wanda", "uniform")),
    ("default", ("taylor", "tried"), ("wanda", "uniform")),
    ("best", ("curvature", "measured"), ("obs", "uniform"))])
def test_effort_says_what_open_passes_stand_for(effort, module, file):
    for model, (scores, counts) in ((NET, module), (FILE, file)):
        assert importance_for(model, "auto", "text.txt", effort) == scores
        assert allocation_for(model, "auto", REAL, ("x",), effort) == counts
        assert allocation_for(model, "auto", MADE_UP, ("x",), effort) == "uniform"
        assert importance_for(model, "snip", "text.txt", effort) == "snip"
    assert importance_for(NET, "auto", "none", effort) == "taylor"
    assert importance_for(FILE, "auto", "none", effort) == "magnitude"
    assert repair_for("auto", True, effort) == EFFORTS[effort].mended
    assert repair_for("auto", False, effort) == "none"
    assert repair_for("bias", False, effort) == "bias"


def test_all_efforts_are_options_and_name_passes():
    assert tuple(EFFORTS) == recipe.EFFORTS
    for effort in EFFORTS.values():
        for kind, name in (("importance", effort.gradients), ("importance", effort.forward),
                           ("allocation", effort.tried), ("compensation", effort.mended)):
            assert registry.find(kind, name).name == name.partition("(")[0]
    with pytest.raises(UsageError, match="effort"):
        recipe.Recipe("params=50%", effort="more")


def test_an_artifact_says_what_the_effort_took(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    data = [(x,) for x in torch.randn(6, 16, 6)]
    made = spacompiler.compile(net, data[0], target="params~60%", effort="best", align=1,
                               calibration=data, onnx=False, latency=False, out=tmp_path / "out")
    kept = recipe.Recipe.read(tmp_path / "out" / "recipe.yaml")
    taken = [text.partition("(")[0] for text in (kept.importance, kept.allocation)]
    assert kept.effort == "best" and taken == ["curvature", "measured"]
    assert kept.repair.startswith("refit(") and "sequential=True" in kept.repair
    assert set(kept.automatic) == {"importance", "allocation", "repair"}
    assert made.plan.costs["params"]["pruned"] < made.plan.costs["params"]["dense"]
