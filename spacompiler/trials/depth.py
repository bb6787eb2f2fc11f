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

import torch
from torch import nn

from ..errors import SpaError, TargetError, UsageError
from ..evidence.calls import Batch
from ..evidence.labels import inputs_only
from ..evidence.losses import distance, first_floating
from ..plan.problem import MISS
from ..request.blocks import parse_blocks
from ..request.targets import parse_shares
from ..stages.records import Emitted, Request, Subject
from ..torch_backend.weights import results
from . import blocks
from .measure import angles

SHORTLIST = 4
BATCHES = 4


def drop_blocks(ask: Request, subject: Subject,
                trial: Callable[[Request, Subject], Emitted]) -> Subject:
    """Take whole blocks out of the subject's module, as the recipe asks.

    `trial(ask, subject)` compiles in memory, for `auto`.
    """
    from ..torch_backend.backend import TORCH

    if subject.backend is not TORCH:
        raise SpaError("blocks can be dropped from a torch module only", where=ask.name,
                       fix="drop them before exporting to ONNX, or give the module itself")
    known = blocks.removable(subject.model, subject.inputs)
    if not known:
        raise blocks.none_found(ask.name)
    asked = parse_blocks(ask.recipe.blocks)
    if isinstance(asked, tuple):
        blocks.check_paths(asked, known)
        _check_count(len(asked), known)
        chosen: Sequence[str] = asked
    elif asked is not None:
        _check_count(asked, known)
        chosen = order(ask, subject.model, known, asked)
    else:
        chosen = _cheapest(ask, subject, known, trial)
        if not chosen:
            ask.notes.append("blocks: all stay, widths are cheaper")
            return subject
    return _without(ask, subject, chosen, known)


def _check_count(count: int, known: Sequence[str]) -> None:
    if count >= len(known):
        raise UsageError(f"cannot drop {count} blocks", where="blocks",
                         why=f"{len(known)} may go, and one must stay",
                         fix="drop fewer, or prune widths")


def _without(ask: Request, subject: Subject, chosen: Sequence[str],
             known: Sequence[str]) -> Subject:
    """Put the shorter network in the dense one's place, and note what the dense one costs."""
    from ..plan.plan import costs, pruned_bytes

    _, solution = subject.backend.trace(subject.model, subject.inputs, True)
    places = {path: i for i, path in enumerate(known)}
    paths = sorted(chosen, key=places.__getitem__)
    made, dropped = blocks.drop(subject.model, subject.inputs, paths, known)
    whole = {metric: pair["dense"] for metric, pair in costs(solution, {}).items()}
    whole["bytes"] = pruned_bytes(solution, {})["dense"]
    ask.notes.append(f"blocks dropped: {', '.join(paths)}; names below are those of the network "
                     "without them")
    return replace(subject, dense=subject.model, model=made, dropped=dropped, whole=whole)


def order(ask: Request, module: nn.Module, known: Sequence[str], count: int,
          first: Sequence[str] = ()) -> list[str]:
    """Return so many blocks in the order in which they should go; `first` are known to begin it."""
    batches = ask.calibration.batches[:BATCHES]
    wanted = list(_results(module, batches))
    gone = list(first)
    for i in range(len(gone), count):
        ask.tell("choosing blocks", i, count)
        left = [path for path in known if path not in gone]
        with blocks.bypassed(module, gone):
            influence = {p: 1 - cosine for p, (_, cosine) in
                         angles(module, left, batches).items()}
        near = sorted(influence, key=influence.__getitem__)[:SHORTLIST]
        if not near:
            raise blocks.none_found(ask.name)
        gone.append(min(near, key=lambda p: _moved(module, (*gone, p), batches, wanted)))
    return gone


def _moved(module: nn.Module, paths: Sequence[str], batches: Sequence[Batch],
           wanted: Sequence[torch.Tensor]) -> float:
    """How far the results are from the dense network's without some blocks."""
    with blocks.bypassed(module, paths):
        return _distance(module, batches, wanted)


def _results(module: nn.Module, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
    for args, kwargs in batches:
        yield first_floating(results(module, args, inputs_only(module, kwargs)))


def _distance(module: nn.Module, batches: Sequence[Batch], wanted: Sequence[torch.Tensor]) -> float:
    found = zip(_results(module, batches), wanted, strict=True)
    return sum(float(distance(got, want)) for got, want in found) / len(wanted)


def _cheapest(ask: Request, subject: Subject, known: Sequence[str],
              trial: Callable[[Request, Subject], Emitted]) -> list[str]:
    """Return the blocks without which the compiled network is nearest to the dense one.

    The numbers tried double until twice in a row there is nothing gained, or too little is left.
    """
    batches = ask.calibration.batches[:BATCHES]
    wanted = list(_results(subject.model, batches))
    chosen: list[str] = []
    best, least, worse = 0, float("inf"), 0
    for count in (0, *_doubling(min(len(known) - 1, max(1, _most(ask, subject.model, known))))):
        chosen = order(ask, subject.model, known, count, chosen)
        ask.tell(f"trying without {count} blocks", 0, 1)
        one = replace(ask, notes=[], recovery=None, recipe=replace(
            ask.recipe.unexported(), blocks="", prove=False, recovery=""))
        shorter = replace(subject, owned=False)
        try:
            if count:
                shorter = _without(one, shorter, chosen[:count], known)
            moved = _distance(trial(one, shorter).model, batches, wanted)
        except TargetError:
            if count:
                break
            continue  # widths alone do not reach the target
        ask.notes.append(f"blocks: without {count}, divergence {moved:.3g} from the dense network")
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


def _most(ask: Request, module: nn.Module, known: Sequence[str]) -> int:
    """How many blocks may go before less than the target is left (by parameters)."""
    share = min(limit.amount for limit in parse_shares(ask.recipe.target))
    sizes = [sum(p.numel() for p in module.get_submodule(path).parameters())
             for path in known]
    total = sum(p.numel() for p in module.parameters())
    return int((1 - share + MISS) * total // max(1, min(sizes)))
