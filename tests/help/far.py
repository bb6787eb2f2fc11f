"""A device beside the processor that every machine has: `far`, on the backend kept for private use.

Its arrays are the processor's behind a wrapper, so that it computes the same to the bit; an
operator that is given arrays of both devices is an error, as it is on a real one. `be_there`
changes the process for good: a test calls it in one of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

MOVES = {"aten::_to_copy", "aten::copy_"}
LIMITS = {"double": True, "bytes": 1 << 40}
"""What the device cannot do: no float64, as mps; or no array of more bytes."""


class Far(torch.Tensor):
    """An array on the device; `raw` is the processor's."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Far:
        """Wrap an array."""
        if raw.dtype == torch.float64 and not LIMITS["double"]:
            raise TypeError("far has no float64")
        if raw.nbytes > LIMITS["bytes"]:
            raise torch.OutOfMemoryError("far out of memory. Tried to allocate too much")
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device="far:0")
        made.raw = raw
        return made

    @property
    def data(self) -> Far:  # type: ignore[override]
        """The array without a gradient, of the same memory."""
        return Far(self.raw)

    @data.setter
    def data(self, value: Far) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = value.raw

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operator on what is behind the wrappers."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far = [x for x in given if isinstance(x, Far)]
    if len(far) < len(given) and name not in MOVES and any(
            x.ndim for x in given if not isinstance(x, Far)):
        raise RuntimeError(f"{name}: arrays on two devices")
    raws = {id(x.raw): x for x in far}
    out = func(*pytree.tree_map(_raw, args), **pytree.tree_map(_raw, kwargs))
    if name == "aten::copy_":
        return args[0]
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return out
    return pytree.tree_map(lambda x: raws[id(x)] if id(x) in raws else
                           Far(x) if isinstance(x, torch.Tensor) else x, out)


def _raw(x: object) -> object:
    return x.raw if isinstance(x, Far) else \
        torch.device("cpu") if isinstance(x, torch.device) else x


def _empty(size: Any, *, dtype: Any = None, **more: Any) -> Far:
    return Far(torch.empty(size, dtype=dtype))


def _strided(size: Any, stride: Any, *, dtype: Any = None, **more: Any) -> Far:
    return Far(torch.empty_strided(size, stride, dtype=dtype))


class _Module:
    """What `torch.far` is: how many there are, and their random state (they draw as here)."""

    @staticmethod
    def is_available() -> bool:
        """Whether there is one."""
        return True

    @staticmethod
    def device_count() -> int:
        """How many there are."""
        return 1

    @staticmethod
    def is_initialized() -> bool:
        """Whether it was used."""
        return True

    @staticmethod
    def current_device() -> int:
        """The only one."""
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Nothing: it draws the processor's numbers."""

    @staticmethod
    def get_rng_state(device: Any = 0) -> torch.Tensor:
        """Nothing of its own."""
        return torch.zeros(1, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = 0) -> None:
        """Nothing of its own."""


_LIBRARY = torch.library.Library("aten", "IMPL")


def be_there() -> None:
    """Make the device known to torch, for the rest of this process."""
    _setup_privateuseone_for_python_backend("far", _Module())
    _LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
    _LIBRARY.impl("empty_strided", _strided, "PrivateUse1")
