"""Consumers as matrix products: whatever a node is, it multiplies some X by some stored W.

A table says by pattern which letters of an operator's two operands are multiplied; a convolution
is brought into that form by cutting its input into patches. Letters that both operands and the
result carry are *shared* (the groups of a convolution, the batch of a product), those that only
the operands carry are *features*, the others *samples* (of X) and *outputs* (of W). Statistics,
scores and repairs then speak of X (shared, samples, features) and W (shared, outputs, features),
and never of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch.nn import functional

from .graph import Graph, Node, Ref
from .notation import Pattern, align, parse

Shaper = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """Two operands by name, the pattern that multiplies them, and how they get to its rank.

    `patch` shapes the first operand; `kernel` is the shape that the second one is given.
    """

    operands: tuple[str, str]
    pattern: str
    patch: Shaper | None = None
    kernel: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Consumer:
    """A node that multiplies the activation `tensor` by the stored (or static) array `weight`.

    Consumers with equal `key` see the same X.
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

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return X (shared, samples, features) of an activation; samples go by example first."""
        return _ordered(self.patch(x) if self.patch else x, self.x_order)

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


def _names(node: Node, *at: int) -> tuple[str, str]:
    one, two = (node.args[i].name for i in at)
    return one, two


def _product(one: int, two: int, pattern: str) -> Callable[[Graph, Node], Form]:
    return lambda graph, node: Form(_names(node, one, two), pattern)


def _matmul(graph: Graph, node: Node) -> Form:
    names = _names(node, 0, 1)
    one, two = (len(graph.tensors[name].shape) for name in names)
    left, n = ("k", "") if one == 1 else ("... n k", "n ")
    right, m = ("k", "") if two == 1 else ("... k m", "m")
    return Form(names, f"{left}, {right} -> {'... ' if one > 1 or two > 1 else ''}{n}{m}")


def _gemm(graph: Graph, node: Node) -> Form:
    """ONNX's Gemm(a, b, c, transA, transB)."""
    a, b = ("k n" if node.args[3] else "n k"), ("m k" if node.args[4] else "k m")
    return Form(_names(node, 0, 1), f"{a}, {b} -> n m")


def _einsum(graph: Graph, node: Node) -> Form:
    sides = node.args[0].replace(" ", "").replace("...", ".").replace("->", ",").split(",")
    one, two, out = (" ".join(side).replace(".", "...") for side in sides)
    first, second = node.args[1]
    return Form((first.name, second.name), f"{one}, {two} -> {out}")


def _convolution(at: int, transposed: Callable[[Node], bool]) -> Callable[[Graph, Node], Form]:
    """Groups stand at argument `at`. A transposed one scatters each position by itself."""

    def form(graph: Graph, node: Node) -> Form:
        names = _names(node, 0, 1)
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
    "aten.einsum": _einsum,
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
    static = [graph.tensors[name].static for name in form.operands]
    if static[0] == static[1] or (form.patch and static[0]):
        return None
    w = static.index(True)
    shared, features, samples, outputs, result = _roles(graph, node, form, w)
    key = f"{form.operands[1 - w]} {form.pattern if not form.patch else _window(node, form)} {w}"
    return Consumer(node, form.operands[1 - w], form.operands[w], key, form.patch, form.kernel,
                    (shared[1 - w], samples, features[1 - w]), (shared[w], outputs, features[w]),
                    result)


Dims = tuple[int, ...]


def _roles(graph: Graph, node: Node, form: Form, w: int) -> tuple[
        tuple[Dims, Dims], tuple[Dims, Dims],
                                                      Dims, Dims, tuple[Dims, Dims, Dims]]:
    """Dimensions of the operands that are shared and features (of both), samples, outputs; and
    those of the result that are shared, samples and outputs."""
    pattern = parse(form.pattern)
    shapes = [graph.tensors[name].shape for name in form.operands]
    if form.patch:  # the pattern speaks of patches, whose letters have no shape in the graph
        ranks = [len(terms) for terms in pattern.inputs]
        shapes = [(2,) * ranks[0], tuple(form.kernel or ())]
    letters = [["".join(term) for term in align(terms, len(shape))]
               for terms, shape in zip(pattern.inputs, shapes, strict=True)]
    one, two = letters
    common = [a for a in one if a in two]
    summed = {a for a in common if a in pattern.consumed}
    # a run's dimension of size one stretches: it belongs to the other operand alone
    both = [a for a in common if a not in summed and (form.patch or 1 not in (
        shapes[0][one.index(a)], shapes[1][two.index(a)]))]

    def dims(i: int, wanted: Iterable[str]) -> Dims:
        return tuple(letters[i].index(a) for a in wanted)

    kept = [a for a in common if a in summed]
    rest = [tuple(d for d, a in enumerate(side) if a not in both and a not in summed)
            for side in letters]
    made = ["".join(term) for term in align(pattern.outputs[0], _rank(graph, node, form, pattern))]
    named = (both, [letters[1 - w][d] for d in rest[1 - w]], [letters[w][d] for d in rest[w]])
    result = [tuple(made.index(a) for a in part if a in made) for part in named]
    return ((dims(0, both), dims(1, both)), (dims(0, kept), dims(1, kept)), rest[1 - w], rest[w],
            (result[0], result[1], result[2]))


def _rank(graph: Graph, node: Node, form: Form, pattern: Pattern) -> int:
    return len(pattern.outputs[0]) if form.patch else len(graph.tensors[node.outputs[0]].shape)


def _window(node: Node, form: Form) -> str:
    arguments = [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, Ref)]
    return f"{form.kernel and form.kernel[0]} {form.kernel and form.kernel[2]} {arguments}"
