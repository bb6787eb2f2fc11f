"""A diagnosis from a source: trace it, find its data, and look."""

from __future__ import annotations

from ..evidence.calls import as_call
from ..evidence.diagnosis import Diagnosis, diagnose
from ..sources.backends import backend_of
from ..sources.source import Source
from .request import Data, Windows, resolve


def diagnosed(found: Source, calibration: Data) -> Diagnosis:
    """Return the diagnosis of a model on data, its example inputs where none is named.

    Raises SpaError for what cannot be traced or is no data.
    """
    module, inputs = found.module, found.inputs
    backend = backend_of(module)
    trace, solution = backend.trace(module, inputs)
    batches = [as_call(inputs)] if calibration is None else resolve(
        calibration, inputs, module, Windows(), tokenizer=found.tokenizer,
        own=found.calibration).batches
    return diagnose(backend.context(trace, solution, 0), list(solution.groups.values()), batches)
