"""Slicing commutes with every operator that the ATen table knows.

A case is one operator on parameters of its own, so that every dimension may shrink unless the
operator says otherwise. `free` says, per operand and dimension, which may: `*` slices can go,
`.` none can. For random kept slices, each value of the pruned program must be the kept part of
the same value of the masked dense one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers an operator; never while tracing)
from commuting import choose, differences, quick_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spacompiler import primitives as p
from spacompiler import reductions, shapes, writes
from spacompiler.allocation import step as step_of
from spacompiler.axes import Choices, is_frozen
from spacompiler.cost import cost
from spacompiler.emit.program import run_pruned
from spacompiler.frontends.aten import TABLE
from spacompiler.frontends.torch_export import Trace, trace
from spacompiler.groups import Solution, solve
from spacompiler.proof import TOLERANCE
from spacompiler.solver import Row

aten = torch.ops.aten


@dataclass(frozen=True)
class Ints:
    """An operand of integers below `high`."""

    shape: tuple[int, ...]
    high: int = 5


@dataclass(frozen=True)
class Bools:
    """An operand of truth values."""

    shape: tuple[int, ...]


Operand = tuple[int, ...] | Ints | Bools


@dataclass(frozen=True)
class Case:
    """One operator on operands of these shapes."""

    op: str
    call: Callable[..., Any]
    operands: tuple[Operand, ...]
    free: str
    least: int = 1  # slices to keep of every axis
    random: bool = False  # results are random numbers: only their shapes are compared

    def __str__(self) -> str:
        shapes = (getattr(o, "shape", o) for o in self.operands)
        return f"{self.op}-{'-'.join('x'.join(map(str, s)) for s in shapes)}"


class Module(nn.Module):
    """One operator on parameters; the input is there because a program needs one."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
        self.call = case.call
        self.operand = nn.ParameterList(make(o, generator) for o in case.operands)

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(*self.operand), x + 1


def make(operand: Operand, generator: torch.Generator) -> nn.Parameter:
    """Values in (0.2, 0.8), where every function of the table is defined and no two are equal."""
    shape = operand if isinstance(operand, tuple) else operand.shape
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    if isinstance(operand, Ints):
        return nn.Parameter((values * operand.high).long(), requires_grad=False)
    if isinstance(operand, Bools):
        return nn.Parameter(values > 0.5, requires_grad=False)
    return nn.Parameter(values * 0.6 + 0.2)


@cache
def traced(case: Case) -> Trace:
    found = trace(Module(case), (torch.tensor(1.0),))
    found.graph.outputs = []  # results stay free
    return found


def solved(case: Case, table: Mapping[str, Row] = TABLE) -> Solution:
    return solve(traced(case).graph, table, rewire=True)


def free_dims(solution: Solution) -> str:
    """Which dimensions of the operands may shrink, in the notation of `Case.free`."""
    dims = solution.weights()
    return " ".join(
        "".join("." if is_frozen(e) else "*" for e in dims[name])
        for name in sorted(dims, key=lambda name: (len(name), name)))


def tried(case: Case, solution: Solution, tries: int = 6) -> list[Choices]:
    """The choices of slices that a case is tried with."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    return [choose(solution, rng, case.least) for _ in range(tries)]


def worst(case: Case, table: Mapping[str, Row] = TABLE) -> float:
    """Worst error over random choices of slices."""
    solution = solved(case, table)
    return max(error for choices in tried(case, solution)
               for error in differences(traced(case), solution, choices, case.random).values())


# --- the cases ----------------------------------------------------------------------------------

UNARY = """
neg abs sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sin cos tan asin
acos atan sinh cosh tanh asinh atanh erf erfc erfinv sigmoid logit relu relu6 leaky_relu elu selu
celu gelu silu mish softplus hardtanh hardswish hardsigmoid hardshrink softshrink log_sigmoid
floor ceil round trunc frac nan_to_num logical_not isnan isinf isfinite sgn positive
sinc lgamma digamma signbit
clone contiguous alias detach zeros_like ones_like _to_copy lift_fresh_copy lift resolve_conj
""".split()
BINARY = """
add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum fmax fmin atan2
multiply divide subtract copy
logaddexp eq ne lt le gt ge logical_and logical_or logical_xor xlogy heaviside copysign hypot
""".split()
INTEGERS = """
bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__
""".split()
ALONG = """
_softmax softmax log_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin
""".split()
REDUCED = "amax amin var std all logsumexp argmax argmin var_mean std_mean max min median".split()


def op(name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The operator itself, with arguments after its tensors."""
    packet = getattr(aten, name)
    return lambda *tensors: packet(*tensors, *args, **kwargs)


