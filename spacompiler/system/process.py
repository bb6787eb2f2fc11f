"""Process-wide settings: one compile at a time, and every setting as it was afterwards.

Tracing changes what all threads share (warnings filters, levels of loggers, stderr, modes of
torch). Whatever does that stands in this file, and whoever calls it comes in by `alone`.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

_LOGGERS = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnxscript",
            "onnx_ir")
_LOCK = threading.RLock()


def _renew() -> None:
    """A child process has none of the threads that may hold the lock."""
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def alone() -> Iterator[None]:
    """Run while no other thread does, and put process-wide settings back afterwards.

    Another thread waits until this one is done; the same thread may come in again.
    """
    with _LOCK, warnings.catch_warnings():
        held = [(write, read()) for read, write in _settings()]
        collect_rarely()
        try:
            yield
        finally:
            for write, value in held:
                write(value)


def collect_rarely() -> None:
    """Let Python look for circles of garbage less often.

    A trace makes objects by the hundred thousand that stay; each look at all of them, and at all
    that torch imported, found nothing and took a tenth of a small compile.
    """
    gc.set_threshold(20_000, 10, 50)


def _settings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Yield (read, write) of every setting that a compile, or a library that it calls, changes."""
    yield lambda: (sys.stdout, sys.stderr), _set_streams
    yield gc.get_threshold, lambda was: gc.set_threshold(*was)
    yield lambda: dict(os.environ), _set_environment
    yield _folder, _set_folder
    yield _levels, _set_levels
    yield lambda: list(sys.path), lambda was: sys.path.__setitem__(slice(None), was)
    torch = sys.modules.get("torch")
    if torch is not None:
        yield torch.get_rng_state, torch.set_rng_state
        yield torch.get_num_threads, torch.set_num_threads
        yield torch.get_default_dtype, torch.set_default_dtype
        yield torch.is_grad_enabled, torch.set_grad_enabled
        yield torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled


def _set_streams(was: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = was


def _set_environment(was: dict[str, str]) -> None:
    if dict(os.environ) != was:
        os.environ.clear()
        os.environ.update(was)


def _folder() -> str | None:
    """The current folder; None where somebody removed it."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _set_folder(was: str | None) -> None:
    if was is not None and _folder() != was:
        os.chdir(was)


def _levels() -> list[tuple[logging.Logger, int, bool]]:
    """Every logger with its level, and whether it is disabled."""
    known = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return [(each, each.level, each.disabled) for each in known
            if isinstance(each, logging.Logger)]


def _set_levels(was: list[tuple[logging.Logger, int, bool]]) -> None:
    for logger, level, disabled in was:
        if logger.level != level:
            logger.setLevel(level)
        logger.disabled = disabled


_OURS = ("spacompiler", "contextlib")
"""Packages whose lines are not what a user is to be pointed to."""


@contextmanager
def no_warnings() -> Iterator[None]:
    """Let no warning be seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def at_level(names: tuple[str, ...], level: int) -> Iterator[None]:
    """Let some loggers speak from a level on only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(level)
        yield
    finally:
        for logger, was in zip(loggers, levels, strict=True):
            logger.setLevel(was)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and printed graphs off the user's terminal."""
    with at_level(_LOGGERS, logging.CRITICAL), unheard():
        yield


@contextmanager
def unheard() -> Iterator[None]:
    """Keep the warnings of a module's code, and what it writes to stderr, off the terminal."""
    with no_warnings(), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Let transformers show no progress bars for a while."""
    from transformers.utils import logging as shown

    was = shown.is_progress_bar_enabled()
    shown.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            shown.enable_progress_bar()


def warn_user(text: str) -> None:
    """Warn at the line of the user's code that led here, not at one of this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
