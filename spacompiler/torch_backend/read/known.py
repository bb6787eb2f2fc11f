"""What operators give on the meta device, asked once for operands of one kind.

torch works out sizes and types in Python for most operators, at about a millisecond each. Repeated
blocks ask the same again and again, and of the commonest operators the answer is a line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

_ATEN = torch.ops.aten
_META = torch.device("meta")
Made = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Known:
    """Calls operators on tensors without data; what was answered once is not asked again."""

    def __init__(self) -> None:
        self._made: dict[Any, Made] = {}

    def __call__(self, func: torch._ops.OpOverload, args: tuple[Any, ...],
                 kwargs: dict[str, Any], key: Sequence[object]) -> Any:
        """Return what an operator gives; `key` says operator, operands by kind, and the rest."""
        asked = tuple(key) if _is_fresh(func) else None
        try:
            found = self._made.get(asked) if asked else None
        except TypeError:  # an argument that cannot be compared
            asked = found = None
        if found is not None:
            shape, stride, dtype = found
            return torch.empty_strided(shape, stride, dtype=dtype, device=_META)
        at_once = _AT_ONCE.get(func)
        said = at_once(args, kwargs) if at_once else None
        result = _asked(func, args, kwargs) if said is None else said
        if asked is not None and (said is not None or _is_apart(result, args, kwargs)):
            self._made[asked] = result.shape, result.stride(), result.dtype
        return result


def _asked(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let torch say it: in C++ where it can, which is much quicker for views."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        with enable_python_dispatcher():
            return func(*args, **kwargs)


def like(x: torch.Tensor) -> torch.Tensor:
    """Return another tensor of the kind of one, as operators give it that lay it out alike."""
    return torch.empty(x.shape, dtype=x.dtype, device=_META) if x.is_contiguous() and x.is_meta \
        else torch.empty_like(x)


@cache
def _is_fresh(func: torch._ops.OpOverload) -> bool:
    """Whether an operator gives one tensor that is no view and writes into none."""
    schema = func._schema
    return len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor" and all(
        a.alias_info is None for a in (*schema.arguments, *schema.returns))


@cache
def takes_device(func: torch._ops.OpOverload) -> bool:
    """Whether an operator may be told where its result is to lie."""
    return any(a.name == "device" for a in func._schema.arguments)


@cache
def is_mutable(func: torch._ops.OpOverload) -> bool:
    """Whether an operator writes into an operand."""
    return bool(func._schema.is_mutable)


def _is_apart(result: object, *given: object) -> bool:
    """Whether a result is a tensor that shares nothing with an operand."""
    return isinstance(result, torch.Tensor) and result.device == _META and not any(
        isinstance(x, torch.Tensor) and x.device == _META
        and x.untyped_storage()._cdata == result.untyped_storage()._cdata
        for x in pytree.tree_leaves(given))


# --- answers of one line ------------------------------------------------------------------------


def _plain(values: Sequence[object], *, whole: bool = False) -> torch.dtype | None:
    """The one type of contiguous operands, if they are that: floats, or, with `whole`, integers
    beside which no number is a float."""
    found = [x for x in values if isinstance(x, torch.Tensor)]
    types = {x.dtype for x in found}
    if len(types) != 1 or not all(x.ndim and x.is_contiguous() for x in found):
        return None
    (dtype,) = types
    floats = dtype.is_floating_point
    numbers = (int, float) if floats else int
    rest = all(x is None or isinstance(x, (torch.Tensor, numbers)) for x in values)
    return dtype if rest and (floats or (whole and not dtype.is_complex)) else None


def _pointwise(args: tuple[Any, ...], kwargs: dict[str, Any], *,
               whole: bool = False, gives: torch.dtype | None = None) -> torch.Tensor | None:
    dtype = None if kwargs else _plain(args, whole=whole)
    if dtype is None:
        return None
    shapes = {x.shape for x in args if isinstance(x, torch.Tensor)}
    shape = shapes.pop() if len(shapes) == 1 else _broadcast(shapes)
    return torch.empty(shape, dtype=gives or dtype, device=_META)


def _broadcast(shapes: Collection[torch.Size]) -> list[int]:
    """Return the shape that several have in common; raises RuntimeError if there is none."""
    rank = max(map(len, shapes))
    found = [1] * rank
    for shape in shapes:
        for at, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                if found[at] not in (1, size):
                    raise RuntimeError(f"sizes {found[at]} and {size} at dimension {at} of {rank}")
                found[at] = size
    return found


def _arithmetic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """As of floats, so of integers; those of truth values are of other types."""
    values = (x for x in args if isinstance(x, (bool, torch.Tensor)))
    if any(x is True or x is False or x.dtype == torch.bool for x in values):
        return None
    return _pointwise(args, kwargs, whole=True)


def _added(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What is added to in place, by as much of the same type."""
    x, other = args
    same = not kwargs and isinstance(other, torch.Tensor) and _plain(args, whole=True) is not None
    return x if same and x.shape == other.shape else None


