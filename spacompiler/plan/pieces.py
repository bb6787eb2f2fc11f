"""Pieces of one split that keep equal counts, so that the module's own code still splits rightly.

`a, b = x.chunk(2, 1)` cuts in the middle, wherever that is: a network with such code keeps its
class only if both halves lose equally many channels.
"""

from __future__ import annotations

from ..axes.expressions import Atom, resolve
from ..graph.idioms import base
from ..graph.ir import Node
from ..groups.solution import Solution

_SPLITS = frozenset("chunk split split_with_sizes unsafe_chunk unsafe_split tensor_split".split())


def leads(solution: Solution) -> dict[Atom, Atom]:
    """Return, for each atom that is a piece of an equal split, the one that speaks for them all.

    Only programs that follow a module's code have such; what is read from a file may be cut anyhow.
    """
    lead: dict[Atom, Atom] = {}
    for node in solution.graph.nodes:
        if node.op.startswith("aten.") and base(node.op) in _SPLITS:
            pieces = _pieces(solution, node)
            known = {lead[piece] for piece in pieces if piece in lead}
            first = next(iter(known), pieces[0] if pieces else None)
            if first is not None:
                lead.update((atom, first) for atom, of in list(lead.items()) if of in known)
                lead.update((piece, first) for piece in pieces)
    return lead


def _pieces(solution: Solution, node: Node) -> list[Atom]:
    """The atoms that pieces of one size consist of; none where a piece is no single atom."""
    dims = [solution.solver.dims[out] for out in node.outputs]
    along = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    found = [resolve(d[along]) for d in dims if d]
    pieces = [e for e in found if isinstance(e, Atom) and not e.frozen]
    equal = len(pieces) == len(found) and len({e.size for e in pieces}) == 1
    return list(dict.fromkeys(pieces)) if equal else []
