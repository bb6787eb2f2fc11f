"""Scales: one factor of each slice that stays, learned under the mask and folded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..axes.choices import Choices
from ..evidence.calls import Batch
from ..stages.records import Scheduling
from ..torch_backend.run.observe import ProgramNetwork
from .beside import Beside
from .folding import fold, scalable
from .network import Gated
from .objective import Aim

REACH = 0.5


def learn_scales(gated: Gated, chosen: Choices, aim: Aim, batches: Iterator[Batch],
                 task: Scheduling, *, steps: int, lr: float, trains: Beside) -> None:
    """Learn 1 + 0.5 tanh(phi) of each slice that can be scaled, by Adam, and fold it.

    The network is the program as it stands, under the masks of a plan (GRASPrune's second stage,
    arXiv 2604.19398); what `trains` beside is put into it, too.
    """
    able = scalable(gated)
    phi = {g.name: torch.zeros(g.shape, requires_grad=True) for g in gated.groups
           if g.name in able}
    if not phi and not trains.parameters:
        task.notes.append("no factors were learned: no slice is read by weights of its own alone")
        return
    kept = {g.name: torch.from_numpy(chosen[g.atom].table).reshape(g.shape).float()
            if g.atom in chosen else torch.ones(g.shape) for g in gated.groups}
    optimizer = torch.optim.Adam([*phi.values(), *trains.parameters.values()], lr=lr,
                                 betas=(0.9, 0.98))
    losses = []

    def scales() -> dict[str, torch.Tensor]:
        return {n: z * (1 + REACH * torch.tanh(phi[n])) if n in phi else z
                for n, z in kept.items()}

    for step in range(steps):
        given = gated.trace.labelled(*next(batches))
        loss = aim(gated.call(given, scales(), choices=chosen, weights=trains.weight), given)
        (loss + trains.term()).backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        task.tell(f"learning factors, loss {losses[-1]:.3f}", step + 1, steps)
    with torch.no_grad():
        network = ProgramNetwork(gated.trace)
        for name, value in trains.trained().items():
            network.put(name, value)
        fold(gated, network, scales())
    few = max(1, steps // 10)
    first, last = np.mean(losses[:few]), np.mean(losses[-few:])
    task.notes.append(f"factors of what stays: {steps} steps, objective {first:.3f} at first, "
                      f"{last:.3f} at the end")
