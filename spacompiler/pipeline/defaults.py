"""What is taken where the user asks for nothing: by what a model can give."""

from __future__ import annotations

from torch import nn

from ..request import registry
from ..stages.records import Job


def importance_for(module: object, asked: object, calibration: object) -> object:
    """The criterion that `auto` stands for: one of gradients where there are any."""
    if asked != "auto":
        return asked
    if isinstance(module, nn.Module):
        return "taylor"
    return "magnitude" if calibration is None or calibration == "none" else "wanda"


def settle_importance(job: Job) -> None:
    """Say what was taken for a file without gradients, once its groups are known.

    A criterion of inputs gives way to one of weights if it cannot score every group.
    """
    if job.recipe.importance != "auto" or isinstance(job.module, nn.Module):
        return
    if job.importance.needs:
        context = job.backend.context(job)
        blind = next((g.name for g in job.candidates if not context.measurable(g)), None)
        if blind is not None:
            job.importance = registry.find("importance", "magnitude")
            job.notes.append(f"no product with weights reads {blind}: scored by weights alone")
    job.notes.append(f"importance: {job.importance.name} (the default, taylor, needs gradients, "
                     "and ONNX Runtime computes forward only)")
