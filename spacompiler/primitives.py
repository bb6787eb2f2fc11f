"""The axis primitives: the only code that knows both the algebra and what operators mean.

Each function returns or is a row: `row(solver, node)` relates the dimensions of the node's
operands and results. The tables of the front ends say which operator is which row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .axes import ONE, Clash, Expr, concat, is_frozen, product
from .graph import Node, Ref
from .idioms import base
from .notation import ELLIPSIS, FROZEN, Term, align, parse
from .solver import Contraction, Row, Solver

# --- element by element -----------------------------------------------------------------------


def pointwise(s: Solver, n: Node) -> None:
    """Broadcast all tensor operands against each other."""
    refs = list(dict.fromkeys(n.refs()))
    for out in n.outputs:
        s.put(out, broadcast(s, n, [s.dims[ref] for ref in refs]))


def broadcast(s: Solver, n: Node, operands: Sequence[Sequence[Expr]]) -> list[Expr]:
    """Unify right-aligned dimensions; a dimension of one stretches."""
    rank = max(map(len, operands))
    result: list[Expr] = [ONE] * rank
    for dims in operands:
        for i, e in enumerate(dims, start=rank - len(dims)):
            if result[i] is ONE:
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
    relate_pattern(s, n, "..., ! -> ..." if one else "b c ..., c -> b c ...", operands(n))


def fixed(s: Solver, n: Node) -> None:
    """The result depends on every position of the operands: all of it freezes."""
    s.give_up(n, f"{n.op} needs every slice")


# --- contractions and other patterns ----------------------------------------------------------


def contract(text: str, **sizes: Any) -> Row:
    """A row in notation: equal letters unify, letters without a result are read.

    `sizes` gives letters' sizes: an int, or (position, keyword, default) of the argument that
    holds it and that is re-written when the axis shrinks.
    """
    parse(text)

    def row(s: Solver, n: Node) -> None:
        relate_pattern(s, n, text, operands(n), sizes=sizes)

    row.__doc__ = text
    return row


def operands(n: Node) -> list[str | None]:
    """Positional tensor operands; None where an optional one is absent."""
    return [a.name if isinstance(a, Ref) else None for a in n.args]


def relate_pattern(s: Solver, n: Node, text: str, refs: Sequence[str | None], *,
                   sizes: Mapping[str, Any] | None = None, how: str = "contract",
                   outputs: Sequence[str] | None = None) -> None:
    """Relate operands and results of one node by a pattern in notation."""
    pattern = parse(text)
    bound: dict[str, Expr] = {}
    for letter, spec in (sizes or {}).items():
        size = n.arg(*spec) if isinstance(spec, tuple) else spec
        bound[letter] = s.space.atom(size)
        if isinstance(spec, tuple):
            path = ("args", spec[0]) if spec[0] < len(n.args) else ("kwargs", spec[1])
            s.edit(n, path, bound[letter])
    present: list[frozenset[str]] = []
    used = []
    for terms, ref in zip(pattern.inputs, refs, strict=False):
        if ref is None:
            continue
        dims = align(terms, len(s.dims[ref]))
        letters: set[str] = set()
        for d, term in enumerate(dims):
            _bind(s, n, term, s.dims[ref][d], bound)
            letters.update(_names(term))
            if any(name in pattern.consumed for name in term):
                s.read(n, ref, d, how)
        present.append(frozenset(letters))
        used.append(ref)
    rank_of_run = max((int(k[1:]) + 1 for k in bound if k[0] == "."), default=0)
    made: list[Expr] = []
    for terms, out in zip(pattern.outputs, outputs or n.outputs, strict=False):
        made = _results(s, terms, out, bound, rank_of_run)
        s.put(out, made)
    _finish(s, n, bound, present, pattern.consumed, made, used)


def _names(term: Term) -> list[str]:
    return ["." + term[1]] if term[0] == "..." else [t for t in term if t[0].isalpha()]


def _bind(s: Solver, n: Node, term: Term, e: Expr, bound: dict[str, Expr]) -> None:
    if term == FROZEN:
        s.space.freeze(e, f"{n.op} works along it")
        return
    names = _names(term)
    for name in reversed(names[1:]):
        known = bound[name].size if name in bound else _last_unknown(e, names, bound)
        e, inner = s.space.factor(e, known)
        _meet(s, n, name, inner, bound)
    _meet(s, n, names[0], e, bound)


def _last_unknown(e: Expr, names: list[str], bound: dict[str, Expr]) -> int:
    known = math.prod(bound[name].size for name in names if name in bound)
    return e.size // known


def _meet(s: Solver, n: Node, name: str, e: Expr, bound: dict[str, Expr]) -> None:
    have = bound.get(name)
    if have is None or (have.size == 1 and name[0] == "."):
        bound[name] = e
    elif not (e.size == 1 and name[0] == "."):
        s.relate(have, e, n)


def _results(s: Solver, terms: tuple[Term, ...], out: str, bound: dict[str, Expr],
             run: int) -> list[Expr]:
    shape = s.shape(out)
    made = []
    for d, term in enumerate(_align_result(terms, len(shape), run)):
        if term == FROZEN:
            made.append(s.space.atom(shape[d], "position inside the operator's window"))
        elif _names(term):
            made.append(product(bound[name] for name in _names(term)))
        else:
            made.append(ONE)
    return made


def _align_result(terms: tuple[Term, ...], rank: int, run: int) -> list[Term]:
    if ELLIPSIS in terms and rank - len(terms) + 1 > run:
        raise ValueError(f"{rank} result dimensions, but operands broadcast {run}")
    return align(terms, rank)


def _finish(s: Solver, n: Node, bound: dict[str, Expr], present: list[frozenset[str]],
            consumed: frozenset[str], made: list[Expr], refs: Sequence[str]) -> None:
    if len(present) < 2:
        return
    macs = [*made, *(bound[c] for c in sorted(consumed) if c in bound)] if consumed else []
    s.contractions.append(Contraction(n.name, dict(bound), tuple(present), tuple(macs)))
    if consumed and not any(s.graph.tensors[ref].static for ref in refs):
        shared = frozenset.intersection(*present)
        for letter, e in bound.items():
            s.roles.append((e, "head" if letter in shared - consumed else "head dim"))


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
    relate_pattern(s, n, "! h, ... -> ... h", operands(n)[:2])


def matmul(s: Solver, n: Node) -> None:
    """numpy's matmul: vectors are completed, leading dimensions broadcast."""
    a, b = (len(s.dims[ref.name]) for ref in n.args[:2])
    left = "k" if a == 1 else "... n k"
    right = "k" if b == 1 else "... k m"
    result = ("" if a == 1 else "n ") + ("" if b == 1 else "m")
    lead = "" if a == 1 and b == 1 else "... "
    relate_pattern(s, n, f"{left}, {right} -> {lead}{result}", operands(n)[:2])


