"""Cases at other shapes: operators whose arguments are sizes, and sizes exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ops_case import Case, Operand, aten, op
from ops_products import experts, recurrent


def sized_cases(a: int, b: int, c: int) -> Iterator[Case]:
    """Operators whose arguments are sizes."""
    for name in "view _unsafe_view reshape view_copy".split():
        yield Case(name, op(name, [a * b, c]), ((a, b, c),), "")
        yield Case(name, op(name, [a, b, c]), ((a * b, c),), "")
        yield Case(name, op(name, [c, -1]), ((c, a, b),), "")
    yield Case("unflatten", op("unflatten", 1, [a, b]), ((c, a * b),), "")
    yield Case("expand", op("expand", [a, b, -1]), ((1, c),), "")
    yield Case("expand", op("expand", [a, b, c]), ((a, 1, c),), "")
    for name in "zeros ones".split():
        yield Case(name, lambda x, n=name: x + getattr(aten, n)([b, c]), ((a, b, c),), "")
        yield Case(f"new_{name}", lambda x, n=name: x + getattr(aten, f"new_{n}")(x, [b, c]),
                   ((a, b, c),), "")
    yield Case("full", lambda x: x + aten.full([b, c], 2.0), ((a, b, c),), "")
    yield Case("new_full", lambda x: x + aten.new_full(x, [b, 1], 2.0), ((a, b, c),), "")
    for name in "split_with_sizes split".split():
        yield Case(name, op(name, [a, b, c], 1), ((a, a + b + c),), "")
    yield Case("unsafe_split", op("unsafe_split", a, 1), ((c, a * b),), "")
    yield Case("narrow", op("narrow", 1, a, b), ((c, a + b + c),), "")
    yield Case("slice", op("slice", 1, a, a + b), ((c, a + b + c),), "")
    yield Case("slice", op("slice", 1, 1, a + b, 2), ((c, a + b + c),), "")
    yield Case("rms_norm", lambda x, w: aten.rms_norm(x, [c], w, 1e-3), ((a, c), (c,)), "")
    yield Case("layer_norm", lambda x, w: aten.layer_norm(x, [c], w, w) * 2, ((a, c), (c,)), "",
               least=min(2, c - 1))
    for name, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        states, wide = (2 if gates == 4 else 1), ((gates * b, b), (gates * b,), (gates * b,))
        yield Case(name, recurrent(name, True, 2, 0.0, False, False, True),
                   ((2, a, c), *((2, 2, b),) * states, (gates * b, c), *wide, (gates * b, b),
                    *wide), "")
        yield Case(f"{name}_cell", recurrent(f"{name}_cell"),
                   ((a, c), *((a, b),) * states, (gates * b, c), *wide), "")
    for name, d in (("grid_sampler", 2), ("grid_sampler_2d", 2), ("grid_sampler_3d", 3)):
        yield Case(name, op(name, 0, 0, False), ((2, a, *(b,) * d), (2, *(c,) * d, d)), "")
    yield Case("roll", op("roll", [a, -b], [0, 1]), ((b, a + c),), "")
    yield Case("channel_shuffle", op("channel_shuffle", a), ((2, a * b, c, 2),), "")
    for name in ("reshape_as", "view_as"):
        yield Case(name, op(name), ((a, b * c), (a, b, c)), "")
    yield Case("col2im", op("col2im", [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
               ((b, 4 * a, 9),), "")
    yield Case("einsum", lambda x, y: aten.einsum("bij,bjk->kbi", [x, y]),
               ((a, b, c), (a, c, b)), "")
    yield Case("new_empty", lambda x: x + aten.new_empty(x, [b, c]) * 0, ((a, b, c),), "",
               random=True)
    yield Case("transformers.grouped_mm_fallback", experts, ((6, a), (3, a, b)), "")
    yield Case("pixel_shuffle", op("pixel_shuffle", 2), ((2, 4 * a, b, c),), "")
    yield Case("pixel_unshuffle", op("pixel_unshuffle", 2), ((2, a, 2 * b, 2 * c),), "")


def other_sizes(case: Case, sizes: dict[int, int]) -> Case:
    """The case with its sizes exchanged, wherever they stand."""
    def changed(operand: Operand) -> Operand:
        shape = operand if isinstance(operand, tuple) else operand.shape
        made = tuple(sizes.get(k, k) for k in shape)
        return made if isinstance(operand, tuple) else replace(operand, shape=made)

    return replace(case, operands=tuple(map(changed, case.operands)))
