"""Tokens that a network has no row for are named before they fail deep inside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.utils import _pytree as pytree

from ..errors import SpaError
from ..evidence.calls import Batch
from ..graph.ir import Ref
from .trace import Trace


def check_tokens(trace: Trace, batches: Iterable[Batch]) -> None:
    """Raise SpaError for an input, of the example or a batch, beyond the table it is looked up in.

    Inputs that something is done to before are not seen here.
    """
    tables = list(_tables(trace))
    calls = [("the example inputs", (trace.args, trace.kwargs))]
    calls += [(f"calibration batch {i}", trace.match(*batch)) for i, batch in
              enumerate(batches if tables else ())]
    for where, call in calls:
        given = [x for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor)]
        for at, weight, rows in tables:
            if given[at].numel() and not 0 <= int(given[at].min()) <= int(given[at].max()) < rows:
                wrong = int(given[at].max()) if int(given[at].max()) >= rows else \
                    int(given[at].min())
                raise SpaError(f"token {wrong} is beyond {weight}, which has {rows} rows",
                               where=where, fix="use the tokenizer of this model")


def _tables(trace: Trace) -> Iterator[tuple[int, str, int]]:
    """Yield which tensor of a call is looked up in which stored table, and its rows."""
    graph = trace.graph
    for node in graph.nodes:
        if not node.op.startswith("aten.embedding.") or len(node.args) < 2:
            continue
        table, ids = node.args[0], node.args[1]
        if isinstance(table, Ref) and isinstance(ids, Ref) and ids.name in graph.inputs:
            held = graph.tensors[table.name]
            if held.weight is not None:
                yield graph.inputs.index(ids.name), held.weight, held.shape[0]
