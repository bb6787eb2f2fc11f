"""The axis primitives: the only code that knows both the algebra and what operators mean.

Each function returns or is a row: `row(solver, node)` relates the dimensions of the node's
operands and results. The tables of the front ends say which operator is which row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

from ..axes.expressions import ONE, Expr, product
from ..axes.notation import Fit, fit, parse
from ..graph.ir import Node, Ref
from .findings import Contraction, Read
from .solver import Row, Solver

# --- element by element -----------------------------------------------------------------------


def pointwise(s: Solver, n: Node) -> None:
    """Broadcast all tensor operands against each other."""
    refs = n.reads()
    dims = [s.dims[ref] for ref in (dict.fromkeys(refs) if len(refs) > 1 else refs)]
    for out in n.outputs:
        s.put(out, broadcast(s, n, dims) if len(dims) > 1 else dims[0])


def broadcast(s: Solver, n: Node, operands: Sequence[Sequence[Expr]]) -> list[Expr]:
    """Unify right-aligned dimensions; a dimension of one stretches."""
    rank = max(map(len, operands))
    result: list[Expr] = [ONE] * rank
    for dims in operands:
        for i, e in enumerate(dims, start=rank - len(dims)):
            if result[i].size == 1:
                result[i] = e
            elif e.size != 1:
                s.relate(result[i], e, n)
    return result


def same(s: Solver, n: Node) -> None:
    """Every result has the first operand's axes (casts, copies, dropout and its mask)."""
    for out in n.outputs:
        s.put(out, s.dims[next(n.refs())])


def prelu(s: Solver, n: Node) -> None:
    """prelu(x, slope): one slope for all, or one for each channel."""
    one = s.shape(n.args[1].name) in ((), (1,))
    relate_pattern(s, n, "..., !* -> ..." if one else "b c ..., c -> b c ...")


def frozen(why: str) -> Row:
    """An operator that is known and that nothing passes: all it touches freezes."""

    def row(s: Solver, n: Node) -> None:
        s.give_up(n, f"{n.title()} {why}")

    return row


# --- contractions and other patterns ----------------------------------------------------------


Size = int | tuple[int, str] | tuple[int, str, object]


def contract(text: str, **sizes: Size) -> Row:
    """A row in notation: equal letters unify, letters without a result are read.

    `sizes` gives letters' sizes: an int, or (position, keyword, default) of the argument that
    holds it and that is re-written when the axis shrinks.
    """
    parse(text)

    def row(s: Solver, n: Node) -> None:
        relate_pattern(s, n, text, sizes=sizes)

    row.__doc__ = text
    return row


def operands(n: Node, count: int | None = None) -> list[str | None]:
    """The first positional operands; None where an optional one is absent or no tensor."""
    return [a.name if isinstance(a, Ref) else None for a in n.args[:count]]


def works_along(n: Node, why: str = "") -> str:
    """The reason of an axis whose positions an operator does not treat one by one."""
    return f"{n.op} works along it" + (f" ({why})" if why else "")


def relate_pattern(s: Solver, n: Node, text: str, refs: Sequence[str | None] | None = None, *,
                   sizes: Mapping[str, Size] | None = None, factor: int = 1,
                   why: str = "") -> dict[str, Expr]:
    """Relate operands and results of one node by a pattern in notation; returns its letters.

    The operands are the node's first arguments, unless `refs` are given.
    `factor` says how often each product of the contraction is computed (window positions), `why`
    tells the user more of what can't be pruned.
    """
    count, shapes = len(parse(text).inputs), [s.shape(out) for out in n.outputs]
    refs = operands(n, count) if refs is None else refs[:count]
    dims = [s.dims[ref] if ref else () for ref in refs]
    known = fit(text, tuple([len(s.dims[ref]) if ref else None for ref in refs]),
                tuple(map(len, shapes)))
    bound = {name: dims[i][d] for name, i, d in known.first}
    if sizes:
        bound = _sized(s, n, sizes, bound)
    for names, i, d in known.later:
        if len(names) == 1:
            _meet(s, n, names[0], dims[i][d], bound)
        else:
            _nest(s, n, names, dims[i][d], bound)
    for i, start, end in known.frozen:
        s.freeze(dims[i][start:end], works_along(n, why))
    if known.reads:
        s.reads += [Read(n.name, refs[i], d, "contract")  # type: ignore[arg-type]  # it is there
                    for i, d in known.reads]
    made: list[Expr] = []
    for out, terms, shape in zip(n.outputs, known.results, shapes, strict=False):
        made = [bound[names[0]] if len(names) == 1 else _nested(s, names, size, bound)
                for names, size in zip(terms, shape, strict=True)]
        s.put(out, made)
    _finish(s, n, bound, known, made, refs, factor)
    return bound


