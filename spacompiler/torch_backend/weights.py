"""A module's arrays by name, and whether two modules agree."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from ..stages.comparison import compare, tensors
from ..stages.tolerances import SAME_RESULTS
from ..store.mapped import let_go
from .untouched import untouched


def named_arrays(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def called(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a module gives in eval mode, drawing random numbers from seed 0."""
    with untouched(module), torch.no_grad(), torch.random.fork_rng(devices=[]), _letting_go():
        torch.manual_seed(0)
        return module(*args, **kwargs)


@contextmanager
def _letting_go() -> Iterator[None]:
    """Let go of each module's arrays when it was called: they may be shown out of a file."""
    def leave(module: nn.Module, args: object, result: object) -> None:
        let_go(p for p in module._parameters.values() if p is not None)

    handle = register_module_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


def runs_like(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
              want: list[Any], tolerance: float = SAME_RESULTS.value) -> str:
    """Return "" if the module's results equal the program's (to rounding), else how they differ."""
    try:
        got = results(module, args, kwargs)
    except Exception as problem:  # any code may run here
        return f"{type(problem).__name__}: {problem}".splitlines()[0] + (
            "" if str(problem).strip() else _line(problem))
    found = compare(got, tensors(want))
    return "" if found.within(tolerance) else \
        found.why or f"results differ by {found.relative:.1e}"


def _line(problem: Exception) -> str:
    """The line that raised an error without words (a bare assert)."""
    last = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{last.line} ({'/'.join(last.filename.split('/')[-2:])}:{last.lineno})"


def results(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the tensors that a module gives in eval mode, drawing random numbers from seed 0."""
    return tensors(called(module, args, kwargs))


def weights_hash(module: nn.Module) -> str:
    """Return sha256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
        let_go([tensor])
    return digest.hexdigest()
