"""Which indices of each stored array are kept: what makes a plan checkable from files alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..stages.compiled import Compiled
from ..store.said import nameless
from . import recorded
from .cuts import cuts


def without_places(job: Compiled) -> Callable[[Any], Any]:
    """What takes the places of the user's files out of data: files keep their names."""
    r = job.recipe
    given = [job.name, r.inputs, r.calibration, r.recover_data, *(a.rpartition("=")[0] or a
                                                        for a in r.adapters), *r.adapters]
    passes = (r.importance, r.allocation, r.repair, r.recovery, r.schedule)
    given += [text.partition(":")[0] for text in (*passes, job.name)]
    return lambda data: nameless(data, given)


def plan_text(job: Compiled) -> str:
    """The plan as JSON, without places of the user's files."""
    return replace(job.plan, recipe=without_places(job)(job.plan.recipe)).to_json()


def slices(job: Compiled) -> dict[str, Any]:
    """Return, per stored array that changed, the kept indices of each dimension.

    Equal index lists are stored once; `null` keeps a whole dimension; arrays whose values were
    corrected besides (gains of RMSNorms) are listed with their factor, repaired and trained ones
    by name.
    `weights_hash` is that of the dense model, without the adapter if one was kept.
    """
    found = cuts(job.solution, job.choices, job.trace.tied)
    names = job.trace.tied or {name: name for name in job.trace.repaired}
    found["repaired"] = [name for name, first in names.items() if first in job.trace.repaired]
    sources = job.solution.graph.sources
    found["repaired"] += [name for folded in sorted(sources.keys() & {*job.trace.repaired})
                          for name in sources[folded]]
    found["weights_hash"] = job.base_hash or job.plan.weights_hash
    if job.trained is not None:
        body = getattr(job.pruned, "body", job.pruned)
        found["trained"] = sorted(name for name, problem in recorded.parts(
            body.state_dict(), job.module.state_dict(), {**found, "repaired": ()}) if problem)
    return found
