"""Show a solved graph: groups as a table or data, why two dimensions are coupled, pictures."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import networkx as nx
from rich.table import Table

from ..axes.expressions import show
from ..errors import SpaError, UsageError, did_you_mean
from ..graph.ir import Node
from ..groups.solution import Solution
from ..groups.why import why
from .tables import table as make_table


def rows(solution: Solution) -> list[tuple[str, ...]]:
    """Return (group, role, slices, fibred under, members, dimension of the first member)."""
    found: list[tuple[str, ...]] = []
    for group in solution.groups.values():
        under = "×".join(str(o.size) for o in group.outers)
        first = group.members[0]
        found.append((group.name, group.role, str(group.size), under, str(len(group.members)),
                      show(solution.dims(first.weight)[first.dim])))
    return found


def table(solution: Solution) -> Table:
    """Return the groups as a table, with what is frozen counted in its title."""
    frozen, unknown = solution.frozen(), solution.solver.opaque
    title = f"{len(solution.groups)} groups, {len(frozen)} frozen dimensions"
    if unknown:
        title += f", unknown operators: {', '.join(sorted({n.op for n in unknown}))}"
    return make_table(("group", "role", "slices", "under", "members", "axis"), rows(solution),
                      title)


def as_data(solution: Solution) -> dict[str, Any]:
    """Return groups, members and frozen dimensions as plain data."""
    return {
        "groups": [{"name": g.name, "role": g.role, "size": g.size,
                    "under": [o.size for o in g.outers], "approximate": bool(g.approximate),
                    "members": [{"array": m.weight, "dim": m.dim, "role": m.role}
                                for m in g.members]} for g in solution.groups.values()],
        "frozen": [{"array": w, "dim": d, "why": reasons} for w, d, reasons in solution.frozen()],
        "unknown_operators": sorted({n.title() for n in solution.solver.opaque}),
    }


def explain(solution: Solution, one: str, other: str) -> list[str]:
    """Return the chain of operators that couples two `PARAM:DIM`, as lines.

    Raises UsageError for an unknown array, SpaError if the two are not coupled.
    """
    a, b = _dimension(solution, one), _dimension(solution, other)
    chain = why(solution, a, b)
    if not chain:
        raise SpaError(f"{one} and {other} are not coupled", why="they share no axis")
    names = {t.name: t.weight for t in solution.graph.weights().values()}
    lines = []
    for step in chain:
        if isinstance(step, Node):
            lines.append(f"  {step.title()}")
        else:
            tensor = solution.graph.tensors[step]
            dims = " ".join(show(e) for e in solution.solver.dims[step])
            lines.append(f"{names.get(step) or step} [{dims}] {tensor.kind}")
    return lines


def _dimension(solution: Solution, text: str) -> tuple[str, int]:
    name, _, dim = text.rpartition(":")
    weights = solution.weights()
    if not name or not dim.lstrip("-").isdigit():
        raise UsageError(f"cannot read {text!r}", fix="write PARAM:DIM, e.g. fc1.weight:0")
    if name not in weights:
        raise UsageError(f"there is no array {name!r}", fix=did_you_mean(name, weights)[:300])
    if not -len(weights[name]) <= int(dim) < len(weights[name]):
        raise UsageError(f"{name} has {len(weights[name])} dimensions, not a dimension {dim}")
    return name, int(dim) % len(weights[name])


def check_graph(path: Path) -> None:
    """Raise UsageError unless a graph can be written there."""
    if path.suffix not in (".dot", ".graphml", ".html"):
        raise UsageError(f"cannot write a graph as {path.suffix or path.name!r}",
                         fix="name it .dot, .graphml or .html")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"cannot write a graph to {str(path)!r}",
                         why=f"there is no directory {str(path.parent)!r}",
                         fix="make it first, or give another place")
    if path.is_dir():
        raise UsageError(f"cannot write a graph to {str(path)!r}", why="it is a directory")


def write_graph(solution: Solution, path: Path) -> None:
    """Write groups and the dimensions that they couple: .graphml, .dot (needs pydot) or .html."""
    check_graph(path)
    graph = solution.network()
    if path.suffix == ".graphml":
        nx.write_graphml(graph, path)
    elif path.suffix == ".dot":
        try:
            nx.nx_pydot.write_dot(_quoted(graph), path)
        except ImportError as problem:
            raise SpaError("writing .dot needs pydot",
                           fix="pip install 'spacompiler[graph]', or write .graphml") from problem
    else:
        path.write_text(_page(graph), encoding="utf-8")


def _quoted(graph: nx.Graph) -> nx.Graph:
    """pydot reads a colon in a name as a port unless the name is quoted."""
    return nx.relabel_nodes(graph, {name: f'"{name}"' for name in graph})


def _page(graph: nx.Graph) -> str:
    """A page without scripts from elsewhere: groups on the left, their dimensions on the right."""
    height, lines, y = 18, [], 30
    for group, data in graph.nodes(data=True):
        if data["kind"] != "group":
            continue
        members = list(graph.neighbors(group))
        middle = y + height * (len(members) - 1) / 2
        label = html.escape(f"{group.removeprefix('group ')}  ({data['size']} {data['role']})")
        lines.append(f'<text x="10" y="{middle + 4}" class="g">{label}</text>')
        for member in members:
            role = graph.edges[group, member]["role"]
            lines.append(f'<path d="M430 {middle} C520 {middle} 520 {y} 600 {y}" '
                         f'class="{role}"/>')
            lines.append(f'<text x="606" y="{y + 4}">{html.escape(member)} ({role})</text>')
            y += height
        y += height
    style = ("text{font:12px monospace}.g{font-weight:bold}path{fill:none;stroke:#999}"
             ".consumer{stroke:#c60}.producer{stroke:#06c}")
    data = json.dumps(nx.node_link_data(graph)).replace("</", "<\\/")
    return (f"<!doctype html><meta charset='utf-8'><title>groups</title><style>{style}</style>"
            f'<svg width="1200" height="{y}">{"".join(lines)}</svg>'
            f'<script type="application/json">{data}</script>\n')
