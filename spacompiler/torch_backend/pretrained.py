"""A transformers model out of a local directory: whole, plain and finite, or an error.

Nothing is asked of the hub, no pickle is read, and no code of the checkpoint's runs unless trusted.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import WeightsError
from ..store import weight_files
from ..store.completeness import Report, listed, of_transformers, unsound, untied
from ..store.weight_files import Stored
from ..system.process import no_progress_bars
from .kinds import Config, StockModel

SPARE = 64
"""A network of more than so many times the stored numbers cannot be what was stored."""
LEAST = 2**24
"""Numbers that are few enough whatever is stored."""


class Loader(Protocol):
    """A class of models, or an automatic one that finds it."""

    def __call__(self, config: Config) -> nn.Module:
        """Make a model with the weights that its configuration draws."""

    def from_pretrained(self, folder: str, **options: object) -> Any:
        """Return a model with the weights of a directory, and what was found out on the way."""


def load(folder: Path, cls: Loader, config: Config, *, trust: bool = False,
         unused: Iterable[str] = ()) -> tuple[Any, Report]:
    """Return a model of a class with the weights of a directory, in eval mode, and what was found.

    Raises SpaError: arrays are missing, left over (but for those that `unused` names), of other
    shapes, not finite, or quantised in a way that cannot be undone here.
    """
    stored = weight_files.headers(folder)
    entries = weight_files.read(folder / weight_files.CONFIG)
    method = weight_files.quantisation(entries)
    weight_files.check_layers(entries, len(stored), str(folder))
    _check_size(cls, config, stored, folder)
    _ask_for_plain(config)
    module, report = _load(folder, cls, config, trust, stored, tuple(unused), method)
    report.check(f"the checkpoint is not that of a {type(module).__name__}", str(folder))
    module = _plain(module, folder, method)
    if name := unsound(module):
        raise WeightsError(f"weight {name} holds NaN or infinity", where=str(folder),
                       fix="use a checkpoint with finite weights")
    return module.eval(), report


def _load(folder: Path, cls: Loader, config: Config, trust: bool, stored: Mapping[str, Stored],
          unused: tuple[str, ...], method: str) -> tuple[Any, Report]:
    with no_progress_bars(), _heard() as said:
        try:
            module, info = cls.from_pretrained(
                str(folder), config=config, dtype="auto", trust_remote_code=trust,
                local_files_only=True, use_safetensors=True, ignore_mismatched_sizes=True,
                output_loading_info=True)
        except Exception as problem:  # transformers raises many kinds
            why = _first_line(problem)
            if torn := [line.split("|")[0].strip() for text in said
                        for line in text.splitlines() if "| CONVERSION" in line]:
                why = f"arrays of these cannot be put together, as some are missing or of other " \
                      f"shapes: {listed(torn)}"
            if method:
                raise weight_files.unread(folder, method, why) from problem
            raise WeightsError(f"cannot load {str(folder)!r} with transformers", why=why,
                           fix="give a directory whose config.json and weights belong together"
                           ) from problem
    return module, of_transformers(module, info, stored, unused)


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def _check_size(cls: Loader, config: Config, stored: Mapping[str, Stored],
                folder: Path) -> None:
    """Raise SpaError for a network so large that it cannot be what is stored."""
    if not hasattr(cls, "config_class"):  # an automatic class
        return
    try:
        with torch.device("meta"):
            made = cls(config)
    except Exception:  # loading says what is wrong
        return
    wanted, have = sum(p.numel() for p in made.parameters()), weight_files.elements(stored)
    if wanted > max(LEAST, SPARE * have):
        raise WeightsError("the configuration belongs to other weights", where=str(folder),
                       why=f"it describes {wanted:,} parameters, and {have:,} numbers are stored",
                       fix="copy the whole checkpoint")


def _ask_for_plain(config: Config) -> None:
    """Have quantised weights made plain while they load, where the method can."""
    said = getattr(config, "quantization_config", None)
    if isinstance(said, dict) and said:
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(said.get("quant_method")))
        if known is not None and "dequantize" in inspect.signature(known).parameters:
            config.quantization_config = {**said, "dequantize": True}


def _plain(module: StockModel, folder: Path, method: str) -> Any:
    """Return the module without quantised weights. Raises SpaError where they stay."""
    if getattr(module, "hf_quantizer", None) is None:
        return module
    try:
        return module.dequantize()
    except Exception as problem:  # each method raises its own kinds, most have none
        raise weight_files.unread(folder, method, f"it cannot be made plain: "
                                                  f"{_first_line(problem)}") from problem


def facts(folder: Path, module: StockModel, report: Report) -> tuple[dict[str, Any], list[str]]:
    """Return what a compile's report says of its source, and the notes that it calls for."""
    stored = weight_files.headers(folder)
    kinds = Counter(a.dtype for a in stored.values())
    method = weight_files.quantisation(weight_files.read(folder / weight_files.CONFIG))
    loaded = str(module.dtype).removeprefix("torch.")
    size = sum(file.stat().st_size for file in weight_files.weight_files(folder))
    data = {"class": type(module).__name__, "dtype": loaded, "stored": dict(sorted(kinds.items())),
            "bytes": size, "quantised": method, **report.as_dict()}
    notes = []
    floats = {k: n for k, n in kinds.items() if "float" in k and k != loaded}
    if method:
        notes.append(f"the checkpoint is quantised ({method}): it was made {loaded} again, and all "
                     f"shares are of that; as stored, its weights have {size:,} bytes")
    elif floats and loaded not in kinds:
        notes.append(f"the checkpoint is stored in {listed(sorted(floats))} and loaded in "
                     f"{loaded}, as its configuration says")
    if apart := untied(module):
        notes.append(f"the configuration ties {listed(sorted(apart))} to another array, and the "
                     "checkpoint holds two: the pruned model's says that they are not tied")
    if report.unused:
        notes.append(f"arrays of the checkpoint left out as of no use: {listed(report.unused)}")
    weighing = [n for n in report.ignored if stored[n].weighs]
    if weighing:
        notes.append(f"{type(module).__name__} reads no {listed(weighing)}: left out, as its class "
                     "says")
    return data, notes


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect what transformers says while it loads, in place of printing it: it is reported."""
    said: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(hear)
    try:
        yield said
    finally:
        logger.removeFilter(hear)
