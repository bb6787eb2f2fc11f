"""What is taken where the user asks for nothing: by what a model can give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..evidence.calibration import Calibration
from ..evidence.protocol import Importance
from ..request import registry
from ..stages.records import Request, Subject, Traced
from .resolved import is_open


@dataclass(frozen=True)
class Effort:
    """What `auto` stands for at one point of the trade between time and quality.

    `gradients` is the criterion of modules, `forward` that of what has no gradients, `tried` the
    allocation of modules where scoring reads real data, `mended` the repair where there is any.
    """

    gradients: str
    forward: str
    tried: str
    mended: str


THOROUGH = "refit(sequential=True, residual=True, every=True)"
EFFORTS: Mapping[str, Effort] = {
    "quick": Effort("wanda", "wanda", "uniform", "refit"),
    "default": Effort("taylor", "wanda", "tried", "refit"),
    "best": Effort("curvature", "obs", "measured", THOROUGH)}


def importance_for(module: object, asked: object, calibration: object, effort: str) -> object:
    """The criterion that `auto` stands for: one of gradients where there are any.

    One of inputs, or of a thorough effort, gives way to `taylor` or `magnitude` without data.
    """
    if asked != "auto":
        return asked
    without = calibration == "none"
    if isinstance(module, nn.Module):
        return EFFORTS["default" if without else effort].gradients
    return "magnitude" if calibration is None or without else EFFORTS[effort].forward


def allocation_for(module: object, asked: object, calibration: Calibration,
                   needs: Sequence[str], effort: str) -> object:
    """The allocation that `auto` stands for: what trials say, where scoring reads real data.

    A compile that looks at weights alone runs no network, and allocates uniformly.
    """
    if asked != "auto":
        return asked
    return EFFORTS[effort].tried if isinstance(module, nn.Module) and calibration.real and needs \
        else "uniform"


def repair_for(asked: object, fits: bool, effort: str) -> object:
    """The repair that `auto` stands for; `fits` says that one may be taken unasked."""
    if asked != "auto":
        return asked
    return EFFORTS[effort].mended if fits else "none"


def settled(ask: Request, subject: Subject, traced: Traced) -> Importance:
    """Return the criterion that scores; say what was taken for a file without gradients.

    A criterion of inputs gives way to one of weights if it cannot score every group.
    """
    taken = ask.importance
    if not is_open(ask.recipe, "importance") or isinstance(subject.model, nn.Module):
        return taken
    if taken.needs:
        context = subject.backend.context(traced.trace, traced.solution, ask.recipe.seed)
        blind = next((g.name for g in traced.candidates if not context.measurable(g)), None)
        if blind is not None:
            taken = registry.find("importance", "magnitude")
            ask.notes.append(f"no product with weights reads {blind}: scored by weights alone")
    ask.notes.append(f"importance: {taken.name} (the default, taylor, needs gradients, "
                     "and ONNX Runtime computes forward only)")
    return taken
