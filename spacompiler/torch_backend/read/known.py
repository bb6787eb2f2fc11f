"""What operators give on the meta device, asked once for operands of one kind.

torch works out sizes and types in Python for most operators, at about a millisecond each. Repeated
blocks ask the same again and again, and of the commonest operators the answer is a line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
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
        result = at_once(args, kwargs) if at_once else None
        if result is None:
            result = _asked(func, args, kwargs)
        if asked is not None and _is_apart(result, args, kwargs):
            self._made[asked] = result.shape, result.stride(), result.dtype
        return result


def _asked(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let torch say it: in C++ where it can, which is much quicker for views."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        with enable_python_dispatcher():
            return func(*args, **kwargs)


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


def _plain(values: Sequence[object]) -> torch.dtype | None:
    """The one type of contiguous operands with floats in them, if they are that."""
    found = [x for x in values if isinstance(x, torch.Tensor)]
    rest = all(isinstance(x, (torch.Tensor, int, float, type(None))) for x in values)
    types = {x.dtype for x in found}
    simple = all(x.ndim and x.dtype.is_floating_point and x.is_contiguous() for x in found)
    return types.pop() if rest and simple and len(types) == 1 else None


def _pointwise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    dtype = None if kwargs else _plain(args)
    if dtype is None:
        return None
    shapes = [x.shape for x in args if isinstance(x, torch.Tensor)]
    return torch.empty(torch.broadcast_shapes(*shapes), dtype=dtype, device=_META)


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
        _ATEN.mul.Tensor, _ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.div.Tensor,
        _ATEN.silu.default, _ATEN.relu.default, _ATEN.gelu.default, _ATEN.sigmoid.default,
        _ATEN.tanh.default, _ATEN.neg.default, _ATEN.cos.default, _ATEN.sin.default,
        _ATEN.rsqrt.default, _ATEN.hardswish.default, _ATEN.hardsigmoid.default,
        _ATEN.pow.Tensor_Scalar), _pointwise),
    _ATEN.linear.default: _linear, _ATEN.conv2d.default: _conv2d,
}
