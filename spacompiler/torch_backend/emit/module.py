"""Carry out a plan on a copy of the user's module: arrays sliced, size attributes brought in step.

The copy shares the memory of every array that a plan leaves alone (until `apart` gives the result
its own), so no second model is held. Attributes of
stock modules stand in one table; those that a module's own code reads are found by watching it
(see `attributes`). Either way the copy is compared with the re-written program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...axes.choices import Choices, kept_size
from ...errors import SpaError
from ...groups.solution import Solution
from ...plan.effects import edits, norm_changes
from ...rows.findings import Path
from ...store.room import Room
from ..copying import copied
from ..trace import Trace
from ..weights import named_arrays
from .apart import fresh
from .attention import narrow
from .attributes import Change, assign
from .reparametrised import remade
from .slicer import Slicer

Attribute = Callable[[nn.Module], Any]


def _size(array: str, dim: int, times: str = "") -> Attribute:
    def read(module: nn.Module) -> int | None:
        stored = getattr(module, array, None)
        return None if stored is None else \
            int(stored.shape[dim]) * getattr(module, times or "_one", 1)

    return read


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = getattr(module, "weight", None)
    return None if weight is None else tuple(weight.shape)


def _hidden(module: nn.Module) -> int:
    """The hidden size of a recurrent layer, which projects it or feeds it back."""
    projected = getattr(module, "weight_hr_l0", None)
    return int((module.weight_hh_l0 if projected is None else projected).shape[1])  # type: ignore


_CONV = {"out_channels": _size("weight", 0), "in_channels": _size("weight", 1, "groups")}
_DECONV = {"in_channels": _size("weight", 0), "out_channels": _size("weight", 1, "groups")}
_FEATURES = {"num_features": _size("weight", 0)}
_LAST = {"normalized_shape": _shape}
_RECURRENT = {"input_size": _size("weight_ih_l0", 1), "hidden_size": _hidden,
              "proj_size": _size("weight_hr_l0", 0)}
_CELL = {"input_size": _size("weight_ih", 1), "hidden_size": _size("weight_hh", 1)}
# module class -> attribute -> how it reads off the sliced arrays
ATTRIBUTES: Mapping[str, Mapping[str, Attribute]] = {
    "Linear": {"out_features": _size("weight", 0), "in_features": _size("weight", 1)},
    "Embedding": {"embedding_dim": _size("weight", 1)},
    "Conv1D": {"nx": _size("weight", 0), "nf": _size("weight", 1)},
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _CONV),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), _DECONV),
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm",
                     "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), _FEATURES),
    "LayerNorm": _LAST, "RMSNorm": _LAST,
    "GroupNorm": {"num_channels": _size("weight", 0)},
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _RECURRENT),
    **dict.fromkeys(("LSTMCell", "GRUCell", "RNNCell"), _CELL),
}
# operator -> (path of the argument, attribute of the module that made the call)
CALL_ATTRIBUTES: Mapping[str, tuple[Path, str]] = {
    "conv": (("args", 6), "groups"), "convolution": (("args", 8), "groups"),
    "group_norm": (("args", 1), "num_groups"), "expand": (("args", 1, 2), "num_key_value_groups"),
}
# operator -> (position of the more and of the fewer, the dimension that counts them, attribute of
# the module that made the call: how many of the one go to each of the other). transformers' code
# hands the number to an operator for some inputs (a mask, a step of generation), and for others
# lets the attention share keys among queries itself.
CALL_RATIOS = {"scaled_dot_product_attention": (0, 1, -3, "num_key_value_groups")}
EPS = ("eps", "variance_epsilon", "epsilon")


def operate(trace: Trace, module: nn.Module, solution: Solution, choices: Choices, *,
            sizes: Sequence[Change] = (), room: Room | None = None,
            cut: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """Return a pruned copy of a module; `sizes` are attributes to change beyond the stock ones.

    Large arrays lie in a `room` where there is one. What is `cut` already, by name, is taken as it
    is, and what is cut is added.
    """
    cut = {} if cut is None else cut
    slicer = Slicer(trace, solution, choices, room)
    memo: dict[int, Any] = {}
    made: dict[str, torch.Tensor] = {}
    computed = remade(module, trace, slicer)
    for name, tensor in named_arrays(module):
        first = trace.tied.get(name)
        if name in computed:
            memo[id(tensor)] = fresh(tensor, computed[name])
            continue
        if first is None or slicer.untouched(name):
            memo.setdefault(id(tensor), fresh(tensor))
            continue
        if first not in made:
            if first not in cut:
                cut[first] = slicer.array(name)
            made[first] = fresh(tensor, cut[first])
        memo[id(tensor)] = made[first]
    pruned = copied(module, memo)
    for path, attribute, value in (*attribute_changes(pruned, trace, solution, choices), *sizes):
        assign(pruned.get_submodule(path), attribute, value)
    narrow(pruned)
    return pruned


def attribute_changes(module: nn.Module, trace: Trace, solution: Solution,
                      choices: Choices) -> list[tuple[str, str, Any]]:
    """Return (module path, attribute, value) of every size attribute that a plan changes.

    `module` holds the sliced arrays already, its attributes are still the dense ones.
    """
    changes = [change for of in (_call_changes, _ratio_changes, _eps_changes)
               for change in of(module, solution, choices)]
    groups = {path: value for path, name, value in changes if name == "groups"}
    for path, part in module.named_modules():
        for name, read in ATTRIBUTES.get(
                type(part).__name__.removeprefix("Parametrized"), {}).items():
            have = getattr(part, name, None)
            if have is None:
                continue
            was = getattr(part, "groups", None)
            if path in groups:
                part.groups = groups[path]
            value = read(part)
            if path in groups:
                part.groups = was  # type: ignore[assignment]
            if value is not None and have != value:
                changes.append((path, name, value))
    return changes


def held_in_code(module: nn.Module, solution: Solution, choices: Choices) -> bool:
    """Whether a plan changes sizes that modules of no stock class hand to operators: their own code
    holds them, or reads them off arrays."""
    where = {node.name: node.where for node in solution.graph.nodes}
    kinds = {path: type(part).__name__ for path, part in
             module.named_modules(remove_duplicate=False)}
    return any(isinstance(value, int) and kinds.get(where[name]) not in ATTRIBUTES
               for name, _, value, _ in edits(solution, choices))


def _call_changes(module: nn.Module, solution: Solution,
                  choices: Choices) -> Iterator[tuple[str, str, Any]]:
    nodes = {node.name: node for node in solution.graph.nodes}
    for name, path, value, old in edits(solution, choices):
        for op, (place, attribute) in CALL_ATTRIBUTES.items():
            node = nodes[name]
            known = path == place and node.op.startswith(f"aten.{op}")
            if known and getattr(module.get_submodule(node.where), attribute, None) == old:
                yield node.where, attribute, value


def _ratio_changes(module: nn.Module, solution: Solution,
                   choices: Choices) -> Iterator[tuple[str, str, Any]]:
    for node in solution.graph.nodes:
        for op, (more, fewer, dim, attribute) in CALL_RATIOS.items():
            if not node.op.startswith(f"aten.{op}"):
                continue
            many, few = (solution.solver.dims[node.reads()[at]][dim] for at in (more, fewer))
            was = many.size // few.size
            now = kept_size(many, choices) // kept_size(few, choices)
            if now != was == getattr(module.get_submodule(node.where), attribute, None):
                yield node.where, attribute, now


def _eps_changes(module: nn.Module, solution: Solution,
                 choices: Choices) -> Iterator[tuple[str, str, Any]]:
    for change in norm_changes(solution, choices):
        path = change.norm.gain.rpartition(".")[0]
        part = module.get_submodule(path)
        for attribute in EPS:
            if isinstance(getattr(part, attribute, ""), (float, type(None))):
                yield path, attribute, change.eps


def resize(dense: nn.Module, attributes: Sequence[Sequence[Any]],
           arrays: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a module that holds `arrays` and the given attributes.

    Raises SpaError if the arrays are not those of this network.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_arrays(dense):
        if name in arrays:
            memo.setdefault(id(tensor), fresh(tensor, arrays[name]))
        else:
            memo.setdefault(id(tensor), fresh(tensor, tensor.clone()))
    unknown = sorted(arrays.keys() - {name for name, _ in named_arrays(dense)})
    if unknown:
        raise SpaError(f"the network has no array {unknown[0]!r}",
                       why="the artifact was made from another network",
                       fix="pass the dense module it was made from")
    pruned = copied(dense, memo)
    for path, attribute, value in attributes:
        assign(pruned.get_submodule(path), attribute, value)
    narrow(pruned)
    return pruned
