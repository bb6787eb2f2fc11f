"""What a backend must do: the steps of a compile that depend on where the model lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..groups.solution import Solution
from .proof import Proof


@dataclass(frozen=True)
class Backend:
    """The steps of a compile that depend on where the model lives.

    `kind` says what a model is: a torch module, or an ONNX file.
    `check(model, name)` raises SpaError for weights that are not finite; `trace(model, inputs,
    quick=False, checked=False)` returns a trace (with its `graph`) and its solution, a quick one of
    the example inputs' sizes only, and only if it computes what the model does where that is to be
    `checked`; `context(trace, solution, seed)` is what importance passes see; `digest(model)`
    the hash of the dense weights; `prove(model, decided, seed)` the proof, and
    `emit(subject, decided, layout, notes)` returns the pruned model, and `module(model, folder)`
    what computes a dense or pruned model when it is called with tensors, by files in the folder
    where it needs some. `add_biases(model, traced,
    owned)` gives a model zero biases where consumers lack one, and None where none does.
    """

    kind: Literal["torch", "onnx"]
    check: Callable[[Any, str], None]
    trace: Callable[..., tuple[Any, Solution]]
    context: Callable[[Any, Solution, int], Any]
    digest: Callable[[Any], str]
    prove: Callable[[Any, Any, int], Proof]
    emit: Callable[[Any, Any, str, list[str]], Any]
    module: Callable[[Any, Path], nn.Module]
    add_biases: Callable[[Any, Any, bool], Any]
