"""Steps of a compile that are taken from a directory where an earlier run has finished them.

Kept are scores with the statistics behind them, counts, repaired arrays (layer by layer) and the
proof. All else follows from these and is done again: the artifact has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evidence import keeping
from ..evidence.scores import Scores
from ..repair.network import Repairable
from ..stages.proof import Proof
from ..stages.records import Request, Subject, Traced
from ..store.said import said
from ..store.work import Work
from ..torch_backend.gather.heads import Fitting
from .resolved import digest_of, resolved

OUTSIDE = {"onnx", "decoder", "int8", "int8_bits", "opset", "gguf", "shard_size", "latency",
           "prove"}
"""Options that say which files are made of a plan, and change none of what is kept."""


@contextmanager
def working(ask: Request, subject: Subject, traced: Traced) -> Iterator[Request]:
    """Give the request with the work that is kept for it, if that was asked for.

    Raises UsageError for a directory that is of another compile, or in use.
    """
    if ask.place is None:
        yield ask
        return
    work = Work(ask.place, _facts(ask, subject, traced))
    try:
        if ask.recovery is not None and ask.checkpoint is None:
            ask = replace(ask, checkpoint=training(ask))
        yield replace(ask, work=work)
    finally:
        ask.notes.extend(work.notes)
        work.close()


def training(ask: Request) -> Path | None:
    """Where kept work has the checkpoint of its training."""
    return ask.place and ask.place / "training"


def _facts(ask: Request, subject: Subject, traced: Traced) -> dict[str, str]:
    """What must be equal for kept work to be gone on with."""
    recipe = {name: value for name, value in resolved(ask, ask.importance).as_dict().items()
              if name not in OUTSIDE}
    groups = [(g.name, g.shape, [str(m) for m in g.members]) for g in traced.candidates]
    return {"spacompiler": version("spacompiler"), "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "weights": subject.backend.digest(subject.model),
            "recipe": json.dumps(recipe, sort_keys=True, default=said),
            "passes": said([ask.importance, ask.allocation, ask.compensation, ask.schedule]),
            "loss": said(ask.loss), "data": digest_of(ask.calibration),
            "groups": hashlib.sha256(said(groups).encode()).hexdigest()}


Found = Mapping[str, np.ndarray]


def scores(ask: Request, context: object, make: Callable[[], Found]) -> Found:
    """Return scores by group that are kept, their statistics put back, or make and keep them."""
    work = ask.work
    if work is None or not isinstance(context, Scores):
        return make()
    have = work.read("scores")
    if have is None:
        with _noted(ask) as notes:
            found = make()
        names = []
        for name, message in keeping.entries(context):
            work.write(name, message)
            names.append(name)
        work.write("scores", [((names, notes, getattr(ask.loss, "used", ())), []), *(
            (name, [torch.from_numpy(score)]) for name, score in found.items())])
        return found
    ((names, notes, used), _), *rest = have
    for name in names:
        entry = work.read(name)
        if entry is None:  # it is damaged
            work.forget("scores")
            keeping.clear(context)
            return scores(ask, context, make)
        keeping.restore(context, name, entry)
    ask.notes.extend(notes)
    if isinstance(ask.loss, Fitting):
        ask.loss.used[:] = used
    return {name: score.numpy().copy() for name, (score,) in rest}


def counts(ask: Request, make: Callable[[], tuple[dict[str, int], str]],
           ) -> tuple[dict[str, int], str]:
    """Return the counts and the layout that are kept, or make and keep them."""
    if ask.work is None:
        return make()
    have = ask.work.read("counts")
    if have is None:
        with _noted(ask) as notes:
            found, layout = make()
        ask.work.write("counts", [(json.dumps([found, layout, notes], default=int), [])])
        return found, layout
    found, layout, notes = json.loads(have[0][0])
    ask.notes.extend(notes)
    return found, layout


def repaired(ask: Request, network: Repairable, make: Callable[[Repairable], list[str]],
             ) -> list[str]:
    """Put repaired arrays that are kept into a network, or have them made and keep them.

    Returns notes for the user.
    """
    work = ask.work
    if work is None:
        return make(network)
    have = work.read("repaired")
    arrays = {} if have is None else {name: work.read(f"array {name}") for name in have[0][0][0]}
    if have is None or None in arrays.values():
        recorded = Recorded(network, work)
        notes = make(recorded)
        work.write("repaired", [((list(recorded.names), notes), [])])
        return notes
    for name, message in arrays.items():
        network.put(name, (message or [])[0][1][0].clone())
    return list(have[0][0][1])


class Recorded:
    """A network that keeps each array which is put into it."""

    def __init__(self, network: Repairable, work: Work) -> None:
        self._network, self.work, self.names = network, work, dict[str, None]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Let the network have another value of a stored array, and keep that."""
        self._network.put(name, value)
        self.names[name] = None
        self.work.write(f"array {name}", [(name, [value])])

    def known(self, node: str, arrays: list[str]) -> tuple[Any, list[torch.Tensor]] | None:
        """Return what an earlier run kept of a layer: how it was solved, and its arrays."""
        about = self.work.read(f"layer {node}")
        found = [] if about is None else [self.work.read(f"array {name}") for name in arrays]
        if about is None or None in found:
            return None
        return about[0][0], [message[0][1][0].clone() for message in found if message]

    def solved(self, node: str, about: object) -> None:
        """Keep how a layer was solved, once its arrays are put."""
        self.work.write(f"layer {node}", [(about, [])])


def proof(ask: Request, make: Callable[[], Proof]) -> Proof:
    """Return the proof that is kept, or make and keep one that holds."""
    if ask.work is None:
        return make()
    have = ask.work.read("proof")
    if have is not None:
        return Proof(**json.loads(have[0][0]))
    made = make()
    if made.holds:
        ask.work.write("proof", [(json.dumps(asdict(made)), [])])
    return made


@contextmanager
def _noted(ask: Request) -> Iterator[list[str]]:
    """Give the notes that the block adds, once it is done."""
    before, added = len(ask.notes), list[str]()
    yield added
    added.extend(ask.notes[before:])
