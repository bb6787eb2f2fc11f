"""Where a network is computed, and in which type of numbers: the processor, or a device beside it.

Arrays stay where they are read from, in the processor's memory: a program that runs fetches each
where a node reads it, and what its results are summed up to comes back. So whatever decides, slices
and writes need not know of devices.

>>> Where().local, Where(torch.device("cuda")).local
(True, False)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import SpaError, UsageError

CPU = torch.device("cpu")
FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32))
"""Types that take part in a change of type: what is float64 was meant to be."""


@dataclass(frozen=True)
class Where:
    """A device, and the type that is computed in (None: the arrays' own)."""

    device: torch.device = CPU
    dtype: torch.dtype | None = None

    @property
    def local(self) -> bool:
        """Whether it is the processor itself."""
        return self.device.type == "cpu"

    def of(self, value: object) -> Any:
        """Return tensors, alone or nested in arguments, on the device; other things as they are."""
        return value if self.local else pytree.tree_map(self._moved, value)

    def _moved(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value if value.device == self.device else value.to(self.device)
        return self.device if isinstance(value, torch.device) else value

    @contextmanager
    def seeded(self, seed: int | None = None) -> Iterator[None]:
        """Give back the states of random generators, here and on the device; seed them first."""
        own = self.local or self.device.type == "mps"  # the state of mps cannot be asked for so
        there = [] if own else [self.device.index or 0]
        with torch.random.fork_rng(there, **({"device_type": self.device.type} if there else {})):
            if seed is not None:
                torch.manual_seed(seed)
            yield


HERE, DOUBLE = Where(), Where(dtype=torch.float64)


def find(device: str, dtype: str) -> Where:
    """Return what options name: "auto" is the first accelerator, or the processor.

    Raises UsageError for a device that is not there, saying what is, or that lacks a type.
    """
    there = ["cpu"] if device == "cpu" else devices()
    asked = next((d for d in there if d != "cpu"), "cpu") if device == "auto" else device
    if asked not in there and f"{asked}:0" not in there:
        raise UsageError(f"there is no device {device!r} here",
                         why=f"torch {torch.__version__} finds {', '.join(there)}",
                         fix="give one of these, or --device auto for the first there is")
    made = Where(torch.device(asked if asked in there else f"{asked}:0"),
                 None if dtype == "auto" else getattr(torch, dtype))
    if made.dtype == torch.float64 and not has_double(made.device):
        raise UsageError(f"device {device!r} has no float64", fix="give --dtype float32")
    return made


def devices() -> list[str]:
    """Return the devices that torch finds here, the processor last."""
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.accelerator.is_available():
        return ["cpu"]
    return [*(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())), "cpu"]


@cache
def has_double(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def able(x: torch.Tensor) -> torch.Tensor:
    """Return a value where float64 is computed: where it is, else in the processor's memory."""
    return x if has_double(x.device) else x.cpu()


def exact(x: torch.Tensor) -> torch.Tensor:
    """Return a value in float64, where that is computed."""
    return able(x).double()


@contextmanager
def enough_memory(where: Where) -> Iterator[None]:
    """Say plainly where the memory of a device is not enough.

    Raises SpaError for it.
    """
    try:
        yield
    except RuntimeError as problem:
        if not runs_out(problem):
            raise
        raise SpaError(f"{where.device} has too little memory for this",
                       why=str(problem).splitlines()[0],
                       fix="give smaller batches (--batch, --recover-batch, --length), --dtype "
                           "bfloat16, or --device cpu") from problem


def runs_out(problem: BaseException) -> bool:
    """Whether an error says that memory was not enough."""
    return isinstance(problem, torch.OutOfMemoryError) or bool(
        re.search("out of memory|can't allocate memory", str(problem)))
