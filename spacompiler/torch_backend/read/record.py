"""Record a module's operators while it runs on the meta device: the quick way to a program.

torch.export traces through fake tensors, symbolic sizes and several rewrites, and most of its time
goes there. Where only groups and widths are asked for, at the sizes of the example inputs, it is
enough to run the module once without data and to note each operator before it is decomposed. The
result is, operator for operator, what torch.export makes of static sizes. What needs data, or does
anything unusual, is left to torch.export.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..trace import Recorded
from .known import Known, is_mutable, like, takes_device
from .nodes import call
from .placed import called
from .repeats import Repeats, Unlike
from .running import follow, innermost_forward

_META = torch.device("meta")
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
_NUMBERS = frozenset((int, float, bool, type(None)))
_ATEN = torch.ops.aten
# operators whose result is like their operand, and for which torch takes long to say so
_LIKE_OPERAND: dict[Any, Callable[..., torch.Tensor]] = {
    **dict.fromkeys((_ATEN.batch_norm.default, _ATEN.layer_norm.default),
                    lambda x, *rest: like(x)),
    **dict.fromkeys((_ATEN.silu_.default, _ATEN.hardswish_.default, _ATEN.hardtanh_.default,
                     _ATEN.relu_.default, _ATEN.sigmoid_.default, _ATEN.hardsigmoid_.default),
                    lambda x, *rest: x),
}
_PREFIX = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_", InputKind.CONSTANT_TENSOR: "c_",
           InputKind.USER_INPUT: ""}


class _Kind(tuple[object, ...]):
    """Sizes, strides and type of an operand, as a part of a question."""

    __slots__ = ()


class NotRecorded(Exception):
    """The module does something that only torch.export can follow."""


def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *,
           once: bool = True) -> Recorded:
    """Return the program of one call of a module that is in eval mode.

    Neither weights nor inputs are read; their sizes stand in the program. Of blocks that do the
    same, one is run if `once`. Raises NotRecorded, or what the module raises for want of data.
    """
    recorder = _Recorder(module)
    repeats = Repeats(recorder)
    held = recorder.arrays()
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given, named = pytree.tree_unflatten(
        [recorder.held(f"input_{i}", x, InputKind.USER_INPUT) if isinstance(x, torch.Tensor) else x
         for i, x in enumerate(leaves)], spec)
    try:
        with torch.no_grad(), _exporting(), \
                repeats.under_way(module) if once else nullcontext(), \
                recorder.modules(), enable_python_dispatcher(), recorder:
            result = called(module, held, given, named)
    except Exception:
        if not repeats.watching:
            raise
        return record(module, args, kwargs, once=False)
    if repeats.used and recorder.wrote:  # what shares memory with what is not known of all blocks
        return record(module, args, kwargs, once=False)
    return recorder.finish(result)


@contextmanager
def _exporting() -> Iterator[None]:
    """Let module code that asks whether it is being exported hear yes."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    was = {name: getattr(torch.compiler, name) for name in flags}
    for name in flags:
        setattr(torch.compiler, name, True)
    try:
        yield
    finally:
        for name, value in was.items():
            setattr(torch.compiler, name, value)