def addmm(s: Solver, n: Node) -> None:
    """addmm(bias, a, b): a bias for each column, or one for each place."""
    bias = "o" if len(s.dims[n.args[0].name]) == 1 else "b o"
    relate_pattern(s, n, f"{bias}, b i, i o -> b o", operands(n)[:3])


def _convolve(s: Solver, n: Node, weight: str, groups: int) -> None:
    """Grouped in and out channels; the batch dimension may be missing."""
    x, w = (len(s.dims[ref.name]) for ref in n.args[:2])
    batch = "b " if x == w else ""
    relate_pattern(s, n, f"{batch}(g i) !*, {weight} !*, (g o) -> {batch}(g o) !*",
                   operands(n)[:3], sizes={"g": (groups, "groups", 1)})
    _conv_macs(s, n)


def convolution(s: Solver, n: Node) -> None:
    """(input, weight, bias, stride, padding, dilation, groups)."""
    _convolve(s, n, "(g o) i", 6)


def transposed_convolution(s: Solver, n: Node) -> None:
    """(input, weight, bias, stride, padding, output_padding, groups, dilation)."""
    _convolve(s, n, "(g i) o", 6)


def aten_convolution(s: Solver, n: Node) -> None:
    """aten.convolution: transposed is an argument, groups the last one."""
    _convolve(s, n, "(g i) o" if n.args[6] else "(g o) i", 8)


