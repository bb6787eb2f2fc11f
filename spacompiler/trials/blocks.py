"""Whole blocks: which of a network's repeated blocks may go, and the network without them.

A block may go if it is x + f(x): with all of its weights zero it gives back what it reads, so that
leaving it out is what removing all of its slices would mean.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ControlError, ProofError, SpaError, UsageError, did_you_mean
from ..evidence.calls import Batch, Inputs, as_call
from ..stages.proof import relative_error
from ..stages.records import Dropped
from ..stages.tolerances import BYPASS, CONTROL
from ..torch_backend.emit.apart import fresh
from ..torch_backend.kinds import is_hf
from ..torch_backend.untouched import untouched
from ..torch_backend.weights import results
from .shorter import shorter

CONTROLS = 3


def removable(module: nn.Module, inputs: Inputs) -> list[str]:
    """Return the paths of all blocks that may go, in the order of their calls.

    They are entries of lists of modules (`nn.ModuleList`, `nn.Sequential`), called once, that hold
    modules themselves. Of nested ones the inner ones count where they are of one class (the blocks
    of a stage), else the outer one does (a layer of attention and feed-forward parts).
    """
    watched = {f"{path}.{name}" if path else name: part
               for path, parts in module.named_modules()
               if isinstance(parts, (nn.ModuleList, nn.Sequential)) and len(parts) > 1
               for name, part in parts.named_children()
               if any(True for _ in part.children()) and any(True for _ in part.parameters())}
    found: list[str] = []
    calls: Counter[str] = Counter()

    def look(path: str, part: nn.Module, before: torch.Tensor | None, call: Batch,
             after: object) -> None:
        calls[path] += 1
        fits = calls[path] == 1 and _alike(before, _state(after, {}))
        if fits and _is_identity_of_zero(part, *call):
            found.append(path)

    args, kwargs = as_call(inputs)
    try:
        with untouched(module), torch.no_grad(), _seen(watched, look):
            module(*args, **kwargs)
    except Exception as problem:  # any code may run here
        raise SpaError("the network does not run block by block", where=type(module).__name__,
                       why=f"{type(problem).__name__}: {problem}".splitlines()[0],
                       fix="prune widths only") from problem
    return _one_level(module, [path for path in found if calls[path] == 1])


def _one_level(module: nn.Module, found: Sequence[str]) -> list[str]:
    """Leave either a block or the blocks inside it."""
    gone: set[str] = set()
    for path in sorted(found, key=len):
        inside = [p for p in found if p.startswith(f"{path}.")]
        if path not in gone and inside:
            one_class = len({type(module.get_submodule(p)) for p in inside}) == 1
            gone.update([path] if one_class else inside)
    return [path for path in found if path not in gone]


def _state(args: object, kwargs: object) -> torch.Tensor | None:
    """What a block reads: its first floating tensor."""
    return next((x for x in pytree.tree_leaves((args, kwargs))
                 if isinstance(x, torch.Tensor) and x.is_floating_point()), None)


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and \
        one.shape == other.shape and one.dtype == other.dtype


def _is_identity_of_zero(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block without weights gives back what it reads (called with copies: of caches)."""
    zeros = {name: torch.zeros_like(p) for name, p in part.named_parameters()}
    want = _state(args, kwargs)
    assert want is not None
    want = want.clone()
    args, kwargs = copy.deepcopy((args, kwargs))
    got = _state(torch.func.functional_call(part, zeros, args, kwargs), {})
    return _alike(want, got) and torch.equal(want, got)  # type: ignore[arg-type]


