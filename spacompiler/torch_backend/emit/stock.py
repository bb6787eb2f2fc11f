"""The uniform layout: a pruned Hugging Face model that stock transformers loads.

No model is named here. The configuration that gives the pruned shapes is *found*: every integer
of the config that equals a size that changed is a candidate, and a candidate is right if the
model class, built from it on the meta device, has exactly the pruned arrays' shapes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...axes.choices import Choices, kept_size
from ...axes.expressions import Expr, Prod, atoms, product, resolve
from ...errors import SpaError
from ...groups.solution import Solution
from ...plan.effects import norm_changes
from ...store import tensors_file
from ...store.completeness import untied
from ...system.process import no_progress_bars
from ..kinds import Config, StockModel, Tokenizer
from ..own_layers import FILE, OwnSizes
from . import stock_search as search
from .stock_search import Key
from .stock_shapes import UNSAVED, Shapes, built, made_shapes

LIMIT = search.LIMIT


def uniform_config(module: StockModel, solution: Solution, choices: Choices,
                   shapes: Shapes) -> Config | None:
    """Return the config of the pruned model.

    `shapes` are the pruned arrays' shapes by state-dict name. Raises SpaError where no stock config
    describes them (layers of unequal width, or a size that the config can't express).
    """
    wrong, sizes = _asking(module, shapes), changed_sizes(solution, choices)
    every = dict.fromkeys(key for entries in built(module).likely for key in entries)
    guess = search.alike(module.config, every, sizes)
    said = search.least(guess, lambda some: not wrong(some)) if guess and not wrong(guess) else \
        _said(module, sizes, wrong)
    return changed(module.config, {**said, **besides(module, solution, choices)})


Wrong = Callable[[Mapping[Key, Any]], list[str]]
"""How what a config with changed entries makes differs from the shapes that are wanted."""


def _asking(module: StockModel, shapes: Shapes) -> Wrong:
    known, buffers = built(module), unsaved(module)

    def wrong(changes: Mapping[Key, Any]) -> list[str]:
        config = changed(module.config, changes)
        return differing(None if config is None else known.shapes(config), shapes, buffers)

    return wrong


def _said(module: StockModel, sizes: Mapping[int, set[int]], wrong: Wrong) -> dict[Key, Any]:
    """Return the entries that say new sizes, by the old ones; raises SpaError if none do."""
    problems = []
    for changes in search.candidates(module.config, sizes, lambda changes: len(wrong(changes))):
        problem = next(iter(wrong(changes)), "")
        if not problem:
            return search.least(changes, lambda some: not wrong(some))
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


def besides(module: StockModel, solution: Solution, choices: Choices) -> dict[Key, Any]:
    """Return what a config must say beside sizes: epsilons that changed, ties that are none."""
    said: dict[Key, Any] = {}
    said.update(_changed_eps(module.config, solution, choices))
    said.update(ties(module))
    return said


def changed(config: Config, changes: Mapping[Key, Any]) -> Config | None:
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
    """Return a function that says whether some stock config describes the model under choices.

    Entries that said other choices are tried first.
    """
    likely = built(module).likely

    def fit(choices: Choices) -> bool:
        wrong = _asking(module, pruned_shapes(module, tied, solution, choices))
        sizes = changed_sizes(solution, choices)
        guesses = (search.alike(module.config, entries, sizes) for entries in likely)
        if any(guess and not wrong(guess) for guess in guesses):
            return True
        try:
            likely.append(_said(module, sizes, wrong))
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


def changed_sizes(solution: Solution, choices: Choices,
                  names: Collection[str] | None = None) -> dict[int, set[int]]:
    """Return old size -> new sizes, of dimensions, of runs of factors and of atoms.

    `names` are the arrays that count; all do where there are none.
    """
    found: dict[int, set[int]] = {}
    for name, dims in solution.weights().items():
        for e in dims if names is None or name in names else ():
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
    return next(iter(misfits(type(module), config, shapes, unsaved(module))), "")


def unsaved(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of buffers that no file holds (rotary frequencies), by name."""
    held = module.state_dict().keys()
    return {n: tuple(t.shape) for n, t in module.named_buffers() if n not in held}


def misfits(cls: Callable[..., nn.Module], config: Config | None, shapes: Shapes,
            buffers: Shapes | None = None) -> list[str]:
    """Return how a model class built from a config differs from these shapes.

    `buffers` that no file holds must keep their size: they tell a head's width apart where arrays
    say heads times width alone.
    """
    return differing(None if config is None else made_shapes(cls, config), shapes, buffers)


def differing(have: Shapes | str | None, shapes: Shapes, buffers: Shapes | None) -> list[str]:
    """Return how shapes differ from those wanted: None where a config refuses such sizes, or what
    building a model raised."""
    none = [""] * (2 * len(shapes) + 1)
    if have is None:
        return ["the config refuses such sizes", *none]
    if isinstance(have, str):
        return [have, *none]
    found = [f"{name} would be {have.get(name, 'missing')}, not {shape}"
             for name, shape in shapes.items() if have.get(name) != shape]
    found += [f"{name} would be added" for name in sorted(have.keys() - shapes.keys())
              if not name.startswith(UNSAVED)]
    return found + [f"{name} would be {have[UNSAVED + name]}, not {shape}"
                    for name, shape in (buffers or {}).items()
                    if have.get(UNSAVED + name, shape) != shape]


def build(module: StockModel, config: Config | None, arrays: Mapping[str, torch.Tensor],
          frozen: Collection[str] = (), cls: Callable[..., StockModel] | None = None) -> StockModel:
    """Return a model of the same class with a new config and the given arrays, without copies.

    `frozen` names the parameters that no training is to change; `cls` is another class than the
    model's, with arrays of the same names.
    """
    with torch.device("meta"):
        made = (cls or type(module))(config)
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


@contextmanager
def _array_by_array() -> Iterator[None]:
    """Let transformers write files of weights with no more than one array of them in memory.

    What it is given by the library, it holds until a whole file is written.
    """
    from transformers import modeling_utils

    name = "safe_save_file"
    was = getattr(modeling_utils, name, None)
    if was is not None:
        setattr(modeling_utils, name, tensors_file.write)
    try:
        yield
    finally:
        if was is not None:
            setattr(modeling_utils, name, was)


def save(model: StockModel, folder: str | Path, tokenizer: Tokenizer | None = None,
         shard: int | None = None) -> None:
    """Write config, weights (safetensors) and tokenizer, deterministically.

    No file of weights has more than `shard` bytes (but for one array), if that is given.

    Code that a trusted checkpoint brought along does not go into what others are given, and nothing
    there names it; the one file of code is that of a model whose layers are built one by one.
    """
    sizes = {} if shard is None else {"max_shard_size": shard}
    with no_progress_bars(), _array_by_array():
        model.save_pretrained(folder, **sizes)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    own = isinstance(model, OwnSizes)
    for file in Path(folder).rglob("*.py"):
        if not own or file != Path(folder) / FILE:
            file.unlink()
    config = Path(folder) / "config.json"
    entries = json.loads(config.read_text(encoding="utf-8"))
    if not own and entries.pop("auto_map", None):
        config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
