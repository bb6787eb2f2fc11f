"""Adapters whose ranks are given before they train: CFSP's by block importance; Flexora, DiffoRA.

Each says how many ranks a layer gets (`Lora.ranks`), none being no adapter at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import ClassVar

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from spacompiler.adapters.merging import library
from spacompiler.errors import SpaError
from spacompiler.evidence.calls import Batch
from spacompiler.evidence.watching import watched
from spacompiler.passes.lora import GRADIENT_BATCHES, Lora
from spacompiler.train.loop import Training
from spacompiler.train.objective import Objective, blocks, call
from spacompiler.train.ranks import pairs

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CfspLora(Lora):
    """Ranks in proportion to what each block turns the hidden state by; `rank` is their mean.

    CFSP (COLING 2025): I_l = mean over tokens of arccos(cos(h_in, h_out)) / pi of the dense
    network's block l; its layers have max(1, round(rank I_l / mean I)) ranks. Layers outside of
    blocks have `rank`.
    """

    name: ClassVar[str] = "cfsp-lora"

    def ranks(self, task: Training, paths: Sequence[str]) -> dict[str, int]:
        """Raises SpaError if no block takes and gives the same shape."""
        angles = turns(task.dense or task.module, task.batches[:GRADIENT_BATCHES])
        if not angles or not any(angles.values()):
            raise SpaError(f"{self.name} finds no blocks whose importance can be measured",
                           why="no member of a list of modules takes and gives the same shape",
                           fix="use --recover lora")
        mean = sum(angles.values()) / len(angles)
        return {path: max(1, round(self.rank * angle / mean)) for block, angle in angles.items()
                for path in paths if path.startswith(f"{block}.")}


@torch.no_grad()
def turns(module: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """Return, by block, the mean angle between what it takes and gives, as a share of pi."""
    found: dict[str, list[float]] = {}

    def see(path: str, part: nn.Module, args: object, kwargs: object, result: object) -> None:
        given, made = _first((args, kwargs)), _first(result)
        if given is not None and made is not None and given.shape == made.shape:
            cosine = torch.cosine_similarity(given.double(), made.double(), dim=-1)
            found.setdefault(path, []).append(
                float(cosine.clamp(-1, 1).arccos().mean() / torch.pi))

    with watched(dict(blocks(module)), see):
        for batch in batches:
            call(module, *batch)
    return {path: sum(angles) / len(angles) for path, angles in found.items()}


def _first(values: object) -> torch.Tensor | None:
    return next((x for x in pytree.tree_leaves(values)
                 if isinstance(x, torch.Tensor) and x.is_floating_point()), None)


@dataclass(frozen=True)
class Flexora(Lora):
    """Adapters on layers that help data which they were not fit to, found by unrolled descent.

    Flexora (2024): layer l's adapters count n softmax(a)_l, a = 0 at first. Each of `search` steps
    takes a step of the adapters on one half of the batches, at `lr`, and a step of a on the other
    half, at `outer`, through the first. Layers whose a ends above zero keep adapters, which then
    start anew. A layer is a block, or an adapted layer outside of blocks.
    """

    name: ClassVar[str] = "flexora"
    search: int = 8
    outer: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search < 1:
            raise TypeError("search must be at least 1")

    def ranks(self, task: Training, paths: Sequence[str]) -> dict[str, int]:
        """`rank` or none, by layer."""
        layers = self.layers(task, paths)
        found = self.searched(task, paths, layers)
        return {path: self.rank * bool(kept) for path, kept in zip(
            paths, self.chosen(found)[layers], strict=True)}

    def layers(self, task: Training, paths: Sequence[str]) -> torch.Tensor:
        """Return which layer each path belongs to, as numbers: (paths,)."""
        own = [path for path, _ in blocks(task.module)]
        names = [next((b for b in own if path.startswith(f"{b}.")), path) for path in paths]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([numbers[name] for name in names])

    def weights(self, found: torch.Tensor) -> torch.Tensor:
        """Return how much each layer's adapters count while they are searched."""
        return len(found) * found.softmax(0)

    def chosen(self, found: torch.Tensor) -> torch.Tensor:
        """Return which layers keep adapters; the best one where none would."""
        return (found > 0) | (found == found.max())

    def slopes(self, search: _Search, found: torch.Tensor, held: Batch,
               inner: Batch) -> torch.Tensor:
        """Return the slope of the held-out loss after a step of the adapters, which is taken."""
        steps = torch.autograd.grad(search.at(search.now, found, inner),
                                    list(search.now.values()), create_graph=True)
        later = {name: p - self.lr * step for (name, p), step in zip(
            search.now.items(), steps, strict=True)}
        slope, = torch.autograd.grad(search.at(later, found, held), found)
        search.now = {name: p.detach().requires_grad_() for name, p in later.items()}
        return slope

    def searched(self, task: Training, paths: Sequence[str],
                 layers: torch.Tensor) -> torch.Tensor:
        """Return a number a layer, learned with adapters that are taken off again: (layers,).

        Raises SpaError if there are fewer than two batches.
        """
        if len(task.batches) < 2:
            raise SpaError(f"{self.name} has nothing to search on",
                           why="one half of the batches judges what is fit to the other",
                           fix="give more with --recover-data or --recover-samples")
        plain = replace(self, init="default", dora=False)  # other starts write into the weights
        tuned = plain.attach(library(), task, dict.fromkeys(paths, self.rank))
        found = torch.zeros(int(layers.max()) + 1, requires_grad=True)
        optimizer = torch.optim.Adam([found], lr=self.outer)
        search = _Search(task, self, paths, layers)
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                for _, inner, held in zip(range(self.search), cycle(task.batches[0::2]),
                                          cycle(task.batches[1::2]), strict=False):
                    found.grad = self.slopes(search, found, held, inner)
                    optimizer.step()
        finally:
            search.stop()
            tuned.unload()
        return found.detach()


