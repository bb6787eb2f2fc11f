"""What is taken where the user asks for nothing: by what a model can give."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..evidence.calibration import Calibration
from ..evidence.protocol import Importance
from ..request import registry
from ..stages.records import Request, Subject, Traced
from .resolved import is_open


def importance_for(module: object, asked: object, calibration: object) -> object:
    """The criterion that `auto` stands for: one of gradients where there are any."""
    if asked != "auto":
        return asked
    if isinstance(module, nn.Module):
        return "taylor"
    return "magnitude" if calibration is None or calibration == "none" else "wanda"


def allocation_for(module: object, asked: object, calibration: Calibration,
                   needs: Sequence[str]) -> object:
    """The allocation that `auto` stands for: what trials say, where scoring reads real data.

    A compile that looks at weights alone runs no network, and allocates uniformly.
    """
    if asked != "auto":
        return asked
    return "tried" if isinstance(module, nn.Module) and calibration.real and needs \
        else "uniform"


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
