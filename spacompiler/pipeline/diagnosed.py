"""A diagnosis of a model: find it and its data, trace it, and look."""

from __future__ import annotations

from torch import nn

from ..errors import UsageError
from ..evidence.calls import Inputs, as_call
from ..evidence.diagnosis import Diagnosis
from ..evidence.diagnosis import diagnose as looked
from ..sources import named
from ..sources.backends import backend_of
from ..sources.source import Source
from ..system.process import alone
from .request import Data, Windows, resolve


@alone()
def diagnose(model: str | nn.Module, example_inputs: Inputs | None = None, *,
             calibration: Data = None, trust_remote_code: bool = False) -> Diagnosis:
    """Say of a model's groups what is silent and uneven, of its attentions how large scores get.

    On `calibration` (as of `compile`), else on the example inputs. Forward passes only.

    Raises UsageError for a module without example inputs, SpaError for what cannot be traced or is
    no data.
    """
    if isinstance(model, str):
        found = named.load(model, trust_remote_code=trust_remote_code)
    elif example_inputs is None:
        raise UsageError("there are no example inputs", where=type(model).__name__,
                         fix="give them: a tuple, or a dict of keywords")
    else:
        found = Source(type(model).__name__, model, example_inputs)
    module, inputs = found.module, found.inputs if example_inputs is None else example_inputs
    trace, solution = backend_of(module).trace(module, inputs)
    batches = [as_call(inputs)] if calibration is None else resolve(
        calibration, inputs, module, Windows(), tokenizer=found.tokenizer,
        own=found.calibration).batches
    return looked(backend_of(module).context(trace, solution, 0), list(solution.groups.values()),
                  batches)
