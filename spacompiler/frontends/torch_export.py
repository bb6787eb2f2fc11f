"""torch.export -> IR: trace once, with concrete sizes for the algebra and symbolic ones kept.

The exported program stays the truth that emitters rewrite; the IR names its values by the names
of its nodes, so that what the solver says about a tensor can be found in the program again.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ..errors import SpaError
from ..graph import Graph, Node, Ref, Tensor
from .functional import make_functional

Inputs = tuple[Any, ...] | dict[str, Any]
_KINDS = {
    InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant", InputKind.USER_INPUT: "input",
}
_DROPPED = ("aten._assert_tensor_metadata", "aten.sym_constrain", "aten._assert_scalar",
            "aten._assert_async")


@dataclass
class Trace:
    """A traced module: the program, its IR, and how to call it."""

    program: ExportedProgram
    graph: Graph
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tied: dict[str, str]

    def match(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Bring another call into the traced form: keywords in order, constants filled in.

        Raises SpaError if tensors are missing or too many.
        """
        missing = [k for k, v in self.kwargs.items()
                   if isinstance(v, torch.Tensor) and k not in kwargs]
        unknown = sorted(kwargs.keys() - self.kwargs.keys())
        if len(args) != len(self.args) or missing or unknown:
            raise SpaError(
                "calibration inputs do not fit the example inputs",
                why=f"{len(args)} positional for {len(self.args)}; missing {missing}, "
                    f"unknown {unknown}",
                fix="give the same arguments as the example inputs")
        return args, {k: kwargs.get(k, v) for k, v in self.kwargs.items()}


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of inputs given as a tuple, a dict of keywords, or (tuple, dict)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs[0], inputs[1]
    return tuple(inputs), {}


def trace(module: nn.Module, inputs: Inputs) -> Trace:
    """Export a module in eval mode with dynamic batch (and, for integer inputs, length).

    Raises SpaError, with the place in the user's code, where the module cannot be traced.
    """
    args, kwargs = as_call(inputs)
    with in_eval_mode(module):
        program = _export(module, args, kwargs)
    _drop_asserts(program)
    _canonicalise(program)
    graph, tied = lower(program, module)
    return Trace(program, graph, args, kwargs, tied)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and every part of it back in the mode that it was in."""
    was = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(was[0][1])
        for part, mode in was:
            part.training = mode


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    problems = []
    for shapes in (_dynamic(args, kwargs), None):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(
                    module, args, kwargs, dynamic_shapes=shapes, strict=False)
                return program if make_functional(program) else program.run_decompositions({})
        except Exception as problem:  # the tracer raises many kinds
            problems.append(problem)
    reason = str(problems[-1]).strip().splitlines()
    raise SpaError(
        f"{type(module).__name__} cannot be traced by torch.export",
        why=reason[0] if reason else type(problems[-1]).__name__,
        fix="compile the part of it that can be traced (pass that sub-module and its inputs)",
    ) from problems[-1]


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph module with the names of its nodes (fx renames those called like builtins)."""
    made = copy.deepcopy(module)
    for old, new in zip(module.graph.nodes, made.graph.nodes, strict=True):
        new.name = old.name
    return made


