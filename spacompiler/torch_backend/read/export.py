"""torch.export -> IR: trace once, with concrete sizes for the algebra and symbolic ones kept.

The exported program stays the truth that emitters rewrite; the IR names its values by the names
of its nodes, so that what the solver says about a tensor can be found in the program again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from ...errors import TraceError
from ...evidence.calls import Inputs, as_call
from ...evidence.labels import as_example
from ...rows.aten_table import TABLE
from ...system.process import quiet, unheard
from ..caches import cacheless
from ..experts import experts_in_groups
from ..run.runner import Runner
from ..trace import Program, Trace
from ..untouched import untouched
from .decompose import spell_out
from .folding import fold_weights
from .functional import make_functional
from .guards import settle
from .lower import hint, lower
from .once import blocks_once
from .record import record

_DROPPED = ("aten._assert_tensor_metadata", "aten.sym_constrain", "aten._assert_scalar",
            "aten._assert_async")


def trace(module: nn.Module, inputs: Inputs, *, quick: bool = False, once: bool = True) -> Trace:
    """Export a module in eval mode with dynamic batch (and, for integer inputs, length).

    `quick` asks for groups, slicing and the proof only: the program then has the sizes of the
    example inputs where it could be recorded without data, and serves no other call. Of blocks that
    do the same one is run, if `once`. The module is left as it was; one whose first call changes
    its parameters is called first. Raises TraceError, with the place in the user's code, where it
    cannot be traced.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(f"{type(module).__name__} is TorchScript, which cannot be traced",
                         fix="give the Python module that it was made from")
    args, kwargs = as_call(as_example(module, inputs))
    kwargs = cacheless(module, kwargs)
    with untouched(module), experts_in_groups(module):
        program = _record(module, args, kwargs) if quick else None
        program = program or _export(module, args, kwargs, once)
    if any(spec.kind is OutputKind.PARAMETER_MUTATION
           for spec in program.graph_signature.output_specs):
        with untouched(module), experts_in_groups(module), torch.no_grad():
            module(*args, **kwargs)
            program = _export(module, args, kwargs, once)
    drop_asserts(program.graph)
    spell_out(program.graph, lambda op: TABLE.get(op) is not None)
    _canonicalise(program.graph)
    folded, sources = fold_weights(program)
    if isinstance(program, ExportedProgram):
        program.graph_module.recompile()
    graph, tied = lower(program, module, _seen_sizes(program, args, kwargs))
    graph.sources = sources
    settle(graph, program, module, args, kwargs)
    return Trace(program, graph, args, kwargs, tied, folded=folded,
                 computed={name: program.state_dict[name] for name in sources},
                 shared=isinstance(program, ExportedProgram)
                 and bool(program.graph_module.meta.get(_SHARED)))


def _record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
    """The program of one call without data; None where only the exporter can follow."""
    try:
        with unheard():
            program = record(module, args, kwargs)
    except Exception:  # any code may run here, and without its data
        return None
    return program if make_functional(program) else None


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
            once: bool) -> ExportedProgram:
    """Export, with dynamic sizes if that can be.

    What runs batched by itself (`torch.vmap`, flex_attention) shows no operators before they are
    dispatched: there, those after that are taken.
    """
    problems = []
    for shapes in (_dynamic(args, kwargs), None):
        try:
            with quiet(), torch.no_grad():
                program = _exported(module, args, kwargs, shapes, once)
                return program if make_functional(program) else _decomposed(program)
        except Exception as problem:  # the tracer raises many kinds
            problems.append(problem)
    if any(word in str(problems[-1]) for word in _BATCHED):
        for shapes in (_dynamic(args, kwargs), None):
            try:
                return _export_dispatched(module, args, kwargs, shapes)
            except Exception:  # what it said first counts
                continue
    reason = str(problems[-1]).strip().splitlines()
    raise TraceError(
        f"{type(module).__name__} cannot be traced by torch.export",
        where=_place(module, problems[-1]),
        why=reason[0] if reason else type(problems[-1]).__name__,
        fix="compile a part of it: --module PATH of a sub-module that does not contain that line",
    ) from problems[-1]


