"""Shrink a live module in place: parameters, buffers, gradients, optimiser state, attributes.

Every array keeps its identity (the same Parameter object holds a smaller array), so that
optimisers, hooks and the user's own references stay valid. What was done can be undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spacompiler.axes.choices import Choices, kept_size
from spacompiler.axes.expressions import ONE, Expr, atoms
from spacompiler.errors import SpaError
from spacompiler.groups.solution import Solution
from spacompiler.torch_backend.emit.attributes import Change, assign
from spacompiler.torch_backend.emit.module import attribute_changes
from spacompiler.torch_backend.emit.slicer import Slicer, cut
from spacompiler.torch_backend.trace import Trace
from spacompiler.torch_backend.weights import named_arrays

Dims = tuple[Expr, ...]
# optimiser state that is not of its parameter's shape -> which of its dimensions it has
FACTORED: Mapping[str, Any] = {
    "exp_avg_sq_row": lambda dims: dims[:-1],
    "exp_avg_sq_col": lambda dims: (*dims[:-2], *dims[-1:]),
    "row_var": lambda dims: (*dims[:-1], ONE),
    "col_var": lambda dims: (*dims[:-2], ONE, *dims[-1:]),
}


@dataclass
class Undo:
    """What a module held before it shrank; `set_to` are the attributes that were set."""

    arrays: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = field(
        default_factory=list)
    state: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    set_to: dict[tuple[str, str], Any] = field(default_factory=dict)

    def __call__(self) -> None:
        for tensor, data, grad in self.arrays:
            put(tensor, data, grad)
        for holder, key, value in self.state:
            holder[key] = value
        for part, name, value in reversed(self.attributes):
            setattr(part, name, value)

    def set(self, module: nn.Module, changes: Iterable[Change]) -> None:
        """Set attributes of a module's parts (dotted names too)."""
        for path, name, value in changes:
            part, first = module.get_submodule(path), name.partition(".")[0]
            self.attributes.append((part, first, getattr(part, first)))
            self.set_to[path, name] = value
            assign(part, name, value)


def operate_in_place(module: nn.Module, trace: Trace, solution: Solution, choices: Choices,
                     optimizers: Iterable[torch.optim.Optimizer] = (),
                     whole: tuple[Solution, Choices] | None = None) -> Undo:
    """Carry out a plan on the module itself and on the state of its optimisers.

    `whole` is the dense solution with all that went so far, from which attributes are taken, so
    that they do not depend on how many steps led there.

    Raises SpaError, having changed nothing, if an optimiser's state cannot be sliced.
    """
    slicer = Slicer(trace, solution, choices)
    touched = {id(tensor): (tensor, trace.tied[name]) for name, tensor in named_arrays(module)
               if name in trace.tied and not slicer.untouched(name)}
    dims = solution.weights()
    states = [change for optimizer in optimizers for tensor, first in touched.values()
              for change in _state_changes(optimizer, tensor, dims[first], choices, first)]
    undo, made = Undo(), dict[str, torch.Tensor]()
    for tensor, first in touched.values():
        if first not in made:
            made[first] = slicer.array(first).detach()
        grad = None if tensor.grad is None else cut(tensor.grad, dims[first], choices)
        undo.arrays.append((tensor, tensor.data, tensor.grad))
        put(tensor, made[first], grad)
    for holder, key, value in states:
        undo.state.append((holder, key, holder[key]))
        holder[key] = value
    undo.set(module, attribute_changes(module, trace, *(whole or (solution, choices))))
    return undo


def put(tensor: torch.Tensor, data: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Give a tensor other data, of any size, and a gradient to match.

    A graph that is still alive (the user's last loss) holds a node that accumulates gradients of
    the old size; autograd makes a new one only when the type changes, so it does, for a moment.
    """
    tensor.grad = None
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    if tensor.is_floating_point():
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = grad


def _state_changes(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, dims: Dims,
                   choices: Choices, name: str) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield (state of a parameter, key, sliced value) for all that an optimiser keeps of it."""
    state = optimizer.state.get(tensor, {})
    for key, value in state.items():
        if (isinstance(value, torch.Tensor) and value.numel() != 1) or isinstance(value, list):
            yield state, key, _sliced(value, tensor, dims, choices, key, name)


def _sliced(value: object, tensor: torch.Tensor, dims: Dims, choices: Choices, key: str,
            name: str) -> torch.Tensor:
    shape = tuple(getattr(value, "shape", ()))
    own = dims if shape == tuple(tensor.shape) else FACTORED.get(key, lambda d: ())(dims)
    mentioned = {a for e in own for a in atoms(e)}
    whole = all(o in mentioned for a in mentioned & choices.keys() for o in choices[a].outers)
    if not isinstance(value, torch.Tensor) or not shape or not whole \
            or tuple(e.size for e in own) != shape:
        raise SpaError(
            f"the optimiser's state {key!r} of {name} cannot be sliced",
            why=f"it is {type(value).__name__} {list(shape)} for a parameter "
                f"{list(tensor.shape)}",
            fix="use an optimiser that keeps its state element by element (SGD, Adam, AdamW, "
                "RMSprop, Adagrad, ...), or Adafactor")
    if all(kept_size(e, choices) == e.size for e in own):
        return value
    return cut(value, own, choices)