@contextmanager
def _seen(watched: dict[str, nn.Module], look: Callable[..., Any]) -> Iterator[None]:
    """Call look(path, block, what it read, its call, its result) after each of some blocks ran.

    What it read is a copy: blocks may write into it. What `look` returns, unless it is None, is
    the result from then on.
    """
    depth = 0

    def hooks(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        held: list[Any] = []

        def before(part: nn.Module, args: object, kwargs: object) -> None:
            if not depth:
                held[:] = pytree.tree_map(
                    lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))

        def after(part: nn.Module, args: object, kwargs: object, out: object) -> Any:
            nonlocal depth
            if depth:
                return None
            depth += 1
            try:
                return look(path, part, _state(*held), tuple(held), out)
            finally:
                depth -= 1
                held.clear()

        return before, after

    handles = []
    for path, part in watched.items():
        before, after = hooks(path)
        handles += [part.register_forward_pre_hook(before, with_kwargs=True),
                    part.register_forward_hook(after, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassed(module: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Let some blocks give back what they read for a while."""

    def give_back(path: str, part: nn.Module, before: object, call: object, after: object) -> Any:
        leaves, spec = pytree.tree_flatten(after)
        at = next(i for i, x in enumerate(leaves)
                  if isinstance(x, torch.Tensor) and x.is_floating_point())
        leaves[at] = before
        return pytree.tree_unflatten(leaves, spec)

    with _seen({path: module.get_submodule(path) for path in paths}, give_back):
        yield


def without(module: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Return the network without some blocks; the blocks that stay are numbered anew.

    Arrays share the memory of the network given. A transformers model is built from a configuration
    of so many layers.

    Raises SpaError where no configuration says that.
    """
    if not paths:
        return module
    if is_hf(module):
        return shorter(module, paths)
    memo: dict[int, Any] = {id(t): fresh(t) for t in (*module.parameters(), *module.buffers())}
    made = copy.deepcopy(module, memo)
    for path in paths:
        parent, _, name = path.rpartition(".")
        del made.get_submodule(parent)._modules[name]
    for parent in {path.rpartition(".")[0] for path in paths}:
        _number_anew(made.get_submodule(parent))
    return made


def _number_anew(parts: nn.Module) -> None:
    """Close the gaps in a list's numbers; names of a user's own stay."""
    children = list(parts._modules.items())
    if all(name.isdigit() for name, _ in children):
        parts._modules.clear()
        parts._modules.update({str(i): part for i, (_, part) in enumerate(children)})


def check_paths(paths: Sequence[str], known: Sequence[str]) -> None:
    """Raise UsageError if a path is no block that may go."""
    for path in paths:
        if path not in known:
            raise UsageError(f"{path!r} is no block that may go",
                             why="a block is an entry of a list of modules, and x + f(x)",
                             fix=did_you_mean(path, known))


def drop(module: nn.Module, inputs: Inputs, paths: Sequence[str],
         known: Sequence[str]) -> tuple[nn.Module, Dropped]:
    """Return the network without some blocks, checked against the dense one that bypasses them.

    Raises ProofError if they differ, ControlError if no wrong bypass (one block more) is seen.
    """
    args, kwargs = as_call(inputs)
    made = without(module, paths)
    try:
        got = results(made, args, kwargs)
    except Exception as problem:  # any code may run here
        raise SpaError(f"the network without {', '.join(paths)} does not run",
                       where=type(module).__name__,
                       why=f"{type(problem).__name__}: {problem}".splitlines()[0],
                       fix="its code may go by a block's number; drop other blocks") from problem

    def gap(also: Sequence[str] = ()) -> float:
        with bypassed(module, (*paths, *also)):
            return relative_error(got, results(module, args, kwargs))

    error = gap()
    if not error <= BYPASS.value:
        raise ProofError(f"the network without {', '.join(paths)} is not the one that bypasses "
                         "them", why=f"results differ by {error:.1e}",
                         fix="its code may go by a block's number; drop other blocks")
    control, other = 0.0, ""
    for other in [p for p in known if p not in paths][-CONTROLS:]:
        control = gap([other])
        if control >= CONTROL.value:
            break
    if other and control < CONTROL.value:
        raise ControlError("a wrong bypass is not seen", why=f"bypassing {other} as well changes "
                           f"results by {control:.1e} only (needed {CONTROL.value:.0e})",
                           fix="the example inputs may not reach these blocks; pass other ones")
    return made, Dropped(tuple(paths), error, control, other)


def none_found(name: str) -> SpaError:
    """Return the error for a network of which no block may go."""
    return SpaError("no block may go", where=name,
                    why="no entry of a list of modules is x + f(x) (with a norm after the sum, "
                        "say, it is none)", fix="prune widths only")
