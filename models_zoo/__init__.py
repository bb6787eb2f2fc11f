"""Small example networks, and three real ones, that the tests and the command line load by name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

if __name__ != "spacompiler.models_zoo":
    raise ImportError(
        "the model zoo is part of the spacompiler package: import it as "
        f"'spacompiler.models_zoo', not as '{__name__}'"
    )

__all__ = ["load", "names"]


def names() -> list[str]:
    """Every model's name, read off the file names so that nothing heavy is imported."""
    modules = (info.name for info in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def load(name: str) -> ModuleType:
    """Import one model's module; an unknown name is a KeyError."""
    if name not in names():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
