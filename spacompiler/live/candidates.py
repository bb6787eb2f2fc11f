"""Which groups may go while a model trains, and how they score as they are now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from spacompiler.errors import SpaError, TargetError
from spacompiler.evidence.protocol import Importance
from spacompiler.groups.solution import Group, Solution
from spacompiler.live.adapter_step import adapter_arrays
from spacompiler.live.kept import Kept
from spacompiler.live.sites import MASKED, Site, sites
from spacompiler.live.watch import Watch
from spacompiler.plan import legal
from spacompiler.request.recipe import Recipe
from spacompiler.torch_backend.trace import Trace


def candidates(model: nn.Module, dense: Solution, recipe: Recipe, notes: list[str]) -> list[Group]:
    """Return the groups that a recipe lets go and that masks can remove; notes name the others.

    Raises TargetError if there is none.
    """
    own = adapter_arrays(model)
    found = [g for g in legal.candidates(
        dense, roles=recipe.roles, only=recipe.only, ignore=recipe.ignore,
        approximate=recipe.approximate) if not all(m.weight in own for m in g.members)]
    scored = [g.name for g in found if any(read.how == "score" for read in g.reads)]
    notes += [f"{name} stays: {MASKED}" for name in scored]
    found = [g for g in found if g.name not in scored]
    if not found:
        raise TargetError("nothing to prune", where=type(model).__name__,
                          why=notes[-1] if scored else
                          f"no group has a role in {list(recipe.roles)}",
                          fix="see `spacompiler.inspect`; let more go with roles or only")
    return found


def read_by_modules(model: nn.Module, trace: Trace, solution: Solution, groups: list[Group],
                    measure: str, notes: list[str]) -> tuple[list[Site], list[Group]]:
    """Return where modules read groups, and the groups that some module reads.

    Notes name the others, which the pass called `measure` cannot see. Raises TargetError if there
    are no groups but those.
    """
    found = sites(model, trace, solution, groups)
    seen = {name for site in found for name, _ in site.reads}
    notes += [f"{g.name} stays: no module reads it as its first argument, where "
              f"{measure} would measure it (taylor-element can)"
              for g in groups if g.name not in seen]
    left = [g for g in groups if g.name in seen]
    if not left:
        raise TargetError("nothing to prune", why=notes[0],
                          fix="use importance='taylor-element' (gradients of weights)")
    return found, left


def average(averages: dict[str, np.ndarray], found: Mapping[str, np.ndarray],
            ema: float) -> bool:
    """Let moving averages take in scores: S <- ema * S + (1 - ema) * score, S = 0 at first.

    False, and nothing is taken in, if a score is not finite (as after a step that overflowed).
    """
    if not all(np.isfinite(score).all() for score in found.values()):
        return False
    for name, score in found.items():
        averages[name] = ema * averages.get(name, 0.0) + (1 - ema) * score
    return True


def measured(importance: Importance, watch: Watch, groups: Iterable[Group],
             kept: Kept) -> dict[str, np.ndarray]:
    """Score groups as they are now: by name, in the dense shape, removed slices zero.

    Raises SpaError for a group without gradients, or a pass that gives no valid scores.
    """
    found = {}
    for group in groups:
        if watch.blind(group):
            raise SpaError(f"all weights of {group.name} are frozen or have no gradient",
                           why=f"{importance.name} needs gradients of weights",
                           fix="use importance='taylor' (gradients at activations)")
        score = torch.as_tensor(importance.score(group, watch)).detach().double()
        if tuple(score.shape) != group.shape:
            raise SpaError(f"importance pass {importance.name!r} gave no valid scores",
                           why=f"shape {tuple(score.shape)} for {group.shape}")
        found[group.name] = kept.scatter(group.name, score.cpu().numpy())
    return found
