"""A transformers model with fewer layers: the configuration that says so is found, as for widths.

No model is named here. Every integer of the config (or of a config inside it) that equals the
length of the list of blocks is a candidate, lists of that length lose the entries of the blocks
that go, and a candidate is right if the class built from it has the arrays that stay.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import SpaError
from ..torch_backend.emit import stock as hf
from ..torch_backend.kinds import Config, StockModel

Entry = tuple[tuple[str, ...], str]


def shorter(module: StockModel, paths: Sequence[str]) -> StockModel:
    """Return the model without some blocks, its arrays shared.

    Raises SpaError where no configuration has exactly the blocks that stay.
    """
    for parent in dict.fromkeys(p.rpartition(".")[0] for p in paths):
        gone = [int(p.rpartition(".")[2]) for p in paths if p.rpartition(".")[0] == parent]
        module = _without(module, parent, gone)
    return module


def _without(module: StockModel, parent: str, gone: Sequence[int]) -> StockModel:
    state = module.state_dict()
    size = len(module.get_submodule(parent)._modules)
    old = renumbered(state, parent, size, gone)
    shapes = {new: tuple(state[name].shape) for new, name in old.items()}
    problem = "no entry of it is the number of blocks"
    for config in _configs(module.config, size, gone):
        problem = hf.mismatch(module, config, shapes)
        if not problem:
            for key, value in hf.ties(module).items():
                setattr(config, key, value)
            frozen = hf.frozen(module)
            return hf.build(module, config, {new: state[name] for new, name in old.items()},
                            {new for new, name in old.items() if name in frozen})
    raise SpaError(f"no configuration describes {parent} without {len(gone)} of its {size} blocks",
                   where=type(module.config).__name__, why=problem,
                   fix="drop other blocks, or prune widths only")


def renumbered(names: Mapping[str, Any], parent: str, size: int,
               gone: Sequence[int]) -> dict[str, str]:
    """Return {name in the shorter network: name in this one} of the arrays that stay.

    >>> renumbered({"h.0.w": 0, "h.1.w": 0, "h.2.w": 0, "head": 0}, "h", 3, [1])
    {'h.0.w': 'h.0.w', 'h.1.w': 'h.2.w', 'head': 'head'}
    """
    numbers = {str(i): str(new) for new, i in enumerate(i for i in range(size) if i not in gone)}
    found = {}
    for name in names:
        if name.startswith(f"{parent}."):
            number, dot, rest = name[len(parent) + 1:].partition(".")
            if number not in numbers:
                continue
            found[f"{parent}.{numbers[number]}{dot}{rest}"] = name
        else:
            found[name] = name
    return found


def _configs(config: Config, size: int,
             gone: Sequence[int]) -> Iterator[Config | None]:
    """Yield configs with fewer layers, those with the least changes first."""
    entries = list(_entries(config, size))
    for count in range(1, len(entries) + 1):
        for chosen in itertools.islice(itertools.combinations(entries, count), hf.LIMIT):
            yield _changed(config, chosen, size, gone)


def _entries(config: object, size: int, at: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Where integers of this size stand: (names of the configs inside configs, key)."""
    for key, value in vars(config).items():
        if type(value) is int and value == size:
            yield at, key
        elif hasattr(value, "to_dict"):
            yield from _entries(value, size, (*at, key))


def _changed(config: Config, chosen: Sequence[Entry], size: int,
             gone: Sequence[int]) -> Config | None:
    """Return a copy with entries changed, and lists beside them shortened; None if refused."""
    made = copy.deepcopy(config)
    try:
        for at, key in chosen:
            part = made
            for name in at:
                part = getattr(part, name)
            for other, value in list(vars(part).items()):
                if isinstance(value, (list, tuple)) and len(value) == size:
                    kept = [v for i, v in enumerate(value) if i not in gone]
                    setattr(part, other, type(value)(kept))
            setattr(part, key, size - len(gone))
        made.validate() if hasattr(made, "validate") else None
    except Exception:  # a config validates what it is given in its own ways
        return None
    return made


