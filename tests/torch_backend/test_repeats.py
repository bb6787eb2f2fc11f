"""Blocks that repeat are run once while a program is recorded; the program is the same."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import fx, nn

from spacompiler.torch_backend.read import export
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.read.record import record

CALLS: list[int] = []


class Block(nn.Module):
    """A residual block of two layers, which notes that it ran; `index` is not read."""

    def __init__(self, index: int, scale: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.index, self.scale = index, scale
        self.up, self.act, self.down = nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        CALLS.append(id(self))
        return self.down(self.act(self.up(x * self.scale[0]))) + x + self.shift


class Indexed(Block):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x) * (self.index + 1)


class Pair(Block):
    """Returns its input and a new value."""

    def forward(self, x: torch.Tensor,  # type: ignore[override]
                mask: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        return x, {"made": super().forward(x), "none": None}


class Counting(Block):
    """Changes itself as it runs."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.index += 1
        return super().forward(x)


class Told(Block):
    """Computes with what its parent sets before the call."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x) * self.factor


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module, write: bool = False) -> None:
        super().__init__()
        self.first, self.blocks, self.write = nn.Linear(6, 6), nn.ModuleList(blocks), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if isinstance(block, Told):
                block.factor = i // 2
            x = block(x, mask=None)
            x = x[0] + x[1]["made"] if isinstance(x, tuple) else x
        return x.add_(1) if self.write else x


def text(program: Any) -> str:
    places = [(s.target, s.arg.name) for s in program.graph_signature.input_specs]
    rows = [(n.name, str(n.target), str(n.args), str(n.kwargs), str(n.meta.get("nn_module_stack")),
             getattr(n.meta.get("val"), "shape", None)) for n in program.graph.nodes]
    return f"{places}\n{rows}"


def unnamed(program: Any) -> str:
    """The program's text without names of nodes, which count others that are dropped, too."""
    at = {node: f"%{i}" for i, node in enumerate(program.graph.nodes)}
    return str([(str(n.target), str(fx.map_arg((n.args, n.kwargs), at.__getitem__)),
                 str(n.meta.get("nn_module_stack")), str(getattr(n.meta.get("val"), "shape", None)))
                for n in program.graph.nodes if n.op != "placeholder"])


def recorded(module: nn.Module, once: bool) -> tuple[str, list[int]]:
    CALLS.clear()
    program = record(module.eval(), (torch.zeros(3, 6),), {}, once=once)
    order = [id(part) for part in module.modules() if isinstance(part, Block)]
    return text(program), [order.index(call) for call in CALLS]


def exported(module: nn.Module, once: bool) -> tuple[str, list[int]]:
    CALLS.clear()
    with pytest.MonkeyPatch.context() as patched:
        if not once:
            patched.setattr(export, "blocks_once", lambda module: nullcontext(lambda: False))
        program = trace(module.eval(), (torch.zeros(3, 6),)).program
    order = [id(part) for part in module.modules() if isinstance(part, Block)]
    return unnamed(program), [order.index(call) for call in CALLS]


def many(kind: type[Block], **options: Any) -> list[Block]:
    return [kind(i, **options) for i in range(4)]


@pytest.mark.parametrize(("blocks", "runs"), [
    (lambda: many(Block), [0]),
    (lambda: many(Pair), [0]),
    (lambda: many(Indexed), [0, 1, 2, 3]),
    (lambda: [*many(Block), Block(4, (2.0,)), Block(5, (2.0,))], [0, 4]),
    (lambda: [*many(Block), nn.Sequential(Block(9))], [0, 1, 4]),
    (lambda: many(Told), [0, 2]),
    (lambda: many(Counting), [0, 1, 2, 3]),
], ids=["alike", "several results", "index read", "two kinds", "another class", "told by parent",
        "changes itself"])
def test_the_program_is_that_of_all_blocks_run(blocks: Any, runs: list[int]) -> None:
    kind = nn.Sequential if runs == [0, 1, 4] else Stack  # there, the first is given the input
    stack = kind(*blocks())
    found, ran = recorded(stack, True)
    assert ran == runs
    assert found == recorded(kind(*blocks()), False)[0]
    assert not any("forward" in vars(part) for part in stack.modules())
    assert {type(part) for part in stack.modules()} == {
        type(part) for part in kind(*blocks()).modules()}


def test_nothing_is_shared_where_values_are_written_into() -> None:
    stack = Stack(*many(Block), write=True)
    found, ran = recorded(stack, True)
    assert ran == [0, 0, 1, 2, 3]
    assert found == recorded(stack, False)[0]


@pytest.mark.parametrize(("blocks", "runs"), [
    (lambda: many(Block), 1), (lambda: many(Pair), 1), (lambda: many(Indexed), 4),
    (lambda: many(Told), 2)], ids=["alike", "several results", "index read", "told by parent"])
def test_an_export_traces_blocks_that_are_alike_once(blocks: Any, runs: int) -> None:
    found, ran = exported(Stack(*blocks()), True)
    assert len(ran) == runs
    assert found == exported(Stack(*blocks()), False)[0]


def test_an_export_that_writes_into_values_traces_all_blocks() -> None:
    class Writing(Block):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x).add_(1)

    stack = Stack(*many(Writing))
    found, ran = exported(stack, True)
    assert len(ran) == 4
    assert found == exported(stack, False)[0]


def test_one_block_in_several_places_and_shared_parts_are_themselves() -> None:
    shared = Block(0)
    tied = many(Block)
    for block in tied[1:]:
        block.up = tied[0].up
    for blocks in ([shared, shared, Block(1)], tied):
        stack = Stack(*blocks)
        assert recorded(stack, True)[0] == recorded(stack, False)[0]


def test_the_values_are_those_of_the_module() -> None:
    torch.manual_seed(0)
    stack, x = Stack(*many(Block)).eval(), torch.randn(3, 6)
    program = trace(stack, (x,), quick=True).program
    made = torch.fx.GraphModule({}, program.graph)
    held = {**dict(stack.named_parameters()), **dict(stack.named_buffers())}
    given = [held[s.target] if s.target else x for s in program.graph_signature.input_specs]
    assert torch.allclose(made(*given)[0], stack(x))