def _dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Batch is dynamic everywhere; so are all dimensions of integer inputs (tokens)."""

    def dims(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        tokens = not value.is_floating_point()
        return {d: Dim.AUTO for d in range(value.ndim) if d == 0 or tokens}

    shapes = pytree.tree_map(dims, (args, kwargs))
    return {**shapes[1]} if not args else (*shapes[0], *shapes[1].values())


def _drop_asserts(program: ExportedProgram) -> None:
    """Remove metadata asserts: they pin dtypes, and proofs run in another one."""
    graph = program.graph_module.graph
    for node in reversed(list(graph.nodes)):
        idle = node.op == "call_function" and not node.users
        if idle and str(node.target).startswith(_DROPPED):
            graph.erase_node(node)
    graph.lint()
    program.graph_module.recompile()


def _sizes(node: fx.Node, dim: int) -> list[int] | None:
    """Static sizes of a node's results along a dimension, or None."""
    sizes = [value.shape[dim] for value in node.meta["val"]]
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _explicit_squeeze(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    ones = [d for d, size in enumerate(shape) if isinstance(size, int) and size == 1]
    return torch.ops.aten.squeeze.dims, (source, ones)


def _explicit_split(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    sizes = _sizes(node, dim)  # type: ignore[arg-type]
    return sizes and (torch.ops.aten.split_with_sizes.default, (node.args[0], sizes, dim))  # type: ignore[return-value]


# operators whose sizes are implied by their operands' -> the same with sizes said, so that axes
# may shrink independently (pieces of a split) or down to one slice (squeeze)
_CANONICAL = {
    torch.ops.aten.squeeze.default: _explicit_squeeze,
    torch.ops.aten.split.Tensor: _explicit_split,
    torch.ops.aten.chunk.default: _explicit_split,
}


def _canonicalise(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        explicit = _CANONICAL[node.target](node) if node.target in _CANONICAL else None
        if explicit:
            node.target, node.args, node.kwargs = *explicit, {}
    program.graph_module.recompile()


def lower(program: ExportedProgram, module: nn.Module) -> tuple[Graph, dict[str, str]]:
    """Return the IR of a program and, per stored name, the first name of its array."""
    tied = _tied_names(program, module)
    graph = Graph()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs
             if hasattr(spec.arg, "name")}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            _lower_input(graph, node, specs.get(node.name), tied)
        elif node.op == "call_function" and node.target is not operator.getitem:
            _lower_call(graph, node)
    out = next(n for n in program.graph.nodes if n.op == "output")
    graph.outputs = [n.name for n in out.all_input_nodes if n.name in graph.tensors]
    return graph, tied


def _tied_names(program: ExportedProgram, module: nn.Module) -> dict[str, str]:
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
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        names[name] = first.setdefault(key, name)
    return names


def _lower_input(graph: Graph, node: fx.Node, spec: Any, tied: dict[str, str]) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or spec is None:
        return
    kind = _KINDS.get(spec.kind, "input")
    weight = tied.get(spec.target) if spec.target else None
    graph.tensors[node.name] = _tensor(node.name, value, kind, weight)
    if kind == "input":
        graph.inputs.append(node.name)


def _lower_call(graph: Graph, node: fx.Node) -> None:
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
        graph.tensors[name] = _tensor(name, result, "value", None)
    where = list(node.meta.get("nn_module_stack", {}).values())
    args, kwargs = _lower_value(graph, node.args), _lower_value(graph, node.kwargs)
    graph.nodes.append(Node(node.name, _op_name(node.target), args, kwargs, tuple(outputs),
                            where[-1][0] if where else "", _source(node)))


def _op_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else \
        getattr(target, "__name__", str(target))


def _source(node: fx.Node) -> str:
    rows = [r.strip() for r in (node.meta.get("stack_trace") or "").splitlines() if "File" in r]
    if not rows:
        return ""
    parts = rows[-1].split('"')
    file = "/".join(parts[1].split("/")[-2:]) if len(parts) > 1 else ""
    line = parts[2].split("line ")[-1].split(",")[0] if len(parts) > 2 else ""
    return f"{file}:{line}"


def _lower_value(graph: Graph, value: Any) -> Any:
    if isinstance(value, fx.Node):
        if value.name in graph.tensors:
            return Ref(value.name)
        return _hint(value.meta.get("val"))
    if isinstance(value, (list, tuple)):
        return type(value)(_lower_value(graph, v) for v in value)
    if isinstance(value, dict):
        return {k: _lower_value(graph, v) for k, v in value.items()}
    return _hint(value)


def _hint(value: Any) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        hint = value.node.hint
        return hint if hint is not None else value
    return value


def _tensor(name: str, value: torch.Tensor, kind: str, weight: str | None) -> Tensor:
    dynamic = frozenset(i for i, n in enumerate(value.shape) if isinstance(n, torch.SymInt))
    sizes = [_hint(n) for n in value.shape]
    if any(isinstance(n, torch.SymInt) for n in sizes):
        raise SpaError(f"the size of {name} depends on data", why=f"its shape is {value.shape}",
                       fix="compile the part of the model before or after that step")
    shape = tuple(map(int, sizes))
    return Tensor(name, shape, str(value.dtype).removeprefix("torch."), kind, weight, dynamic)
