"""Cases of products: matrices, convolutions, recurrent layers, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from ops_case import Case, Ints, aten, op


def experts(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Grouped products of rows, sorted by expert, with an expert's matrix each."""
    return torch.ops.transformers.grouped_mm_fallback(x, weights, torch.tensor([2, 3, 6]))


def contraction_cases() -> Iterator[Case]:
    yield Case("linear", op("linear"), ((2, 3), (4, 3), (4,)), "** ** *")
    yield Case("linear", op("linear"), ((2, 5, 4), (4, 4), (4,)), "*** ** *")
    yield Case("linear", op("linear"), ((3,), (4, 3)), "* **")
    yield Case("addmm", op("addmm"), ((4,), (2, 3), (3, 4)), "* ** **")
    yield Case("addmm", op("addmm"), ((4,), (4, 4), (4, 4)), "* ** **")
    yield Case("addmm", op("addmm"), ((2, 4), (2, 3), (3, 4)), "** ** **")
    yield Case("mm", op("mm"), ((4, 4), (4, 4)), "** **")
    yield Case("mm", op("mm"), ((2, 3), (3, 4)), "** **")
    yield Case("bmm", op("bmm"), ((2, 3, 4), (2, 4, 5)), "*** ***")
    yield Case("bmm", op("bmm"), ((4, 4, 4), (4, 4, 4)), "*** ***")
    yield Case("baddbmm", op("baddbmm"), ((2, 3, 5), (2, 3, 4), (2, 4, 5)), "*** *** ***")
    yield Case("baddbmm", op("baddbmm"), ((2, 1, 5), (2, 3, 4), (2, 4, 5)), "*.* *** ***")
    yield Case("addbmm", op("addbmm"), ((4,), (2, 3, 5), (2, 5, 4)), "* *** ***")
    yield Case("bilinear", op("bilinear"), ((2, 3), (2, 4), (5, 3, 4), (5,)), "** ** *** *")
    yield Case("mv", op("mv"), ((4, 4), (4,)), "** *")
    yield Case("dot", op("dot"), ((4,), (4,)), "* *")
    yield Case("outer", op("outer"), ((3,), (4,)), "* *")
    yield Case("outer", op("outer"), ((4,), (4,)), "* *")
    def gram(x: torch.Tensor) -> torch.Tensor:
        heads = aten.view(x, [3, 4])
        return aten.einsum("hd,gd->hg", [heads, heads])

    yield Case("einsum", gram, ((12,),), "*")
    for a, b, free in (((3, 4), (4, 5), "** **"), ((4,), (4,), "* *"), ((4,), (4, 5), "* **"),
                       ((3, 4), (4,), "** *"), ((2, 3, 4), (4, 5), "*** **"),
                       ((2, 4, 4), (2, 4, 4), "*** ***"), ((2, 3, 4), (1, 4, 5), "*** .**"),
                       ((6, 1, 3, 4), (2, 4, 5), "*.** ***")):
        yield Case("matmul", op("matmul"), (a, b), free)
    for text, a, b, free in (
            ("bij,bjk->bik", (4, 4, 4), (4, 4, 4), "*** ***"),
            ("...i,oi->...o", (2, 3, 4), (5, 4), "*** **"),
            ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 3, 4, 5), "**** ****"),
            ("ij,kj->ki", (4, 4), (4, 4), "** **")):
        yield Case("einsum", lambda x, y, t=text: aten.einsum(t, [x, y]), (a, b), free)
    yield Case("einsum", lambda x: aten.einsum("iij->ji", [x]), ((4, 4, 3),), "***")
    yield Case("transformers.grouped_mm_fallback", experts, ((6, 4), (3, 4, 5)), ".* .** .")
    yield Case("embedding", op("embedding"), ((5, 4), Ints((2, 3))), ".* **")
    yield Case("embedding", op("embedding"), ((4, 4), Ints((4,), 4)), ".* *")