def experts(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Grouped products of rows, sorted by expert, with an expert's matrix each."""
    return torch.ops.transformers.grouped_mm_fallback(x, weights, torch.tensor([2, 3, 6]))


def pointwise_cases() -> Iterator[Case]:
    for name in UNARY:
        yield Case(name, op(name), ((3, 4),), "**")
    for name in BINARY:
        yield Case(name, op(name), ((3, 4), (3, 4)), "** **")
    for name in "add mul where".split():
        call = op(name) if name != "where" else lambda x, y: torch.where(x > 0.5, x, y)
        yield Case(name, call, ((2, 3, 4), (4,)), "*** *")
        yield Case(name, call, ((2, 3, 4), (3, 1)), "*** *.")
        yield Case(name, call, ((1, 4), (2, 3, 1)), ".* **.")
    for name in INTEGERS:
        yield Case(name, op(name), (Ints((3, 4)), Ints((3, 4))), "** **")
    yield Case("bitwise_not", op("bitwise_not"), (Ints((3, 4)),), "**")
    yield Case("acosh", lambda x: aten.acosh(x + 1), ((3, 4),), "**")
    for name, args in {"threshold": (0.5, 0.1), "clamp": (0.3, 0.6), "clip": (0.3, 0.6),
                       "clamp_min": (0.4,), "clamp_max": (0.4,), "fill": (2.0,),
                       "dropout": (0.5, False), "feature_dropout": (0.5, False),
                       "alpha_dropout": (0.5, False), "full_like": (2.0,),
                       "to": (torch.float64,), "native_dropout": (0.5, False)}.items():
        yield Case(name, op(name, *args), ((3, 4),), "**")
    for name in "rand_like randn_like empty_like bernoulli".split():
        yield Case(name, op(name), ((3, 4),), "**", random=True)
    yield Case("new_empty", lambda x: x + aten.new_empty(x, [3, 4]) * 0, ((2, 3, 4),), "***",
               random=True)
    for name in "zeros ones".split():
        yield Case(name, lambda x, n=name: x + getattr(aten, n)([3, 4]), ((2, 3, 4),), "***")
        yield Case(f"new_{name}", lambda x, n=f"new_{name}": x + getattr(aten, n)(x, [3, 4]),
                   ((2, 3, 4),), "***")
    yield Case("full", lambda x: x + aten.full([3, 4], 2.0), ((2, 3, 4),), "***")
    yield Case("new_full", lambda x: x + aten.new_full(x, [3, 1], 2.0), ((2, 3, 4),), "***")
    yield Case("type_as", op("type_as"), ((3, 4), (2,)), "** *")
    yield Case("lerp", op("lerp"), ((3, 4),) * 3, "** ** **")
    yield Case("addcmul", op("addcmul"), ((3, 4), (3, 4), (4,)), "** ** *")
    yield Case("addcdiv", op("addcdiv"), ((3, 4),) * 3, "** ** **")
    yield Case("where", op("where"), (Bools((3, 4)), (3, 4), (4,)), "** ** *")
    yield Case("masked_fill", op("masked_fill", -1.0), ((2, 3, 4), Bools((3, 4))), "*** **")
    yield Case("prelu", op("prelu"), ((2, 4, 4), (4,)), "*** *")
    yield Case("_weight_norm", op("_weight_norm", 0), ((4, 3, 2), (4, 1, 1)), "*.. *..")
    yield Case("_weight_norm", op("_weight_norm", 2), ((4, 3, 2), (1, 1, 2)), "..* ..*")
    yield Case("prelu", op("prelu"), ((2, 3, 4), (1,)), "*** .")
    yield Case("prelu", op("prelu"), ((2, 4), (4,)), "** *")


def along_cases() -> Iterator[Case]:
    for name in ALONG:
        args = (False,) if name[0] == "_" else ()
        yield Case(name, op(name, 1, *args), ((3, 4, 5),), "*.*")
        yield Case(name, op(name, -1, *args), ((4, 4),), "*.")
    yield Case("_safe_softmax", op("_safe_softmax", 1), ((3, 4),), "*.")
    yield Case("glu", op("glu", 1), ((3, 4),), "**")
    yield Case("glu", op("glu", 0), ((6, 4),), "**")
    for name in "sort argsort".split():
        yield Case(name, op(name, 0), ((4, 4),), ".*")
        yield Case(name, op(name), ((3, 4),), "*.")
        yield Case(name, op(name, stable=True, dim=0), ((3, 4),), ".*")
    yield Case("topk", op("topk", 2), ((3, 4),), "*.")
    yield Case("topk", op("topk", 2, 0), ((4, 4),), ".*")
    yield Case("flip", op("flip", [0]), ((3, 4),), "**")
    yield Case("flip", op("flip", [0, -1]), ((3, 4, 5),), "***")
    yield Case("roll", op("roll", [1], [0]), ((3, 4),), "**")
    yield Case("roll", op("roll", [1, -2], [0, 2]), ((3, 4, 5),), "***")
    yield Case("roll", op("roll", [5, 8], [0, 1]), ((3, 4),), "**")
    yield Case("roll", op("roll", [1]), ((3, 4),), "..")
    yield Case("diff", op("diff"), ((3, 4),), "*.")
    yield Case("diff", op("diff", 1, 0), ((3, 4),), ".*")
    yield Case("tril", op("tril"), ((3, 4, 4),), "*..")
    yield Case("triu", op("triu", 1), ((3, 4, 4),), "*..")


def reduce_cases() -> Iterator[Case]:
    for name in REDUCED:
        free = "*.*"
        many = name in ("amax", "amin", "var", "std", "var_mean", "std_mean")
        args: tuple[Any, ...] = ([1],) if many else (1,)
        yield Case(name, op(name, *args), ((3, 4, 5),), free)
        keep = {"keepdim": True}
        yield Case(name, op(name, *args, **keep), ((4, 4, 4),), free)
    yield Case("var", op("var", False), ((3, 4),), "..")
    yield Case("var", op("var", [1], False, True), ((4, 4),), "*.")
    yield Case("max", op("max"), ((3, 4),), "..")
    yield Case("max", op("max"), ((3, 4), (3, 4)), "** **")
    yield Case("min", op("min"), ((3, 4), (4,)), "** *")
    yield Case("any", lambda x: aten.any(x > 0.5, 1), ((3, 4),), "**")
    yield Case("count_nonzero", op("count_nonzero", [0]), ((3, 4),), "**")
    yield Case("prod", op("prod", 1), ((3, 4),), "*.")
    yield Case("sum", op("sum", [1]), ((3, 4, 5),), "***")
    yield Case("sum", op("sum", [0, -1], True), ((3, 4, 5),), "***")
    yield Case("sum", op("sum"), ((3, 4),), "**")
    yield Case("mean", op("mean", [1]), ((3, 4, 5),), "*.*")
    yield Case("mean", op("mean", [0], True), ((3, 4),), ".*")
    yield Case("mean", op("mean"), ((3, 4),), "..")
    for args in ((2, [1]), (1, [0], True), (2, [-1], True)):
        yield Case("linalg_vector_norm", op("linalg_vector_norm", *args), ((4, 4),), "**")
    yield Case("linalg_vector_norm", op("linalg_vector_norm", -1, [1]), ((3, 4),), "*.")
    for args, free in (((None, [1]), "**"), ((2, [0], True), "**"), ((-1, [1]), "*.")):
        yield Case("linalg_norm", op("linalg_norm", *args), ((4, 4),), free)
    yield Case("norm", op("norm", 2, [1]), ((4, 4),), "**")
    yield Case("norm", op("norm", 2, [0], True), ((4, 4),), "**")
    yield Case("norm", op("norm", 2), ((3, 4),), "**")


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


def normed(x: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
    """The masked run replaces layer_norm itself, so that what follows it is compared."""
    return aten.layer_norm(x, [4], *affine) * 2


def norm_cases() -> Iterator[Case]:
    yield Case("layer_norm", normed, ((3, 4),), "**", least=2)
    yield Case("layer_norm", normed, ((4, 4), (4,), (4,)), "** * *", least=2)
    yield Case("layer_norm", op("layer_norm", [4, 5]), ((3, 4, 5),), "*..")
    yield Case("rms_norm", lambda x, w: aten.rms_norm(x, [4], w, 1e-3), ((4, 4), (4,)), "** *")
    yield Case("rms_norm", lambda x: aten.rms_norm(x, [4], None, 1e-3), ((3, 4),), "*.")
    yield Case("rms_norm", lambda x, w: aten.rms_norm(x, [4], w), ((3, 4), (4,)), "*. .")
    yield Case("group_norm", op("group_norm", 2), ((2, 4, 4),), "**.")
    yield Case("group_norm", op("group_norm", 1), ((2, 4, 4),), "**.")
    yield Case("group_norm", lambda x, w, b: aten.group_norm(x, 3, w, b),
               ((2, 6, 4), (6,), (6,)), "**. * *")
    yield Case("group_norm", op("group_norm", 4), ((2, 4, 3),), "**.")
    call = lambda x, w, b, m, v: aten.batch_norm(x, w, b, m, v, False, 0.1, 1e-5, False)  # noqa: E731
    yield Case("batch_norm", call, ((2, 4, 4, 4), *((4,),) * 4), "**** * * * *")
    yield Case("batch_norm", call, ((4, 4), *((4,),) * 4), "** * * * *")
    yield Case("batch_norm", lambda x: aten.batch_norm(x, None, None, None, None, True, 0.1, 1e-5,
                                                       False), ((2, 4, 4),), ".*.")
    call = lambda x, m, v: aten.batch_norm(x, None, None, m, v, False, 0.1, 1e-5, False)  # noqa: E731
    yield Case("batch_norm", call, ((2, 3, 4), (3,), (3,)), "*** * *")
    call = lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training(  # noqa: E731
        x, w, b, m, v, 0.1, 1e-5)
    yield Case("_native_batch_norm_legit_no_training", call, ((2, 4, 4), *((4,),) * 4),
               "*** * * * *")
    call = lambda x, w, b: aten.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False)  # noqa: E731
    yield Case("instance_norm", call, ((2, 4, 5), (4,), (4,)), "**. * *")


def transform_cases() -> Iterator[Case]:
    for name in "fft_fft fft_ifft fft_rfft".split():
        yield Case(name, op(name, None, 1), ((3, 4, 5),), "*.*")
    for name in "fft_fftn fft_ifftn fft_fft2 fft_ifft2 fft_rfftn fft_rfft2".split():
        yield Case(name, op(name, None, [-2, -1]), ((3, 4, 5),), "*..")
    for name in "fft_irfft fft_irfftn fft_irfft2".split():
        dims: Any = 1 if name == "fft_irfft" else [0, 1]
        yield Case(name, op(name, None, dims), ((3, 4, 5),), "*.*" if dims == 1 else "..*")
    yield Case("stft", lambda x: aten.stft(x, 4, window=aten.ones([4]), return_complex=True).abs(),
               ((3, 9),), "..")
    yield Case("istft", lambda x: aten.istft(aten.complex(x, x), 4, window=aten.ones([4])),
               ((2, 3, 6),), "...")
    for name in "complex polar".split():
        yield Case(name, lambda x, y, n=name: getattr(aten, n)(x, y).abs(), ((3, 4), (3, 1)),
                   "** *.")
    yield Case("view_as_real", lambda x: aten.view_as_real(aten.fft_fft(x)), ((3, 4),), "*.")
    yield Case("view_as_complex", lambda x: aten.view_as_complex(x).abs(), ((3, 4, 2),), "**.")
    for name in "real imag angle conj_physical resolve_neg".split():
        def call(x: torch.Tensor, n: str = name) -> torch.Tensor:
            return getattr(aten, n)(aten.fft_fft(x, None, 0)).abs()

        yield Case(name, call, ((3, 4),), ".*")


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


def pooling_cases() -> Iterator[Case]:
    for name, d in (("grid_sampler", 2), ("grid_sampler_2d", 2), ("grid_sampler_3d", 3)):
        yield Case(name, op(name, 0, 0, False), ((2, 3, *(4,) * d), (2, *(5,) * d, d)),
                   f"**{'.' * d} *{'.' * (d + 1)}")
    def case(name: str, d: int, *args: Any) -> Case:
        return Case(name, op(name, *args), ((2, 3, *(4,) * d),), "**" + "." * d)

    for d in (1, 2, 3):
        two, size = [2] * d, [6] * d
        for name in "avg_pool max_pool adaptive_avg_pool".split():
            yield case(f"{name}{d}d", d, two)
        yield case(f"upsample_nearest{d}d", d, size)
        yield case(f"replication_pad{d}d", d, [1] * 2 * d)
    for d in (1, 2):
        yield case(f"adaptive_max_pool{d}d", d, [2] * d)
        yield case(f"reflection_pad{d}d", d, [1] * 2 * d)
    for d, name in ((1, "linear"), (2, "bilinear"), (2, "bicubic"), (3, "trilinear")):
        yield case(f"upsample_{name}{d}d", d, [6] * d, False)
    yield case("_upsample_nearest_exact2d", 2, [6, 6])
    yield case("_upsample_bilinear2d_aa", 2, [3, 3], False)
    yield case("_adaptive_avg_pool2d", 2, [2, 2])
    for d in (2, 3):
        yield case(f"max_pool{d}d_with_indices", d, [2] * d)
    yield Case("max_pool2d", op("max_pool2d", [2, 2]), ((4, 4, 4),), "*..")


CASES = [case for make_cases in (
    pointwise_cases, along_cases, reduce_cases, contraction_cases, convolution_cases,
    recurrent_cases, attention_cases, shape_cases, cut_cases, norm_cases, transform_cases,
    lookup_cases, pooling_cases,
) for case in make_cases()]

# Rows that no exported program of real numbers asks for.
NEVER = {
    "chunk": "made explicit as split_with_sizes", "_conj": "complex numbers only",
    "lift_fresh": "exported as lift_fresh_copy",
    **dict.fromkeys("cond while_loop scan map_impl associative_scan".split(),
                    "control flow: see test_decompose"),
}


def test_every_row_has_a_case() -> None:
    assert {case.op for case in CASES} == set(TABLE) - set(NEVER)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slicing_commutes(case: Case) -> None:
    packets = {n.op.removeprefix("aten.").rsplit(".", 1)[0] for n in traced(case).graph.nodes}
    assert case.op in packets, "the case does not reach its row"
    assert free_dims(solved(case)) == case.free
    assert any(tried(case, solved(case))) == ("*" in case.free)  # not vacuous
    assert worst(case) <= TOLERANCE


def test_macs_are_those_that_torch_counts() -> None:
    """Of the dense operator and of pruned ones, wherever it runs as products of matrices."""
    counted: set[str] = set()
    for case in [*contraction_cases(), *convolution_cases(), *attention_cases()]:
        solution = solved(case)
        for choices in [{}, *tried(case, solution, 2)]:
            price = cost(solution, "macs")
            price.set({atom: choice.count for atom, choice in choices.items()})
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run_pruned(traced(case), solution, choices)
            if flops := counter.get_total_flops():
                counted.add(case.op)
                assert 2 * price.total == flops, case
    assert counted >= set("addmm baddbmm bmm conv1d conv2d conv3d conv_transpose1d convolution "
                          "conv_transpose2d conv_transpose3d einsum linear matmul mm "
                          "scaled_dot_product_attention".split())


def test_a_kernel_takes_only_multiples() -> None:
    case = next(c for c in CASES if c.op == "transformers.grouped_mm_fallback")
    solution = solved(case)  # rows of whole 16 bytes: two numbers in float64
    assert {step_of(solution, g, 1, 8) for g in solution.groups.values()} == {2}
    linear = solved(next(c for c in CASES if c.op == "linear"))
    assert {step_of(linear, g, 1, 8) for g in linear.groups.values()} == {1}


# --- wrong rows are caught ----------------------------------------------------------------------


def same_order(s: Any, n: Any) -> None:
    s.put(n.outputs[0], s.dims[next(n.refs())])


def flat_inside_out(s: Any, n: Any) -> None:
    a, b, c = s.dims[next(n.refs())]
    s.put(n.outputs[0], [shapes.product((b, a)), c])


def replicas_inside(s: Any, n: Any) -> None:
    (e,), count = s.dims[next(n.refs())], s.space.atom(n.args[1][0])
    s.edit(n, ("args", 1, 0), count)
    s.put(n.outputs[0], [shapes.product((e, count))])


def last_first(s: Any, n: Any) -> None:
    (a, b), (_, c) = (s.dims[ref.name] for ref in n.args[0])
    s.relate(a, s.dims[n.args[0][1].name][0], n)
    s.put(n.outputs[0], [a, shapes.concat((c, b))])


def right_part(s: Any, n: Any) -> None:
    dims = list(s.dims[next(n.refs())])
    left, right = s.space.split(dims[1], 2)
    s.edit(n, ("args", 3), left, when=dims[1])
    s.put(n.outputs[0], [dims[0], right])


def pieces_swapped(s: Any, n: Any) -> None:
    shapes.split(s, n)
    first, last = n.outputs
    s.dims[first], s.dims[last] = s.dims[last], s.dims[first]


def first_slice(s: Any, n: Any) -> None:
    shapes.select(s, replace_args(n, (*n.args[:2], 0)))


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
        s.dims[ref.name] = (shapes.product((hidden, gates)), *s.dims[ref.name][1:])


def pattern(text: str, **sizes: Any) -> Row:
    return p.contract(text, **sizes)


def free_windows(s: Any, n: Any) -> None:
    a, _, b = s.dims[n.args[0].name]
    s.put(n.outputs[0], [a, *map(s.space.atom, s.shape(n.outputs[0])[1:2]), b, s.space.atom(3)])


def case_of(name: str, index: int = 0) -> Case:
    return [case for case in CASES if case.op == name][index]


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
    "as_strided keeps its sizes": (without_edits(shapes.as_strided), Case(
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
    "as_strided keeps its strides": (without_edits(shapes.as_strided), case_of("as_strided", 3)),
    "unfold with free positions": (free_windows, case_of("unfold")),
    "grid_sampler with free positions": (pattern("b c h w, b !* -> b c h w"), Case(
        "grid_sampler", op("grid_sampler", 0, 0, False), ((2, 3, 4, 4), (2, 4, 4, 2)),
        "**.. *...")),
    "pad copies": (lambda s, n: shapes.pad(s, replace_args(n, n.args[:2])), Case(
        "pad", op("pad", [1, 1, 1, 1], "replicate"), ((2, 2, 3, 4),), "**..")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_row_is_caught(fault: str) -> None:
    wrong, case = FAULTS[fault]
    assert worst(case) <= TOLERANCE
    table = type(TABLE)({**TABLE, case.op: wrong})
    try:
        error = worst(case, table)
    except (RuntimeError, IndexError, ValueError):
        return  # the pruned program does not even run
    assert error > 1e-4


def forgetful(row: Row) -> Row:
    """A row that reads nothing and gives its results axes of their own."""
    def wrong(s: Any, n: Any) -> None:
        before = len(s.reads)
        row(s, n)
        del s.reads[before:]
        for out in n.outputs:
            s.dims[out] = tuple(s.space.atom(e.size, *(["frozen"] if is_frozen(e) else []))
                                for e in s.dims.get(out, ()))

    return wrong


FREE = {case.op for case in CASES if "*" in case.free}


@pytest.mark.parametrize("name", sorted(set(TABLE) & FREE))
def test_every_row_matters(name: str) -> None:
    """No row passes its cases if what it relates is forgotten."""
    cases = [case for case in CASES if case.op == name]
    table = type(TABLE)({**TABLE, name: forgetful(TABLE[name])})
    for case in cases:
        if "*" in case.free:
            try:
                if worst(case, table) > 1e-4:
                    return
            except (RuntimeError, IndexError, ValueError):
                return
    raise AssertionError("a row that relates nothing passes")


# --- other shapes -------------------------------------------------------------------------------

SMALL = st.integers(2, 5)


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


@pytest.mark.parametrize("name", sorted(set(TABLE) - set(NEVER)))
def test_slicing_commutes_at_other_shapes(name: str) -> None:
    tried: set[str] = set()

    @settings(max_examples=3 if settings().max_examples <= 50 else 50, database=None)
    @given(st.dictionaries(st.sampled_from([3, 4, 5, 6]), SMALL, min_size=2), SMALL, SMALL, SMALL,
           st.integers(0, 9))
    def commutes(sizes: dict[int, int], a: int, b: int, c: int, seed: int) -> None:
        fixed = [other_sizes(case, sizes) for case in CASES if case.op == name]
        cases = [case for case in sized_cases(a, b, c) if case.op == name] or fixed
        case = cases[seed % len(cases)]
        try:
            module = Module(case)
            found = quick_trace(module, torch.tensor(1.0))
        except (RuntimeError, IndexError, ValueError):
            return  # sizes that the operator does not take
        found.graph.outputs = []
        solution, rng = solve(found.graph, TABLE, rewire=True), np.random.default_rng(seed)
        tried.add(str(case))
        for _ in range(2):
            errors = differences(found, solution, choose(solution, rng, case.least), case.random)
            assert max(errors.values(), default=0.0) <= TOLERANCE

    commutes()
    assert tried - {str(case) for case in CASES} or name == "as_strided"  # strides are sizes


# --- random programs ----------------------------------------------------------------------------


def step(x: torch.Tensor, w: torch.Tensor, kind: str, k: int) -> torch.Tensor:
    """One of the ways in which models regroup, cut and mix dimensions, where it fits."""
    d = k % x.ndim
    size = x.shape[d]
    if kind == "factor" and x.ndim < 5:
        inner = [f for f in (2, 3) if size % f == 0 and size > f]
        return x.unflatten(d, (size // inner[k % len(inner)], inner[k % len(inner)])) \
            if inner else x
    if kind == "flatten" and x.ndim > 1:
        return x.flatten(d % (x.ndim - 1), d % (x.ndim - 1) + 1)
    if kind == "swap":
        return x.transpose(d, k // 3 % x.ndim)
    if kind in ("halves", "rotate", "gate") and size % 2 == 0:
        a, b = x.chunk(2, d)
        return {"halves": a + 2 * b, "rotate": torch.cat([-b, a], d), "gate": a * b.sin()}[kind]
    if kind == "cat" and x.numel() < 300:
        return torch.cat([x, x.cos()], d)
    if kind == "slice" and size > 2:
        return x.narrow(d, k % 2, size - 1)
    if kind == "grow" and x.numel() < 300 and x.ndim < 5:
        sizes = [-1] * (x.ndim + 1)
        sizes[d + 1] = 2
        return x.unsqueeze(d + 1).expand(sizes).flatten(d, d + 1)
    if kind == "sum" and x.ndim > 1:
        return x.sum(d)
    if kind == "mix" and x.shape[-1] <= 12:
        return torch.nn.functional.linear(x, w[:, : x.shape[-1]])
    return x


KINDS = "factor flatten swap halves rotate gate cat slice grow sum mix".split()
PROGRAMS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 11)), min_size=2, max_size=8)


@settings(max_examples=max(60, settings().max_examples))
@given(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=3), PROGRAMS,
       st.integers(0, 9))
def test_slicing_commutes_with_programs(shape: list[int], steps: list[tuple[str, int]],
                                        seed: int) -> None:
    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for kind, k in steps:
            x = step(x, w, kind, k)
        return x.exp()

    case = Case("program", call, (tuple(shape), (6, 12)), "")
    found = trace(Module(case), (torch.tensor(1.0),))
    found.graph.outputs = []
    solution, rng = solve(found.graph, TABLE, rewire=True), np.random.default_rng(seed)
    for _ in range(4):
        errors = differences(found, solution, choose(solution, rng))
        assert max(errors.values()) <= TOLERANCE
