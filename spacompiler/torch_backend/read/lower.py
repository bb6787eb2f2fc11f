"""The IR of a traced program: its tensors, its operators, and their places in the user's code."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from ...errors import SpaError
from ...graph.ir import Graph, Node, Ref, Tensor, Unknown
from ..trace import Program

_KINDS = {
    InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant", InputKind.USER_INPUT: "input",
}
_NUMBERS = frozenset((int, float, bool, str, type(None)))
_WRITTEN = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


def lower(program: Program, module: nn.Module,
          seen: Mapping[str, tuple[int, ...]] | None = None) -> tuple[Graph, dict[str, str]]:
    """Return the IR of a program and, per stored name, the first name of its array.

    `seen` gives shapes of results whose sizes depend on data.
    """
    tied = _tied_names(program, module)
    graph, seen = Graph(), seen or {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs
             if hasattr(spec.arg, "name")}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            _lower_input(graph, node, specs.get(node.name), tied)
        elif node.op == "call_function" and node.target is not operator.getitem:
            _lower_call(graph, node, seen)
    out = next(n for n in program.graph.nodes if n.op == "output")
    asked = {spec.arg.name for spec in program.graph_signature.output_specs
             if spec.kind not in _WRITTEN and hasattr(spec.arg, "name")}
    graph.written = _written(program)
    graph.outputs = [n.name for n in out.all_input_nodes if n.name in graph.tensors
                     and (n.name in asked or n.name not in graph.written)]
    return graph, tied


def _written(program: Program) -> dict[str, str]:
    """Values that are written back into stored arrays, with the inputs that hold these."""
    signature = program.graph_signature
    held = {spec.target: spec.arg.name for spec in signature.input_specs if spec.target}
    return {spec.arg.name: held[spec.target] for spec in signature.output_specs
            if spec.kind in _WRITTEN}


def _tied_names(program: Program, module: nn.Module) -> dict[str, str]:
    """Map every stored name to the first name that shares its array."""
    first: dict[Any, str] = {}
    names = {}
    order = {name: i for i, (name, _) in enumerate(
        [*module.named_parameters(remove_duplicate=False),
         *module.named_buffers(remove_duplicate=False)])}
    stored = {**program.state_dict, **program.constants}
    for name in sorted(stored, key=lambda k: order.get(k, len(order))):
        tensor = stored[name]
        if not isinstance(tensor, torch.Tensor):
            continue
        key: Any = id(tensor)
        if tensor.device.type != "meta" and tensor.numel():
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        names[name] = first.setdefault(key, name)
    return names


def _lower_input(graph: Graph, node: fx.Node, spec: InputSpec | None,
                 tied: dict[str, str]) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or spec is None:
        return
    kind = _KINDS.get(spec.kind, "input")
    weight = tied.get(spec.target) if spec.target else None
    graph.tensors[node.name] = _tensor(node.name, value, kind, weight)
    if kind == "input":
        graph.inputs.append(node.name)


def _lower_call(graph: Graph, node: fx.Node, seen: Mapping[str, tuple[int, ...]]) -> None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        outputs = {node.name: value}
    elif isinstance(value, (list, tuple)):
        names = {u.args[1]: u.name for u in node.users if u.target is operator.getitem}
        outputs = {names.get(i, f"{node.name}.{i}"): v for i, v in enumerate(value)
                   if isinstance(v, torch.Tensor)}
    else:
        return
    for name, result in outputs.items():
        graph.tensors[name] = _tensor(name, result, "value", None, seen.get(name))
    where = list(node.meta.get("nn_module_stack", {}).values())
    args, kwargs = _lower_value(graph, node.args), _lower_value(graph, node.kwargs)
    graph.nodes.append(Node(node.name, _op_name(node.target), args, kwargs, tuple(outputs),
                            where[-1][0] if where else "", _source(node)))


@cache
def _op_name(target: object) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else \
        getattr(target, "__name__", str(target))


def _source(node: fx.Node) -> str:
    return _line(node.meta.get("stack_trace") or "")


@lru_cache(1 << 12)
def _line(trace: str) -> str:
    """The innermost place of a stack, as folder/file:line."""
    rows = [r.strip() for r in trace.splitlines() if "File" in r]
    if not rows:
        return ""
    parts = rows[-1].split('"')
    file = "/".join(parts[1].split("/")[-2:]) if len(parts) > 1 else ""
    line = parts[2].split("line ")[-1].split(",")[0] if len(parts) > 2 else ""
    return f"{file}:{line}"


def _lower_value(graph: Graph, value: object) -> Any:
    if type(value) in _NUMBERS:
        return value
    if isinstance(value, fx.Node):
        if value.name in graph.tensors:
            return Ref(value.name)
        return _lower_value(graph, value.meta.get("val"))
    if isinstance(value, (list, tuple)):
        return type(value)(_lower_value(graph, v) for v in value)
    if isinstance(value, dict):
        return {k: _lower_value(graph, v) for k, v in value.items()}
    known = hint(value)
    return Unknown() if isinstance(known, (torch.SymInt, torch.SymFloat)) else known


def hint(value: object) -> Any:
    """Return the number that a symbolic size had when it was traced; anything else as it is."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        hint = value.node.hint
        return hint if hint is not None else value
    return value


def _varies(size: object) -> bool:
    """Whether a size is a symbol still: one that the module's code needed to know is a number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _tensor(name: str, value: torch.Tensor, kind: str, weight: str | None,
            seen: tuple[int, ...] | None = None) -> Tensor:
    dtype = _dtype(value.dtype)
    if seen is None and all([type(n) is int for n in value.shape]):
        return Tensor(name, tuple(value.shape), dtype, kind, weight)
    dynamic = frozenset(i for i, n in enumerate(value.shape) if _varies(n))
    sizes = seen or [hint(n) for n in value.shape]
    if any(isinstance(n, torch.SymInt) for n in sizes):
        raise SpaError(f"the size of {name} depends on data", why=f"its shape is {value.shape}",
                       fix="compile a part of it: --module PATH of a sub-module before or after")
    shape = tuple(map(int, sizes))
    return Tensor(name, shape, dtype, kind, weight, dynamic)


@cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
