"""Experts that go are merged into experts that stay, the best of which are left as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from spacompiler.axes.choices import Choices
from spacompiler.errors import TargetError
from spacompiler.groups.solution import Group
from spacompiler.request import registry
from spacompiler.stages.records import Scheduling, Scored
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.run.observe import ProgramNetwork


@dataclass(frozen=True)
class MergeExperts:
    """W_k <- mean of W_k and the experts that it takes in, weighed by their scores.

    Partial-preservation merging (SlimQwen, arXiv 2605.08738, by its abstract): of the experts that
    stay, a share `preserve`, the best by `criterion`, are left alone; each one that goes is merged
    into the nearest of the others, by the cosine of all their weights. Routers are only cut. The
    neurons of experts are taken as they stand, in no other order.
    """

    name: ClassVar[str] = "merge-experts"
    criterion: str = "taylor"
    preserve: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.preserve < 1:
            raise TypeError("preserve is a share from 0 to below 1")

    def run(self, task: Scheduling) -> Scored:
        """Score and allocate as in one shot. Raises TargetError if no experts may go."""
        if not any(g.role == "expert" for g in task.candidates):
            raise TargetError("there are no experts to merge", where=self.name,
                              why="no group of experts may go", fix="add --role expert")
        importance = registry.find("importance", self.criterion)
        context = task.context or fresh_context(task.trace, task.solution, task.seed)
        if importance.needs:
            context.calibrate(importance.needs, task.calibration.batches, task.loss,
                              groups=task.candidates)
        scores = {g.name: torch.as_tensor(importance.score(g, context)).detach().double().numpy()
                  for g in task.candidates}
        counts, stock = task.allocate(task.candidates, scores)
        return Scored(importance, task.candidates, scores, counts, stock, context)

    def after(self, task: Scheduling, chosen: Choices) -> None:
        """Merge, in the program's arrays."""
        network = ProgramNetwork(task.trace)
        for group in task.candidates:
            if group.role != "expert" or group.atom not in chosen:
                continue
            kept = np.asarray(chosen[group.atom].table).reshape(-1)
            score = np.asarray(task.scores[group.name], dtype=float).reshape(-1)
            names = _arrays(task, group)
            into = nearest([network.stored(n) for n in names], kept, score, self.preserve)
            for name in names:
                network.put(name, merged(network.stored(name), into, score))
            task.notes.append(f"{group.name}: {len(set(into.values()))} experts take in "
                              f"{len(into)} that go")


def _arrays(task: Scheduling, group: Group) -> list[str]:
    """The stored arrays of a group that are looked up by expert, its axis first."""
    graph = task.solution.graph
    makers = {out: node for node in graph.nodes for out in node.outputs}

    def stored(name: str) -> Iterator[str]:
        weight, maker = graph.tensors[name].weight, makers.get(name)
        if weight is not None:
            yield weight
        elif maker is not None and graph.tensors[name].static:
            for ref in maker.refs():
                yield from stored(ref)

    found = dict.fromkeys(w for r in group.reads if r.how == "chosen" for w in stored(r.tensor))
    return [m.weight for m in group.members if m.dim == 0 and m.weight in found]


def nearest(arrays: Sequence[torch.Tensor], kept: np.ndarray, score: np.ndarray,
            preserve: float) -> dict[int, int]:
    """Return, for each expert that goes, the one that takes it in; arrays are (experts, ...)."""
    order = sorted(np.flatnonzero(kept).tolist(), key=lambda k: -score[k])
    open_ = order[min(round(preserve * len(order)), len(order) - 1):]
    rows = torch.cat([a.detach().double().flatten(1) for a in arrays], 1)
    rows = torch.nn.functional.normalize(rows, dim=1)
    return {int(e): open_[int((rows[open_] @ rows[e]).argmax())] for e in np.flatnonzero(~kept)}


def merged(array: torch.Tensor, into: dict[int, int], score: np.ndarray) -> torch.Tensor:
    """Return an array (experts, ...) in which experts have taken in what is merged into them."""
    weights = torch.from_numpy(np.maximum(score, 1e-12))  # equal where all are zero
    made = array.detach().clone()
    for k in set(into.values()):
        some = [k, *(e for e, at in into.items() if at == k)]
        share = (weights[some] / weights[some].sum()).reshape(-1, *[1] * (array.ndim - 1))
        made[k] = (share * array.detach()[some].double()).sum(0).to(array.dtype)
    return made
