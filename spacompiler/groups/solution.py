"""Groups: the coupled slices of a network, read off the solved axes.

A group is one free atom with every stored array that carries it. Removing slice i of a group
removes, from each of its members, all positions whose coordinate on the atom is i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..axes.expressions import Atom, Expr, atoms, is_frozen, reasons, show, walk
from ..graph.idioms import choosing, deals, rms_norms
from ..graph.ir import Graph, Tensor
from ..rows.findings import Read
from ..rows.solver import Row, Solver
from .fibres import Once, beside, find_fibres

if TYPE_CHECKING:
    import networkx as nx


class Member(NamedTuple):
    """A stored array's dimension that carries the group; `role` is producer, consumer, carrier."""

    weight: str
    dim: int
    role: str

    def __str__(self) -> str:
        return f"{self.weight}:{self.dim}"


@dataclass(slots=True)
class Group:
    """One atom: `size` slices; `outers` names the groups or frozen axes that it is fibred under."""

    name: str
    atom: Atom
    members: tuple[Member, ...]
    role: str
    reads: tuple[Read, ...] = ()
    outers: tuple[Atom, ...] = ()
    approximate: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of slices of the dense network."""
        return self.atom.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a score: one number per slice, for each slice of the outer axes."""
        return (*(o.size for o in self.outers), self.size)


@dataclass(slots=True, repr=False)
class Solution:
    """A graph with its axes solved and its groups named."""

    graph: Graph
    solver: Solver
    groups: dict[str, Group] = field(default_factory=dict)

    def dims(self, tensor: str) -> tuple[Expr, ...]:
        """Return the axis expressions of a tensor (or of a stored array, by its name)."""
        if tensor in self.solver.dims:
            return self.solver.dims[tensor]
        return self.solver.dims[self.graph.array(tensor).name]

    def weights(self) -> dict[str, tuple[Expr, ...]]:
        """Return the axis expressions of every stored array."""
        return {name: self.solver.dims[t.name] for name, t in self.graph.weights().items()}

    def by_atom(self) -> dict[Atom, Group]:
        """Return the groups by the atoms that they stand for."""
        return {group.atom: group for group in self.groups.values()}

    def frozen(self) -> list[tuple[str, int, list[str]]]:
        """Return (array, dimension, reasons) for every dimension that nothing can go from."""
        return [(weight, d, reasons(e)) for weight, dims in self.weights().items()
                for d, e in enumerate(dims) if e.size > 1 and is_frozen(e)]

    def network(self) -> nx.Graph:
        """Return groups and array dimensions as one bipartite graph."""
        import networkx as nx

        graph = nx.Graph()
        for group in self.groups.values():
            name = f"group {group.name}"
            graph.add_node(name, kind="group", size=group.size, role=group.role)
            for member in group.members:
                graph.add_node(str(member), kind="dimension")
                graph.add_edge(name, str(member), role=member.role)
        return graph

    def __repr__(self) -> str:
        """A line on how much there is; the whole is what `print` shows."""
        return (f"<Solution: {len(self.groups)} groups over {len(self.weights())} arrays; print it "
                "for all>")

    def __str__(self) -> str:
        """One line per group and per frozen array: what golden tests hold."""
        names = {g.atom: f"{g.size}" for g in self.groups.values()}
        rows = []
        for group in self.groups.values():
            under = f" under {'*'.join(str(o.size) for o in group.outers)}" if group.outers else ""
            mark = " approximate" if group.approximate else ""
            rows.append(f"{group.name}  {group.size} {group.role}{under}{mark}")
            rows.extend(f"    {m} {m.role} {show(self.dims(m.weight)[m.dim], names)}"
                        for m in group.members)
        rows.extend(f"frozen {w}:{d}  {'; '.join(why)}" for w, d, why in self.frozen())
        return "\n".join(rows)


