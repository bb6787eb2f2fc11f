"""Blocks that look alike and do not do the same are all run: the program gives what they do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spacompiler.torch_backend.backend import TORCH
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.run.runner import Runner


class Block(nn.Module):
    """A residual block, which multiplies by what its config says."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)
        self.config = config or SimpleNamespace(scale=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x))) * self.config.scale + x


CALLS: list[int] = []


class CountingOutside(Block):
    """Multiplies by how often a block has run, which nothing that it holds says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(0)
        return super().forward(x) * len(CALLS)


class Stack(nn.Module):
    def __init__(self, kind: type[Block] = Block, config: Any = None) -> None:
        super().__init__()
        shared = config or SimpleNamespace(scale=1.0, taps=[])
        self.config, self.first = shared, nn.Linear(6, 6)
        self.blocks = nn.ModuleList([kind(shared) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Tapped(Block):
    """Appends what it gives to a list of all blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.config.taps.append(super().forward(x))
        return self.config.taps[-1]  # type: ignore[no-any-return]


class Tapping(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.config.taps.clear()
        super().forward(x)
        return sum(self.config.taps, torch.zeros(()))


class Starting(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.clear()
        return super().forward(x)


class NumberedByVars(Block):
    """Reads its number where nothing watches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * vars(self).get("number", 7)


def numbered() -> Stack:
    stack = Stack(NumberedByVars)
    for i, block in enumerate(stack.blocks):
        block.number = i  # type: ignore[assignment]
    return stack


class Telling(Stack):
    """Says in the config, before each block, what to multiply by."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            self.config.scale = 1.0 + i
            x = block(x)
        return x


class Times(Block):
    def forward(self, x: torch.Tensor,  # type: ignore[override]
                weight: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ weight


class Lending(Stack):
    """Gives all blocks an array of the first one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, self.blocks[0].up.weight)  # type: ignore[union-attr,index]
        return x


def tied() -> Stack:
    stack = Stack()
    stack.blocks[0].down.weight = stack.blocks[0].up.weight  # type: ignore[union-attr]
    return stack


def one_part_twice() -> Stack:
    stack = Stack()
    stack.blocks[0].down = stack.blocks[0].up
    return stack


def another_forward() -> Stack:
    stack = Stack()
    stack.blocks[1].act.forward = torch.relu  # type: ignore[union-attr,assignment]
    return stack


def hooked() -> Stack:
    stack = Stack()
    stack.blocks[2].act.register_forward_hook(  # type: ignore[union-attr]
        lambda part, args, result: 2 * result)
    return stack


@pytest.mark.parametrize("quick", [False, True], ids=["exported", "recorded"])
@pytest.mark.parametrize("make", [
    tied, one_part_twice, another_forward, hooked, lambda: Tapping(Tapped), Telling,
    lambda: Lending(Times)], ids=["tied in one", "one part twice", "another forward",
                                  "a hook", "a list of all", "told by a config", "an array given"])
def test_the_program_gives_what_the_blocks_do(make: Any, quick: bool) -> None:
    torch.manual_seed(0)
    stack, x = make().eval(), torch.randn(3, 6)
    with torch.no_grad():
        want = stack(x)
        got = Runner(trace(stack, (x,), quick=quick).program).call((x,), {})[-1]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("quick", [False, True], ids=["exported", "recorded"])
@pytest.mark.parametrize("make", [lambda: Starting(CountingOutside), numbered],
                         ids=["counted outside", "numbers by vars"])
def test_what_nothing_shows_is_seen_by_the_check_and_all_blocks_run(make: Any,
                                                                    quick: bool) -> None:
    torch.manual_seed(0)
    stack, x = make().eval(), torch.randn(3, 6)
    program = TORCH.trace(stack, (x,), quick, True)[0].program
    with torch.no_grad():
        assert torch.allclose(Runner(program).call((x,), {})[-1], stack(x), atol=1e-5)
