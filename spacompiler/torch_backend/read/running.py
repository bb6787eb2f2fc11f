"""Where a running model is: in which module, and at which line of its code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


@contextmanager
def follow(names: Mapping[int, str], path: list[str]) -> Iterator[None]:
    """Keep the names of the modules under way on `path`; `names` is by the identity of each."""
    def enter(module: nn.Module, args: object) -> None:
        path.append(names.get(id(module), path[-1]))

    def leave(module: nn.Module, args: object, result: object) -> None:
        path.pop()

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield


def innermost_forward(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of a `forward`: what the exporter names as the place of a node."""
    while frame is not None and frame.f_code.co_name != "forward":
        frame = frame.f_back
    return frame
