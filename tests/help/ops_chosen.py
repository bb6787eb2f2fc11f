"""Cases of routers: scores along an axis, the best chosen, positions that look things up.

Scores are negative: one that is removed would be the best of all if it read zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ops_case import Case, aten

Tensor = torch.Tensor


def top(x: Tensor, k: int = 2, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The best of every row, all values negative."""
    values, positions = aten.topk(x - 1, k, **kwargs)
    return values, positions


def looked_up(x: Tensor, w: Tensor) -> Tensor:
    values, positions = top(x)
    return aten.index(w, [positions]) * values.unsqueeze(-1)


def softly(name: str, *args: Any) -> Any:
    """Chosen by probabilities, which gather reads again."""
    def call(x: Tensor) -> Tensor:
        scores = getattr(aten, name)(x - 1, 1, *args)
        return aten.gather(scores, 1, aten.topk(scores, 2)[1])

    return call


def counted(x: Tensor) -> Tensor:
    chosen = aten.sort(aten.reshape(top(x)[1], [-1]))[0]
    return aten.histc(chosen.double(), x.shape[1], 0, x.shape[1] - 1)


def ended(x: Tensor) -> Tensor:
    return aten.cumsum(counted(x), 0)


def routed(x: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """Rows by the expert that they go to, each with its matrix."""
    chosen, order = aten.sort(aten.reshape(top(scores)[1], [-1]))
    counts = aten.histc(chosen.double(), scores.shape[1], 0, scores.shape[1] - 1)
    ends = aten.cumsum(counts, 0, dtype=torch.int32)
    rows = aten.index(x, [aten.floor_divide(order, 2)])
    return torch.ops.transformers.grouped_mm_fallback(rows, weights, ends)


def marked(x: Tensor) -> Tensor:
    """One where a position was chosen."""
    return aten.scatter(aten.zeros_like(x), 1, top(x)[1], 1.0) * x


def chosen_cases() -> Iterator[Case]:
    for name, *args in (("softmax",), ("_softmax", False), ("log_softmax",),
                        ("_log_softmax", False), ("_safe_softmax",)):
        yield Case(name, softly(name, *args), ((3, 5),), "**")
    yield Case("topk", looked_up, ((3, 5), (5, 4)), ".* **")
    yield Case("index", looked_up, ((4, 4), (4, 4)), ".* **")
    yield Case("topk", lambda x, w: aten.index(w, [top(x, 2, dim=0)[1]]), ((5, 3), (5, 4)), "*. **")
    yield Case("gather", lambda x, w: aten.gather(w, 1, top(x)[1]), ((3, 5), (3, 5)), "** **")
    yield Case("scatter", marked, ((3, 5),), "**")
    yield Case("histc", counted, ((3, 5),), ".*")
    yield Case("cumsum", ended, ((3, 5),), ".*")
    yield Case("transformers.grouped_mm_fallback", routed, ((3, 4), (3, 5), (5, 4, 6)),
               ".* .* ***")
    yield from frozen_cases()


def frozen_cases() -> Iterator[Case]:
    """What is no choice of the best, or does more with positions than look things up."""
    yield Case("topk", lambda x: aten.gather(x, 1, top(x, largest=False)[1]), ((3, 5),), "*.")
    yield Case("topk", lambda x: aten.gather(x, 1, top(x, 5)[1]), ((3, 5),), "*.")
    yield Case("topk", lambda x: aten.gather(x, 1, top(x)[1]) + top(x)[1], ((3, 5),), "*.")
    yield Case("topk", lambda x: aten.gather(x, 1, aten.remainder(top(x)[1] + 1, 5)),
               ((3, 5),), "*.")
    yield Case("topk", lambda x: aten.eq(top(x)[1], 1), ((3, 5),), "*.")
    yield Case("topk", lambda x: top(x.reshape(3, 6))[1].sin(), ((3, 2, 3),), "*..")
    yield Case("topk", lambda x, w: aten.gather(x, 1, top(x)[1]).sum() + (x + w.reshape(6)).sin(),
               ((3, 6), (2, 3)), "*. ..")
    yield Case("softmax", lambda x, w: aten.gather(x, 1, top(x)[1]).sum() + aten.softmax(w, 1),
               ((3, 5), (4, 4)), "** *.")
    yield Case("histc", lambda x: aten.histc(top(x)[1].double(), 4, 0, 4), ((3, 5),), "..")
    yield Case("histc", lambda x: aten.histc(x, 4, 0, 3), ((3, 5),), "..")
