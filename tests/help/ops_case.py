"""A case of test_ops: one operator on operands of its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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


def op(name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The operator itself, with arguments after its tensors."""
    packet = getattr(aten, name)
    return lambda *tensors: packet(*tensors, *args, **kwargs)
