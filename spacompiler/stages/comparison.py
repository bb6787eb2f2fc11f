"""Compare what a network returned with what it should have returned: one rule for every check.

Results are nested: tensors, arrays and numbers inside tuples, mappings, whatever torch's pytree
knows, dataclasses and plain objects. All of them are opened. What cannot be compared (another
structure, shape, kind or pattern of NaN, or nothing at all) is infinitely far apart, never equal.

>>> compare({"y": torch.tensor([1.0, 2.0])}, {"y": torch.tensor([1.0, 4.0])}).relative
0.5
>>> compare((), ()).why
'there is nothing to compare'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

DEPTH = 100
"""Results that are nested deeper than this are not opened further: they hold themselves."""
AT_A_TIME = 1 << 20
"""Values that are compared at a time."""
_NO_RESULTS = (str, bytes, type, nn.Module, torch.dtype, torch.device, torch.Generator)


class Comparison(NamedTuple):
    """How far results are from those wanted: the largest difference, as it is and `relative`.

    Relative to the largest finite value of the same tensor, if that is not zero; of whole numbers
    and truth values it is the share that differs. Both are inf where results cannot be compared,
    with the reason in `why`.
    """

    absolute: float
    relative: float
    why: str = ""

    def within(self, tolerance: float) -> bool:
        """True if results agree to a relative error; what is no number never does."""
        return not self.why and self.relative <= tolerance


def compare(got: object, want: object) -> Comparison:
    """Return how far nested results are from those wanted; nothing to compare is a failure.

    Tensors without elements agree with tensors of their shape; values that are not finite agree
    with equal ones, but something finite (or whole, or empty) must be there.
    """
    pairs, why = _paired(leaves(got), leaves(want))
    if why:
        return Comparison(np.inf, np.inf, why)
    worst = Comparison(0.0, 0.0)
    compared = False
    for where, a, b in pairs:
        found, counted = _gap(a, b)
        if found.why:
            return found._replace(why=f"{where}: {found.why}")
        compared |= counted
        worst = Comparison(max(worst.absolute, found.absolute),
                           max(worst.relative, found.relative))
    if compared:
        return worst
    return _apart("no value is finite" if pairs else "there is nothing to compare")


def tensors(result: object) -> list[torch.Tensor]:
    """Return all tensors and fractions (as tensors) of a nested result, in pytree's order.

    Python's whole numbers are left out: sizes, which programs hold as constants.
    """
    return [value for _, value in _opened(result, "", (), whole=False)]


def leaves(result: object) -> list[tuple[str, torch.Tensor]]:
    """Return (path, tensor) of everything in a nested result that can be compared."""
    return list(_opened(result, "", (), whole=True))


def _opened(value: object, path: str, above: tuple[int, ...],
            whole: bool) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, _dense(value)
    elif isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "fiubc":
            yield path, torch.from_numpy(np.array(value))
    elif isinstance(value, float | complex):
        yield path, torch.tensor(value, dtype=torch.promote_types(
            torch.tensor(value).dtype, torch.float64))
    elif isinstance(value, int):
        if whole and abs(value) < 2**63:
            yield path, torch.tensor(value)
    elif value is not None and not isinstance(value, _NO_RESULTS) and \
            id(value) not in above and len(above) < DEPTH:
        for name, part in _parts(value):
            yield from _opened(part, f"{path}{name}", (*above, id(value)), whole)


def _parts(value: object) -> Iterator[tuple[str, Any]]:
    """What a container or an object holds, with the text that leads there."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
        return
    parts = value if isinstance(value, Sequence) else \
        pytree.tree_flatten(value, is_leaf=lambda x: x is not value)[0]
    if len(parts) != 1 or parts[0] is not value:
        yield from ((f"[{i}]", part) for i, part in enumerate(parts))
    elif not callable(value):
        yield from ((f".{name}", part) for name, part in _fields(value).items())


def _fields(value: object) -> dict[str, Any]:
    """The fields of a dataclass or of any other object, those in slots included."""
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [
        name for kind in type(value).__mro__ for slots in [kind.__dict__.get("__slots__", ())]
        for name in ([slots] if isinstance(slots, str) else slots)]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def _dense(value: torch.Tensor) -> torch.Tensor:
    """A tensor as plain numbers, real ones: of whatever storage it was."""
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    elif value.layout is not torch.strided:
        value = value.to_dense()
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _paired(got: list[tuple[str, torch.Tensor]], want: list[tuple[str, torch.Tensor]]
            ) -> tuple[list[tuple[str, torch.Tensor, torch.Tensor]], str]:
    """Match results by their paths; the second is what stands against it, "" if nothing does."""
    have, wanted = dict(got), dict(want)
    odd = [*(f"{path or 'the result'} is missing" for path in wanted if path not in have),
           *(f"{path or 'the result'} is not expected" for path in have if path not in wanted)]
    if odd:
        return [], odd[0] + (f", and {len(odd) - 1} more differ" if len(odd) > 1 else "")
    return [(path or "the result", have[path], value) for path, value in want], ""


def _gap(got: torch.Tensor, want: torch.Tensor) -> tuple[Comparison, bool]:
    """How far one tensor is from another, and whether a value of it was compared."""
    if got.shape != want.shape:
        return _apart(f"shape {tuple(got.shape)} for {tuple(want.shape)}"), True
    if _kind(got) != _kind(want):
        return _apart(f"type {got.dtype} for {want.dtype}"), True
    if not want.numel():
        return Comparison(0.0, 0.0), True
    if not want.is_floating_point():
        got, want = got.double(), want.double()
        return Comparison((got - want).abs().max().item(),
                          (got != want).double().mean().item()), True
    return _fractions(got.reshape(-1), want.reshape(-1))


def _fractions(got: torch.Tensor, want: torch.Tensor) -> tuple[Comparison, bool]:
    """The gap of two flat tensors in float64, a part at a time: results may be large."""
    gap, scale, counted = 0.0, 0.0, False
    for a, b in zip(got.split(AT_A_TIME), want.split(AT_A_TIME), strict=True):
        a, b = a.double(), b.double()
        finite = torch.isfinite(b)
        if not finite.all():
            if not _alike(a[~finite], b[~finite]):
                return _apart("other values are not finite"), True
            a, b = a[finite], b[finite]
        if not torch.isfinite(a).all():
            return _apart("other values are not finite"), True
        if b.numel():
            gap, scale = max(gap, (a - b).abs().max().item()), max(scale, b.abs().max().item())
            counted = True
    return Comparison(gap, gap / scale if scale else gap), counted


def _apart(why: str) -> Comparison:
    return Comparison(np.inf, np.inf, why)


def _kind(value: torch.Tensor) -> str:
    return "float" if value.is_floating_point() else \
        "bool" if value.dtype is torch.bool else "integer"


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal values, of which NaN is one."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
