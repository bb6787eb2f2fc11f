"""A loaded model and what came with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..evidence.calls import Inputs


@dataclass
class Source:
    """A loaded model: the module, example inputs, and what came with it.

    `calibration(n, seed)` yields example batches where the model brings its own; `kind` is one of
    `zoo`, `onnx`, `factory`, `directory`, `hub` and `module` (the user's own), `folder` where its
    files lie, `facts` and `notes` what a report says of it, `adapter` the directory that was named
    in place of the model that it belongs to; `sound`, that all its arrays were found finite.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    tokenizer: Any = None
    calibration: Callable[[int, int], Any] | None = field(default=None)
    kind: str = "module"
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    adapter: str = ""
    sound: bool = False
