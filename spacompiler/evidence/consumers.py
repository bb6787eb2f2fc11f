"""Consumers as matrix products: whatever a node is, it multiplies some X by some stored W.

A table says by pattern which letters of an operator's two operands are multiplied; a convolution
is brought into that form by cutting its input into patches. Letters that both operands and the
result carry are *shared* (the groups of a convolution, the batch of a product), those that only
the operands carry are *features*, the others *samples* (of X) and *outputs* (of W). Statistics,
scores and repairs then speak of X (shared, samples, features) and W (shared, outputs, features),
and never of layers. Where data says which of several arrays a sample meets (experts of a mixture),
these are the shared index, and a `Route` deals the samples out to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch.nn import functional

from ..axes.notation import Pattern, align, parse
from ..graph.ir import Graph, Node, Ref
from .origins import Dims, Origin, Route, origin

Shaper = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """Two operands by name, the pattern that multiplies them, and how they get to its rank.

    `patch` shapes the first operand; `kernel` is the shape that the second one is given; `ends`
    names the tensor that says where rows of the first one end that meet each array of the second.
    """

    operands: tuple[str, str]
    pattern: str
    patch: Shaper | None = None
    kernel: tuple[int, ...] | None = None
    ends: str | None = None


@dataclass(frozen=True, slots=True)
class Consumer:
    """A node that multiplies the activation `tensor` by the stored (or static) array `weight`.

    What it reads of the array may be a view, the last of `views`. Consumers with equal `key` see
    the same X. With a `route`, X has all samples, in one, until they are dealt out.
    """

    node: Node
    tensor: str
    weight: str
    key: str
    patch: Shaper | None
    kernel: tuple[int, ...] | None
    x_order: tuple[tuple[int, ...], ...]
    w_order: tuple[tuple[int, ...], ...]
    y_order: tuple[tuple[int, ...], ...]
    views: tuple[str, ...] = ()
    route: Route | None = None

    @property
    def operand(self) -> str:
        """The array as the node reads it."""
        return self.views[-1] if self.views else self.weight

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """Where to look, as (node, tensor): at the activation, and at where samples go."""
        own = (self.node.name, self.tensor)
        return (own,) if self.route is None else (own, (self.route.node, self.route.tensor))

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return X (shared, samples, features) of an activation; samples go by example first."""
        made = _ordered(self.patch(x) if self.patch else x, self.x_order)
        return made if self.route is None else made.expand(self.route.count, -1, -1)

    def matrix(self, w: torch.Tensor) -> torch.Tensor:
        """Return W (shared, outputs, features) of the stored array."""
        return _ordered(w.reshape(self.kernel) if self.kernel else w, self.w_order)

    def outputs(self, y: torch.Tensor) -> torch.Tensor:
        """Return the result (shared, samples, outputs), or its gradient, of what the node gives."""
        if self.patch:
            y = y.reshape(y.shape[0], (self.kernel or (1,))[0], -1, prod(y.shape[2:]))
        return _ordered(y, self.y_order)

    def array(self, matrix: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the stored array, of `shape`, whose `matrix` this is."""
        order = [d for dims in self.w_order for d in dims]
        sizes = self.kernel or shape
        back = [order.index(d) for d in range(len(order))]
        return matrix.reshape([sizes[d] for d in order]).permute(back).reshape(shape)


def _ordered(value: torch.Tensor, order: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    shape = [prod(value.shape[d] for d in dims) for dims in order]
    return value.permute([d for dims in order for d in dims]).reshape(shape)


# --- which operators multiply what ------------------------------------------------------------


def operands(node: Node, *at: int) -> tuple[str, str]:
    """Return the names of the two tensors at these positions of a node's arguments."""
    one, two = (node.args[i].name for i in at)
    return one, two


def _product(one: int, two: int, pattern: str) -> Callable[[Graph, Node], Form]:
    return lambda graph, node: Form(operands(node, one, two), pattern)


def _grouped(graph: Graph, node: Node) -> Form:
    """grouped_mm(x, weights, ends)."""
    return Form(operands(node, 0, 1), "n i, e i o -> n o", ends=node.args[2].name)


def _matmul(graph: Graph, node: Node) -> Form:
    names = operands(node, 0, 1)
    one, two = (len(graph.tensors[name].shape) for name in names)
    left, n = ("k", "") if one == 1 else ("... n k", "n ")
    right, m = ("k", "") if two == 1 else ("... k m", "m")
    return Form(names, f"{left}, {right} -> {'... ' if one > 1 or two > 1 else ''}{n}{m}")


def _gemm(graph: Graph, node: Node) -> Form:
    """ONNX's Gemm(a, b, c, transA, transB)."""
    a, b = ("k n" if node.args[3] else "n k"), ("m k" if node.args[4] else "k m")
    return Form(operands(node, 0, 1), f"{a}, {b} -> n m")


def _einsum(graph: Graph, node: Node) -> Form:
    sides = node.args[0].replace(" ", "").replace("...", ".").replace("->", ",").split(",")
    one, two, out = (" ".join(side).replace(".", "...") for side in sides)
    first, second = node.args[1]
    return Form((first.name, second.name), f"{one}, {two} -> {out}")


def _convolution(at: int, transposed: Callable[[Node], bool]) -> Callable[[Graph, Node], Form]:
    """Groups stand at argument `at`. A transposed one scatters each position by itself."""

    def form(graph: Graph, node: Node) -> Form:
        names = operands(node, 0, 1)
        shape = graph.tensors[names[1]].shape
        groups, across = node.arg(at, "groups", 1), transposed(node)

        def patch(x: torch.Tensor) -> torch.Tensor:
            x = x if x.ndim == len(shape) else x.unsqueeze(0)
            x = x.flatten(2).unsqueeze(2) if across else _unfold(node, x, shape[2:])
            return x.reshape(x.shape[0], groups, -1, x.shape[-1])

        pattern = "b g f l, g f o -> b g o l" if across else "b g f l, g o f -> b g o l"
        kernel = (groups, shape[0] // groups, prod(shape[1:]))
        return Form(names, pattern, patch, kernel)

    return form


def _unfold(node: Node, x: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """Cut a convolution's input (b, c, *positions) into patches (b, c, kernel, positions)."""
    rank = len(kernel)

    def per_axis(position: int, name: str, default: int) -> list[int]:
        given = node.arg(position, name, default)
        given = [given] if isinstance(given, int) else list(given)
        return given * rank if len(given) == 1 else given

    stride, dilation = per_axis(3, "stride", 1), per_axis(5, "dilation", 1)
    if isinstance(node.arg(4, "padding"), str):
        same = node.arg(4, "padding") == "same"
        total = [d * (k - 1) * same for k, d in zip(kernel, dilation, strict=True)]
        pads = [(n // 2, n - n // 2) for n in total]
    else:
        pads = [n if isinstance(n, tuple) else (n, n) for n in per_axis(4, "padding", 0)]
    x = functional.pad(x, [n for pair in reversed(pads) for n in pair])
    for axis in range(rank):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]
    x = x.flatten(2 + rank).flatten(2, 1 + rank)
    return x.transpose(2, 3)


_CONV, _TRANSPOSED = _convolution(6, lambda n: False), _convolution(6, lambda n: True)
FORMS: dict[str, Callable[[Graph, Node], Form]] = {
    "aten.linear": _product(0, 1, "... i, o i -> ... o"),
    "aten.mm": _product(0, 1, "n i, i m -> n m"),
    "aten.addmm": _product(1, 2, "n i, i m -> n m"),
    "aten.bmm": _product(0, 1, "b n i, b i m -> b n m"),
    "aten.baddbmm": _product(1, 2, "b n i, b i m -> b n m"),
    "aten.matmul": _matmul,
    "aten.einsum": _einsum, "transformers.grouped_mm_fallback": _grouped,
    **dict.fromkeys("aten.conv1d aten.conv2d aten.conv3d".split(), _CONV),
    **dict.fromkeys("aten.conv_transpose1d aten.conv_transpose2d aten.conv_transpose3d".split(),
                    _TRANSPOSED),
    "aten.convolution": _convolution(8, lambda n: bool(n.args[6])),
    "MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Conv": _CONV,
    "ConvTranspose": _TRANSPOSED,
}


def consumer(graph: Graph, node: Node) -> Consumer | None:
    """Return a node as a consumer, or None where it does not multiply one activation by weights."""
    row = FORMS.get(node.op) or FORMS.get(node.op.rsplit(".", 1)[0])
    if row is None:
        return None
    form = row(graph, node)
    tensors = [graph.tensors[name] for name in form.operands]
    fixed = [t.static for t in tensors]
    arrays = fixed if any(fixed) else [t.looked for t in tensors]
    if arrays[0] == arrays[1] or (form.patch and arrays[0]):
        return None
    w = arrays.index(True)
    known = origin(graph, form.operands[w]) if form.kernel is None else None
    if tensors[w].looked and known is None:
        return None
    behind = known or Origin(form.operands[w], tuple(range(len(form.kernel or tensors[w].shape))))
    route = behind.route if form.ends is None else Route(
        node.name, form.ends, behind.dims[0], tensors[w].shape[0], ends=True)
    dealt = tuple(d for d, own in enumerate(behind.dims) if route and own == route.dim)
    roles = _roles(graph, node, form, w, dealt)
    if roles is None:
        return None
    x_order, w_order, result = roles
    own = [tuple(behind.dims[d] for d in dims) for dims in w_order]
    key = f"{form.operands[1 - w]} {form.pattern if not form.patch else _window(node, form)} {w}"
    return Consumer(node, form.operands[1 - w], behind.weight,
                    key if route is None else f"{key} {route.tensor}", form.patch, form.kernel,
                    x_order, (own[0] if route is None else (route.dim,), own[1], own[2]), result,
                    behind.views, route)


def _roles(graph: Graph, node: Node, form: Form, w: int, dealt: Dims) -> tuple[
        tuple[Dims, Dims, Dims], tuple[Dims, Dims, Dims], tuple[Dims, Dims, Dims]] | None:
    """Dimensions that are shared, samples (outputs) and features: of the activation, the array;
    and those of the result that are shared, samples and outputs.

    Samples are dealt out by the dimensions `dealt` of the array: None if they are none of X's.
    """
    pattern = parse(form.pattern)
    shapes = [graph.tensors[name].shape for name in form.operands]
    if form.patch:  # the pattern speaks of patches, whose letters have no shape in the graph
        ranks = [len(terms) for terms in pattern.inputs]
        shapes = [(2,) * ranks[0], tuple(form.kernel or ())]
    letters = [["".join(term) for term in align(terms, len(shape))]
               for terms, shape in zip(pattern.inputs, shapes, strict=True)]
    one, two = letters
    common = [a for a in one if a in two]
    kept = [a for a in common if a in pattern.consumed]
    first = [letters[w][d] for d in dealt]
    if form.ends is None and not set(first) <= set(common):
        return None
    # a run's dimension of size one stretches: it belongs to the other operand alone
    both = [a for a in common if a not in (*kept, *first) and (form.patch or 1 not in (
        shapes[0][one.index(a)], shapes[1][two.index(a)]))]

    def dims(side: list[str], wanted: Iterable[str]) -> Dims:
        return tuple(side.index(a) for a in wanted if a in side)

    left = [[a for a in side if a not in (*both, *kept, *first)] for side in letters]
    x, y = letters[1 - w], letters[w]
    samples = [*(a for a in first if a in x), *left[1 - w]]
    made = ["".join(term) for term in align(pattern.outputs[0], _rank(graph, node, form, pattern))]
    return ((dims(x, both), dims(x, samples), dims(x, kept)),
            (dims(y, both), dims(y, left[w]), dims(y, kept)),
            (dims(made, both), dims(made, samples), dims(made, left[w])))


def _rank(graph: Graph, node: Node, form: Form, pattern: Pattern) -> int:
    return len(pattern.outputs[0]) if form.patch else len(graph.tensors[node.outputs[0]].shape)


def _window(node: Node, form: Form) -> str:
    arguments = [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, Ref)]
    return f"{form.kernel and form.kernel[0]} {form.kernel and form.kernel[2]} {arguments}"