def _exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
              shapes: Any, once: bool) -> ExportedProgram:
    """Export, repeated blocks traced once; all of them, where that leads to no program."""
    export = partial(torch.export.export, module, args, kwargs, dynamic_shapes=shapes,
                     strict=False)
    if once:
        with _use_lazy_graph_module(True), blocks_once(module) as used:  # no code between passes
            try:
                program = export()
                program.graph_module.meta[_SHARED] = used()
                return program
            except Exception:  # the tracer raises many kinds
                if not used():
                    raise
    return export()


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program of operators that others are made of, which write into nothing."""
    made = program.run_decompositions({})
    made.graph_module.meta[_SHARED] = program.graph_module.meta.get(_SHARED)
    return made


_SHARED = "blocks_once"
_BATCHED = ("BatchedTensor", "fake tensor in the exported program")


def _export_dispatched(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                       shapes: object) -> ExportedProgram:
    """Export the operators that a module's own ones are made of; no gradient is wanted."""
    from torch.export._trace import _export as export

    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with quiet(), torch.no_grad():
        program = export(module, args, kwargs, dynamic_shapes=shapes, strict=False,
                         pre_dispatch=False)
    return program if make_functional(program) else program.run_decompositions({})


def _place(module: nn.Module, problem: Exception) -> str:
    """The sub-module and line that an error rose from: the innermost `forward` of the user's."""
    names = {id(part): path for path, part in module.named_modules()}
    found, frame = "", problem.__traceback__
    while frame is not None:
        code, owner = frame.tb_frame.f_code, frame.tb_frame.f_locals.get("self")
        if code.co_name == "forward" and id(owner) in names:
            path = names[id(owner)] or type(module).__name__
            found = f"{path} ({'/'.join(code.co_filename.split('/')[-2:])}:{frame.tb_lineno})"
        frame = frame.tb_next
    return found


def _seen_sizes(program: Program, args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Sizes that depend on data, as they come out on the example inputs."""
    if not isinstance(program, ExportedProgram):  # it was recorded: all sizes are known
        return {}
    free = {node.name for node in program.graph.nodes for value in _tensors(node)
            if any(hint(size) is size for size in value.shape if isinstance(size, torch.SymInt))}
    seen: dict[str, tuple[int, ...]] = {}

    def watch(name: str, value: object) -> None:
        if name in free and isinstance(value, torch.Tensor):
            seen[name] = tuple(value.shape)

    if free:
        with torch.no_grad():
            Runner(program, watch=watch).call(args, kwargs)
    return seen


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def _dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Batch is dynamic everywhere; so are all dimensions of integer inputs (tokens)."""

    def dims(value: object) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        tokens = not value.is_floating_point()
        return {d: Dim.AUTO for d in range(value.ndim) if d == 0 or tokens}

    shapes = pytree.tree_map(dims, (args, kwargs))
    return {**shapes[1]} if not args else (*shapes[0], *shapes[1].values())


def drop_asserts(graph: fx.Graph) -> None:
    """Remove metadata asserts: they pin dtypes, and proofs run in another one."""
    for node in reversed(list(graph.nodes)):
        idle = node.op == "call_function" and not node.users
        if idle and str(node.target).startswith(_DROPPED):
            graph.erase_node(node)


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


def _explicit_eps(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """rms_norm(x, shape, gain=None, eps=None): an eps that is left out is that of the type."""
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), node.args, strict=False))
    x, shape, gain, eps = map((given | node.kwargs).get,
                              ("input", "normalized_shape", "weight", "eps"))
    if eps is None:
        eps = torch.finfo(x.meta["val"].dtype).eps  # type: ignore[union-attr]
    return torch.ops.aten.rms_norm.default, (x, shape, gain, eps)


# operators whose sizes are implied by their operands' -> the same with sizes said, so that axes
# may shrink independently (pieces of a split) or down to one slice (squeeze); rms_norm's eps,
# which follows from the type, and proofs run in another one
_CANONICAL = {
    torch.ops.aten.squeeze.default: _explicit_squeeze,
    torch.ops.aten.split.Tensor: _explicit_split,
    torch.ops.aten.chunk.default: _explicit_split,
    torch.ops.aten.rms_norm.default: _explicit_eps,
}


def _canonicalise(graph: fx.Graph) -> None:
    for node in graph.nodes:
        explicit = _CANONICAL[node.target](node) if node.target in _CANONICAL else None
        if explicit:
            node.target, node.args, node.kwargs = *explicit, {}