def _conv_macs(s: Solver, n: Node) -> None:
    """A convolution multiplies, per result position, by the whole of its kernel window."""
    last = s.contractions.pop()
    window = math.prod(s.shape(n.args[1].name)[2:])
    s.contractions.append(
        Contraction(last.node, last.letters, last.operands, last.macs, factor=window))


def attention(s: Solver, n: Node) -> None:
    """scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=, enable_gqa=).

    The softmax scale stays what it was before query/key dimensions go.
    """
    q, k, v = (a.name for a in n.args[:3])
    heads, groups = s.shape(q)[-3] if len(s.shape(q)) > 2 else 1, 1
    sizes: dict[str, Any]
    if n.kwargs.get("enable_gqa") and s.shape(k)[-3] != heads:
        groups = s.shape(k)[-3]
        text = "... (g r) q d, ... g k d, ... g k e -> ... (g r) q e"
        sizes = {"g": groups}
    else:
        text, sizes = "... q d, ... k d, ... k e -> ... q e", {}
    relate_pattern(s, n, text, [q, k, v], sizes=sizes, outputs=n.outputs[:1])
    letters = s.contractions[-1].letters
    for letter in ("q", "k"):
        s.space.freeze(letters[letter], "positions of attention")
    mask = n.arg(3, "attn_mask")
    if isinstance(mask, Ref):
        broadcast(s, n, [s.dims[n.outputs[0]][:-1] + (letters["k"],), s.dims[mask.name]])
    if n.kwargs.get("scale") is None:
        s.edit(n, ("kwargs", "scale"), letters["d"], value=1 / math.sqrt(s.shape(q)[-1]))


# --- shape ------------------------------------------------------------------------------------


def reshape(s: Solver, n: Node) -> None:
    """view/reshape: regroup runs of dimensions whose products agree."""
    out = n.outputs[0]
    made = regroup(s, s.dims[next(n.refs())], s.shape(out))
    s.put(out, made)
    sizes = n.arg(1, "size", n.kwargs.get("shape"))
    if isinstance(sizes, (list, tuple)):
        key = ("args", 1) if len(n.args) > 1 else ("kwargs", "size" if "size" in n.kwargs
                                                   else "shape")
        for i, e in enumerate(made):
            s.edit(n, (*key, i), e)


def regroup(s: Solver, dims: Sequence[Expr], shape: Sequence[int]) -> list[Expr]:
    """Flatten each minimal run of dimensions and factor it into the new sizes."""
    made: list[Expr] = []
    old, new = [e for e in dims if e.size != 1], list(shape)
    while new:
        give = [new.pop(0)]
        if give[0] == 1:
            made.append(ONE)
            continue
        take = [old.pop(0)]
        while (have := math.prod(e.size for e in take)) != (want := math.prod(give)):
            if have < want:
                take.append(old.pop(0))
            else:
                give.append(new.pop(0))
        made.extend(_unnest(s, product(take), give))
    return made


def _unnest(s: Solver, e: Expr, sizes: Sequence[int]) -> list[Expr]:
    made: list[Expr] = []
    for size in reversed(sizes[1:]):
        e, inner = s.space.factor(e, size)
        made.append(inner)
    return [e, *reversed(made)]


def flatten(s: Solver, n: Node) -> None:
    s.put(n.outputs[0], regroup(s, s.dims[next(n.refs())], s.shape(n.outputs[0])))


