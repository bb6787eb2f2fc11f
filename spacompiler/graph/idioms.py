"""Idioms of several operators that only mean something together.

A channel shuffle is traced as view, transpose, view: one axis dealt out in another order.

RMSNorm is traced as rms_norm or as pow, mean, add, rsqrt, mul (and mul by a gain). On its own
the mean over a pruned axis changes; as RMSNorm the change is undone exactly by the gain and eps:
from width d to d', gain * sqrt(d/d') and eps * d/d'. So it is in a global response norm (Woo et
al., ConvNeXt V2, 2023), where a channel's response is divided by the mean of all: gain * d/d'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .ir import Graph, Node, Ref


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """`x * rsqrt(mean(x^2) + eps) * (gain + offset)` over the last dimension of `source`.

    With `power` 1 it is `y * (x / (mean(x) + eps)) * gain`, a global response norm. From width d
    to d' the gain becomes `gain * (d/d') ** power`.
    """

    mean: str
    source: str
    eps_node: str
    eps_arg: int
    eps: float
    gain: str
    offset: float
    power: float = 0.5


_CASTS = {"_to_copy", "to", "clone", "type_as", "cast", "castlike", "identity"}
_VIEWS = ("view", "reshape", "_unsafe_view", "unflatten", "flatten", "view_copy")
_FUSED = ("rms_norm", "rmsnormalization", "simplifiedlayernormalization",
          "skipsimplifiedlayernormalization")


@cache
def base(op: str) -> str:
    """`aten.mul.Tensor` and ONNX's `Mul` -> `mul`, `com.microsoft.Gelu` -> `gelu`."""
    parts = op.split(".")
    return parts[1] if parts[0] == "aten" else parts[-1].lower()


class _Uses:
    def __init__(self, graph: Graph) -> None:
        self.makers = {out: node for node in graph.nodes for out in node.outputs}
        self.users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for ref in dict.fromkeys(node.refs()):
                self.users.setdefault(ref, []).append(node)
        self.graph = graph

    def only(self, name: str, *ops: str) -> Node | None:
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and base(users[0].op) in ops else None

    def uncast(self, name: str) -> str:
        while name in self.makers and base(self.makers[name].op) in _CASTS:
            name = next(self.makers[name].refs())
        return name

    def casts(self, name: str) -> Iterator[str]:
        yield name
        for user in self.users.get(name, []):
            if base(user.op) in _CASTS:
                yield from self.casts(user.outputs[0])


def choosing(graph: Graph) -> frozenset[str]:
    """Find the nodes that choose the best along an axis and whose positions are read."""
    found = [node for node in graph.nodes if base(node.op) == "topk" and len(node.outputs) == 2]
    read = {ref for node in graph.nodes for ref in node.refs()} if found else set()
    return frozenset(node.name for node in found if node.outputs[1] in read)


def rms_norms(graph: Graph) -> dict[str, RmsNorm]:
    """Find every RMSNorm of the graph, by the name of its mean node."""
    means = [node for node in graph.nodes if base(node.op) in _MATCHES and not _over_places(node)]
    if not means:
        return {}
    uses, found = _Uses(graph), {}
    for node in means:
        for match in _MATCHES[base(node.op)]:
            norm = match(uses, node)
            if norm is not None:
                found[node.name] = norm
    return found


def _over_places(node: Node) -> bool:
    """Whether a node reduces several dimensions (a global pooling, say): no norm does."""
    dims = node.arg(1, "dim")
    return base(node.op) == "mean" and isinstance(dims, (list, tuple)) and len(dims) > 1


def _fused(uses: _Uses, node: Node) -> RmsNorm | None:
    """The operator rms_norm(x, shape, gain, eps), given a stored gain and an eps."""
    if len(node.args) < 4 or len(node.args[1]) != 1 or not isinstance(node.args[3], float):
        return None
    x, gain = node.args[0], node.args[2]
    weight = uses.graph.tensors[uses.uncast(gain.name)].weight if isinstance(gain, Ref) else None
    if weight is None:
        return None
    return RmsNorm(node.name, x.name, node.name, 3, node.args[3], weight, 0.0)


def _match(uses: _Uses, mean: Node) -> RmsNorm | None:
    square = uses.makers.get(next(mean.refs()))
    if square is None or not _is_square(square):
        return None
    source = next(square.refs())
    found = _plus_eps(uses, mean, source)
    if found is None:
        return None
    add, eps_arg = found
    scale = _scale(uses, add.outputs[0])
    if scale is None or uses.uncast(source) not in map(uses.uncast, scale.refs()):
        return None
    gain = _gain(uses, scale.outputs[0])
    if gain is None:
        return None
    return RmsNorm(mean.name, source, add.name, eps_arg, add.args[eps_arg], *gain)


def _response(uses: _Uses, mean: Node) -> RmsNorm | None:
    """`y * (x / (mean(x) + eps)) * gain`, or without y."""
    source = next(mean.refs())
    found = _plus_eps(uses, mean, source)
    if found is None:
        return None
    add, eps_arg = found
    over = uses.only(add.outputs[0], "div")
    if over is None or not isinstance(over.args[0], Ref) or \
            uses.uncast(over.args[0].name) != uses.uncast(source):
        return None
    gain, times = _gain(uses, over.outputs[0]), uses.only(over.outputs[0], "mul")
    if gain is None and times is not None:
        gain = _gain(uses, times.outputs[0])
    if gain is None or gain[1]:
        return None
    return RmsNorm(mean.name, source, add.name, eps_arg, add.args[eps_arg], *gain, power=1.0)


def _plus_eps(uses: _Uses, mean: Node, source: str) -> tuple[Node, int] | None:
    """The node that adds eps to a mean over the last dimension, and where eps stands in it."""
    rank = len(uses.graph.tensors[source].shape)
    add = uses.only(mean.outputs[0], "add")
    if add is None or mean.arg(1, "dim") not in ([-1], [rank - 1]):
        return None
    return next(((add, i) for i, a in enumerate(add.args) if isinstance(a, float)), None)


_MATCHES = {"mean": (_match, _response), "reducemean": (_match, _response),
            **dict.fromkeys(_FUSED, (_fused,))}


def _scale(uses: _Uses, variance: str) -> Node | None:
    """The product with 1 / sqrt(variance): rsqrt, pow -1/2, or a root and what divides by it."""
    root = uses.only(variance, "rsqrt", "pow", "sqrt")
    if root is None or (base(root.op) == "pow" and root.arg(1, "exponent") not in (-0.5, 0.5)):
        return None
    if base(root.op) == "rsqrt" or root.arg(1, "exponent") == -0.5:
        return uses.only(root.outputs[0], "mul")
    over = uses.only(root.outputs[0], "reciprocal", "div")
    if over is None or base(over.op) == "reciprocal":
        return uses.only(over.outputs[0], "mul") if over is not None else None
    if over.args[0] == 1:
        return uses.only(over.outputs[0], "mul")
    divides = isinstance(over.args[1], Ref) and over.args[1].name == root.outputs[0]
    return over if divides else None


def _is_square(node: Node) -> bool:
    if base(node.op) == "pow":
        return node.arg(1, "exponent") == 2
    refs = list(node.refs())
    return base(node.op) == "mul" and len(refs) == 2 and refs[0] == refs[1]


def _gain(uses: _Uses, normed: str) -> tuple[str, float] | None:
    """The stored array that scales the normalised value, and the constant added to it."""
    for name in uses.casts(normed):
        for user in uses.users.get(name, []):
            factors = _factors(user)
            if name not in factors or len(uses.users.get(name, [])) != 1:
                continue
            for other in factors:
                found = _offset_weight(uses, other) if other != name else None
                if found is not None:
                    return found
    return None


def _factors(node: Node) -> list[str]:
    """What a node multiplies: the operands of mul, the last two of addcmul."""
    if base(node.op) == "addcmul":
        return [a.name for a in node.args[1:]]
    return list(node.refs()) if base(node.op) == "mul" else []


def _offset_weight(uses: _Uses, name: str) -> tuple[str, float] | None:
    name = uses.uncast(name)
    maker = uses.makers.get(name)
    while maker is not None and base(maker.op) in _VIEWS and uses.graph.tensors[name].shape[:-1] \
            == (1,) * (len(uses.graph.tensors[name].shape) - 1):  # a gain, ready to broadcast
        name = uses.uncast(next(maker.refs()))
        maker = uses.makers.get(name)
    if maker is None:
        weight = uses.graph.tensors[name].weight
        return (weight, 0.0) if weight is not None else None
    if base(maker.op) != "add":
        return None
    refs = [a for a in maker.args if isinstance(a, Ref)]
    constants = [a for a in maker.args if isinstance(a, (int, float))]
    if len(refs) != 1 or len(constants) != 1:
        return None
    (ref,), (constant,) = refs, constants
    weight = uses.graph.tensors[uses.uncast(ref.name)].weight
    return (weight, float(constant)) if weight is not None else None


# --- one axis dealt out in another order ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deal:
    """`source` with dimension `dim` in another order: position p is its position `order[p]`.

    `first` and `last` are the nodes at the ends of the chain that computes it.
    """

    source: str
    dim: int
    order: np.ndarray
    first: str
    last: str


_MOVES = ("permute", "transpose", "swapaxes", "clone", "contiguous")


def deals(graph: Graph) -> dict[str, Deal]:
    """Find every axis that is split, its factors permuted, and merged again; by all its nodes."""
    uses, found = _Uses(graph), {}
    for node in graph.nodes:
        if base(node.op) in _VIEWS:
            chain, deal = _deal(uses, node)
            if deal is not None:
                found.update(dict.fromkeys(chain, deal))
    return found


def _deal(uses: _Uses, first: Node) -> tuple[list[str], Deal | None]:
    tensors = uses.graph.tensors
    source = next(first.refs())
    old, new = tensors[source].shape, tensors[first.outputs[0]].shape
    dim = next((d for d, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(old))
    count = len(new) - len(old) + 1
    factors = new[dim : dim + count]
    if count < 2 or dim >= len(old) or dim in tensors[source].dynamic or \
            math.prod(factors) != old[dim] or new[dim + count :] != old[dim + 1 :]:
        return [], None
    axes, node, chain = list(range(len(new))), first, [first.name]
    while (user := uses.only(node.outputs[0], *_MOVES, *_VIEWS)) is not None:
        node = user
        chain.append(node.name)
        if base(node.op) in _VIEWS:
            middle = [a - dim for a in axes[dim : dim + count]]
            outside = axes[:dim] + axes[dim + count :]
            rest = [*range(dim), *range(dim + count, len(new))]
            if tensors[node.outputs[0]].shape != old or outside != rest:
                return [], None
            order = np.arange(old[dim]).reshape(factors).transpose(middle).ravel()
            if np.array_equal(order, np.arange(old[dim])):  # plain views say more
                return [], None
            return chain, Deal(source, dim, order, first.name, node.name)
        axes = moved(node, axes)
    return [], None


def moved(node: Node, axes: Sequence[int]) -> list[int]:
    """Return the axes in the order that a transposition or permutation gives them."""
    if base(node.op) == "permute":
        return [axes[d] for d in node.args[1]]
    if base(node.op) in ("transpose", "swapaxes"):
        a, b = node.args[1:3]
        axes = list(axes)
        axes[a], axes[b] = axes[b], axes[a]
    return list(axes)