def convolution_cases() -> Iterator[Case]:
    for d in (1, 2, 3):
        x, k, dots = (5,) * d, (3,) * d, "." * d
        call = op(f"conv{d}d")
        yield Case(f"conv{d}d", call, ((2, 3, *x), (4, 3, *k), (4,)), f"**{dots} **{dots} *")
        grouped = op(f"conv{d}d", [1], [1], [1], 2)
        yield Case(f"conv{d}d", grouped, ((2, 4, *x), (6, 2, *k), (6,)), f"**{dots} **{dots} *")
        name = f"conv_transpose{d}d"
        yield Case(name, op(name), ((2, 3, *x), (3, 4, *k), (4,)), f"**{dots} **{dots} *")
        grouped = op(name, [1], [1], [0], 2)
        yield Case(name, grouped, ((2, 4, *x), (4, 3, *k), (6,)), f"**{dots} **{dots} *")
    named = op("conv2d", [1, 1], [1, 1], [1, 1], groups=2)
    yield Case("conv2d", named, ((2, 4, 6, 6), (6, 2, 3, 3), (6,)), "**.. **.. *")
    depthwise = op("conv2d", [1, 1], [1, 1], [1, 1], 4)
    yield Case("conv2d", depthwise, ((2, 4, 4, 4), (4, 1, 3, 3), (4,)), "**.. *... *")
    multiplied = op("conv2d", [1, 1], [1, 1], [1, 1], 3)
    yield Case("conv2d", multiplied, ((2, 3, 5, 5), (6, 1, 3, 3), (6,)), "**.. *... *")
    unbatched = op("conv2d", [1, 1], [1, 1])
    yield Case("conv2d", unbatched, ((4, 4, 4), (4, 4, 3, 3), (4,)), "*.. **.. *")
    yield Case("conv2d", lambda x, w: aten.conv2d(x, w, None, [1, 1], "same"),
               ((2, 3, 5, 5), (4, 3, 3, 3)), "**.. **..")
    for transposed, weight in ((False, (6, 2, 3, 3)), (True, (4, 3, 3, 3))):
        call = op("convolution", [1, 1], [1, 1], [1, 1], transposed, [0, 0], 2)
        yield Case("convolution", call, ((2, 4, 5, 5), weight, (6,)), "**.. **.. *")


def recurrent(name: str, *options: Any) -> Callable[..., Any]:
    """lstm, gru or rnn of x, its states and its arrays (for each layer and way, and biased?)."""
    def call(x: torch.Tensor, *rest: torch.Tensor) -> Any:
        states = 2 if name.startswith("lstm") else 1
        given = list(rest[:2]) if states == 2 else rest[0]
        arrays = rest[states:] if name.endswith("cell") else (list(rest[states:]),)
        return getattr(aten, name)(x, given, *arrays, *options)

    return call


def recurrent_cases() -> Iterator[Case]:
    for name, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        states, h, rows = (2 if gates == 4 else 1), 5, 5 * gates
        stack = "*.* " + ".** " * states
        once, twice = (((n, 2, h),) * states for n in (1, 4))
        arrays, inner = ((rows, 4), (rows, h), (rows,), (rows,)), (rows, 2 * h)
        yield Case(name, recurrent(name, True, 1, 0.0, False, False, False),
                   ((3, 2, 4), *once, *arrays), f".*{stack[2:]}** ** * *")
        yield Case(name, recurrent(name, False, 1, 0.0, False, False, True),
                   ((2, 3, 4), *once, *arrays[:2]), f"{stack}** **")
        yield Case(name, recurrent(name, True, 2, 0.0, False, True, True),
                   ((2, 3, 4), *twice, *arrays * 2, *(inner, *arrays[1:]) * 2),
                   stack + " ".join(["** ** * *"] * 4))
        yield Case(f"{name}_cell", recurrent(f"{name}_cell"),
                   ((2, 4), *((2, h),) * states, *arrays), "** " * (1 + states) + "** ** * *")
    projected = ((24, 4), (24, 3), (24,), (24,), (3, 6))
    yield Case("lstm", recurrent("lstm", True, 1, 0.0, False, True, True),
               ((2, 3, 4), (2, 2, 3), (2, 2, 6), *projected * 2),
               "*.* .** .*. " + " ".join([".* .* . . *."] * 2))


def attend(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    return lambda q, k, v, *mask: aten.scaled_dot_product_attention(q, k, v, *mask, *args, **kwargs)


def attention_cases() -> Iterator[Case]:
    name = "scaled_dot_product_attention"
    yield Case(name, attend(), ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)), "**.* **.* **.*")
    yield Case(name, attend(), ((2, 4, 4, 4),) * 3, "**.* **.* **.*")
    yield Case(name, attend(None, 0.0, True, scale=0.3), ((2, 4, 4, 4),) * 3, "**.* **.* **.*")
    yield Case(name, attend(None, 0.0, False, enable_gqa=True),
               ((2, 6, 4, 4), (2, 2, 4, 4), (2, 2, 4, 4)), "**.* **.* **.*")
    yield Case(name, attend(), ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7), (3, 5, 6)),
               "**.* **.* **.* *..")
    yield Case(name, attend(), ((3, 5, 4), (3, 6, 4), (3, 6, 7)), "*.* *.* *.*")
