"""Leave what is the user's as it was: attributes of the module, the terminal, random state."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from torch import nn

_LOGGERS = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnxscript",
            "onnx_ir")


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run in eval mode and put every attribute of every sub-module back afterwards.

    Modes, registered arrays and caches (fake tensors among them) return to what they were; of
    lists and dicts in attributes, their entries do.
    """
    before = [(part, {k: (v, _entries(v)) for k, v in vars(part).items()})
              for part in module.modules()]
    flags = [(p, p.requires_grad) for p in module.parameters()]
    module.eval()
    try:
        yield
    finally:
        for part, attributes in before:
            _restore(vars(part), attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _entries(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set) else None


def _restore(have: dict[str, Any], attributes: dict[str, tuple[Any, Any]]) -> None:
    for name in have.keys() - attributes.keys():
        del have[name]
    for name, (value, entries) in attributes.items():
        have[name] = value
        if entries is not None:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(entries)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and printed graphs off the user's terminal."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
