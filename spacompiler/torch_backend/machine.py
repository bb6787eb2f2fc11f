"""What this processor wants."""

from __future__ import annotations

from collections.abc import Iterable

import torch

SHORT = frozenset((torch.bfloat16, torch.float16))
"""Types of weights that many processors have no arithmetic of."""


def lanes() -> int:
    """Return the channel block of this CPU's convolutions: 16 with AVX-512, else 8."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def computing(arrays: Iterable[object]) -> torch.dtype | None:
    """Return float32 where arrays are of types that this CPU only emulates, else None.

    What is emulated takes several times as long as float32, and is less exact.
    """
    short = {a.dtype for a in arrays if isinstance(a, torch.Tensor) and a.device.type == "cpu"}
    return torch.float32 if any(map(_emulated, short & SHORT)) else None


def _emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products of a type, as far as torch knows."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") \
        if dtype is torch.bfloat16 else ("_is_amx_fp16_supported",)
    return not any(getattr(torch.cpu, name, bool)() for name in names)
