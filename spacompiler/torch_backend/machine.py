"""What this processor wants."""

from __future__ import annotations

import torch


def lanes() -> int:
    """Return the channel block of this CPU's convolutions: 16 with AVX-512, else 8."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
