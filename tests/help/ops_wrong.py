"""Wrong rows, each with a case that shows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ops_case import Case, Ints, aten, op
from ops_cases import case_of
from ops_chosen import top
from ops_norms import normed
from ops_products import attend

from spacompiler.axes.expressions import concat, product
from spacompiler.rows import chosen, cuts, reductions, shapes, writes
from spacompiler.rows import primitives as p
from spacompiler.rows.aten_table import TABLE
from spacompiler.rows.solver import Row


def same_order(s: Any, n: Any) -> None:
    s.put(n.outputs[0], s.dims[next(n.refs())])


def flat_inside_out(s: Any, n: Any) -> None:
    a, b, c = s.dims[next(n.refs())]
    s.put(n.outputs[0], [product((b, a)), c])


def replicas_inside(s: Any, n: Any) -> None:
    (e,), count = s.dims[next(n.refs())], s.space.atom(n.args[1][0])
    s.edit(n, ("args", 1, 0), count)
    s.put(n.outputs[0], [product((e, count))])


def last_first(s: Any, n: Any) -> None:
    (a, b), (_, c) = (s.dims[ref.name] for ref in n.args[0])
    s.relate(a, s.dims[n.args[0][1].name][0], n)
    s.put(n.outputs[0], [a, concat((c, b))])


def right_part(s: Any, n: Any) -> None:
    dims = list(s.dims[next(n.refs())])
    left, right = s.space.split(dims[1], 2)
    s.edit(n, ("args", 3), left, when=dims[1])
    s.put(n.outputs[0], [dims[0], right])


def pieces_swapped(s: Any, n: Any) -> None:
    cuts.split(s, n)
    first, last = n.outputs
    s.dims[first], s.dims[last] = s.dims[last], s.dims[first]


def first_slice(s: Any, n: Any) -> None:
    cuts.select(s, replace_args(n, (*n.args[:2], 0)))


def replace_args(n: Any, args: tuple[Any, ...]) -> Any:
    return replace(n, args=args)


def without_edits(row: Row) -> Row:
    def wrong(s: Any, n: Any) -> None:
        row(s, n)
        s.edits.clear()

    return wrong


def without_reads(row: Row) -> Row:
    def wrong(s: Any, n: Any) -> None:
        row(s, n)
        s.reads.clear()

    return wrong


def scores_of_zero(row: Row) -> Row:
    def wrong(s: Any, n: Any) -> None:
        row(s, n)
        s.reads[:] = [r._replace(how="sum") if r.how == "score" else r for r in s.reads]

    return wrong


def other_experts(s: Any, n: Any) -> None:
    """The experts' arrays have an axis of their own."""
    s.label(n, n.args[2].name, "end")
    p.relate_pattern(s, n, "! i, ... i o -> ! o", p.operands(n)[:2])


def without_recurrence(row: Row) -> Row:
    def wrong(s: Any, n: Any) -> None:
        row(s, n)
        s.reads[:] = [read for read in s.reads if read.how != "recurrent"]

    return wrong


def gates_inside(s: Any, n: Any) -> None:
    """Rows are taken for (hidden, gates)."""
    TABLE["gru_cell"](s, n)
    for ref in n.args[2:6]:
        gates, hidden = s.space.factor(s.dims[ref.name][0], s.dims[n.args[1].name][1].size)
        s.dims[ref.name] = (product((hidden, gates)), *s.dims[ref.name][1:])


def pattern(text: str, **sizes: Any) -> Row:
    return p.contract(text, **sizes)


def free_windows(s: Any, n: Any) -> None:
    a, _, b = s.dims[n.args[0].name]
    s.put(n.outputs[0], [a, *map(s.space.atom, s.shape(n.outputs[0])[1:2]), b, s.space.atom(3)])


