"""Exports in which a repeated block is traced once, and its operators noted again for the others.

Most of the time of an export goes into the operators of blocks, which are alike but for their
arrays (see `repeats`, which says when). torch's tracer tells of each module that it comes to: for
a block that does what another one did, the nodes of that one are copied. Sizes that vary between
calls are numbers of the program, not of a block, and stand in it once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor

from .known import is_mutable
from .repeats import Kind, Repeats, Unlike, alike

ROOT = "_export_root"
"""What the exporter calls the module, while it traces."""
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class _Traced:
    """The graph of torch's tracer, as `repeats` reads and writes it."""

    def __init__(self, tracer: Any, module: nn.Module) -> None:
        self._tracer = tracer
        self._paths = {id(part): f"{ROOT}.{path}" for path, part in module.named_modules()}
        self._wrote, self._seen = False, tracer.graph._root

    @property
    def graph(self) -> fx.Graph:
        """The graph, to which nodes are added at its end."""
        graph: fx.Graph = self._tracer.graph
        return graph

    @property
    def wrote(self) -> bool:
        """Whether a value was written into."""
        while self._seen.next.op != "root":
            self._seen = self._seen.next
            target = self._seen.target
            self._wrote |= isinstance(target, torch._ops.OpOverload) and is_mutable(target)
        return self._wrote

    def kind(self, tensor: torch.Tensor) -> object:
        """Return what is known of a tensor, to compare; raises Unlike for one that none is."""
        if type(tensor) is not FakeTensor or tensor.constant is not None \
                or tensor.layout is not torch.strided or tensor.storage_offset() != 0:
            raise Unlike
        return str(tensor.shape), str(tensor.stride()), tensor.dtype, tensor.device, \
            tensor.requires_grad

    def array(self, part: nn.Module, name: str) -> fx.Node | None:
        """Return the node of an array that a module holds."""
        held = part._parameters.get(name, part._buffers.get(name))
        return None if held is None else self._found(held)

    def place_of(self, part: nn.Module) -> str:
        """Return where a module stands, as nodes say it."""
        return self._paths[id(part)]

    def copied(self, node: fx.Node) -> bool:
        """Whether a node makes a value of its block; raises Unlike for what cannot be copied."""
        if isinstance(node.meta.get("val"), _SYMBOLIC):
            return False
        target = node.target
        plain = isinstance(target, torch._ops.OpOverload) and not is_mutable(target)
        if node.op != "call_function" or "unbacked_bindings" in node.meta \
                or not (plain or target is operator.getitem):
            raise Unlike
        return True

    def node(self, tensor: torch.Tensor) -> fx.Node:
        """Return the node of a value."""
        found = self._found(tensor)
        if found is None:
            raise Unlike
        return found

    def _found(self, tensor: torch.Tensor) -> fx.Node | None:
        slot = self._tracer.tensor_tracker.get(tensor)
        return None if slot is None else slot.proxy.node

    def note(self, result: torch.Tensor, node: fx.Node) -> None:
        """Let a node stand for a value."""
        proxy_tensor.track_tensor_tree(result, fx.Proxy(node, self._tracer), constant=None,
                                       tracer=self._tracer)

    def another(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same kind, of which nothing is noted."""
        with proxy_tensor.disable_proxy_modes_tracing():
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype,
                                       device=like.device)


@contextmanager
def blocks_once(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Let an export meanwhile trace repeated blocks once; what is given tells whether it did."""
    kinds = {id(block): kind for kind, blocks in alike(module) for block in blocks}
    used: list[Repeats] = []

    def begin(root: nn.Module, given: object) -> None:
        mode = proxy_tensor.get_proxy_mode()
        if mode is not None and not used:
            tracer: Any = mode.tracer
            used.append(Repeats(_Traced(tracer, module)))
            tracer.call_module = partial(_called, tracer.call_module, used[0], kinds)

    handle = module.register_forward_pre_hook(begin) if kinds else None
    try:
        yield lambda: any(one.used or one.watching for one in used)
    finally:
        if handle is not None:
            handle.remove()


def _called(plain: Callable[..., Any], repeats: Repeats, kinds: dict[int, Kind], module: nn.Module,
            forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the place of the tracer's way to call a module."""
    face: Any = module
    is_face = isinstance(module, proxy_tensor._AttrProxy)
    block = face.get_base() if is_face else module
    run = partial(plain, module, forward, args, kwargs)
    kind = kinds.get(id(block))
    return run() if kind is None else repeats.called(kind, block, run, args, kwargs)
