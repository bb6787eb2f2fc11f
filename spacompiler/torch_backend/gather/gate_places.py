"""Where gates stand: the places at which groups are read, and whether examples are apart there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ...errors import SpaError
from ...evidence.consumers import consumer
from ...graph.idioms import base
from ...graph.ir import Graph, Node
from ...groups.solution import Group, Solution

Places = Mapping[tuple[str, str], Sequence[tuple[Group, int]]]
"""(node, tensor that it reads) -> the groups that it reads there, and along which dimension."""


def read_places(solution: Solution, groups: Sequence[Group]) -> Places:
    """Return where slices of groups are read; of arrays that data chooses, the last ones alone."""
    graph = solution.graph
    found: dict[tuple[str, str], list[tuple[Group, int]]] = {}
    for group in groups:
        last = _last_choices(graph, group)
        for read in dict.fromkeys(group.reads):
            array = graph.tensors[read.tensor].array
            chosen = read.how == "chosen"
            if read.node in last if chosen and array else not (
                    chosen or array or read.how == "score"):
                sites = found.setdefault((read.node, read.tensor), [])
                if (group, read.dim) not in sites:
                    sites.append((group, read.dim))
    return found


def _last_choices(graph: Graph, group: Group) -> set[str]:
    """Nodes that look up the last arrays of experts: no product with another one follows.

    An expert whose last arrays are zero gives nothing.
    """
    import networkx as nx

    chosen = {r.node for r in group.reads
              if r.how == "chosen" and graph.tensors[r.tensor].static}
    meet = {node.name: _meet(graph, node) for node in graph.nodes if node.name in chosen}
    products = {("op", n.name) for nodes in meet.values() for n in nodes
                if base(n.op) not in ("add", "sub")}
    flow = graph.to_networkx() if meet else None
    return {name for name, nodes in meet.items() if all(
        products.isdisjoint(nx.descendants(flow, ("op", n.name))) for n in nodes)}


def _meet(graph: Graph, node: Node) -> list[Node]:
    """Where an array that a node looks up meets activations: there, or where it is read."""
    out, *_ = node.outputs
    return [n for user in graph.nodes if out in user.refs() for n in _meet(graph, user)] \
        if graph.tensors[out].looked else [node]


def check_apart(graph: Graph, kinds: Collection[str], groups: Sequence[Group],
                places: Places) -> None:
    """Raise SpaError where one of the kinds is to tell single examples apart, and cannot."""
    for kind in sorted({"fisher", "relevance", "relevance_positive"} & set(kinds)):
        for group in groups:
            own = [at for at, found in places.items() if any(g is group for g, _ in found)]
            why = next(filter(None, (_mixed(graph, kind, *at) for at in own)), "")
            if why:
                raise SpaError(
                    f"{kind} of {group.name} cannot be gathered",
                    why=f"{why}, so that examples are not told apart",
                    fix="use a criterion that sums over a batch (taylor, magnitude), or keep "
                        f"the group: --ignore '{group.name}'")


def _mixed(graph: Graph, kind: str, node: str, tensor: str) -> str:
    """Why examples are mixed in what a node reads, or nothing."""
    if graph.tensors[tensor].static:
        return "its slices are arrays that data chooses"
    at = consumer(graph, next(n for n in graph.nodes if n.name == node))
    if kind == "fisher" and at is not None and at.route is not None and at.route.ends:
        return f"{at.node.title()} reads it in the order of experts"
    return ""
