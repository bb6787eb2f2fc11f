"""Programs for torch's ONNX exporter that decompose only what it has no word for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..torch_backend.emit.refresh import rebuild
from ..torch_backend.read.decompose import Once, fake_mode, replace
from ..torch_backend.trace import copied
from .words import words

_ATEN = torch.ops.aten
_OLDEST = 18


class LocallyDecomposed(ExportedProgram):
    """A program that decomposes only the operations that need it.

    The exporter decomposes every program it gets, and torch does so by tracing all of it twice
    more: two thirds of the time of an export, for the handful of nodes that ONNX has no word for.
    """

    def run_decompositions(
        self,
        decomp_table: dict[Any, Callable[..., Any]] | None = None,
        decompose_custom_triton_ops: bool = False,
    ) -> ExportedProgram:
        """As the base class; its whole-program way is the fallback."""
        try:
            return decomposed(self, decomp_table or {}, words(_OLDEST).is_registered)
        except Exception as error:  # any surprise in one node: let torch do all of it
            logging.getLogger(__name__).debug("decomposing the whole program: %s", error)
        plain = rebuild(self, copied(self.graph_module))
        return plain.run_decompositions(decomp_table, decompose_custom_triton_ops)


def decomposed(ep: ExportedProgram, table: Mapping[Any, Any],
               known: Callable[[Any], bool]) -> ExportedProgram:
    """Return a program in which only what a table knows is decomposed.

    `known` says whether the exporter translates an operator. Raises ValueError, or what torch
    raises, where the whole program has to be decomposed.
    """
    module = copied(ep.graph_module)
    if not table or not _is_plain(module):
        raise ValueError("it holds other graphs, or writes into values")
    once = Once(table, fake_mode(module))
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _needs_decomposing(node.target, table, known):
            replace(node, once, _is_expressible)
    for node in module.graph.nodes:  # what a view reads may lie otherwise when the exporter runs it
        if node.target is _ATEN.view.default:
            node.target = _ATEN.reshape.default
    module.graph.eliminate_dead_code()
    return rebuild(ep, module)


def _is_plain(module: GraphModule) -> bool:
    """Whether the graph calls only operators without side effects, and holds no other graph."""
    calls = [n.target for n in module.graph.nodes if n.op == "call_function"]
    operators = [t for t in calls if isinstance(t, torch._ops.OpOverload)]
    hidden = any(isinstance(t, torch._ops.HigherOrderOperator) for t in calls)
    return not hidden and not any(t._schema.is_mutable for t in operators)


def _needs_decomposing(target: object, table: Mapping[Any, Any],
               known: Callable[[Any], bool]) -> bool:
    """Whether torch would decompose an operator: by the table, or as a composite that may alias.

    Composites that never alias (linear, attention) are kept if the exporter knows them.
    """
    if target in table or not isinstance(target, torch._ops.OpOverload):
        return target in table
    composite = target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd  # type: ignore[attr-defined]
    )
    aliases = any(value.alias_info is not None for value in target._schema.returns)
    return composite and (aliases or not known(target))


def _is_expressible(node: Node) -> bool:
    """Whether a traced node is one that the exporter knows: of the size queries, only sym_size."""
    if str(node.target).startswith("aten.sym_"):
        return node.target is _ATEN.sym_size.int
    return node.op in ("placeholder", "call_function", "output")
