"""Targets: what of which cost is to stay, as a share of the dense network's or as an amount.

>>> parse_targets("params=70%, latency@1x128=12ms")[1]
Target(metric='latency', amount=12.0, absolute=True, nearest=False, batch=1, length=128)
>>> parse_target("params~70%")
('params', 0.7)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UsageError, did_you_mean

METRICS = ("params", "body", "macs")
"""Costs that every report counts."""
_COUNT = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9,
          "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3}
UNITS: Mapping[str, Mapping[str, float]] = {
    "params": _COUNT, "body": _COUNT, "macs": _COUNT, "active": _COUNT,
    "bytes": _BYTES, "memory": _BYTES, "latency": _TIME}
"""What there is to aim at, and the units of its amounts; times are in milliseconds."""
SHAPED = ("memory", "latency")
"""Costs at a batch and a length, which `@BATCHxLENGTH` says."""
BATCH, LENGTH = 1, {"memory": 2048, "latency": 128}
FORM = ("write metric=share, e.g. params=70%, body=75% or macs=60%: the share that stays "
        "(params~70%: the nearest to it that can be reached); or an amount: latency@1x128=12ms, "
        "memory@1x2048=300MB, bytes=80MB; several with commas between: limits that all hold")


@dataclass(frozen=True)
class Target:
    """One limit: `amount` is a share of the dense network's cost, or `absolute`.

    Amounts are numbers, bytes or milliseconds; `batch` and `length` count for memory and latency.
    """

    metric: str
    amount: float
    absolute: bool = False
    nearest: bool = False
    batch: int = BATCH
    length: int = 0

    def of(self, dense: float) -> float:
        """The cost to meet, where the dense network has this one."""
        return self.amount if self.absolute else self.amount * dense


def parse_targets(text: object) -> tuple[Target, ...]:
    """Return the limits that a text names; raises UsageError for what is none."""
    if not isinstance(text, str):
        raise UsageError(f"a target is text, not {text!r}", fix=FORM)
    found = tuple(_target(part, text) for part in text.split(","))
    names = [t.metric for t in found]
    if len(set(names)) < len(names):
        raise UsageError(f"target {text!r} names a metric twice", fix=FORM)
    return found


def _target(part: str, text: str) -> Target:
    read = re.fullmatch(r"\s*(\w+)\s*(?:@\s*(\d+)\s*x\s*(\d+))?\s*([=~])\s*"
                        r"([-+]?\d*\.?\d*)\s*(%|[A-Za-z]*)\s*", part)
    if not read:
        raise UsageError(f"cannot read target {text!r}", fix=FORM)
    metric, batch, length, sign, number, unit = read.groups()
    if metric not in UNITS:
        raise UsageError(f"unknown metric {metric!r} in target {text!r}",
                         fix=did_you_mean(metric, UNITS))
    if batch and metric not in SHAPED:
        raise UsageError(f"target {text!r} has a shape",
                         why=f"{metric} does not depend on one", fix=FORM)
    if unit not in ("", "%") and unit not in UNITS[metric]:
        raise UsageError(f"unknown unit {unit!r} in target {text!r}",
                         fix=f"{metric} is in %, {', '.join(UNITS[metric])}")
    try:
        amount = float(number)
    except ValueError as problem:
        raise UsageError(f"cannot read target {text!r}", fix=FORM) from problem
    absolute = unit in UNITS[metric]
    amount = amount * UNITS[metric][unit] if absolute else amount / 100 if unit else amount
    if not (amount > 0 and (absolute or amount < 1)):
        raise UsageError(f"target {text!r} is out of range",
                         why="the share that stays must lie between 0% and 100%", fix=FORM)
    return Target(metric, amount, absolute, sign == "~", int(batch or BATCH),
                  int(length or LENGTH.get(metric, 0)))


def is_nearest(target: str) -> bool:
    """Whether the nearest share that can be reached will do (`params~70%`)."""
    return "~" in target


def parse_target(text: str) -> tuple[str, float]:
    """Return (metric, share that stays) of a target that is one share of what reports count.

    Raises UsageError for anything else.
    """
    found = parse_shares(text)
    if len(found) > 1:
        raise _no_share(text, "one share", "one of them")
    return found[0].metric, found[0].amount


def parse_shares(text: str) -> tuple[Target, ...]:
    """Return the limits of a target, each a share of what reports count.

    Raises UsageError for anything else.
    """
    found = parse_targets(text)
    if any(t.absolute or t.metric not in METRICS for t in found):
        raise _no_share(text, "one share" if len(found) == 1 else "made of shares", "these")
    return found


def _no_share(text: str, what: str, which: str) -> UsageError:
    return UsageError(f"target {text!r} is not {what} of {', '.join(METRICS)}",
                      why=f"this way of pruning goes by {which}", fix="write params=70%")
