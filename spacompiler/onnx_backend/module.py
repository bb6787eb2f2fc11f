"""An ONNX file as a module: called with tensors, computed by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from ..errors import UsageError
from ..runtime.session import open_session, run_session
from .read.file import OnnxFile
from .save import save


class OnnxModule(nn.Module):
    """Calls the file with tensors by position or by input name; it holds no parameters."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self._session = path, open_session(path)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the file's results. Raises UsageError if inputs are missing."""
        names = [i.name for i in self._session.get_inputs()]
        given = dict(zip(names, args, strict=False)) | kwargs
        if set(given) != set(names):
            raise UsageError("the inputs do not fit the file",
                             why=f"given {sorted(given)}, it has {sorted(names)}")
        results = run_session(self._session, {n: t.detach().numpy() for n, t in given.items()})
        return tuple(map(torch.from_numpy, results))


def opened(model: OnnxFile | ir.Model, folder: Path) -> OnnxModule:
    """Return a module that computes what a file does, or a model that is saved to the folder."""
    if isinstance(model, OnnxFile):
        return OnnxModule(model.path)
    save(model, folder / "model.onnx")
    return OnnxModule(folder / "model.onnx")
