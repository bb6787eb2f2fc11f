"""The uniform layout: a pruned Hugging Face model that stock transformers loads.

No model is named here. The configuration that gives the pruned shapes is *found*: every integer
of the config that equals a size that changed is a candidate, and a candidate is right if the
model class, built from it on the meta device, has exactly the pruned arrays' shapes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...axes.choices import Choices, kept_size
from ...axes.expressions import Expr, Prod, atoms, product, resolve
from ...errors import SpaError
from ...groups.solution import Solution
from ...plan.effects import norm_changes
from ...store.completeness import untied
from ...system.process import no_progress_bars
from ..kinds import Config, StockModel, Tokenizer
from . import stock_search as search
from .stock_search import Key

LIMIT = search.LIMIT


def uniform_config(module: StockModel, solution: Solution, choices: Choices,
                   shapes: Mapping[str, tuple[int, ...]]) -> Config | None:
    """Return the config of the pruned model.

    `shapes` are the pruned arrays' shapes by state-dict name. Raises SpaError where no stock
    config describes them (layers of unequal width, or a size that the config can't express).
    """
    problems = []
    floats = _changed_eps(module.config, solution, choices)
    for changes in search.candidates(
            module.config, _changed_sizes(solution, choices),
            lambda changes: len(_misfits(module, _changed(module.config, changes), shapes))):
        problem = mismatch(module, _changed(module.config, changes), shapes)
        if not problem:
            least: dict[Key, Any] = _least(module, changes, shapes)
            least.update(floats)
            least.update(ties(module))
            return _changed(module.config, least)
        problems.append(problem)
    raise SpaError(
        "no stock configuration describes the pruned shapes",
        where=type(module.config).__name__,
        why=problems[0] if problems else "no config entry has a size that changed",
        fix="prune the same number of slices in every layer (layout uniform), prune other roles, "
            "or save in layout any")


def ties(module: nn.Module) -> dict[str, bool]:
    """What a config must say besides, where it ties arrays that are two in the module."""
    return {"tie_word_embeddings": False} if untied(module) else {}


def _least(module: StockModel, changes: dict[Key, Any],
           shapes: Mapping[str, tuple[int, ...]]) -> dict[Key, Any]:
    """Take back every change that the shapes do not need: it only happened to have that size."""
    for key in list(changes):
        fewer = {k: v for k, v in changes.items() if k != key}
        if key != "head_dim" and not mismatch(module, _changed(module.config, fewer), shapes):
            changes = fewer
    return changes


def _changed(config: Config, changes: Mapping[Key, Any]) -> Config | None:
    """Return a copy of a config with entries changed, or None where it refuses them."""
    made = copy.deepcopy(config)
    try:
        search.put(made, changes)
        made.validate() if hasattr(made, "validate") else None
    except Exception:  # a config validates what it is given in its own ways
        return None
    return made


def fits(module: StockModel, tied: Mapping[str, str],
         solution: Solution) -> Callable[[Choices], bool]:
    """Return a function that says whether some stock config describes the model under choices."""
    def fit(choices: Choices) -> bool:
        try:
            uniform_config(module, solution, choices,
                           pruned_shapes(module, tied, solution, choices))
        except SpaError:
            return False
        return True

    return fit


def pruned_shapes(module: nn.Module, tied: Mapping[str, str], solution: Solution,
                  choices: Choices) -> dict[str, tuple[int, ...]]:
    """Return the shape of every state-dict entry under a plan."""
    dims = solution.weights()
    shapes = {}
    for name, tensor in module.state_dict().items():
        known = dims.get(tied.get(name, name))
        shapes[name] = tuple(tensor.shape) if known is None else \
            tuple(kept_size(e, choices) for e in known)
    return shapes


def _changed_sizes(solution: Solution, choices: Choices) -> dict[int, set[int]]:
    """Old size -> new sizes, of dimensions, of runs of factors and of atoms."""
    found: dict[int, set[int]] = {}
    for dims in solution.weights().values():
        for e in dims:
            if any(a in choices for a in atoms(e)):
                for part in _parts(e):
                    old, new = part.size, kept_size(part, choices)
                    if old != new:
                        found.setdefault(old, set()).add(new)
    return found


def _parts(e: Expr) -> Iterator[Expr]:
    """A dimension, its leading runs of factors, and everything inside."""
    e = resolve(e)
    yield e
    inner = getattr(e, "parts", ())
    if isinstance(e, Prod):
        for k in range(2, len(inner)):
            yield product(inner[:k])
    for part in inner:
        yield from _parts(part)


def _changed_eps(config: Config, solution: Solution, choices: Choices) -> dict[str, float]:
    new = {change.norm.eps: change.eps for change in norm_changes(solution, choices)
           if change.norm.power < 1}
    return {key: new[value] for key, value in config.to_dict().items()
            if isinstance(value, float) and value in new}


def frozen(module: nn.Module) -> set[str]:
    """Return the names of the parameters that no training is to change."""
    return {name for name, p in module.named_parameters(remove_duplicate=False)
            if not p.requires_grad}


def mismatch(module: nn.Module, config: Config | None,
             shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return "" if the model class built from a config has these shapes, else a difference."""
    return next(iter(_misfits(module, config, shapes)), "")


def _misfits(module: nn.Module, config: Config | None,
             shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return how the model class built from a config differs from these shapes."""
    none = [""] * (2 * len(shapes) + 1)
    if config is None:
        return ["the config refuses such sizes", *none]
    try:
        with torch.device("meta"):
            built = type(module)(config)
    except Exception as problem:
        return [f"{type(problem).__name__}: {problem}".splitlines()[0], *none]
    have = {name: tuple(t.shape) for name, t in built.state_dict().items()}
    found = [f"{name} would be {have.get(name, 'missing')}, not {shape}"
             for name, shape in shapes.items() if have.get(name) != shape]
    return found + [f"{name} would be added" for name in sorted(have.keys() - shapes.keys())]


def build(module: StockModel, config: Config | None, arrays: Mapping[str, torch.Tensor],
          frozen: Collection[str] = ()) -> StockModel:
    """Return a model of the same class with a new config and the given arrays, without copies.

    `frozen` names the parameters that no training is to change.
    """
    with torch.device("meta"):
        made = type(module)(config)
    made.load_state_dict({n: t.detach() for n, t in arrays.items()}, strict=True, assign=True)
    for name in frozen:
        made.get_parameter(name).requires_grad_(False)
    made.tie_weights()
    _revive_buffers(made, module)
    if getattr(module, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(module.generation_config)
    return made.train(module.training)


def _revive_buffers(made: nn.Module, module: nn.Module) -> None:
    """Buffers that no state dict holds (rotary frequencies) are taken over from the dense model."""
    old = dict(module.named_buffers())
    for name, tensor in list(made.named_buffers()):
        if tensor.device.type == "meta":
            if name not in old or old[name].shape != tensor.shape:
                raise SpaError(f"buffer {name} of the pruned model cannot be made",
                               why="it is not saved with the model and its size changed",
                               fix="do not prune the axis that it carries")
            parent, _, leaf = name.rpartition(".")
            made.get_submodule(parent)._buffers[leaf] = old[name].clone()


def save(model: StockModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write config, weights (safetensors) and tokenizer, deterministically.

    Code that a trusted checkpoint brought along does not go into what others are given, and nothing
    there names it.
    """
    with no_progress_bars():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for file in Path(folder).rglob("*.py"):
        file.unlink()
    config = Path(folder) / "config.json"
    entries = json.loads(config.read_text(encoding="utf-8"))
    if entries.pop("auto_map", None):
        config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