SQUARE = ((4, 4), (4, 4))
NORMED = ((4, 4), *((4,),) * 4)
FAULTS: dict[str, tuple[Row, Case]] = {
    "linear transposed": (pattern("... i, i o, o -> ... o"), Case(
        "linear", op("linear"), ((2, 4), (4, 4), (4,)), "** ** *")),
    "linear reads nothing": (without_reads(TABLE["linear"]), Case(
        "linear", op("linear"), ((2, 4), (3, 4)), "** **")),
    "mm transposed": (pattern("n i, m i -> n m"), Case("mm", op("mm"), SQUARE, "** **")),
    "matmul transposed": (pattern("... n k, ... m k -> ... n m"), Case(
        "matmul", op("matmul"), ((2, 4, 4), (2, 4, 4)), "*** ***")),
    "bmm mixes batches": (pattern("b n i, i b m -> b n m"), Case(
        "bmm", op("bmm"), ((4, 4, 4),) * 2, "*** ***")),
    "mv over rows": (pattern("i n, i -> n"), Case("mv", op("mv"), ((4, 4), (4,)), "** *")),
    "permute keeps the order": (same_order, Case(
        "permute", op("permute", [2, 0, 1]), ((4, 4, 4),), "***")),
    "transpose keeps the order": (same_order, Case(
        "transpose", op("transpose", 0, 1), ((4, 4),), "**")),
    "view inside out": (flat_inside_out, Case("view", op("view", [12, 2]), ((3, 4, 2),), "***")),
    "view keeps its sizes": (without_edits(shapes.reshape), Case(
        "view", op("view", [12, 2]), ((3, 4, 2),), "***")),
    "softmax element by element": (p.pointwise, Case(
        "softmax", op("softmax", 1), SQUARE[:1], "*.")),
    "cumsum element by element": (p.pointwise, Case("cumsum", op("cumsum", 1), SQUARE[:1], "*.")),
    "cumsum along the other": (reductions.along(9, "", 0), Case(
        "cumsum", op("cumsum", 1), SQUARE[:1], "*.")),
    "softmax of zeros": (scores_of_zero(TABLE["softmax"]), case_of("softmax", 2)),
    "topk of zeros": (scores_of_zero(TABLE["topk"]), case_of("topk", 2)),
    "histc keeps its bins": (without_edits(TABLE["histc"]), case_of("histc")),
    "positions from the end": (chosen.carried(p.pointwise), Case("rsub", lambda x, w: aten.index(
        w, [aten.rsub(top(x)[1], 4)]), ((3, 5), (5, 4)), "*. .*")),
    "grouped_mm of other experts": (other_experts, case_of(
        "transformers.grouped_mm_fallback", 1)),
    "sort element by element": (p.pointwise, Case("sort", op("sort"), SQUARE[:1], "*.")),
    "flip keeps the order": (same_order, Case("flip", op("flip", [0]), SQUARE[:1], "**")),
    "roll keeps the order": (same_order, Case("roll", op("roll", [1], [0]), SQUARE[:1], "**")),
    "tril element by element": (p.pointwise, Case("tril", op("tril"), SQUARE[:1], "..")),
    "mean is a sum": (reductions.reduce("sum"), Case("mean", op("mean", [1]), SQUARE[:1], "*.")),
    "amin is a sum": (reductions.reduce("sum"), Case("amin", op("amin", [1]), SQUARE[:1], "*.")),
    "batch_norm without gain": (pattern("b c ..., g, h, m, v -> b c ..."), Case(
        "batch_norm", lambda *t: aten.batch_norm(*t, False, 0.1, 1e-5, False), NORMED,
        "** * * * *")),
    "rms_norm is a layer_norm": (without_reads(reductions.layer_norm), Case(
        "rms_norm", lambda x, w: aten.rms_norm(x, [4], w, 1e-3), ((4, 4), (4,)), "** *")),
    "layer_norm element by element": (same_order, Case(
        "layer_norm", normed, ((3, 4),), "**", least=2)),
    "layer_norm over all": (without_reads(reductions.layer_norm), Case(
        "layer_norm", normed, ((3, 4),), "**", least=2)),
    "group_norm without groups": (pattern("b c !* -> b c !*"), Case(
        "group_norm", op("group_norm", 2), ((2, 4, 3),), "**.")),
    "group_norm reads nothing": (without_reads(TABLE["group_norm"]), case_of("group_norm", 1)),
    "conv2d without groups": (pattern("b i !*, o ! !*, o -> b o !*"), Case(
        "conv2d", op("conv2d", [1, 1], [1, 1], [1, 1], 2),
        ((2, 4, 4, 4), (4, 2, 3, 3), (4,)), "**.. **.. *")),
    "conv2d transposed": (pattern("b i !*, i o !*, o -> b o !*"), Case(
        "conv2d", op("conv2d"), ((2, 4, 4, 4), (4, 4, 3, 3), (4,)), "**.. **.. *")),
    "conv2d with free windows": (pattern("b i h w, o i !*, o -> b o h w"), Case(
        "conv2d", op("conv2d", [1, 1], [1, 1]), ((2, 3, 4, 4), (4, 3, 3, 3), (4,)),
        "**.. **.. *")),
    "attention ties keys to values": (
        pattern("... ! d, ... ! e, ... ! d -> ... ! d"), Case(
            "scaled_dot_product_attention", attend(), ((2, 3, 4, 4),) * 3, "**.* **.* **.*")),
    "attention with another scale": (without_edits(p.attention), Case(
        "scaled_dot_product_attention", attend(), ((2, 3, 4, 4),) * 3, "**.* **.* **.*")),
    "gru feeds back unmasked": (without_recurrence(TABLE["gru"]), case_of("gru")),
    "lstm with a layer inside unmasked": (without_recurrence(TABLE["lstm"]),
                                          case_of("lstm", 2)),
    "gru_cell with gates inside": (gates_inside, case_of("gru_cell")),
    "embedding with free rows": (pattern("r h, ... -> ... h"), Case(
        "embedding", op("embedding"), ((4, 4), Ints((2, 3), 4)), ".* **")),
    "index with free rows": (lambda s, n: s.put(n.outputs[0], s.dims[n.args[0].name]), Case(
        "index", lambda x, i: aten.index(x, [i]), ((4, 4), Ints((4,), 4)), ".* .")),
    "cat in another order": (last_first, Case(
        "cat", lambda x, y: aten.cat([x, y], 1), SQUARE, "** **")),
    "slice takes the right part": (right_part, Case(
        "slice", op("slice", 1, 0, 2), SQUARE[:1], "**")),
    "split swaps its pieces": (pieces_swapped, Case("split", op("split", [2, 2], 1), SQUARE[:1],
                                                    "**")),
    "select takes the first": (first_slice, Case("select", op("select", 0, 2), SQUARE[:1], "**")),
    "repeat inside": (replicas_inside, Case("repeat", op("repeat", [4]), ((4,),), "*")),
    "pixel_shuffle from the outside": (
        pattern("... (r r c) h w -> ... c (h r) (w r)", r=(1, "r")), Case(
            "pixel_shuffle", op("pixel_shuffle", 2), ((2, 12, 3, 5),), "****")),
    "channel_shuffle keeps the order": (same_order, Case(
        "channel_shuffle", op("channel_shuffle", 2), ((2, 4, 4, 4),), "****")),
    "prelu over the last": (p.pointwise, Case("prelu", op("prelu"), ((2, 4, 4), (4,)), "*** *")),
    "as_strided keeps its sizes": (without_edits(cuts.as_strided), Case(
        "as_strided", lambda x: aten.as_strided(x, [4, 2], [6, 1]), ((4, 6),), "*.")),
    "fft element by element": (p.pointwise, Case(
        "fft_fft", lambda x: aten.fft_fft(x, None, 1).abs(), SQUARE[:1], "*.")),
    "slice_scatter writes elsewhere": (lambda s, n: writes.slice_scatter(
        s, replace_args(n, (*n.args[:3], 0, 2))), case_of("slice_scatter")),
    "slice_scatter keeps its bounds": (without_edits(writes.slice_scatter),
                                       case_of("slice_scatter")),
    "select_scatter keeps its index": (without_edits(writes.select_scatter),
                                       case_of("select_scatter")),
    "scatter with free rows": (lambda s, n: s.put(n.outputs[0], s.dims[n.args[0].name]),
                               case_of("scatter_add")),
    "index_add with free rows": (lambda s, n: s.put(n.outputs[0], s.dims[n.args[0].name]),
                                 case_of("index_add")),
    "index_put with free rows": (lambda s, n: s.put(n.outputs[0], s.dims[n.args[0].name]),
                                 case_of("index_put")),
    "as_strided keeps its strides": (without_edits(cuts.as_strided), case_of("as_strided", 3)),
    "unfold with free positions": (free_windows, case_of("unfold")),
    "grid_sampler with free positions": (pattern("b c h w, b !* -> b c h w"), Case(
        "grid_sampler", op("grid_sampler", 0, 0, False), ((2, 3, 4, 4), (2, 4, 4, 2)),
        "**.. *...")),
    "pad copies": (lambda s, n: cuts.pad(s, replace_args(n, n.args[:2])), Case(
        "pad", op("pad", [1, 1, 1, 1], "replicate"), ((2, 2, 3, 4),), "**..")),
}