def unflatten(s: Solver, n: Node) -> None:
    """unflatten(x, dim, sizes)."""
    made = regroup(s, s.dims[next(n.refs())], s.shape(n.outputs[0]))
    s.put(n.outputs[0], made)
    first = n.args[1] % len(s.dims[next(n.refs())])
    for i in range(len(n.args[2])):
        s.edit(n, ("args", 2, i), made[first + i])


def permute(s: Solver, n: Node) -> None:
    """permute(x, order); numpy_T turns the order around."""
    dims = s.dims[next(n.refs())]
    s.put(n.outputs[0], [dims[d] for d in n.arg(1, "dims", range(len(dims))[::-1])])


def movedim(s: Solver, n: Node) -> None:
    """movedim(x, source, destination)."""
    dims = s.dims[next(n.refs())]
    source, target = ([d % len(dims) for d in (a if isinstance(a, (list, tuple)) else [a])]
                      for a in n.args[1:3])
    made = [e for d, e in enumerate(dims) if d not in source]
    for at, d in sorted(zip(target, source, strict=True)):
        made.insert(at, dims[d])
    s.put(n.outputs[0], made)


def transpose(s: Solver, n: Node) -> None:
    dims = list(s.dims[next(n.refs())])
    a, b = (n.args[1], n.args[2]) if len(n.args) > 2 else (-1, -2)
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    s.put(n.outputs[0], dims)


def unsqueeze(s: Solver, n: Node) -> None:
    dims = list(s.dims[next(n.refs())])
    dims.insert(n.args[1] % (len(dims) + 1), ONE)
    s.put(n.outputs[0], dims)


def squeeze(s: Solver, n: Node) -> None:
    """Drop dimensions of one: those named, or all."""
    dims = s.dims[next(n.refs())]
    named = n.arg(1, "dim", list(range(len(dims))))
    gone = {d % len(dims) for d in (named if isinstance(named, (list, tuple)) else [named])}
    s.put(n.outputs[0], [e for i, e in enumerate(dims) if i not in gone or e.size != 1])


def expand(s: Solver, n: Node) -> None:
    """expand(x, sizes): a stretched dimension is a new axis of replicas."""
    out, old = n.outputs[0], s.dims[next(n.refs())]
    shape = s.shape(out)
    padded = [ONE] * (len(shape) - len(old)) + list(old)
    made = [s.space.atom(size) if e.size != size else e
            for e, size in zip(padded, shape, strict=True)]
    s.put(out, made)
    sizes = n.arg(1, "size")
    for i, e in enumerate(made if isinstance(sizes, (list, tuple)) else ()):
        if sizes[i] != -1:
            s.edit(n, ("args", 1, i), e)


def tile(s: Solver, n: Node) -> None:
    """repeat / tile(x, counts): replicas outside each dimension."""
    old, counts = s.dims[next(n.refs())], n.args[1]
    padded = [ONE] * (len(counts) - len(old)) + list(old)
    made = padded[: len(padded) - len(counts)]
    for i, (e, count) in enumerate(zip(padded[len(made):], counts, strict=True)):
        replicas = s.space.atom(count)
        s.edit(n, ("args", 1, i), replicas)
        made.append(product((replicas, e)))
    s.put(n.outputs[0], made)


def repeat_interleave(s: Solver, n: Node) -> None:
    """repeat_interleave(x, count, dim): replicas inside a dimension."""
    dims = list(s.dims[next(n.refs())])
    count, dim = n.args[1], n.arg(2, "dim")
    if not isinstance(count, int) or dim is None:
        raise Clash("only one count along one dimension is understood")
    replicas = s.space.atom(count)
    s.edit(n, ("args", 1), replicas)
    dims[dim] = product((dims[dim], replicas))
    s.put(n.outputs[0], dims)