def _compared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    return _pointwise(args, kwargs, whole=True, gives=torch.bool)


def _mean(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    x, dims, keep = (*args, None, False)[:3]
    if kwargs or _plain((x,)) is None or not isinstance(dims, (list, tuple)) or not dims:
        return None
    over = {d % x.ndim for d in dims}
    sizes = [1 if d in over else n for d, n in enumerate(x.shape) if keep or d not in over]
    return torch.empty(sizes, dtype=x.dtype, device=_META)


def _cat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    parts, dim = (*args, 0)[:2]
    dtype = None if kwargs else _plain(parts, whole=True)
    shapes = [list(x.shape) for x in parts]
    if dtype is None or len({len(shape) for shape in shapes}) != 1:
        return None
    lengths = [shape.pop(dim) for shape in shapes]
    if any(shape != shapes[0] for shape in shapes):
        return None
    sizes = list(parts[0].shape)
    sizes[dim] = sum(lengths)
    return torch.empty(sizes, dtype=dtype, device=_META)


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Of as many heads in keys and values as in queries: one result for each query."""
    q, k, v = args[:3]
    dtype = next(iter({x.dtype for x in (q, k, v)}))
    if len({x.dtype for x in (q, k, v)}) != 1 or not dtype.is_floating_point or q.ndim != 4 \
            or not q.shape[:2] == k.shape[:2] == v.shape[:2] or q.shape[3] != k.shape[3] \
            or k.shape[2] != v.shape[2]:
        return None
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=dtype, device=_META)


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    dtype = None if kwargs else _plain(args)
    x, w = args[:2]
    if dtype is None or w.ndim != 2 or x.shape[-1] != w.shape[1]:
        return None
    return torch.empty((*x.shape[:-1], w.shape[0]), dtype=dtype, device=_META)


def _conv2d(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    x, w, *rest = args
    defaults: list[Any] = [None, [1, 1], [0, 0], [1, 1], 1]
    bias, stride, padding, dilation, groups = [*rest, *defaults[len(rest):]]
    dtype = None if kwargs or isinstance(padding, str) else _plain((x, w, bias))
    if dtype is None or x.ndim != 4 or x.shape[1] != w.shape[1] * groups:
        return None
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(
        x.shape[2:], w.shape[2:], *(list(a) * (2 // len(a)) for a in (stride, padding, dilation)),
        strict=True)]
    if prod(sizes) <= 0 or min(sizes) <= 0:
        return None
    return torch.empty((x.shape[0], w.shape[0], *sizes), dtype=dtype, device=_META)


_AT_ONCE: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor | None]] = {
    **dict.fromkeys((
        _ATEN.div.Tensor, _ATEN.silu.default, _ATEN.relu.default, _ATEN.gelu.default,
        _ATEN.sigmoid.default, _ATEN.tanh.default, _ATEN.neg.default, _ATEN.cos.default,
        _ATEN.sin.default, _ATEN.rsqrt.default, _ATEN.hardswish.default,
        _ATEN.hardsigmoid.default, _ATEN.pow.Tensor_Scalar), _pointwise),
    **dict.fromkeys((_ATEN.mul.Tensor, _ATEN.add.Tensor, _ATEN.sub.Tensor), _arithmetic),
    **dict.fromkeys((_ATEN.eq.Tensor, _ATEN.ne.Tensor, _ATEN.le.Tensor, _ATEN.lt.Tensor,
                     _ATEN.ge.Tensor, _ATEN.gt.Tensor, _ATEN.eq.Scalar, _ATEN.ne.Scalar,
                     _ATEN.le.Scalar, _ATEN.lt.Scalar, _ATEN.ge.Scalar, _ATEN.gt.Scalar),
                    _compared),
    **dict.fromkeys((_ATEN.bitwise_and.Tensor, _ATEN.bitwise_or.Tensor, _ATEN.__and__.Tensor,
                     _ATEN.__or__.Tensor), partial(_pointwise, whole=True)),
    **dict.fromkeys((_ATEN.add_.Tensor, _ATEN.mul_.Tensor, _ATEN.sub_.Tensor), _added),
    _ATEN.linear.default: _linear, _ATEN.conv2d.default: _conv2d, _ATEN.mean.dim: _mean,
    _ATEN.cat.default: _cat, _ATEN.scaled_dot_product_attention.default: _attention,
}
