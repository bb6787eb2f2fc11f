"""Measurements on a file by ONNX Runtime, for allocation passes that forward passes are enough for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..axes.choices import Choices
from ..evidence.calls import Batch
from ..onnx_backend.prove import as_tensors
from ..onnx_backend.read.trace import OnnxTrace
from ..onnx_backend.run.masks import masked
from ..onnx_backend.run.observe import feed_of
from ..onnx_backend.run.session import Session
from .compared import Arrays, Compared


@dataclass
class FileMeasure(Compared):
    """What is measured on a file: a session is opened for each plan, and for each array moved."""

    trace: OnnxTrace

    def results(self, batch: Batch, choices: Choices | None = None,
                arrays: Arrays | None = None) -> list[torch.Tensor]:
        """Return the floating results of a batch; see `Compared`."""
        moved = {name: self.trace.array(name, np.ascontiguousarray(value.numpy()))
                 for name, value in (arrays or {}).items()}
        model = masked(self.trace, self.solution, choices or {}, {**self.trace.repaired, **moved})
        return as_tensors(Session(model).run(feed_of(self.trace, batch)))

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array of the file."""
        return torch.from_numpy(np.array(self.trace.stored(name)))

    def called(self, batch: Batch) -> Batch:
        """Return a batch as it is: losses take a file's inputs by their names."""
        return batch