def cat(s: Solver, n: Node) -> None:
    """cat(tensors, dim): a Sum along dim, equal elsewhere."""
    parts = [s.dims[ref.name] for ref in n.args[0] if s.shape(ref.name) != (0,)]
    dim = n.arg(1, "dim", 0) % len(parts[0])
    made = list(parts[0])
    made[dim] = concat(dims[dim] for dims in parts)
    for dims in parts[1:]:
        for i, e in enumerate(dims):
            if i != dim:
                s.relate(made[i], e, n)
    s.put(n.outputs[0], made)


def stack(s: Solver, n: Node) -> None:
    parts = [s.dims[ref.name] for ref in n.args[0]]
    made = broadcast(s, n, parts)
    made.insert(n.arg(1, "dim", 0) % (len(made) + 1), concat([ONE] * len(parts)))
    s.put(n.outputs[0], made)


def cuts(s: Solver, e: Expr, sizes: Sequence[int]) -> list[Expr]:
    """Cut an expression into consecutive pieces."""
    made: list[Expr] = []
    for size in sizes[:-1]:
        piece, e = s.space.split(e, size) if 0 < size < e.size else (e, e)
        made.append(piece)
    return [*made, e]


def split(s: Solver, n: Node) -> None:
    """split / split_with_sizes / chunk / unsafe_split: pieces along one dimension."""
    ref = next(n.refs())
    dim = n.arg(2, "dim", 0) % len(s.dims[ref])
    sizes = [s.shape(out)[dim] for out in n.outputs]
    pieces = cuts(s, s.dims[ref][dim], sizes)
    for out, piece in zip(n.outputs, pieces, strict=True):
        s.put(out, [piece if i == dim else e for i, e in enumerate(s.dims[ref])])
    given = n.arg(1, "split_size")
    if isinstance(given, (list, tuple)):
        for i, piece in enumerate(pieces):
            s.edit(n, ("args", 1, i), piece)
    elif len(pieces) > 1 and not base_is_chunk(n):
        for piece in pieces[1:-1]:
            s.relate(pieces[0], piece, n)
        s.edit(n, ("args", 1), pieces[0])
        if pieces[-1].size == pieces[0].size:
            s.relate(pieces[0], pieces[-1], n)
        else:
            s.freeze(pieces, f"{n.op} leaves a smaller last piece")
    else:
        for piece in pieces[1:]:
            if piece.size == pieces[0].size:
                s.relate(pieces[0], piece, n)
            else:
                s.freeze(pieces, f"{n.op} leaves a smaller last piece")


def base_is_chunk(n: Node) -> bool:
    return base(n.op).endswith("chunk")


def unbind(s: Solver, n: Node) -> None:
    ref = next(n.refs())
    dims = list(s.dims[ref])
    dim = n.arg(1, "dim", 0) % len(dims)
    cuts(s, dims[dim], [1] * dims[dim].size)
    for out in n.outputs:
        s.put(out, dims[:dim] + dims[dim + 1 :])


def select(s: Solver, n: Node) -> None:
    """select(x, dim, index): that slice must stay, so the dimension is cut around it."""
    dims = list(s.dims[next(n.refs())])
    dim = n.args[1] % len(dims)
    size = dims[dim].size
    index = n.args[2] % size
    if not is_frozen(dims[dim]):
        left, _, _ = cuts3(s, dims[dim], index, index + 1)
        s.edit(n, ("args", 2), left, when=dims[dim], value=None if index else 0)
    s.put(n.outputs[0], dims[:dim] + dims[dim + 1 :])


def cuts3(s: Solver, e: Expr, start: int, end: int) -> tuple[Expr, Expr, Expr]:
    """Cut e = left + middle + right; an empty side is ONE."""
    left: Expr = ONE
    right: Expr = ONE
    if end < e.size:
        e, right = s.space.split(e, end)
    if start > 0:
        left, e = s.space.split(e, start)
    return left, e, right


