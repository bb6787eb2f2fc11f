"""Refuse, before anything is computed, modules and calls whose arrays cannot be computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ...errors import SpaError, UsageError

Test = Callable[[torch.Tensor], bool]
# whether an array is of this kind, what is wrong with it, and what to do
_UNREADABLE: tuple[tuple[Test, str, str], ...] = (
    (lambda t: bool(is_lazy(t)), "has no values yet: its size follows from the first call",
     "call the module once on its inputs"),
    (lambda t: t.device.type == "meta", "has no values: it lies on the meta device",
     "load the weights first (to_empty, then load_state_dict)"),
    (lambda t: t.is_inference(), "was made in inference mode, and cannot be trained or written to",
     "build or load the module outside of torch.inference_mode(), or give copy.deepcopy(module)"),
)


def check_readable(module: object, *, values: bool = True) -> None:
    """Raise SpaError for an array without values or a part that no attribute reaches, UsageError
    for a call in inference mode.

    Where no `values` are needed, an array must have a size only.
    """
    if not isinstance(module, nn.Module):
        return
    if values and torch.is_inference_mode_enabled():
        raise UsageError("a model cannot be compiled in inference mode",
                         why="what is made there cannot be trained, and scores need gradients",
                         fix="call it outside of torch.inference_mode()")
    for path, part in module.named_modules():
        _check_unpacked(path, part)
        for name, inner in part.named_children():
            _check_reachable(path, part, name, inner)
    for kind, name, tensor in _arrays(module):
        for wrong, why, fix in _UNREADABLE if values else _UNREADABLE[:1]:
            if wrong(tensor):
                raise SpaError(f"{kind} {name} {why}", where=type(module).__name__, fix=fix)


def _check_reachable(path: str, part: nn.Module, name: str, inner: nn.Module) -> None:
    """Raise SpaError for a part under the name of something that its owner's class has."""
    if hasattr(type(part), name) and getattr(part, name, None) is not inner:
        full = f"{path}.{name}" if path else name
        raise SpaError(
            f"the part {full!r} cannot be reached", where=type(part).__name__,
            why=f"{type(part).__name__}.{name} is something of its class, which hides it",
            fix=f"rename it; where it only lists arrays, take it away (module"
                f"{'.' + path if path else ''}._modules.pop({name!r})) and register the layers "
                "that hold them (nn.ModuleList)")


def _check_unpacked(path: str, part: nn.Module) -> None:
    """Raise SpaError for a layer of torch.ao.quantization, whose weights are one packed object."""
    packed = vars(part).get("_packed_params")
    if isinstance(packed, torch.ScriptObject):
        raise SpaError(
            f"layer {path.removesuffix('._packed_params') or type(part).__name__} is quantised",
            why=f"its weights are packed for a kernel ({type(part).__name__} of "
                f"{type(part).__module__}), and cannot be cut",
            fix="compile the module in floating point, and quantise the result")


def check_exportable(inputs: object) -> None:
    """Raise UsageError for input tensors that ONNX Runtime cannot be given from numpy."""
    for value in pytree.tree_leaves(inputs):
        if isinstance(value, torch.Tensor) and not _in_numpy(value.dtype):
            kind = str(value.dtype).removeprefix("torch.")
            raise UsageError(f"model.onnx cannot be checked with {kind} inputs",
                             why=f"numpy has no {kind}, so that ONNX Runtime cannot be fed",
                             fix="leave it out (--no-onnx, onnx=False), or give the module and its "
                                 "inputs in float32")


def _in_numpy(kind: torch.dtype) -> bool:
    try:
        torch.empty(0, dtype=kind).numpy()
    except TypeError:
        return False
    return True


def _arrays(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield what each array is, its name, and the array."""
    for name, tensor in module.named_parameters():
        yield "weight", name, tensor
    for name, buffer in module.named_buffers():
        yield "buffer", name, buffer
