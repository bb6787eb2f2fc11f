"""Open a model, and look at its groups without compiling it, which imports little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import UsageError
from ..evidence.calls import Inputs
from ..groups.solution import Solution
from ..sources import named
from ..sources.backends import backend_of
from ..sources.checkpoints import example_inputs
from ..sources.source import Source
from ..system.process import alone
from ..torch_backend.kinds import is_hf
from ..torch_backend.read.readable import check_readable


@alone()
def inspect(model: str | nn.Module, example_inputs: Inputs | None = None, *,
            modules: Sequence[str] = (), trust_remote_code: bool = False) -> Solution:
    """Trace a model and return its solved axes and groups (print it for the whole text).

    `modules` are paths of sub-modules to look at in place of the whole.
    """
    found = opened(model, example_inputs, trust=trust_remote_code)
    module, inputs = found.module, found.inputs
    if modules:
        from ..torch_backend import parts

        module, inputs = parts.of(module, modules, inputs)
    return backend_of(module).trace(module, inputs, quick=True)[1]


def opened(model: str | nn.Module, inputs: Inputs | None,
           tokenizer: Callable[..., Any] | None = None, *, trust: bool = False,
           unused: Sequence[str] = ("*",), values: bool = False) -> Source:
    """Return a model, given or named, with its example inputs.

    `unused` are patterns of arrays of a checkpoint that its class may leave, `values` says that
    numbers will be read. Raises UsageError if there are no example inputs.
    """
    if isinstance(model, str):
        found = named.load(model, trust_remote_code=trust, unused=unused)
        if inputs is not None:
            found.inputs = inputs
        return found
    if inputs is None and not is_hf(model):
        raise UsageError(f"there are no example inputs for {type(model).__name__}",
                         why="a module of your own does not say what it takes",
                         fix="give them: a tuple, or a dict of keywords, of two or more examples")
    check_readable(model, values=values)
    return Source(type(model).__name__, model, example_inputs(model) if inputs is None else inputs,
                  tokenizer)
