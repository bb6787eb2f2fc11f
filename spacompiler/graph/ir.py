"""The IR: a DAG of operators over named tensors, with no framework in it.

Front ends lower to it, the solver reads it, and `to_networkx` shows it to NetworkX: operators and
tensors are nodes of one directed graph, so a path in it is a chain of operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor used as an argument."""

    name: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A number among the arguments that depends on data: no row can compute with it."""


@dataclass(slots=True)
class Tensor:
    """A value: `kind` is input, parameter, buffer, constant or value (an operator's result).

    A parameter that code outside of the traced parts uses is of the kind `outside`.

    `weight` is the name of the stored array behind it (tied names share one), `shape` concrete,
    `dynamic` the dimensions whose size varies between calls. `static` values follow from stored
    arrays alone (a transposed weight), `looked` ones are such a value at positions that the
    network computes (the array of a token's expert): they are no activations.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = "value"
    weight: str | None = None
    dynamic: frozenset[int] = frozenset()
    static: bool = False
    looked: bool = False

    @property
    def array(self) -> bool:
        """True if its values are those of stored arrays alone."""
        return self.static or self.looked


@dataclass(slots=True)
class Node:
    """An operator: arguments are plain Python values with `Ref`s in place of tensors."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    where: str = ""
    source: str = ""
    _read: tuple[str, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def arg(self, index: int, keyword: str, default: object = None) -> Any:
        """Return an argument given by position or by keyword."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(keyword, default)

    def refs(self) -> Iterator[str]:
        """Yield the names of all tensors it reads, in order."""
        return iter(self.reads())

    def reads(self) -> tuple[str, ...]:
        """Return the names of all tensors it reads, in order."""
        if self._read is None:
            found: list[str] = []
            _collect(self.args, found)
            if self.kwargs:
                _collect(self.kwargs.values(), found)
            self._read = tuple(found)
        return self._read

    def title(self) -> str:
        """Name the operator and where the user wrote it."""
        place = self.where or self.name
        return f"{self.op} in {place}" + (f" ({self.source})" if self.source else "")

    __str__ = title


def _collect(values: Iterable[Any], found: list[str]) -> None:
    for value in values:
        if isinstance(value, Ref):
            found.append(value.name)
        elif isinstance(value, (list, tuple, dict)):
            _collect(value.values() if isinstance(value, dict) else value, found)


@dataclass(slots=True)
class Graph:
    """Nodes in topological order over named tensors.

    `written` are values that a call writes back into stored arrays, with these arrays' tensors.
    `sources` name what a stored array is computed from by the network's own code.
    Where the graph holds parts of a network, `outside_macs` is the work of the others in one call,
    and `heads` names the arrays of the whole network's embeddings and output layer.
    """

    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outside_macs: int = 0
    heads: frozenset[str] | None = None
    _makers: dict[str, Node] = field(default_factory=dict, init=False, repr=False, compare=False)
    _known: int = field(default=0, init=False, repr=False, compare=False)
    _stored: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _counted: int = field(default=0, init=False, repr=False, compare=False)

    def maker(self, name: str) -> Node | None:
        """Return the node that makes a tensor, None for inputs and stored arrays."""
        if self._known != len(self.nodes):
            self._makers = {out: node for node in self.nodes for out in node.outputs}
            self._known = len(self.nodes)
        return self._makers.get(name)

    def weights(self) -> dict[str, Tensor]:
        """Return one tensor for each stored array (parameters and buffers), by array name."""
        return dict(self._arrays())

    def array(self, name: str) -> Tensor:
        """Return the tensor of a stored array; raises KeyError if there is none of that name."""
        return self._arrays()[name]

    def _arrays(self) -> dict[str, Tensor]:
        if self._counted != len(self.tensors):  # tensors are only added
            self._stored, self._counted = {}, len(self.tensors)
            for tensor in self.tensors.values():
                if tensor.weight is not None:
                    self._stored.setdefault(tensor.weight, tensor)
        return self._stored

    def to_networkx(self) -> nx.DiGraph:
        """Return operators and tensors as one bipartite graph (`kind`: op or tensor)."""
        import networkx as nx

        graph = nx.DiGraph()
        for tensor in self.tensors.values():
            graph.add_node(tensor.name, kind="tensor", shape=tensor.shape, weight=tensor.weight)
        for node in self.nodes:
            graph.add_node(("op", node.name), kind="op", op=node.op, where=node.where)
            graph.add_edges_from((ref, ("op", node.name)) for ref in node.refs())
            graph.add_edges_from((("op", node.name), out) for out in node.outputs)
        return graph

    def __str__(self) -> str:
        rows = []
        for node in self.nodes:
            outs = ", ".join(f"{o}{list(self.tensors[o].shape)}" for o in node.outputs)
            rows.append(f"{outs} = {node.op}({', '.join(node.refs())})  # {node.where}")
        return "\n".join(rows)
