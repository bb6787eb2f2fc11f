"""Where a group is read in a live module: the modules whose first argument carries it.

The solver says which operator reads a slice, the operator's stored array says which module that
is. Masks and gates on what these modules are given stand where the proof puts its masks, and
whether they do is checked by running both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spacompiler.axes.choices import Choices, keep_mask
from spacompiler.axes.expressions import atoms
from spacompiler.groups.solution import Group, Solution
from spacompiler.stages.tolerances import SITE
from spacompiler.torch_backend.run.runner import Runner
from spacompiler.torch_backend.trace import Trace
from spacompiler.torch_backend.untouched import untouched

Change = Callable[["Site", torch.Tensor], torch.Tensor]
MASKED = "masks while training are zeros, and a score that goes would have to be minus infinity"


@dataclass
class Site:
    """A module (by its path), the traced tensor that is its first argument, and what it reads.

    `reads` are (group's name, dimension of the tensor).
    """

    path: str
    tensor: str
    reads: list[tuple[str, int]] = field(default_factory=list)


def sites(module: nn.Module, trace: Trace, solution: Solution,
          groups: Iterable[Group]) -> list[Site]:
    """Return the sites at which any of the groups is read.

    Each is checked: what the module is given on the example inputs is the traced tensor.
    """
    nodes = {node.name: node for node in solution.graph.nodes}
    found: dict[tuple[str, str], Site] = {}
    paths = {path for path, _ in module.named_modules()}
    for group in groups:
        for read in dict.fromkeys((r.node, r.tensor, r.dim) for r in group.reads
                                  if r.how not in ("score", "chosen")):
            node, tensor, dim = nodes[read[0]], read[1], read[2]
            if solution.graph.tensors[tensor].static:
                continue
            stored = [w for ref in node.refs() if (w := solution.graph.tensors[ref].weight)]
            path = stored[0].rpartition(".")[0] if stored else node.where
            if path in paths:
                site = found.setdefault((path, tensor), Site(path, tensor))
                site.reads.append((group.name, dim))
    return _checked(module, trace, list(found.values()))


@torch.no_grad()
def _checked(module: nn.Module, trace: Trace, found: list[Site]) -> list[Site]:
    """Keep the sites whose module is called once, with the tensor that was traced."""
    given: dict[str, list[Any]] = {site.path: [] for site in found}
    want: dict[str, torch.Tensor] = {}
    names = {site.tensor for site in found}

    def keep(name: str, value: object) -> None:
        if name in names and isinstance(value, torch.Tensor):
            want[name] = value

    handles = [module.get_submodule(path).register_forward_pre_hook(
        lambda part, args, calls=calls: calls.append(args[0] if args else None))
        for path, calls in given.items()]
    try:
        with untouched(module):
            module(*trace.args, **trace.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    Runner(trace.program, watch=keep).call(trace.args, trace.kwargs)
    return [s for s in found if len(given[s.path]) == 1 and s.tensor in want
            and _same(given[s.path][0], want[s.tensor])]


def _same(got: object, want: torch.Tensor) -> bool:
    if not isinstance(got, torch.Tensor) or got.numel() != want.numel() or not got.ndim:
        return False
    given, want = got.reshape(-1).double(), want.reshape(-1).double()
    return bool((given - want).abs().max() <= SITE.value * want.abs().max() + 1e-12)


def hook(module: nn.Module, found: Iterable[Site], change: Change) -> list[RemovableHandle]:
    """Let `change(site, x)` replace what each site's module is given; returns the handles."""

    def at(site: Site) -> Any:
        def run(part: nn.Module, args: tuple[Any, ...]) -> Any:
            return (change(site, args[0]), *args[1:]) if args else None

        return module.get_submodule(site.path).register_forward_pre_hook(run)

    return [at(site) for site in found]


class Masks:
    """Zero removed slices where they are read, in the live module; growing masks are set anew."""

    def __init__(self, module: nn.Module, solution: Solution, found: list[Site]) -> None:
        self._solution, self._sites = solution, found
        self._masks: dict[str, torch.Tensor] = {}
        self._handles = hook(module, found, self._masked)

    def set(self, choices: Choices) -> None:
        """Mask what a plan removes."""
        for site in self._sites:
            dims = self._solution.solver.dims[site.tensor]
            if any(a in choices for e in dims for a in atoms(e)):
                mask = torch.from_numpy(keep_mask(dims, choices))
                while mask.ndim > 1 and mask.shape[0] == 1:
                    mask = mask[0]
                self._masks[site.tensor] = mask

    def _masked(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        mask = self._masks.get(site.tensor)
        if mask is None:
            return x
        return torch.where(mask.to(x.device), x, torch.zeros((), dtype=x.dtype, device=x.device))

    def remove(self) -> None:
        """Take the hooks out of the module."""
        for handle in self._handles:
            handle.remove()