def slice_(s: Solver, n: Node) -> None:
    """slice(x, dim, start, end, step)."""
    dims = list(s.dims[next(n.refs())])
    dim, size = n.arg(1, "dim", 0) % len(dims), 0
    size = dims[dim].size
    start, end = (_clamp(n.arg(i, k, d), size) for i, k, d in ((2, "start", 0), (3, "end", size)))
    step = n.arg(4, "step", 1)
    if (start, end, step) == (0, size, 1):
        s.put(n.outputs[0], dims)
        return
    if step != 1:
        _strided(s, n, dims, dim, start, end, step)
        return
    left, middle, _ = cuts3(s, dims[dim], start, end)
    if start > 0:
        s.edit(n, ("args", 2), left, when=dims[dim])
    if end < size:
        upto = concat((left, middle)) if start > 0 else middle
        s.edit(n, ("args", 3), upto, when=dims[dim])
    dims[dim] = middle
    s.put(n.outputs[0], dims)


def narrow(s: Solver, n: Node) -> None:
    """narrow(x, dim, start, length)."""
    dims = list(s.dims[next(n.refs())])
    dim, (start, length) = n.args[1] % len(dims), n.args[2:4]
    start %= dims[dim].size
    left, middle, _ = cuts3(s, dims[dim], start, start + length)
    s.edit(n, ("args", 2), left, when=dims[dim], value=None if start else 0)
    s.edit(n, ("args", 3), middle)
    dims[dim] = middle
    s.put(n.outputs[0], dims)


def _clamp(value: Any, size: int) -> int:
    value = (0 if value is None else value)
    return max(0, min(value + size if value < 0 else value, size))


def _strided(s: Solver, n: Node, dims: list[Expr], dim: int, start: int, end: int,
             step: int) -> None:
    """x[start::step] picks one member of each run of `step`: runs go or stay whole."""
    if end != dims[dim].size or start >= step or dims[dim].size % step:
        raise Clash("a strided slice that is not one member of equal runs")
    outer, inner = s.space.factor(dims[dim], step)
    cuts(s, inner, [1] * step)
    dims[dim] = outer
    s.put(n.outputs[0], dims)


