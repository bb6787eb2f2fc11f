"""A traced network: its program, graph and inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from ..errors import SpaError
from ..evidence.labels import is_label, labels_of
from ..evidence.room import Room
from ..evidence.where import DOUBLE, HERE, Where, has_double
from ..graph.ir import Graph
from .machine import computing

REPAIRED = 1 << 27
"""Bytes of repaired arrays that are held in memory; others lie in files until they are written."""


@dataclass
class Recorded:
    """A program of static sizes: what of an ExportedProgram reading and slicing it needs."""

    graph: fx.Graph
    graph_signature: ExportGraphSignature
    state_dict: dict[str, Any]
    constants: dict[str, torch.Tensor]

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The program as something that runs."""
        return fx.GraphModule({}, self.graph)


Program = ExportedProgram | Recorded


@dataclass
class Trace:
    """A traced module: the program, its IR, and how to call it.

    `repaired` names the stored arrays that are no longer the module's own, `folded` those that the
    program does not hold any more, as only statistics of them are read;
    `computed` are the arrays that it holds instead, as they were at first. `faithful` says that
    the program was seen to compute what the module does, `asked` where it is to be computed,
    `shared` that one of several blocks was traced for all. What is put in place of stored arrays
    is `laid` in `room`.
    """

    program: Program
    graph: Graph
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tied: dict[str, str]
    repaired: set[str] = field(default_factory=set)
    folded: tuple[str, ...] = ()
    computed: dict[str, torch.Tensor] = field(default_factory=dict)
    faithful: bool = False
    asked: Where = HERE
    shared: bool = False
    room: Room = field(default_factory=lambda: Room(REPAIRED))
    laid: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def homes(self) -> list[dict[str, Any]]:
        """Where the arrays lie that a repair puts others in place of."""
        return [self.program.state_dict, self.program.constants]

    @property
    def exported(self) -> ExportedProgram:
        """The program as torch.export made it. Raises SpaError if the trace was a quick one."""
        if isinstance(self.program, ExportedProgram):
            return self.program
        raise SpaError("this trace serves groups and slicing only",
                       why="it was recorded with the sizes of the example inputs",
                       fix="trace without quick")

    @property
    def where(self) -> Where:
        """Where calibration computes, and in which type: what is asked for, or, where this
        processor only emulates the program's own, float32."""
        if self.asked.dtype is not None or not self.asked.local:
            return self.asked
        return Where(dtype=computing(self.program.state_dict.values()))

    @property
    def proving(self) -> Where:
        """Where the proof computes: in float64, on the device if it has that."""
        return replace(DOUBLE, device=self.asked.device) if has_double(self.asked.device) \
            else DOUBLE

    def fixed(self) -> list[tuple[str, int]]:
        """Inputs of several examples that the program takes at the traced number of them alone."""
        tensors = (self.graph.tensors[name] for name in self.graph.inputs)
        return [(t.name, t.shape[0]) for t in tensors
                if t.shape and t.shape[0] > 1 and 0 not in t.dynamic]

    def single(self) -> list[str]:
        """Inputs whose first size is one, where none has another: torch.export fixes such a size.
        """
        tensors = [self.graph.tensors[name] for name in self.graph.inputs]
        sizes = {t.shape[0] for t in tensors if t.shape}
        return [t.name for t in tensors if t.shape] if sizes == {1} else []

    def match(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Bring another call into the traced form: keywords in order, constants filled in, labels
        left out.

        Raises SpaError if tensors are missing or too many.
        """
        missing = [k for k, v in self.kwargs.items()
                   if isinstance(v, torch.Tensor) and k not in kwargs]
        unknown = sorted(k for k in kwargs.keys() - self.kwargs.keys() if not is_label(k))
        if len(args) != len(self.args) or missing or unknown:
            raise SpaError(
                "calibration inputs do not fit the example inputs",
                why=f"{len(args)} positional for {len(self.args)}; missing {missing}, "
                    f"unknown {unknown}",
                fix="give the same arguments as the example inputs, or a batch of yours as these")
        return args, {k: kwargs.get(k, v) for k, v in self.kwargs.items()}

    def labelled(self, args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a matched call with its labels after all that the program reads, for losses."""
        given, named = self.match(args, kwargs)
        return given, {**named, **labels_of(kwargs, named)}

    def misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Name a tensor of a call that has another shape than the one that was traced."""
        given, traced = ([x for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor)]
                         for call in (self.match(args, kwargs), (self.args, self.kwargs)))
        return next((f"a tensor of shape {tuple(x.shape)} for {tuple(held.shape)}"
                     for x, held in zip(given, traced, strict=False) if x.shape != held.shape), "")


def redrawn(trace: Trace, seed: int) -> Trace:
    """Return a trace with other parameters: none of them tiny, dead or equal. Buffers stay."""
    draws = torch.Generator().manual_seed(seed)
    program = copy.copy(trace.program)
    stored: dict[str, Any] = trace.program.state_dict
    drawn: dict[str, torch.Tensor] = {}
    changed = dict(stored)
    for spec in program.graph_signature.input_specs:
        name = str(spec.target)
        if spec.kind is InputKind.PARAMETER and stored[name].is_floating_point():
            first = trace.tied.get(name, name)
            if first not in drawn:  # arrays that are tied stay so
                drawn[first] = _drawn(stored[name], draws)
            changed[name] = drawn[first]
    if isinstance(program, ExportedProgram):
        program._state_dict = changed
    else:
        program.state_dict = changed
    return replace(trace, program=program)


def _drawn(old: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Matrices keep the size of what they are given; gains and biases lie about 1."""
    fan = old[0].numel() if old.dim() > 1 else 0
    new = torch.randn(old.shape, generator=draws) / fan**0.5 if fan else \
        torch.rand(old.shape, generator=draws) + 0.5
    return new.to(old.dtype)


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph module with the names of its nodes (fx renames those called like builtins).

    Its Python code, which few copies need, is made when it is called.
    """
    same = _LazyGraphModule.__new__(_LazyGraphModule)
    object.__setattr__(same, "__dict__", module.__dict__)
    made = copy.deepcopy(same)
    for old, new in zip(module.graph.nodes, made.graph.nodes, strict=True):
        new.name = old.name
    return made
