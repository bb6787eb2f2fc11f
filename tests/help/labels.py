"""A second model of what may be removed: marks on positions, and every choice tried.

It knows nothing of expressions. A choice removes rows of stored arrays; each operator carries the
marks of what stays along, position by position, and says what its other arrays must keep for it
to be well defined. Operators that only move positions are run on the marks themselves. A choice is
allowed if the marks of every value are a box (kept rows x kept columns), no dimension is emptied,
and all operators get what they need. (Values in `ragged` need be no box: they are never made.)
Columns and biases follow from what is read, so that only rows (and copies that an expand makes)
are chosen: few enough to try them all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from spacompiler.graph.idioms import base
from spacompiler.torch_backend.trace import Trace

MOST_BITS = 13


class Unsupported(Exception):
    """An operator that the marks know no rule for, or more choices than can be tried."""


Given = Callable[[str, int], Tensor | None]


@dataclass
class Marks:
    """Marks of one network: `valid[a]` says whether choice a is allowed.

    `marks[name]` has the shape (choices, *tensor); `kept[array, dim]` is (choices, size).
    """

    trace: Trace
    choices: int = 1
    bits: Tensor | None = None
    given: Given = lambda name, dim: None
    norms: frozenset[str] = frozenset()
    ragged: frozenset[str] = frozenset()
    used: int = 0
    marks: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    stored: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    valid: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.bool))

    def run(self) -> Marks:
        """Carry marks through the network."""
        self.valid = torch.ones(self.choices, dtype=torch.bool)
        tensors = self.trace.graph.tensors
        for node in self.trace.program.graph_module.graph.nodes:
            tensor = tensors.get(node.name)
            if tensor is None and node.op != "call_function":
                continue
            if tensor is not None and tensor.weight is not None:
                self.stored[node.name] = tuple((tensor.weight, d)
                                               for d in range(len(tensor.shape)))
            elif node.op == "placeholder":
                self.marks[node.name] = self.full(tensor.shape)
            elif node.target is operator.getitem:
                self.marks[node.name] = self.marks[f"{node.args[0].name}"][node.args[1]]
            else:
                self.visit(node)
        for name in self.trace.graph.outputs:
            if name in self.marks:
                self.need(self.marks[name].flatten(1).all(1))
        return self

    def full(self, shape: Sequence[int]) -> Tensor:
        return torch.ones(self.choices, *shape, dtype=torch.bool)

    def need(self, condition: Tensor) -> None:
        self.valid = self.valid & condition

    def visit(self, node: fx.Node) -> None:
        name = base(str(node.target))
        if all(n.name in self.stored for n in node.all_input_nodes) and node.all_input_nodes:
            self.stored_view(node, name)
        elif name in MOVES:
            self.moved(node, name)
        elif name in RULES:
            self.marks[node.name] = RULES[name](self, node)
        else:
            raise Unsupported(name)

    # --- arrays ---------------------------------------------------------------------------------

    def require(self, node: fx.Node | None, dim: int, kept: Tensor) -> None:
        """A dimension of a stored array must keep exactly this."""
        if node is None:
            return
        if node.name not in self.stored:
            self.need((self.line(node, dim) == kept).all(1))
            return
        key = self.stored[node.name][dim]
        have = self.kept.get(key)
        if have is None:
            have = self.given(*key)
        if have is not None:
            self.need((have == kept).all(1))
        self.kept[key] = kept if have is None else have

    def rows(self, node: fx.Node, dim: int, last: fx.Node | None = None) -> Tensor:
        """What a dimension of a stored array keeps: chosen, unless it is known by now."""
        key = self.stored[node.name][dim]
        if key not in self.kept:
            given = self.given(*key)
            size = self.trace.graph.tensors[node.name].shape[dim]
            if given is None and last is not None and last.name in self.trace.graph.outputs:
                given = self.full([size])
            self.kept[key] = self.free(size) if given is None else given
        self.need(self.kept[key].any(1))
        return self.kept[key]

    def free(self, size: int) -> Tensor:
        """The next choices: any of `size` slices may go."""
        self.used += size
        if self.bits is None or size == 1:
            self.used -= size == 1
            return self.full([size])
        return self.bits[:, self.used - size : self.used]

    def stored_view(self, node: fx.Node, name: str) -> None:
        """A turned array is the same array; what else is made of arrays stays out of it."""
        source = self.stored[node.all_input_nodes[0].name]
        if name in ("t", "numpy_T"):
            self.stored[node.name] = source[::-1]
        elif name in ("clone", "detach", "alias", "add") and len(node.all_input_nodes) == 1:
            self.stored[node.name] = source
        else:
            raise Unsupported(f"{name} of stored arrays")

    # --- values ---------------------------------------------------------------------------------

    def of(self, node: fx.Node) -> Tensor:
        """Marks of a value that an operator reads: they must be a box."""
        if node.name in self.stored:
            dims = [self.rows(node, d) for d in range(len(self.stored[node.name]))]
            return box(dims) if dims else self.full([])
        marks = self.marks[node.name]
        lines = [line(marks, d) for d in range(marks.ndim - 1)]
        if lines:
            self.need((box(lines) == marks).flatten(1).all(1))
            self.need(torch.stack([kept.any(1) for kept in lines]).all(0))
        return marks

    def line(self, node: fx.Node, dim: int) -> Tensor:
        return line(self.of(node), dim % (self.of(node).ndim - 1))

    def whole(self, node: fx.Node, dims: Sequence[int]) -> None:
        for d in dims:
            self.need(self.line(node, d).all(1))

    def moved(self, node: fx.Node, name: str) -> None:
        """Run an operator that only moves positions on the marks."""
        def run(*given: Tensor) -> Any:
            values = iter(given)
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: (
                next(values) if n.name in self.marks else self.constant(n)))
            return node.target(*args, **kwargs)

        read: list[fx.Node] = []
        fx.node.map_arg((node.args, dict(node.kwargs)), read.append)
        given = [self.marks[n.name].double() for n in read if n.name in self.marks]
        made = torch.vmap(run)(*given)
        if isinstance(made, (list, tuple)):
            self.marks[node.name] = tuple(m > 0.5 for m in made)  # type: ignore[assignment]
            return
        self.marks[node.name] = (made > 0.5) & self.copies(node, name, made.shape[1:])
        if node.name not in self.ragged:
            self.of(node)

    def constant(self, node: fx.Node) -> Tensor:
        stored = {**self.trace.program.state_dict, **self.trace.program.constants}
        return stored[self.trace.graph.tensors[node.name].weight].data

    def copies(self, node: fx.Node, name: str, shape: Sequence[int]) -> Tensor:
        """Copies that an operator makes of a dimension may be fewer: another choice each."""
        kept = self.full([1] * len(shape))
        if name not in ("expand", "repeat", "repeat_interleave", "tile"):
            return kept
        old = self.marks[node.args[0].name].shape[1:]
        old = [1] * (len(shape) - len(old)) + list(old)
        for d, (a, b) in enumerate(zip(old, shape, strict=True)):
            if a == b:
                continue
            key = (f"copies of {node.name}", d)
            given = self.given(*key)
            at = torch.arange(b)
            index = at % (b // a) if name == "repeat_interleave" else at // a
            chosen = self.free(b // a) if given is None else torch.stack(
                [given[:, index == i].any(1) for i in range(b // a)], 1)
            self.kept[key] = chosen
            kept = kept & chosen[:, index].reshape(
                self.choices, *(b if i == d else 1 for i in range(len(shape))))
        return kept


def line(marks: Tensor, dim: int) -> Tensor:
    """Which slices of one dimension hold anything: (choices, size)."""
    return marks.movedim(dim + 1, 1).flatten(2).any(2) if marks.ndim > 2 else marks


def box(lines: Sequence[Tensor]) -> Tensor:
    """Rows x columns x ...: (choices, *sizes)."""
    rank = len(lines)
    return reduce(operator.and_, (
        kept.reshape(kept.shape[0], *(-1 if i == d else 1 for i in range(rank)))
        for d, kept in enumerate(lines)))


# --- rules --------------------------------------------------------------------------------------

MOVES = """
view _unsafe_view reshape flatten unflatten permute transpose t mT swapaxes movedim unsqueeze
squeeze expand repeat tile repeat_interleave cat stack slice narrow select split_with_sizes split
unbind flip roll index_select pixel_shuffle pixel_unshuffle clone contiguous alias detach
""".split()
Rule = Callable[[Marks, fx.Node], Any]


def pointwise(m: Marks, n: fx.Node) -> Tensor:
    """All operands keep the same, where they do not stretch."""
    read = list(n.all_input_nodes)
    values = [r for r in read if r.name in m.marks]
    lines: dict[int, Tensor] = {}
    for r in [*values, *(r for r in read if r.name in m.stored)]:
        rank = len(m.trace.graph.tensors[r.name].shape)
        for d, size in enumerate(m.trace.graph.tensors[r.name].shape):
            if size > 1 and d - rank in lines:
                m.require(r, d, lines[d - rank])
            elif size > 1:
                lines[d - rank] = m.line(r, d)
    rank = max(len(m.trace.graph.tensors[r.name].shape) for r in read)
    return box([lines.get(d - rank, m.full([1])) for d in range(rank)])


def contract(m: Marks, n: fx.Node, text: str, read: Sequence[fx.Node | None]) -> Tensor:
    """Equal letters keep the same; letters that only stored arrays have are chosen."""
    inputs, _, output = text.replace(" ", "").partition("->")
    known: dict[str, Tensor] = {}
    pairs = [(r, t) for r, t in zip(read, inputs.split(","), strict=False) if r is not None]
    for r, letters in sorted(pairs, key=lambda p: p[0].name in m.stored):
        for d, letter in enumerate(letters):
            if letter in known:
                m.require(r, d, known[letter])
            elif r.name in m.stored:
                known[letter] = m.rows(r, d, n)
            else:
                known[letter] = m.line(r, d)
    return box([known[letter] for letter in output])


def rank(m: Marks, node: fx.Node) -> int:
    return len(m.trace.graph.tensors[node.name].shape)


def linear(m: Marks, n: fx.Node) -> Tensor:
    lead = "abcdefg"[: rank(m, n.args[0]) - 1]
    return contract(m, n, f"{lead}i,oi,o->{lead}o", n.args)


def matmul(m: Marks, n: fx.Node) -> Tensor:
    a, b = n.args
    lead = "abcdefg"[: rank(m, a) - 2]
    if rank(m, a) != rank(m, b):
        raise Unsupported("matmul that broadcasts")
    return contract(m, n, f"{lead}ni,{lead}ik->{lead}nk", n.args)


def einsum(m: Marks, n: fx.Node) -> Tensor:
    return contract(m, n, n.args[0], n.args[1])


def convolution(transposed: bool) -> Rule:
    def rule(m: Marks, n: fx.Node) -> Tensor:
        x, w, bias, *_ = (*n.args, None)
        groups = n.args[6] if len(n.args) > 6 else 1
        m.whole(x, range(2, rank(m, x)))
        blocks = m.line(x, 1).reshape(m.choices, groups, -1)
        there, inner = blocks.any(2), blocks.any(1)
        m.need((there[:, :, None] & inner[:, None] == blocks).flatten(1).all(1))
        if transposed:
            m.require(w, 0, blocks.flatten(1))
            out = m.rows(w, 1, n)
            rows = (there[:, :, None] & out[:, None]).flatten(1)
        else:
            m.require(w, 1, inner)
            rows = m.rows(w, 0, n)
            made = rows.reshape(m.choices, groups, -1)
            m.need((there[:, :, None] & made.any(1)[:, None] == made).flatten(1).all(1))
        if isinstance(bias, fx.Node):
            m.require(bias, 0, rows)
        spatial = m.trace.graph.tensors[n.name].shape[2:]
        return box([m.line(x, 0), rows, *(m.full([k]) for k in spatial)])

    return rule


def attention(m: Marks, n: fx.Node) -> Tensor:
    q, k, v = n.args[:3]
    for node in (q, k, v):
        m.whole(node, [rank(m, node) - 2])
    if not n.kwargs.get("enable_gqa"):
        return contract(m, n, "bhqd,bhkd,bhke->bhqe", [q, k, v])
    m.require(k, 3, m.line(q, 3))
    groups = m.line(k, 1)
    m.require(v, 1, groups)
    heads = m.line(q, 1).reshape(m.choices, groups.shape[1], -1)
    m.need((groups[:, :, None] & heads.any(1)[:, None] == heads).flatten(1).all(1))
    return box([m.line(q, 0), m.line(q, 1), m.line(q, 2), m.line(v, 3)])


def batch_norm(m: Marks, n: fx.Node) -> Tensor:
    for array in n.args[1:5]:
        m.require(array, 0, m.line(n.args[0], 1))
    return m.of(n.args[0])


def layer_norm(m: Marks, n: fx.Node) -> Tensor:
    for array in n.args[2:4]:
        m.require(array, 0, m.line(n.args[0], -1))
    return m.of(n.args[0])


def group_norm(m: Marks, n: fx.Node) -> Tensor:
    x, groups, *arrays = n.args[:4]
    kept = m.line(x, 1)
    blocks = kept.reshape(m.choices, groups, -1)
    counts = blocks.sum(2)  # groups are equal parts
    m.need(((counts == 0) | (counts == counts.amax(1, keepdim=True))).all(1))
    m.whole(x, range(2, rank(m, x)))
    for array in arrays:
        m.require(array, 0, kept)
    return m.of(x)


def instance_norm(m: Marks, n: fx.Node) -> Tensor:
    m.whole(n.args[0], range(2, rank(m, n.args[0])))
    for array in n.args[1:3]:
        m.require(array, 0, m.line(n.args[0], 1))
    return m.of(n.args[0])


def windows(m: Marks, n: fx.Node) -> Tensor:
    """Pooling and resizing: positions stay."""
    m.whole(n.args[0], range(2, rank(m, n.args[0])))
    shape = m.trace.graph.tensors[n.name].shape
    return box([m.line(n.args[0], 0), m.line(n.args[0], 1), *(m.full([k]) for k in shape[2:])])


def along(m: Marks, n: fx.Node) -> Tensor:
    """All positions of a dimension matter to each other."""
    m.whole(n.args[0], [n.args[1]])
    return m.of(n.args[0])


def reduction(whole: bool) -> Rule:
    def rule(m: Marks, n: fx.Node) -> Tensor:
        dims = n.args[1] if isinstance(n.args[1], (list, tuple)) else [n.args[1]]
        dims = sorted({d % rank(m, n.args[0]) for d in dims})
        if whole and n.name not in m.norms:
            m.whole(n.args[0], dims)
        marks = m.of(n.args[0])
        keep = rank(m, n) == rank(m, n.args[0])
        for d in reversed(dims):
            marks = marks.any(d + 1, keepdim=keep)
        return marks

    return rule


def pad(m: Marks, n: fx.Node) -> Tensor:
    """Constants before and after stay; copies of positions need all of these."""
    pads, total = n.args[1], rank(m, n.args[0])
    copied = len(n.args) > 2 and n.args[2] in ("reflect", "replicate")
    lines = [m.line(n.args[0], d) for d in range(total)]
    for i in range(len(pads) // 2):
        d, both = total - 1 - i, list(pads[2 * i : 2 * i + 2])
        if copied:
            m.whole(n.args[0], [d])
        lines[d] = torch.nn.functional.pad(lines[d], both, value=True)
    return box(lines)


def chosen_glu(m: Marks, n: fx.Node) -> Tensor:
    d = n.args[1] % rank(m, n.args[0])
    left, right = m.of(n.args[0]).chunk(2, d + 1)
    m.need((left == right).flatten(1).all(1))
    return left


RULES: Mapping[str, Rule] = {
    **dict.fromkeys("add sub mul div neg relu tanh sigmoid pow square rsqrt sqrt maximum cos sin "
                    "rsub exp".split(), pointwise),
    "linear": linear, "matmul": matmul, "bmm": matmul, "einsum": einsum,
    **dict.fromkeys("conv1d conv2d conv3d".split(), convolution(False)),
    **dict.fromkeys("conv_transpose1d conv_transpose2d conv_transpose3d".split(),
                    convolution(True)),
    "scaled_dot_product_attention": attention, "batch_norm": batch_norm,
    "layer_norm": layer_norm, "group_norm": group_norm, "instance_norm": instance_norm,
    **dict.fromkeys("max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d "
                    "adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d".split(), windows),
    "softmax": along, "cumsum": along, "sum": reduction(False), "mean": reduction(True),
    "amax": reduction(True), "pad": pad, "constant_pad_nd": pad, "glu": chosen_glu,
}


def every_choice(trace: Trace, norms: frozenset[str], ragged: frozenset[str]) -> Marks:
    """Try all choices of a network; raises Unsupported if there are too many."""
    dry = Marks(trace, norms=norms, ragged=ragged).run()
    if dry.used > MOST_BITS:
        raise Unsupported(f"{dry.used} slices to choose from")
    count = 2**dry.used
    bits = (torch.arange(count)[:, None] >> torch.arange(dry.used)) & 1 == 0
    return Marks(trace, count, bits, norms=norms, ragged=ragged).run()
