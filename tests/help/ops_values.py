"""Cases of operators on values: element by element, along one dimension, reductions,
transforms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ops_case import Bools, Case, Ints, aten, op

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
