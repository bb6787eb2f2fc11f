"""Which backend a model belongs to: asked once, where it is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..stages.backend import Backend
from ..torch_backend.backend import TORCH
from ..torch_backend.parts import PARTS, Parts

if TYPE_CHECKING:
    from ..onnx_backend.read.file import OnnxFile


def backend_of(model: nn.Module | OnnxFile) -> Backend:
    """Return what carries out a compile of a model: of a torch module, or of an ONNX file."""
    if isinstance(model, nn.Module):
        return PARTS if isinstance(model, Parts) else TORCH
    from ..onnx_backend.backend import BACKEND

    return BACKEND
