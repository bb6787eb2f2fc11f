"""How a device is written."""

from __future__ import annotations

import re

from ..errors import UsageError


def check_device(device: str) -> None:
    """Raise UsageError for what is no device; whether it is there is asked when it is used.

    >>> check_device("cuda:1")
    """
    if not re.fullmatch(r"auto|cpu|[a-z]\w*(:\d+)?", device):
        raise UsageError(f"cannot read device {device!r}",
                         fix="give auto, cpu, cuda, cuda:1 or mps")
