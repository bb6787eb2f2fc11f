"""How fast a long stage goes, and how long it will take still.

>>> pace = Pace(100, "tokens", clock=iter([0.0, 2.0]).__next__)
>>> pace(50)
'25 tokens/s, 0:02 left'
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Says of an amount that is done, of `total`, how many a second that is and what is left."""

    def __init__(self, total: float, unit: str,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._unit, self._clock = total, unit, clock
        self._began = clock()

    def __call__(self, done: float) -> str:
        """Return the rate, and the time left in minutes and seconds."""
        seconds = max(self._clock() - self._began, 1e-9)
        left = seconds / done * max(self._total - done, 0.0) if done else 0.0
        return f"{done / seconds:,.0f} {self._unit}/s, {int(left // 60)}:{int(left % 60):02d} left"
