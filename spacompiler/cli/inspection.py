"""Show a solved graph: groups as a table or data, why two dimensions are coupled, pictures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
from rich.table import Table

from ..axes.expressions import atoms, show
from ..errors import SpaError, UsageError, did_you_mean
from ..evidence.diagnosis import Diagnosis
from ..graph.ir import Node
from ..groups.cost import Cost, cost
from ..groups.solution import Group, Solution
from ..groups.why import why
from .inspection_page import page
from .tables import table as make_table

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")
DEFAULT_ROLES = ("channel", "head")
KERNEL = 2
"""Dimensions from here on of arrays of rank 3 and more are windows of kernels."""


class Row(NamedTuple):
    """Groups of repeated layers: how many, of what, whether they may go, and their shares of
    parameters and MACs (all of them together)."""

    name: str
    groups: tuple[Group, ...]
    may: str
    params: float
    macs: float


def rows(solution: Solution) -> list[Row]:
    """Return the groups, repeated layers folded."""
    bundles: dict[tuple[str, str, int, str], list[Group]] = {}
    for group in solution.groups.values():
        key = (_NUMBER.sub("*", group.name), group.role, group.size, may(group))
        bundles.setdefault(key, []).append(group)
    prices = [cost(solution, metric) for metric in ("params", "macs")]

    def share(price: Cost, groups: Sequence[Group]) -> float:
        return -price.change({g.atom: 0 for g in groups}) / (price.total or 1)

    return [Row(name if len(groups) > 1 else groups[0].name, tuple(groups), why,
                *(share(price, groups) for price in prices))
            for (name, _, _, why), groups in bundles.items()]


def may(group: Group) -> str:
    """Return "yes" if the default roles let a group shrink, else what would."""
    if group.role not in DEFAULT_ROLES:
        return f"--role {group.role!r}" if " " in group.role else f"--role {group.role}"
    return "--approximate" if group.approximate else "yes"


def table(solution: Solution) -> Table:
    """Return the groups as a table, with what stays counted in its title."""
    kernels, others = _kernels(solution)
    unknown = solution.solver.opaque
    title = (f"{len(solution.groups)} groups; {len(others)} dimensions and {len(kernels)} kernel "
             "axes stay (--full lists them)")
    if unknown:
        title += f"; unknown operators: {', '.join(sorted({n.op for n in unknown}))}"
    cells = [(f"{r.name} ×{len(r.groups)}" if len(r.groups) > 1 else r.name, r.groups[0].role,
              "×".join(map(str, r.groups[0].shape)), r.may, f"{r.params:.1%}", f"{r.macs:.1%}")
             for r in rows(solution)]
    return make_table(("group", "role", "slices", "may go", "params", "MACs"), cells, title)


def diagnosed(found: Diagnosis) -> Iterator[Table]:
    """Yield tables of groups (repeated layers stay apart) and of attentions."""
    cells = [(g.group, str(g.size), "-" if g.silent is None else str(g.silent),
              "-" if g.zeros is None else f"{g.zeros:.1%}", f"{g.pq:.1%}")
             for g in found.groups]
    yield make_table(("group", "slices", "silent", "zeros", "uneven (PQ index)"), cells,
                     f"{found.batches} batch{'es' * (found.batches != 1)}; {found.dead:.1%} of all "
                     "reads are zero")
    if found.attentions:
        yield make_table(("attention", "largest query", "largest key", "root of log length"), [
            (a.node, f"{a.queries:.3g}", f"{a.keys:.3g}", f"{a.bound:.3g}")
            for a in found.attentions])


def _kernels(solution: Solution) -> tuple[list[tuple[str, int, list[str]]], ...]:
    """Frozen dimensions: windows of kernels, and all others."""
    ranks = {name: len(dims) for name, dims in solution.weights().items()}
    found: tuple[list[tuple[str, int, list[str]]], ...] = [], []
    for weight, dim, reasons in solution.frozen():
        found[not (ranks[weight] > KERNEL and dim >= KERNEL)].append((weight, dim, reasons))
    return found


def about(solution: Solution, text: str) -> list[str]:
    """Say of one `PARAM:DIM` what may go from it, what not and why, as lines.

    Raises UsageError for an unknown array.
    """
    weight, dim = _dimension(solution, text)
    e = solution.dims(weight)[dim]
    lines = [f"{weight}:{dim}, {e.size} positions: {show(e)}"]
    groups = solution.by_atom()
    for atom in atoms(e):
        group = groups.get(atom)
        if group is None:
            why = "; ".join(atom.reasons) or "nothing learned carries it"
            lines.append(f"  {atom.size} slices stay: {why}")
            continue
        said = "may go" if may(group) == "yes" else f"stay unless asked for by {may(group)}"
        more = f" ({'; '.join(group.approximate)})" if group.approximate else ""
        lines.append(f"  {group.size} slices of role {group.role} {said}{more}, together with:")
        lines.extend(f"    {m} {m.role}" for m in group.members if (m.weight, m.dim) != (
            weight, dim))
    return lines


def explained(solution: Solution, one: str, other: str | None) -> list[str]:
    """Say what may go from one dimension, or why two are coupled."""
    return about(solution, one) if other is None else explain(solution, one, other)


def write_page(solution: Solution, path: Path, title: str) -> None:
    """Write the groups as one page of HTML."""
    kernels, others = _kernels(solution)
    frozen: dict[str, list[str]] = {}
    for weight, dim, reasons in others:
        frozen.setdefault("; ".join(reasons[:1]), []).append(f"{weight}:{dim}")
    if kernels:
        frozen["windows of kernels"] = [f"{weight}:{dim}" for weight, dim, _ in kernels]
    families = [{"name": r.name, "role": r.groups[0].role, "size": r.groups[0].size,
                 "count": len(r.groups), "may": r.may, "share": r.params,
                 "members": [f"{m} {m.role}" for g in r.groups for m in g.members]}
                for r in rows(solution)]
    path.write_text(page(title, families, frozen), encoding="utf-8")


def as_data(solution: Solution) -> dict[str, Any]:
    """Return groups, members and frozen dimensions as plain data."""
    return {
        "groups": [{"name": g.name, "role": g.role, "size": g.size,
                    "under": [o.size for o in g.outers], "approximate": bool(g.approximate),
                    "may_go": may(g),
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
