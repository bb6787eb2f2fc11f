"""One check of an artifact and its bound."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One check: `passed` is None where it could not be done, with the reason in `detail`."""

    name: str
    passed: bool | None
    detail: str