def _sized(s: Solver, n: Node, sizes: Mapping[str, Size], bound: dict[str, Expr],
           ) -> dict[str, Expr]:
    """Return the letters, those of given sizes first."""
    made: dict[str, Expr] = {}
    for letter, spec in sizes.items():
        made[letter] = s.space.atom(n.arg(*spec) if isinstance(spec, tuple) else spec)
        s.relate(made[letter], bound.get(letter, made[letter]), n)
        if isinstance(spec, tuple):
            path = ("args", spec[0]) if spec[0] < len(n.args) else ("kwargs", spec[1])
            s.edit(n, path, made[letter])
    return made | bound


def _nest(s: Solver, n: Node, names: Sequence[str], e: Expr, bound: dict[str, Expr]) -> None:
    for name in reversed(names[1:]):
        known = bound[name].size if name in bound else _last_unknown(e, names, bound)
        e, inner = s.space.factor(e, known)
        _meet(s, n, name, inner, bound)
    _meet(s, n, names[0], e, bound)


def _last_unknown(e: Expr, names: Sequence[str], bound: dict[str, Expr]) -> int:
    known = math.prod(bound[name].size for name in names if name in bound)
    return e.size // known


def _meet(s: Solver, n: Node, name: str, e: Expr, bound: dict[str, Expr]) -> None:
    have = bound.get(name)
    if have is None or (have.size == 1 and name[0] == "."):
        bound[name] = e
    elif have is not e and not (e.size == 1 and name[0] == "."):
        s.space.relate(have, e, n)


def _nested(s: Solver, names: Sequence[str], size: int, bound: Mapping[str, Expr]) -> Expr:
    if names:
        return product([bound[name] for name in names])
    return s.space.atom(size, "position inside the operator's window")


def _finish(s: Solver, n: Node, bound: dict[str, Expr], known: Fit, made: Sequence[Expr],
            refs: Sequence[str | None], factor: int) -> None:
    if len(known.letters) < 2:
        return
    macs = (*made, *[bound[c] for c in known.consumed]) if known.consumed else ()
    s.contractions.append(Contraction(n.name, bound, known.letters, macs, factor))
    if known.consumed and not any([s.graph.tensors[ref].array for ref in refs if ref]):
        for letter, e in bound.items():
            s.roles.append((e, "head" if letter in known.shared else
                            "head dim" if letter in known.consumed else "open"))


def einsum(s: Solver, n: Node) -> None:
    """einsum's own equation, spaced out into notation."""
    left, _, right = n.args[0].replace(" ", "").partition("->")
    spaced = [" ".join(side.replace("...", "\0")).replace("\0", "...") for side in
              [*left.split(","), right]]
    refs = [ref.name for ref in n.args[1]]
    relate_pattern(s, n, ", ".join(spaced[:-1]) + " -> " + spaced[-1], refs)


def embedding(s: Solver, n: Node) -> None:
    """embedding(table, index): rows are looked up, columns carried."""
    s.tables.append(n.args[0].name)
    relate_pattern(s, n, "! h, ... -> ... h")


def matmul(s: Solver, n: Node) -> None:
    """numpy's matmul: vectors are completed, leading dimensions broadcast."""
    a, b = (len(s.dims[ref.name]) for ref in n.args)
    left = "k" if a == 1 else "... n k"
    right = "k" if b == 1 else "... k m"
    result = ("" if a == 1 else "n ") + ("" if b == 1 else "m")
    relate_pattern(s, n, f"{left}, {right} -> ... {result}")