def solve(graph: Graph, table: Mapping[str, Row], *, rewire: bool = False) -> Solution:
    """Solve the axes of a graph and name its groups.

    With `rewire`, permutations of one axis (channel shuffles) may be emitted as gathers: more is
    free, but only the re-written program can carry it out.
    """
    solver = Solver(graph, table, rms_norms(graph), rewire=rewire, choosing=choosing(graph),
                    deals=deals(graph) if rewire else {}).solve()
    solution = Solution(graph, solver)
    mentions = Once(atoms)
    weights = graph.weights()
    carried = _members(solver, weights, mentions)
    roles = _roles(solver, weights, mentions)
    reads = _reads(solver, carried, mentions)
    approximate = _approximate(solver)
    fibres = find_fibres(solver, weights, carried, mentions)
    learned = {t.weight for t in graph.tensors.values() if t.kind == "parameter"}
    for atom, (name, members) in carried.items():
        if learned.isdisjoint([m.weight for m in members]):
            continue
        solution.groups[name] = Group(
            name, atom, tuple(members), roles.get(atom, "channel"),
            tuple(reads.get(atom, ())), fibres.get(atom, ()), tuple(approximate.get(atom, ())))
    return solution


def _members(solver: Solver, weights: Mapping[str, Tensor],
             mentions: Mapping[Expr, list[Atom]]) -> dict[Atom, tuple[str, list[Member]]]:
    """Free atoms by first mention; a group is named after its first producer and the factor."""
    consumed: dict[str, set[int]] = {}
    for read in solver.reads:
        consumed.setdefault(read.tensor, set()).add(read.dim)
    found: dict[Atom, tuple[str, list[Member]]] = {}
    for weight, tensor in weights.items():
        role = "producer" if len(tensor.shape) > 1 else "carrier"
        read_dims = consumed.get(tensor.name, ())
        for d, e in enumerate(solver.dims[tensor.name]):
            for atom in mentions[e]:
                if not atom.reasons:
                    if atom not in found:
                        found[atom] = _named(weight, d, atom, mentions[e]), []
                    found[atom][1].append(
                        Member(weight, d, "consumer" if d in read_dims else role))
    return found


def _named(weight: str, dim: int, atom: Atom, mentioned: list[Atom]) -> str:
    factor = f".{mentioned.index(atom)}" if len(mentioned) > 1 else ""
    return f"{weight}:{dim}{factor}"


ROLE_OF = {"expert": "expert", "head dim": "head dim", "head": "head", "normalised": "hidden"}
"""What the tags that rows give an atom make of it; the first that it has counts."""


def _roles(solver: Solver, weights: Mapping[str, Tensor],
           mentions: Mapping[Expr, list[Atom]]) -> dict[Atom, str]:
    """Roles by tag. What one operand brings into a product of activations and the result keeps
    (`open`) is a head if dims of heads stand inside it in a stored array, such a dim if heads
    stand outside it, and a channel (of values that are mixed, of a state) if it stands alone."""
    tags: dict[Atom, set[str]] = {}
    for e, tag in solver.roles:
        for atom in mentions[e]:
            tags.setdefault(atom, set()).add(tag)
    if any("open" in found for found in tags.values()):
        of_heads = {atom for atom, found in tags.items() if found != {"normalised"}}
        stored = set().union(*[solver.dims[tensor.name] for tensor in weights.values()])
        for atom, outside, inside in (found for e in stored for found in beside(e)):
            if "open" in tags.get(atom, ()):
                tags[atom] |= {"head"} if inside & of_heads else \
                    {"inner"} if outside & of_heads else set()
    for found in tags.values():
        if "inner" in found and "head" not in found:
            found.add("head dim")
    return {atom: role for atom, found in tags.items()
            if (role := next((r for tag, r in ROLE_OF.items() if tag in found), ""))}


def _reads(solver: Solver, carried: Iterable[Atom],
           mentions: Mapping[Expr, list[Atom]]) -> dict[Atom, list[Read]]:
    found: dict[Atom, list[Read]] = {atom: [] for atom in carried}
    for read in solver.reads:
        for atom in mentions[solver.dims[read.tensor][read.dim]]:
            if atom in found:
                found[atom].append(read)
    return found


def _approximate(solver: Solver) -> dict[Atom, list[str]]:
    found: dict[Atom, list[str]] = {}
    for e, why in solver.approximate:
        for atom in walk(e):
            found.setdefault(atom, []).append(why)
    return found


# --- fibres -----------------------------------------------------------------------------------


# --- why are two dimensions coupled -----------------------------------------------------------

