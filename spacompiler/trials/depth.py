"""The step that drops whole blocks: which, and how many.

Blocks go one at a time. Each round looks at the few that change the hidden state least (block
influence, as ShortGPT has it: 1 - cosine between what a block reads and gives), bypasses each of
them in turn, and takes the one that moves the results least from the dense network's. `auto`
compiles the network without 0, 1, 2, 4, ... of them to the target, and takes what ends up nearest
to the dense network: blocks go where that is cheaper than widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import SpaError, TargetError, UsageError
from ..evidence.labels import inputs_only
from ..evidence.losses import distance, first_floating
from ..plan.problem import TOLERANCE
from ..request.recipe import parse_blocks, parse_target
from ..stages.records import Job
from ..torch_backend.weights import results
from . import blocks
from .measure import angles

SHORTLIST = 4
BATCHES = 4


def drop_blocks(job: Job, trial: Callable[[Job], Job]) -> None:
    """Take whole blocks out of the job's module, as its recipe asks.

    `trial(job)` compiles a copy of the job in memory, for `auto`.
    """
    from ..torch_backend.backend import TORCH

    if job.backend is not TORCH:
        raise SpaError("blocks can be dropped from a torch module only", where=job.name,
                       fix="drop them before exporting to ONNX, or give the module itself")
    known = blocks.removable(job.module, job.inputs)
    if not known:
        raise blocks.none_found(job.name)
    asked = parse_blocks(job.recipe.blocks)
    if isinstance(asked, tuple):
        blocks.check_paths(asked, known)
        _check_count(len(asked), known)
        chosen: Sequence[str] = asked
    elif asked is not None:
        _check_count(asked, known)
        chosen = order(job, known, asked)
    else:
        chosen = _cheapest(job, known, trial)
        if not chosen:
            job.notes.append("blocks: all stay, widths are cheaper")
            return
    _drop(job, chosen, known)


def _check_count(count: int, known: Sequence[str]) -> None:
    if count >= len(known):
        raise UsageError(f"cannot drop {count} blocks", where="blocks",
                         why=f"{len(known)} may go, and one must stay",
                         fix="drop fewer, or prune widths")


def _drop(job: Job, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Put the shorter network in the dense one's place, and note what the dense one costs."""
    from ..plan.plan import costs, pruned_bytes

    _, solution = job.backend.trace(job.module, job.inputs, True)
    places = {path: i for i, path in enumerate(known)}
    paths = sorted(chosen, key=places.__getitem__)
    made, dropped = blocks.drop(job.module, job.inputs, paths, known)
    job.whole = {metric: pair["dense"] for metric, pair in costs(solution, {}).items()}
    job.whole["bytes"] = pruned_bytes(solution, {})["dense"]
    job.dense, job.module, job.dropped = job.module, made, dropped
    job.notes.append(f"blocks dropped: {', '.join(paths)}; names below are those of the network "
                     "without them")


def order(job: Job, known: Sequence[str], count: int, first: Sequence[str] = ()) -> list[str]:
    """Return so many blocks in the order in which they should go; `first` are known to begin it."""
    batches = job.calibration.batches[:BATCHES]
    wanted = list(_results(job.module, batches))
    gone = list(first)
    for i in range(len(gone), count):
        job.progress("choosing blocks", i, count)
        left = [path for path in known if path not in gone]
        with blocks.bypassed(job.module, gone):
            influence = {p: 1 - cosine for p, (_, cosine) in
                         angles(job.module, left, batches).items()}
        near = sorted(influence, key=influence.__getitem__)[:SHORTLIST]
        if not near:
            raise blocks.none_found(job.name)
        gone.append(min(near, key=lambda p: _moved(job, (*gone, p), batches, wanted)))
    return gone


def _moved(job: Job, paths: Sequence[str], batches: Sequence[Any],
           wanted: Sequence[torch.Tensor]) -> float:
    """How far the results are from the dense network's without some blocks."""
    with blocks.bypassed(job.module, paths):
        return _distance(job.module, batches, wanted)


def _results(module: Any, batches: Sequence[Any]) -> Iterator[torch.Tensor]:
    for args, kwargs in batches:
        yield first_floating(results(module, args, inputs_only(module, kwargs)))


def _distance(module: Any, batches: Sequence[Any], wanted: Sequence[torch.Tensor]) -> float:
    found = zip(_results(module, batches), wanted, strict=True)
    return sum(float(distance(got, want)) for got, want in found) / len(wanted)


def _cheapest(job: Job, known: Sequence[str], trial: Callable[[Job], Job]) -> list[str]:
    """Return the blocks without which the compiled network is nearest to the dense one.

    The numbers tried double until twice in a row there is nothing gained, or too little is left.
    """
    batches = job.calibration.batches[:BATCHES]
    wanted = list(_results(job.module, batches))
    chosen: list[str] = []
    best, least, worse = 0, float("inf"), 0
    for count in (0, *_doubling(min(len(known) - 1, max(1, _most(job, known))))):
        chosen = order(job, known, count, chosen)
        job.progress(f"trying without {count} blocks", 0, 1)
        one = replace(job, recipe=replace(job.recipe, blocks="", prove=False, onnx=False,
                                          latency=False, recovery="", int8=False, decoder=False),
                      notes=[], scores={}, counts={}, choices={}, owned=False, recovery=None)
        try:
            if count:
                _drop(one, chosen[:count], known)
            moved = _distance(trial(one).pruned, batches, wanted)
        except TargetError:
            if count:
                break
            continue  # widths alone do not reach the target
        job.notes.append(f"blocks: without {count}, divergence {moved:.3g} from the dense network")
        if moved < least:
            best, least, worse = count, moved, 0
        else:
            worse += 1
        if worse == 2:
            break
    return chosen[:best]


def _doubling(most: int) -> Iterator[int]:
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def _most(job: Job, known: Sequence[str]) -> int:
    """How many blocks may go before less than the target is left (by parameters)."""
    share = parse_target(job.recipe.target)[1]
    sizes = [sum(p.numel() for p in job.module.get_submodule(path).parameters())
             for path in known]
    total = sum(p.numel() for p in job.module.parameters())
    return int((1 - share + TOLERANCE) * total // max(1, min(sizes)))
