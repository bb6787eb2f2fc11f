"""Whether a checkpoint holds a network's arrays: all of them, no others, each of its shape.

transformers initialises what is missing at random and says so in its log; what it found is one
report here, and every entry of it must be explained: re-created by the class (tied weights,
constants), ignored by the class's own rules, or named by the user as of no use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import WeightsError
from .mapped import let_go
from .weight_files import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LISTED = 12
FIXES = {
    (True, True): "arrays may be named otherwise than the class names them: rename them, or give "
                  "the class that they are of in config.json (architectures)",
    (True, False): "copy the whole checkpoint, or give the class that it is of in config.json "
                   "(architectures)",
    (False, True): "the configuration may say too little; arrays of no use to it (a head of "
                   "another task) can be named: --unused 'PATTERN'",
    (False, False): "the configuration belongs to other weights",
}
"""What to do, by (arrays are missing, arrays are left over)."""


@dataclass(frozen=True)
class Report:
    """What was found where a network's arrays were loaded.

    `missing`, `unexpected` and `misshaped` are errors; `recreated` were made by the class itself,
    `ignored` are stored and read by none by the class's own rules, `unused` by the user's word.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    recreated: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def whole(self) -> bool:
        """True if every array is where it should be."""
        return not (self.missing or self.unexpected or self.misshaped or self.problems)

    def check(self, what: str, where: str, fix: str = "") -> None:
        """Raise WeightsError, with the arrays' names, unless all is explained."""
        if self.whole:
            return
        rows = (("missing:", self.missing), ("the network has no array", self.unexpected),
                ("of another shape:", self.misshaped), ("", self.problems))
        why = "; ".join(f"{label} {listed(names)}".strip() for label, names in rows if names)
        raise WeightsError(what, where=where, why=why,
                       fix=fix or FIXES[bool(self.missing), bool(self.unexpected)])

    def as_dict(self) -> dict[str, Any]:
        """Return the explained entries: what a report of a compile shows."""
        return {key: list(value) for key in ("recreated", "ignored", "unused")
                if (value := getattr(self, key))}


def listed(names: Sequence[str]) -> str:
    """Return names with commas between, the first of many.

    >>> listed(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def of_transformers(module: PreTrainedModel, info: Mapping[str, Any], stored: Mapping[str, Stored],
                    unused: Iterable[str] = ()) -> Report:
    """Return the report of a `from_pretrained(..., output_loading_info=True)`.

    Its entries are already without what the class ignores. Missing integer and boolean buffers are
    the class's constants; left-over single numbers and integers are those of an older class.
    """
    buffers = dict(module.named_buffers())
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    recreated = [n for n in missing if n in buffers and not buffers[n].is_floating_point()]
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    constants = [n for n in left if n in stored and not stored[n].weighs]
    named = [n for n in left if any(fnmatchcase(n, pattern) for pattern in unused)]
    return Report(
        missing=_without(missing, recreated),
        unexpected=_without(left, [*constants, *named]),
        misshaped=tuple(f"{name} {list(have)} for {list(want)}"
                        for name, have, want in sorted(info["mismatched_keys"])),
        recreated=tuple(sorted({*recreated, *(n for n in tied if n not in stored)})),
        ignored=tuple(sorted({*constants, *_ignored(module, stored)} - set(named))),
        unused=tuple(named), problems=tuple(info["error_msgs"]))


def _without(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    return tuple(n for n in names if n not in set(others))


def _ignored(module: nn.Module, stored: Iterable[str]) -> list[str]:
    """Stored arrays that the class itself says it does not read."""
    rules = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    have = module.state_dict().keys()
    return [n for n in stored if n not in have and any(re.search(rule, n) for rule in rules)]


def untied(module: PreTrainedModel) -> dict[str, str]:
    """Return {array: the one that the configuration ties it to}, where these are two arrays.

    Empty where only some of what the configuration ties lies apart: no entry says that.
    """
    ask = getattr(module, "get_expanded_tied_weights_keys", None)
    pairs: dict[str, str] = ask(all_submodels=True) if ask is not None else {}
    try:
        apart = all(_place(module, one) != _place(module, other) for one, other in pairs.items())
    except (AttributeError, RuntimeError):  # a name of no array, an array without data
        return {}
    return pairs if apart else {}


def _place(module: PreTrainedModel, name: str) -> tuple[int, tuple[int, ...]]:
    array = module.get_parameter_or_buffer(name)
    return array.data_ptr(), tuple(array.shape)


def of_arrays(network: Mapping[str, tuple[int, ...] | None],
              arrays: Mapping[str, torch.Tensor]) -> Report:
    """Return the report of arrays against a network's names and shapes (None: any shape)."""
    return Report(
        missing=tuple(sorted(network.keys() - arrays.keys())),
        unexpected=tuple(sorted(arrays.keys() - network.keys())),
        misshaped=tuple(f"{name} {list(arrays[name].shape)} for {list(shape)}"
                        for name, shape in sorted(network.items())
                        if shape is not None and name in arrays
                        and tuple(arrays[name].shape) != tuple(shape)))


def unsound(module: nn.Module) -> str:
    """Return the name of the first array with NaN or infinity, or "".

    Buffers may hold nothing but zeros and infinities (a mask).
    """
    for name, tensor in module.named_parameters():
        if tensor.is_floating_point() and not is_finite(tensor):
            return name
        let_go([tensor])
    return next((name for name, tensor in module.named_buffers() if not _mask_or_finite(tensor)),
                "")


def is_finite(tensor: torch.Tensor) -> bool:
    """True if no number of an array is NaN or infinite; nothing of its size is allocated."""
    values = tensor.detach()
    if not values.is_floating_point() or values.itemsize < 2 or not values.numel() \
            or values.layout is not torch.strided:
        return bool(torch.isfinite(values).all())
    return all(isfinite(end) for end in torch.stack(torch.aminmax(values)).tolist())


def _mask_or_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or is_finite(tensor):
        return True
    finite = torch.isfinite(tensor)
    return not bool(torch.isnan(tensor).any()) and not bool(tensor[finite].any())
