"""The rows of quality.py: how a language model is scored, allocated and repaired in each."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spacompiler.passes.factors import Factors
from spacompiler.passes.gates import Gates

MLP = ("*.mlp.*",)
KV_GROUPS = "*.q_proj.weight:0.0"


@dataclass(frozen=True)
class Method:
    """A row: passes by name, and which groups may go (all channels and heads, or `only`).

    Without a criterion it is a compile with no options but the target: on the text that it takes by
    itself, or on the calibration's (`given_text`), of which it reads what it reads by default.
    """

    importance: Any
    allocation: str = "uniform"
    repair: str = "none"
    only: tuple[str, ...] = MLP
    floor: float = 0.0
    needs: tuple[str, ...] = ()
    continued: bool = False
    given_text: bool = False
    schedule: Any = None  # learns gates, from the criterion's scores; `scales` after the repair


METHODS: dict[str, Method] = {
    "default": Method(""), "default, given text": Method("", given_text=True),
    "random": Method("random"),
    "magnitude": Method("magnitude"),
    "LLM-Pruner vector": Method("taylor-vector"),
    "LLM-Pruner element1": Method("taylor-element"),
    "LLM-Pruner mixed": Method("taylor-element(order='mixed')"),
    "Wanda-sp": Method("wanda"),
    "Global MP": Method("magnitude", "threshold", floor=0.02),
    "GBLM": Method("gblm"),
    "FLAP UL-UM": Method("fluctuation", repair="bias"),
    "FLAP AL-AM": Method("fluctuation(standardised=True)", "threshold", "bias",
                         only=(*MLP, KV_GROUPS)),
    "CFSP": Method("cfsp", "cfsp-layers"),
    "Adapt-Pruner": Method("taylor-element", "adapt-layers"),
    "OBS refit": Method("obs(bias=False)", repair="refit(bias=False, damping=0.01)"),
    "OBS, ridge chosen": Method("obs(bias=False)", repair="refit"),
    "ours, MLP only": Method("curvature", "global", "refit", floor=0.02),
    "ours, by layers": Method("curvature", "cfsp-layers", "refit", floor=0.02),
    "ours, not measured": Method("curvature", "global", "refit", (), 0.02),
    "ours, measured": Method("curvature", "measured", "refit", (), 0.02),
    "ours, searched": Method("curvature", "search(generations=4, offspring=8)", "refit", (), 0.02),
    "ours, in sequence": Method("curvature", "measured",
                                "refit(sequential=True, residual=True, every=True)", (), 0.02),
    "ours": Method("curvature", "measured",
                   "refit(sequential=True, residual=True, every=True)", (), 0.02,
                   continued=True),
    "ours, scored by given text": Method(
        "curvature(continued=False)", "measured",
        "refit(sequential=True, residual=True, every=True)", (), 0.02, continued=True),
    "gates, refit": Method("curvature", repair="refit(damping=0.1)", only=(), floor=0.02,
                           schedule=Gates(scales=0)),
    "gates": Method("curvature", repair="refit(damping=0.1)", only=(), floor=0.02,
                    schedule=Gates()),
    "gates, streams": Method("curvature", repair="refit(damping=0.1)", only=(), floor=0.02,
                             schedule=Gates(streams=True)),
    "gates, in sequence": Method("curvature", only=(), floor=0.02, schedule=Gates(streams=True),
                                 repair="refit(sequential=True, residual=True, every=True)"),
    "gates, nothing else": Method("curvature", only=(), floor=0.02,
                                  schedule=Gates(refit=0.0, scales=0)),
    "gates, factors": Method("curvature", only=(), floor=0.02, schedule=Gates(refit=0.0)),
    "gates, continued": Method("curvature", only=(), floor=0.02, schedule=Gates(), continued=True,
                               repair="refit(sequential=True, residual=True, every=True)"),
    "factors, continued": Method("curvature", "measured(batches=4, rounds=3)", "refit", (), 0.02,
                                 continued=True, schedule=Factors()),
    "factors, in sequence": Method(
        "curvature", "measured(batches=4, rounds=3)",
        "refit(sequential=True, residual=True, every=True)", (), 0.02, continued=True,
        schedule=Factors()),
    "OBS refit, continued": Method("obs(bias=False)",
                                   repair="refit(bias=False, damping=0.01)", continued=True),
}
GLOBAL = ("magnitude", "wanda", "taylor", "taylor-vector", "taylor-element")
METHODS |= {f"{how}, {by}": Method(by, how, only=(), floor=0.1)
            for by in GLOBAL for how in ("uniform", "global")}


def own(text: str) -> tuple[str, Method]:
    """Return a row for `file.py:Class`."""
    path, _, attribute = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return attribute, Method(getattr(module, attribute)())