def pad(s: Solver, n: Node) -> None:
    """pad(x, pads, mode, value): constant padding is a fixed part of a Sum.

    Other modes copy positions into the padding, so that the padded dimensions freeze.
    """
    dims = list(s.dims[next(n.refs())])
    pads = n.args[1]
    copied = isinstance(n.arg(2, "mode"), str) and n.arg(2, "mode") != "constant"
    for i in range(len(pads) // 2):
        dim, before, after = len(dims) - 1 - i, pads[2 * i], pads[2 * i + 1]
        if copied:
            s.space.freeze(dims[dim], f"{n.op} copies positions of it")
        if before < 0 or after < 0:
            raise Clash("negative padding")
        parts = [s.space.atom(k, "padding") for k in (before,) if k] + [dims[dim]]
        parts += [s.space.atom(k, "padding") for k in (after,) if k]
        dims[dim] = concat(parts) if len(parts) > 1 else dims[dim]
    s.put(n.outputs[0], dims)


# --- reductions, norms, look-ups --------------------------------------------------------------


def _reduced(s: Solver, n: Node, argument: int) -> tuple[str, list[int]]:
    ref = next(n.refs())
    rank = len(s.dims[ref])
    dims = n.arg(argument, "dim")
    if isinstance(dims, bool):  # var and std over everything: it says whether they are unbiased
        dims = None
    named = list(range(rank)) if dims is None or dims == [] else dims
    named = named if isinstance(named, (list, tuple)) else [named]
    return ref, [d % rank for d in named]


def reduce(how: str, argument: int = 1) -> Row:
    """A reduction over the dimensions that an argument names.

    `sum` reads them (zeros add nothing: so do norms, any, count_nonzero), `mean` does as part of
    an RMSNorm. Any other reduction, or mean on its own, freezes what it reduces.
    """

    def row(s: Solver, n: Node) -> None:
        ref, named = _reduced(s, n, argument)
        keep = any(len(s.shape(out)) == len(s.dims[ref]) for out in n.outputs)
        for d in named:
            e = s.dims[ref][d]
            if how == "sum":
                s.read(n, ref, d, "sum")
            elif how == "mean" and n.name in s.norms:
                s.read(n, ref, d, "norm")
                s.roles.append((e, "normalised"))
            else:
                s.space.freeze(e, f"{n.op} over it depends on how many slices there are")
        made = [ONE if i in named else e for i, e in enumerate(s.dims[ref])
                if keep or i not in named]
        for out in n.outputs:
            s.put(out, made)

    return row


def vector_norm(s: Solver, n: Node) -> None:
    """norm(x, order, dims): zeros add nothing to it if its order is positive."""
    order = n.arg(1, "ord", n.kwargs.get("p", 2))
    neutral = order is None or (isinstance(order, (int, float)) and order >= 0)
    reduce("sum" if neutral else "other", 2)(s, n)


def extremum(s: Solver, n: Node) -> None:
    """max / min: of two tensors, or over a dimension."""
    (pointwise if isinstance(n.arg(1, "other"), Ref) else reduce("other"))(s, n)


def along(argument: int = 1, keyword: str = "dim", default: Any = -1) -> Row:
    """An operator that mixes all positions of one dimension (softmax, cumsum, sort, flip).

    With `default=None` it mixes all dimensions unless some are named.
    """

    def row(s: Solver, n: Node) -> None:
        ref = next(n.refs())
        dims = s.dims[ref]
        given = n.arg(argument, keyword, default)
        if default is None and not given and given != 0:
            given = range(len(dims))
        for d in given if isinstance(given, (list, tuple, range)) else [given]:
            s.space.freeze(dims[d], f"{n.op} works along it")
        for out in n.outputs:
            shape = s.shape(out)
            s.put(out, [e if e.size == shape[i] else s.space.atom(shape[i], f"result of {n.op}")
                        for i, e in enumerate(dims)])

    return row


def layer_norm(s: Solver, n: Node) -> None:
    """layer_norm(x, shape, gain, bias, eps): its statistics change with the width."""
    x = n.args[0].name
    width = len(n.args[1])
    dims = s.dims[x]
    for ref in operands(n)[2:4]:
        if ref is not None:
            for e, other in zip(dims[-width:], s.dims[ref], strict=True):
                s.relate(e, other, n)
    for i, e in enumerate(dims[-width:], start=len(dims) - width):
        s.read(n, x, i, "norm")
        s.roles.append((e, "normalised"))
        s.approximate.append((e, f"statistics of {n.title()} change with the width"))
        s.edit(n, ("args", 1, i - len(dims) + width), e)
    if width > 1:
        s.freeze(dims[-width:], f"{n.op} takes its statistics over several dimensions")
    s.put(n.outputs[0], dims)


def rms_norm(s: Solver, n: Node) -> None:
    """aten.rms_norm(x, shape, gain, eps): exact once gain and eps are corrected."""
    x, (*gain, _) = n.args[0].name, [*operands(n)[2:3], None]
    e = s.dims[x][-1]
    for ref in filter(None, gain):
        for i, other in enumerate(reversed(s.dims[ref])):
            s.relate(s.dims[x][-1 - i], other, n)
    if n.name in s.norms:
        s.read(n, x, -1, "norm")
        s.roles.append((e, "normalised"))
        s.edit(n, ("args", 1, 0), e)
    else:
        s.freeze(s.dims[x][-len(n.args[1]):], f"{n.op} has no gain and eps to correct")
    s.put(n.outputs[0], s.dims[x])


def group_norm(s: Solver, n: Node) -> None:
    """group_norm(x, groups, gain, bias): whole groups may go, what is inside stays."""
    refs = [n.args[0].name, *operands(n)[2:4]]
    relate_pattern(s, n, "b (g i) !*, (g i), (g i) -> b (g i) !*", refs,
                   sizes={"g": (1, "num_groups", 1)})
    s.space.freeze(s.contractions[-1].letters["i"] if len([r for r in refs if r]) > 1
                   else s.dims[refs[0]][1], "statistics are taken over a group of channels")


def index(s: Solver, n: Node) -> None:
    """x[i, j, ...] by integer tensors: indexed dimensions freeze, the others carry over."""
    x, given = n.args[0].name, list(n.args[1])
    dims = list(s.dims[x])
    at = [d for d, ref in enumerate(given) if isinstance(ref, Ref)]
    for d in at:
        s.space.freeze(dims[d], f"indexed by data in {n.title()}")
        s.freeze(s.dims[given[d].name], "an index")
    if any(s.graph.tensors[given[d].name].dtype == "bool" for d in at):
        raise Clash("indexed by a mask")
    block = broadcast(s, n, [s.dims[given[d].name] for d in at])
    block = [e if is_frozen(e) or e is ONE else s.space.atom(e.size, "an index") for e in block]
    rest = [e for d, e in enumerate(dims) if d not in at]
    together = at == list(range(at[0], at[-1] + 1))
    where = at[0] if together else 0
    s.put(n.outputs[0], rest[:where] + block + rest[where:])


def lookup(along_dim: int | None = None) -> Row:
    """index_select / gather-like: the dimension looked up in freezes, the others carry over."""

    def row(s: Solver, n: Node) -> None:
        ref = next(n.refs())
        dims = list(s.dims[ref])
        dim = (n.arg(1, "dim") if along_dim is None else along_dim) % len(dims)
        s.space.freeze(dims[dim], f"looked up by {n.title()}")
        for other in list(n.refs())[1:]:
            s.freeze(s.dims[other], "an index")
        dims[dim] = s.space.atom(s.shape(n.outputs[0])[dim], "an index")
        s.put(n.outputs[0], dims)

    return row


def gather(s: Solver, n: Node) -> None:
    """gather(x, dim, index): freezes what it looks up; elsewhere x and index go together."""
    x, index = n.args[0].name, n.args[2].name
    dim, made = n.args[1] % len(s.dims[x]), []
    for d, (e, at) in enumerate(zip(s.dims[x], s.dims[index], strict=True)):
        if d == dim or e.size != at.size:
            s.freeze((e, at), f"looked up by {n.title()}")
        else:
            s.relate(e, at, n)
        made.append(at)
    s.put(n.outputs[0], made)


def create(argument: int) -> Row:
    """zeros, ones, full: any slice of a constant may go; the argument holds its sizes."""

    def row(s: Solver, n: Node) -> None:
        made = [s.space.atom(size) for size in s.shape(n.outputs[0])]
        for i, e in enumerate(made):
            s.edit(n, ("args", argument, i), e)
        s.put(n.outputs[0], made)

    return row


def first_dims(count: int) -> Row:
    """Keep the first `count` dimensions, freeze the others (pooling, interpolation)."""

    def row(s: Solver, n: Node) -> None:
        dims = s.dims[next(n.refs())]
        s.freeze(dims[count:], f"{n.op} works along it")
        for out in n.outputs:
            shape = s.shape(out)
            tail = [s.space.atom(k, f"result of {n.op}") for k in shape[count:]]
            s.put(out, [*dims[:count], *tail])

    return row


def last_frozen(count: int) -> Row:
    """Keep all but the last `count` dimensions (pooling without a batch dimension)."""

    def row(s: Solver, n: Node) -> None:
        first_dims(len(s.dims[next(n.refs())]) - count)(s, n)

    return row