@dataclass(eq=False)
class _Recorder(ProxyTorchDispatchMode):
    """Notes each operator in a graph, and computes sizes and types alone.

    A mode of this base class is what torch lets see operators before they are decomposed.
    """

    module: nn.Module
    graph: fx.Graph = field(default_factory=fx.Graph)
    specs: list[InputSpec] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    path: list[str] = field(default_factory=lambda: [""])
    places: dict[tuple[int, str], fx.Node] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    wrote: bool = False

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self._nodes: dict[Any, Any] = {}
        self._alive: list[torch.Tensor] = []
        self._device: torch.device | None = None
        self._known = Known()
        self.names = {id(part): path for path, part in self.module.named_modules()}

    def __enter__(self) -> _Recorder:
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *problem: object) -> None:
        TorchDispatchMode.__exit__(self, *problem)

    # --- what comes in ---------------------------------------------------------------------

    def arrays(self) -> dict[str, torch.Tensor]:
        """A stand-in on the meta device for each array of each module, by its first name."""
        held = {}
        for path, part in self.module.named_modules():
            for kind, arrays in ((InputKind.PARAMETER, part._parameters),
                                 (InputKind.BUFFER, part._buffers)):
                for name, tensor in arrays.items():
                    if tensor is not None:
                        full = f"{path}.{name}" if path else name
                        held[full] = self.held(full, tensor, kind)
                        self.places[id(part), name] = self.node(held[full])
        return held

    def held(self, name: str, tensor: torch.Tensor, kind: InputKind) -> torch.Tensor:
        """Give the graph an input; returns what stands for it."""
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            raise NotRecorded(f"{name} is a {type(tensor).__name__}")
        if self._device is None:
            self._device = tensor.device
        stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype,
                                       device=_META)
        node = self.graph.placeholder(_PREFIX[kind] + name.replace(".", "_"))
        target = None if kind is InputKind.USER_INPUT else name
        self.specs.append(InputSpec(
            kind, TensorArgument(node.name), target,
            persistent=self._persists(name) if kind is InputKind.BUFFER else None))
        self.note(stand_in, node)
        node.meta["val"] = stand_in
        return stand_in

    def _persists(self, name: str) -> bool:
        path, _, attribute = name.rpartition(".")
        return attribute not in self.module.get_submodule(path)._non_persistent_buffers_set

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        """An array that no input or operator made: it is put before all else in the graph."""
        if tensor.device == _META:
            raise NotRecorded("a result came from nowhere")
        name = f"lifted_tensor_{len(self.constants)}"
        self.constants[name] = tensor
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            self.held(name, tensor, InputKind.CONSTANT_TENSOR)
        self.specs.insert(0, self.specs.pop())
        node = next(iter(self.graph.nodes))
        self.note(tensor, node)
        return node

    # --- what is called --------------------------------------------------------------------

    def seen(self, func: object, types: Collection[type], args: tuple[Any, ...] = (),
             kwargs: dict[str, Any] | None = None) -> Any:
        """Note an operator in the graph, and run it without data."""
        if not isinstance(func, torch._ops.OpOverload):
            raise NotRecorded(f"{func} is not an operator")
        with no_python_dispatcher():  # it is what brought us here, and makes every call slow
            return self._call(func, args, kwargs or {})

    def _call(self, func: torch._ops.OpOverload, args: tuple[Any, ...],
              kwargs: dict[str, Any]) -> Any:
        key: list[object] = [func]
        node_args, given = self._told(args, key)
        node_kwargs, named = self._told(kwargs, key)
        if takes_device(func) and "device" not in named and not any(
                isinstance(x, (_Kind, torch.device)) for x in key):
            named = {**named, "device": _META}
        if is_mutable(func):
            self.wrote = True
            self._keep_sizes(args, kwargs)
        alike = _LIKE_OPERAND.get(func)
        result = alike(*given, **named) if alike else self._known(func, given, named, key)
        node = call(self.graph, func, node_args, node_kwargs)
        node.meta.update(val=_snapshot(result), stack_trace=_place(),
                         nn_module_stack={"": (self.path[-1], "")})
        self.note(result, node)
        return result

    def _told(self, value: object, key: list[object]) -> tuple[Any, Any]:
        """An argument as it stands in the graph, and without data; `key` is given its kind."""
        if type(value) in _NUMBERS:
            key.append((type(value), value))
            return value, value
        if isinstance(value, torch.Tensor):
            node = self.node(value)
            given = value if value.is_meta else value.to(_META)
            key.append(_Kind((given.shape, given.stride(), given.dtype)))
            return node, given
        if isinstance(value, (list, tuple)):
            key.append((type(value), len(value)))
            told = [self._told(part, key) for part in value]
            return type(value)([n for n, _ in told]), type(value)([g for _, g in told])
        if isinstance(value, dict):
            key.append(tuple(value))
            pairs = {name: self._told(part, key) for name, part in value.items()}
            return {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}
        if isinstance(value, torch.device):
            key.append(value)
            return self._device if value == _META else value, _META
        key.append((type(value), value))
        return value, value

    def _keep_sizes(self, *given: object) -> None:
        """Keep what is known of operands apart from what is about to be written into."""
        for value in pytree.tree_leaves(given):
            node = self._nodes.get(id(value)) if isinstance(value, torch.Tensor) else None
            if isinstance(node, fx.Node) and node.meta["val"] is value:
                node.meta["val"] = value.detach()

    def node(self, tensor: torch.Tensor) -> fx.Node:
        """Return the node of a value; an array from elsewhere becomes a constant."""
        found = self._nodes.get(id(tensor)) or self._nodes.get(_region(tensor))
        if found is None:
            return self._constant(tensor)
        if isinstance(found, tuple):
            whole, index = found
            found = call(self.graph, operator.getitem, (whole, index), {})
            found.meta = {**whole.meta, "val": whole.meta["val"][index]}
            self._nodes[id(tensor)] = found
        return found

    def kind(self, tensor: torch.Tensor) -> object:
        """Return what is known of a tensor, to compare."""
        if type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.is_meta:
            raise Unlike
        return tensor.shape, tensor.stride(), tensor.dtype

    def array(self, part: nn.Module, name: str) -> fx.Node | None:
        """Return the node of an array that a module holds."""
        return self.places.get((id(part), name))

    def place_of(self, part: nn.Module) -> str:
        """Return where a module stands."""
        return self.names[id(part)]

    def copied(self, node: fx.Node) -> bool:
        """Whether a node is to be noted again: all are."""
        return True

    def note(self, result: object, node: object) -> None:
        """Let a node stand for a value, or for the parts of one."""
        if isinstance(result, torch.Tensor):
            self._nodes[id(result)] = self._nodes[_region(result)] = node
            self._alive.append(result)
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                self.note(part, (node, i))
        elif not isinstance(result, _PLAIN):
            raise NotRecorded(f"{node} gives a {type(result).__name__}")

    def another(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same kind, of which nothing is noted."""
        own = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)
        with no_python_dispatcher(), torch._C._ExcludeDispatchKeyGuard(own):
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=_META)

    # --- what comes out --------------------------------------------------------------------

    def finish(self, result: object) -> Recorded:
        """The program, once the module has returned."""
        leaves = pytree.tree_leaves(result)
        strange = [x for x in leaves if not isinstance(x, (torch.Tensor, *_PLAIN))]
        if strange:
            raise NotRecorded(f"the module returns a {type(strange[0]).__name__}")
        nodes = [self.node(x) for x in leaves if isinstance(x, torch.Tensor)]
        self.graph.output(tuple(nodes))
        outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in nodes]
        state: dict[str, Any] = dict(self.module.named_parameters(remove_duplicate=False))
        for name, tensor in self.module.named_buffers(remove_duplicate=False):
            (state if self._persists(name) else self.constants)[name] = tensor
        return Recorded(self.graph, ExportGraphSignature(self.specs, outputs), state,
                        self.constants)

    def modules(self) -> AbstractContextManager[None]:
        """Follow which module is running."""
        return follow(self.names, self.path)


# torch has a method of this name stand behind two more calls where a class defines it
_Recorder.__torch_dispatch__ = _Recorder.seen  # type: ignore[method-assign,assignment]


def _region(tensor: torch.Tensor) -> Any:
    """What part of which storage a tensor is: factories hand on another object than they made."""
    if tensor.device != _META:
        return None
    return (tensor.untyped_storage()._cdata, tensor.dtype, tensor.storage_offset(), *tensor.shape,
            *tensor.stride())


def _snapshot(result: object) -> Any:
    """A result as it is now; one tensor is kept apart once something writes into it."""
    if isinstance(result, (tuple, list)):
        return type(result)([x.detach() if isinstance(x, torch.Tensor) else x for x in result])
    return result


def _place() -> str:
    """The innermost line of a `forward`, written as the exporter does."""
    frame = innermost_forward(sys._getframe(1))
    return "" if frame is None else f'File "{frame.f_code.co_filename}", line {frame.f_lineno},'