@dataclass(frozen=True)
class Diffora(Flexora):
    """Adapters on a `share` of the layers that a relaxed choice, learned beside them, likes best.

    DiffoRA (2025): each adapted layer's adapter counts sigmoid(g), g = 0 at first. Steps of the
    adapters on one half of the batches and of g on the other half take turns, neither through the
    other; the layers of the largest g keep adapters.
    """

    name: ClassVar[str] = "diffora"
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise TypeError("share is above 0, at most 1")

    def layers(self, task: Training, paths: Sequence[str]) -> torch.Tensor:
        """Each adapted layer is one."""
        return torch.arange(len(paths))

    def weights(self, found: torch.Tensor) -> torch.Tensor:
        """sigmoid(g)."""
        return found.sigmoid()

    def chosen(self, found: torch.Tensor) -> torch.Tensor:
        """The best `share`, at least one."""
        made = torch.zeros(len(found), dtype=torch.bool)
        made[found.topk(max(1, round(self.share * len(found)))).indices] = True
        return made

    def slopes(self, search: _Search, found: torch.Tensor, held: Batch,
               inner: Batch) -> torch.Tensor:
        """The slope of the loss on the other half, once the adapters have taken a step."""
        steps = torch.autograd.grad(search.at(search.now, found.detach(), inner),
                                    list(search.now.values()))
        search.now = {name: (p - self.lr * step).detach().requires_grad_()
                      for (name, p), step in zip(search.now.items(), steps, strict=True)}
        slope, = torch.autograd.grad(search.at(search.now, found, held), found)
        return slope


class _Search(nn.Module):
    """The objective of a batch, as a function of adapters' parameters and of how much they count.

    `now` are the parameters as they are, by name.
    """

    def __init__(self, task: Training, row: Flexora, paths: Sequence[str],
                 layers: torch.Tensor) -> None:
        super().__init__()
        self.module, self._weights, self._layers = task.module, row.weights, layers
        self._objective = Objective(task.module, task.dense, task.loss, row)
        at = {path: i for i, path in enumerate(paths)}
        self._factors = torch.ones(len(paths))
        self._handles = [up.register_forward_hook(
            lambda part, args, out, i=at[path]: out * self._factors[i])
            for path, _, up in pairs(task.module)]
        self.now: Parameters = {
            f"module.{n}": p.detach().clone().requires_grad_()
            for n, p in task.module.named_parameters() if ".lora_A." in n or ".lora_B." in n}

    def at(self, now: Mapping[str, torch.Tensor], found: torch.Tensor,
           batch: Batch) -> torch.Tensor:
        """Return the objective."""
        self._factors = self._weights(found)[self._layers]
        made: torch.Tensor = functional_call(self, dict(now), (batch,))
        return made

    def forward(self, batch: Batch) -> torch.Tensor:
        """The objective of the module as it is."""
        return self._objective(batch).total

    def stop(self) -> None:
        """Take the factors off."""
        for handle in self._handles:
            handle.remove()
