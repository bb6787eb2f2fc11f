"""A training's checkpoint: one safetensors file, replaced whole, that resumes to the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import SpaError, UsageError
from ..system.staging import sync


@dataclass
class Run:
    """Where a training stands; everything in it is in the checkpoint."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    worse: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


FILE = "training.safetensors"


class Checkpoint:
    """Trained arrays, the best ones so far, Adam's moments, the random state and the history.

    The file says the sha256 of what it holds. One that is damaged is an error, or, with `damaged`,
    counts as not there once that was told why.
    """

    def __init__(self, folder: Path | None, key: str,
                 damaged: Callable[[str], None] | None = None) -> None:
        self._folder, self._key, self._damaged = folder, key, damaged

    def save(self, run: Run, state: Mapping[str, torch.Tensor], best: Mapping[str, torch.Tensor],
             optimizer: torch.optim.Optimizer, parameters: Mapping[str, Any]) -> None:
        """Write the file; the one before stays whole until it is replaced."""
        if self._folder is None:
            return
        tensors = {f"now.{n}": t for n, t in state.items()}
        tensors |= {f"best.{n}": t for n, t in best.items()}
        tensors |= {f"adam.{key}.{n}": value for n, p in parameters.items()
                    for key, value in optimizer.state[p].items()}
        tensors["random"] = torch.get_rng_state()
        tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        facts = json.dumps({"key": self._key, "run": asdict(run)})
        part = self._folder / f"{FILE}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(_apart(tensors), part,
                      metadata={"training": facts, "sha256": _sha(facts, tensors)})
            sync(part)
            os.replace(part, self._folder / FILE)
            sync(self._folder)
        except OSError as problem:
            raise UsageError("the checkpoint cannot be written", where=str(self._folder),
                             why=str(problem)) from problem

    def found(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Return what the file holds, if there is one: facts and arrays.

        Raises SpaError if it is damaged or of another run.
        """
        if self._folder is None or not (self._folder / FILE).exists():
            return None
        try:
            facts, tensors = _read(self._folder / FILE)
        except Exception as problem:  # safetensors raises its own kinds
            if self._damaged is not None:
                self._damaged(f"{FILE} of the kept work is damaged, and training began anew: "
                              f"{str(problem).splitlines()[0]}")
                return None
            raise SpaError("the checkpoint cannot be read", where=str(self._folder),
                           why=str(problem), fix="delete it to start anew") from problem
        if facts["key"] != self._key:
            raise SpaError("the checkpoint is of another run", where=str(self._folder),
                           why="the plan, the data, the weights or the options differ",
                           fix="give the same options again, or another --checkpoint directory")
        return facts, tensors

    @staticmethod
    def put(found: tuple[dict[str, Any], dict[str, torch.Tensor]] | None, run: Run,
            state: Mapping[str, torch.Tensor], best: dict[str, torch.Tensor],
            optimizer: torch.optim.Optimizer, parameters: Mapping[str, Any]) -> None:
        """Continue a run, if one was found."""
        if found is None:
            return
        facts, tensors = found
        for name, value in facts["run"].items():
            setattr(run, name, value)
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[f"now.{name}"])
                best[name].copy_(tensors[f"best.{name}"])
        for name, p in parameters.items():
            held = {key: _beside(p, key, tensors[f"adam.{key}.{name}"])
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"adam.{key}.{name}" in tensors}
            if held:  # none of what was frozen when it was saved
                optimizer.state[p] = held
        torch.set_rng_state(tensors["random"].clone())  # torch reads a part from the whole's start


def _read(place: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what a file says and its arrays; raises an error if its hash is another."""
    with safe_open(place, "pt") as file:
        about = file.metadata() or {}
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    if about.get("sha256") != _sha(about["training"], tensors):
        raise ValueError("its hash is another")
    return json.loads(about["training"]), tensors


def _sha(facts: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Arrays none of which shares memory with another: tied ones as copies."""
    seen, found = set[int](), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if start in seen else tensor
        seen.add(start)
    return found


def _beside(p: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
    """A moment on the device of its parameter; Adam counts steps on the processor."""
    return value if key == "step" else value.to(p.device)
