"""Cases of operators that re-arrange, cut, look up or write positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ops_case import Bools, Case, Ints, aten, op


def shape_cases() -> Iterator[Case]:
    for name in "view _unsafe_view reshape view_copy".split():
        yield Case(name, op(name, [4, 6]), ((2, 2, 6),), "***")
        yield Case(name, op(name, [2, 3, 4]), ((6, 4),), "**")
        yield Case(name, op(name, [3, -1]), ((3, 2, 4),), "***")
    yield Case("view", op("view", [2, 4, 3]), ((4, 6),), "**")
    yield Case("view", op("view", [6, 1, 4]), ((3, 2, 4),), "***")
    yield Case("reshape", lambda x: aten.reshape(aten.reshape(x, [3, 4]), [2, 6]), ((12,),), ".")
    yield Case("view", lambda x: aten.view(x, size=[4, 6]), ((2, 2, 6),), "***")
    yield Case("reshape", lambda x: aten.reshape(x, shape=[4, 6]), ((2, 2, 6),), "***")
    yield Case("flatten", op("flatten", 1), ((2, 3, 4),), "***")
    yield Case("flatten", op("flatten"), ((4, 4),), "**")
    yield Case("unflatten", op("unflatten", 1, [2, -1]), ((3, 6),), "**")
    yield Case("unflatten", op("unflatten", 0, [2, 3]), ((6, 4),), "**")
    yield Case("permute", op("permute", [2, 0, 1]), ((4, 4, 4),), "***")
    yield Case("permute", op("permute", [-1, 0, 1]), ((2, 3, 4),), "***")
    yield Case("numpy_T", op("numpy_T"), ((4, 4),), "**")
    yield Case("mT", op("mT"), ((3, 4, 4),), "***")
    for name in "movedim moveaxis".split():
        yield Case(name, op(name, 0, -1), ((4, 4, 4),), "***")
        yield Case(name, op(name, [0, 1], [2, 0]), ((4, 4, 4),), "***")
    for name in "transpose swapaxes swapdims".split():
        yield Case(name, op(name, 0, -1), ((4, 4, 4),), "***")
    turned = lambda x: aten.transpose(aten.view(x, [2, 3, 4]), 0, 1)  # noqa: E731
    yield Case("transpose", turned, ((6, 4),), "**")
    yield Case("t", op("t"), ((3, 4),), "**")
    yield Case("t", op("t"), ((3,),), "*")
    yield Case("unsqueeze", op("unsqueeze", 1), ((3, 4),), "**")
    yield Case("unsqueeze", op("unsqueeze", -1), ((3, 4),), "**")
    yield Case("squeeze", op("squeeze", 1), ((3, 1, 4),), "*.*")
    yield Case("squeeze", op("squeeze", [0, 1]), ((1, 1, 4),), "..*")
    yield Case("squeeze", op("squeeze"), ((3, 1, 4),), "*.*", least=2)
    yield Case("expand", op("expand", [3, 4, -1]), ((4, 5),), "**")
    yield Case("expand", op("expand", [2, 3, 4]), ((2, 1, 4),), "*.*")
    yield Case("repeat", op("repeat", [2, 3]), ((3, 4),), "**")
    yield Case("repeat", op("repeat", [2, 1, 3]), ((3, 4),), "**")
    yield Case("tile", op("tile", [2, 3]), ((3, 4),), "**")
    yield Case("tile", op("tile", [3]), ((3, 4),), "**")
    yield Case("expand_as", op("expand_as"), ((4, 1), (3, 4, 5)), "*. ***")
    yield Case("repeat_interleave", op("repeat_interleave", 3, 1), ((3, 4),), "**")
    yield Case("repeat_interleave", op("repeat_interleave", 2, -1), ((4, 4),), "**")
    yield Case("pixel_shuffle", op("pixel_shuffle", 2), ((2, 12, 3, 5),), "****")
    yield Case("pixel_unshuffle", op("pixel_unshuffle", 2), ((2, 3, 4, 6),), "****")
    yield Case("channel_shuffle", op("channel_shuffle", 2), ((2, 6, 4, 4),), "****")


def cut_cases() -> Iterator[Case]:
    for name in "cat concat".split():
        def call(*xs: Any, n: str = name) -> Any:
            return getattr(aten, n)(xs, 1)
        yield Case(name, call, ((3, 4), (3, 5), (3, 4)), "** ** **")
    yield Case("cat", lambda x, y: aten.cat([x, y]), ((4, 4), (4, 4)), "** **")
    yield Case("cat", lambda x, y: aten.cat([x, y, x], -1), ((4, 4), (4, 4)), "** **")
    yield Case("stack", lambda x, y: aten.stack([x, y], 1), ((3, 4), (3, 4)), "** **")
    yield Case("stack", lambda x, y: aten.stack([x, y], -1), ((3, 4), (3, 4)), "** **")
    yield Case("reshape_as", op("reshape_as"), ((4, 6), (4, 2, 3)), "** ***")
    yield Case("view_as", op("view_as"), ((4, 6), (24,)), "** *")
    yield Case("unfold", op("unfold", 1, 3, 2), ((3, 7, 4),), "*.*")
    yield Case("im2col", op("im2col", [2, 2], [1, 1], [0, 0], [1, 1]), ((2, 3, 4, 4),), "**..")
    yield Case("col2im", op("col2im", [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]), ((2, 12, 9),),
               "**.")
    yield Case("slice_scatter", op("slice_scatter", 1, 1, 3), ((3, 4), (3, 2)), "** **")
    yield Case("slice_scatter", op("slice_scatter", -1, 2), ((3, 4), (3, 2)), "** **")
    yield Case("slice_scatter", op("slice_scatter", 0, 0, 2), ((4, 4), (2, 4)), "** **")
    yield Case("slice_scatter", op("slice_scatter", 0, 0, 4, 2), ((4, 4), (2, 4)), ".* .*")
    yield Case("slice_scatter", lambda x, y: aten.slice_scatter(aten.cumsum(x, 1), y, 1, 1, 3),
               ((3, 4), (3, 2)), "*. *.")
    yield Case("select_scatter", op("select_scatter", 1, 2), ((3, 4), (3,)), "** *")
    yield Case("select_scatter", op("select_scatter", 0, -4), ((4, 4), (4,)), "** *")
    yield Case("concatenate", lambda x, y: aten.concatenate([x, y], 1), ((4, 4), (4, 3)), "** **")
    for name in "split_with_sizes split".split():
        yield Case(name, op(name, [2, 3, 4], 1), ((3, 9),), "**")
    yield Case("split_with_sizes", op("split", 4, 1), ((3, 9),), "**")
    yield Case("split_with_sizes", op("chunk", 3, 0), ((8, 4),), "**")
    yield Case("unsafe_split", op("unsafe_split", 3, 1), ((3, 9),), "**")
    yield Case("unsafe_split", op("unsafe_split", 4, 1), ((3, 9),), "*.")
    yield Case("unsafe_chunk", op("unsafe_chunk", 2, 1), ((4, 8),), "**")
    yield Case("unsafe_chunk", op("unsafe_chunk", 3, 0), ((8, 4),), ".*")
    yield Case("unsafe_chunk", op("unsafe_chunk", 5, 0), ((6, 4),), "**")
    yield Case("unbind", op("unbind"), ((3, 4),), ".*")
    yield Case("unbind", op("unbind", 1), ((4, 4),), "*.")
    for at in (0, 2, -1, -4):
        yield Case("select", op("select", 0, at), ((4, 4),), "**")
    yield Case("select", op("select", -1, 1), ((4, 4),), "**")
    for start, end, free in ((0, 2, "**"), (2, 5, "**"), (1, 4, "**"), (-2, 99, "**"),
                             (0, -2, "**"), (-99, 3, "**"), (None, None, "**")):
        yield Case("slice", op("slice", 1, start, end), ((3, 5),), free)
    for start, length in ((0, 2), (1, 3), (-2, 2)):
        yield Case("narrow", op("narrow", 1, start, length), ((3, 5),), "**")
    yield Case("slice", op("slice", 1, 2, 4), ((4, 6),), "**")
    yield Case("slice", op("slice", 1, 1, 6, 2), ((3, 6),), "**")
    yield Case("slice", op("slice", 1, 0, 5, 2), ((3, 5),), "**")
    yield Case("slice", op("slice", 1, 1, 5, 3), ((3, 6),), "**")
    yield Case("slice", op("slice", 0, 2, 2), ((4, 4),), "..")
    yield Case("slice", op("slice", 0, 3, 2), ((4, 4),), "..")
    for name in "constant_pad_nd pad".split():
        yield Case(name, op(name, [1, 2]), ((3, 4),), "**")
        yield Case(name, op(name, [0, 1, 2, 0]), ((2, 3, 4),), "***")
    yield Case("pad", op("pad", [1, 1], "reflect"), ((2, 3, 4),), "**.")
    yield Case("pad", op("pad", [1, -1]), ((3, 4),), "*.")
    for call in (lambda x: aten.as_strided(x, [4, 2, 3], [6, 2, 1]),
                 lambda x: aten.as_strided(x, [4, 2], [6, 1])):
        yield Case("as_strided", call, ((4, 6),), "*.")
    yield Case("as_strided", lambda x: aten.as_strided(x, [3, 6], [7, 1]), ((4, 6),), "..")
    yield Case("as_strided", lambda x: aten.as_strided(x, [2, 5, 2, 3], [18, 3, 3, 1]),
               ((2, 6, 3),), "*.*")
    yield Case("as_strided", lambda x: aten.as_strided(x, [3, 2, 3, 4], [12, 12, 4, 1]),
               ((4, 3, 4),), ".**")
    yield Case("as_strided", lambda x: aten.as_strided(x, [4, 3], [4, 1], 1), ((4, 4),), "..")
    yield Case("pad", op("pad", [1, 1, 1, 1], "replicate"), ((2, 2, 3, 4),), "**..")


def lookup_cases() -> Iterator[Case]:
    yield Case("index", lambda x, i: aten.index(x, [i]), ((5, 4), Ints((3,))), ".* .")
    yield Case("index", lambda x, i: aten.index(x, [None, i]), ((4, 4), Ints((4,), 4)), "*. .")
    yield Case("index", lambda x, i, j: aten.index(x, [i, j]),
               ((5, 5, 4), Ints((2, 3)), Ints((3,))), "..* .. .")
    yield Case("index", lambda x, i, j: aten.index(x, [i, None, j]),
               ((5, 4, 5), Ints((3,)), Ints((3,))), ".*. . .")
    yield Case("gather", lambda x, i: aten.gather(x, 1, i), ((3, 5), Ints((3, 4))), "*. *.")
    yield Case("gather", lambda x, i: aten.gather(x, 0, i), ((5, 4), Ints((3, 3))), ".. ..")
    yield Case("index", lambda x, i, j: aten.index(x, [None, i, j]),
               ((3, 4, 5, 2), Ints((3,), 4), Ints((3,), 5)), "*..* . .")
    yield Case("index", lambda x, i, j: aten.index(x, [i, None, j]),
               ((4, 3, 5, 2), Ints((3,), 4), Ints((3,), 5)), ".*.* . .")
    yield Case("index", lambda x, m: aten.index(x, [None, m]), ((3, 4, 5), Bools((4,))), "*.* .")
    yield Case("index", lambda x, m: aten.index(x, [m]), ((3, 4, 5), Bools((3, 4))), "..* ..")
    yield Case("_unsafe_index", lambda x, i: aten._unsafe_index(x, [None, i]),
               ((3, 5), Ints((4,))), "*. .")
    for name in "index_put _unsafe_index_put".split():
        def put(x: Any, i: Any, y: Any, n: str = name) -> Any:
            return getattr(aten, n)(x, [i], y)
        yield Case(name, put, ((5, 4), Ints((3,)), (3, 4)), ".* . .*")
        yield Case(name, put, ((3, 4, 5), Bools((3, 4)), (5,)), "..* .. *")
        yield Case(name, lambda x, i, y, n=name: getattr(aten, n)(x, [None, i], y, True),
                   ((4, 5, 3), Ints((2,)), (4, 2, 1)), "*.* . *..")
    yield Case("index_add", lambda x, i, y: aten.index_add(x, 0, i, y),
               ((5, 4), Ints((3,)), (3, 4)), ".* . .*")
    yield Case("index_copy", lambda x, i, y: aten.index_copy(x, -1, i % 2 + 2, y),
               ((3, 5), Ints((1,)), (3, 1)), "*. . *.")
    yield Case("index_fill", lambda x, i: aten.index_fill(x, 1, i, 2.0),
               ((3, 5), Ints((2,))), "*. .")
    yield Case("scatter", lambda x, i, y: aten.scatter(x, 1, i, y),
               ((3, 5), Ints((3, 1)), (3, 1)), "*. *. *.")
    yield Case("scatter", lambda x, i: aten.scatter(x, 0, i, 0.5), ((5, 4), Ints((2, 3))),
               ".. ..")
    yield Case("scatter_add", lambda x, i, y: aten.scatter_add(x, 0, i, y),
               ((5, 4), Ints((3, 4)), (3, 4)), ".* .* .*")
    yield Case("scatter_reduce", lambda x, i, y: aten.scatter_reduce(x, 1, i, y, "amax"),
               ((3, 5), Ints((3, 4)), (4, 4)), ".. .. ..")
    yield Case("scatter_reduce", lambda x, i, y: aten.scatter_reduce(x, 1, i, y, "sum"),
               ((3, 5), Ints((3, 4)), (3, 4)), "*. *. *.")
    yield Case("index_select", lambda x, i: aten.index_select(x, 0, i), ((5, 4), Ints((3,))),
               ".* .")
    yield Case("index_select", lambda x, i: aten.index_select(x, -1, i), ((4, 4), Ints((4,), 4)),
               "*. .")