def plus(text: str) -> Row:
    """(bias, a, b): a product in notation; the bias broadcasts to it."""

    def row(s: Solver, n: Node) -> None:
        relate_pattern(s, n, text, operands(n)[1:])
        s.put(n.outputs[0], broadcast(s, n, [s.dims[n.outputs[0]], s.dims[n.args[0].name]]))

    return row


def batch_norm(s: Solver, n: Node) -> None:
    """batch_norm(x, gain, bias, mean, var, training, ...): in training mode (weight
    standardisation) statistics are taken over everything but the channels."""
    text = "! c !*, c, c, c, c -> ! c !*" if n.arg(5, "training", False) else \
        "b c ..., c, c, c, c -> b c ..."
    relate_pattern(s, n, text)


def addmm(s: Solver, n: Node) -> None:
    """addmm(bias, a, b): a bias for each column, or one for each place."""
    bias = "o" if len(s.dims[n.args[0].name]) == 1 else "b o"
    relate_pattern(s, n, f"{bias}, b i, i o -> b o")


def _convolve(s: Solver, n: Node, transposed: bool, at: int) -> None:
    """Grouped in and out channels; the batch dimension may be missing.

    Every result position (transposed: every input position) meets the whole window.
    """
    x, w = s.shape(n.args[0].name), s.shape(n.args[1].name)
    grouped = n.arg(at, "groups", 1) > 1
    relate_pattern(s, n, _windows(len(x) == len(w), grouped, transposed),
                   sizes={"g": (at, "groups")} if grouped else None, factor=math.prod(w[2:]))
    if transposed:
        last = s.contractions.pop()
        macs = (*s.dims[n.args[0].name], last.letters["o"])
        s.contractions.append(last._replace(macs=macs))


@cache
def _windows(batched: bool, grouped: bool, transposed: bool) -> str:
    b, i, o = "b " if batched else "", *(("(g i)", "(g o)") if grouped else ("i", "o"))
    weight = f"{i} o" if transposed else f"{o} i"
    return f"{b}{i} !*, {weight} !*, {o} -> {b}{o} !*"


def convolution(s: Solver, n: Node) -> None:
    """(input, weight, bias, stride, padding, dilation, groups)."""
    _convolve(s, n, False, 6)


def transposed_convolution(s: Solver, n: Node) -> None:
    """(input, weight, bias, stride, padding, output_padding, groups, dilation)."""
    _convolve(s, n, True, 6)


def aten_convolution(s: Solver, n: Node) -> None:
    """aten.convolution: transposed is an argument, groups the last one."""
    _convolve(s, n, n.args[6], 8)


def attention(s: Solver, n: Node) -> None:
    """scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=, enable_gqa=).

    The softmax scale stays what it was before query/key dimensions go.
    """
    q, k, v = (a.name for a in n.args[:3])
    if n.kwargs.get("enable_gqa"):
        text = "... (g r) q d, ... g k d, ... g k e -> ... (g r) q e"
        sizes = {"g": s.shape(k)[-3]}
    else:
        text, sizes = "... q d, ... k d, ... k e -> ... q e", {}
    relate_pattern(s, n, text, [q, k, v], sizes=sizes)
    both = s.contractions.pop()
    letters, rows = both.letters, s.dims[n.outputs[0]][:-1]
    s.roles.append((letters["e"], "head dim"))
    for dims in "de":  # every query meets every key, then every value
        s.contractions.append(both._replace(macs=(*rows, letters["k"], letters[dims])))
    for letter in ("q", "k"):
        s.space.freeze(letters[letter], "positions of attention")
    mask = n.arg(3, "attn_mask")
    if isinstance(mask, Ref):
        broadcast(s, n, [s.dims[n.outputs[0]][:-1] + (letters["k"],), s.dims[mask.name]])
    if n.kwargs.get("scale") is None:
        s.edit(n, ("kwargs", "scale"), letters["d"], value=1 / math.sqrt(s.shape(q)[-1]))
