"""Why two dimensions are coupled: the operators between them."""

from __future__ import annotations

import networkx as nx

from ..axes.expressions import Atom, atoms, walk
from ..graph.ir import Node
from .solution import Solution


def why(solution: Solution, one: tuple[str, int], other: tuple[str, int]) -> list[Node | str]:
    """Return a shortest chain tensor, operator, tensor, ... that couples two dimensions.

    Empty if they share no atom.
    """
    shared = set(atoms(solution.dims(one[0])[one[1]])) & set(
        atoms(solution.dims(other[0])[other[1]]))
    if not shared:
        return []
    names = {t.weight: t.name for t in solution.graph.weights().values()}
    graph = coupling(solution, shared)
    path = nx.shortest_path(graph, names[one[0]], names[other[0]])
    return [graph.nodes[p].get("node", p) for p in path]


def coupling(solution: Solution, shared: set[Atom]) -> nx.Graph:
    """Tensors that mention any of the atoms, joined by the operators that touch them."""
    tensors = {name for name, dims in solution.solver.dims.items()
               if any(a in shared for e in dims for a in walk(e))}
    names = {t.weight: t.name for t in solution.graph.weights().values()}
    graph = nx.Graph()
    for node in solution.graph.nodes:
        touched = [n for n in (*node.refs(), *node.outputs) if n in tensors]
        if len(touched) > 1:
            graph.add_node(("op", node.name), node=node)
            for name in touched:
                weight = solution.graph.tensors[name].weight
                graph.add_edge(("op", node.name), names.get(weight, name) if weight else name)
    return graph
