"""What a network says of itself before anything goes: silent units, uneven slices, large scores.

Of each group: how many of its slices no consumer ever reads anything but zero of, which share of
reads is zero (AP's dynamic rate of dead neurons), and the PQ index of its slices' norms: near 0
where all are alike, near 1 where a few hold everything. Of each attention: the largest entries of
queries and keys, which theory sets against the root of the logarithm of the length.

>>> round(pq_index(np.array([1.0, 1.0, 1.0, 1.0])), 6), pq_index(np.array([1.0, 0.0, 0.0, 0.0]))
(0.0, 0.75)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any

import numpy as np
import torch

from ..graph.ir import Graph, Node
from ..groups.solution import Group
from .calls import Batch
from .losses import default_loss
from .scores import Scores

SPREAD, SUM = 0.5, 1.0
"""The powers p < q of the index: those of the paper's experiments."""
ATTENTION = ("aten.scaled_dot_product_attention", "Attention", "com.microsoft.MultiHeadAttention",
             "com.microsoft.GroupQueryAttention")
"""Operators that read queries and keys as their first two arguments."""


def pq_index(values: np.ndarray, p: float = SPREAD, q: float = SUM) -> float:
    """Return I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q of d numbers that are not negative.

    0 where all are alike, 1 - d^(1/q - 1/p) where one holds everything (Diao et al., ICLR 2023).
    """
    w = np.abs(np.asarray(values, dtype=np.float64)).ravel()
    top = w.max(initial=0.0)
    if top == 0:
        return 0.0
    w = w / top
    norms = [float((w ** power).sum() ** (1 / power)) for power in (p, q)]
    return float(1 - len(w) ** (1 / q - 1 / p) * norms[0] / norms[1])


def spare(values: np.ndarray, p: float = SPREAD, q: float = SUM) -> float:
    """Return the share of d numbers that may go while the rest holds the whole of their q-norm.

    1 - r/d, r = d (1 - I)^(pq / (q - p)): the bound of the same paper without a loss (eta = 0).
    At the powers that are used here it is the index itself.

    >>> spare(np.array([2.0, 1.0])) == pq_index(np.array([2.0, 1.0]))
    True
    """
    return float(1 - (1 - pq_index(values, p, q)) ** (p * q / (q - p)))


@dataclass(frozen=True)
class OfGroup:
    """One group: `silent` slices that are read as zero at every sample, `zeros` the share of
    reads that are zero (None where no consumer multiplies them by weights), and the PQ index of
    the norms of its slices, which is the share that may go by the bound of its paper, too."""

    group: str
    role: str
    size: int
    silent: int | None
    zeros: float | None
    pq: float


@dataclass(frozen=True)
class OfAttention:
    """One attention: the largest absolute entries of what it takes as queries and as keys.

    Fast approximations exist while they stay below the root of log(length), `bound` (Alman and
    Song, NeurIPS 2023; with adapters: Hu et al., 2024).
    """

    node: str
    queries: float
    keys: float
    bound: float


@dataclass(frozen=True)
class Diagnosis:
    """What was found of all groups and attentions, and in how many batches."""

    groups: tuple[OfGroup, ...]
    attentions: tuple[OfAttention, ...] = ()
    batches: int = 0

    @property
    def dead(self) -> float:
        """The share of all reads of groups that are zero."""
        known = [(g.zeros, g.size) for g in self.groups if g.zeros is not None]
        total = sum(size for _, size in known)
        return sum(share * size for share, size in known) / total if total else 0.0


def diagnose(context: Scores, groups: Sequence[Group], batches: Sequence[Batch]) -> Diagnosis:
    """Look at groups and attentions of a network while it runs on batches (forward only)."""
    context.calibrate({"zeros"}, batches, default_loss, groups=groups)
    return Diagnosis(tuple(_of_group(context, g) for g in groups),
                     tuple(_attentions(context, batches)), len(batches))


def _of_group(context: Scores, group: Group) -> OfGroup:
    norms = _norms(context, group)
    silent, share = None, None
    if context.measurable(group):
        views = context.consumers(group)
        seen = torch.stack([v.onto(v.zeros.count - v.zeros.value) for v in views]).sum(0)
        reads = torch.stack([v.onto(torch.full_like(v.zeros.value, v.zeros.count))
                             for v in views]).sum()
        silent, share = int((seen == 0).sum()), float(1 - seen.sum() / reads)
    return OfGroup(group.name, group.role, group.size, silent, share, pq_index(norms))


def _norms(context: Scores, group: Group) -> np.ndarray:
    """The norm of each slice over all of its weights; of carriers where there is nothing else."""
    own = [m for m in group.members if m.role != "carrier"] or list(group.members)
    total = torch.zeros(group.shape, dtype=torch.float64)
    for member in own:
        total += context.rows(member, group).double().square().sum(-1)
    context.done(group)
    return np.asarray(total.sqrt().numpy())


# --- attention ------------------------------------------------------------------------------------


@dataclass
class _Largest:
    """The largest absolute entry that each place reads, and the longest second-last dimension."""

    entry: dict[tuple[str, str], float] = field(default_factory=dict)
    length: int = 2

    def see(self, batch: int, node: str, name: str, value: torch.Tensor, examples: int) -> None:
        """Take in what a node reads."""
        largest = float(value.abs().max()) if value.numel() else 0.0
        self.entry[node, name] = max(largest, self.entry.get((node, name), 0.0))
        self.length = max(self.length, value.shape[-2] if value.ndim > 1 else 1)


def _attentions(context: Scores, batches: Sequence[Batch]) -> Iterable[OfAttention]:
    found = dict(_reads(context.solution.graph))
    seen = _Largest()
    places = {(node, name): 0.0 for node, names in found.items() for name in names}
    if places:
        for _ in context.network.observe(batches, places, seen.see):
            pass
    for node, (queries, keys) in found.items():
        yield OfAttention(node, seen.entry[node, queries], seen.entry[node, keys],
                          log(seen.length) ** 0.5)


def _reads(graph: Graph) -> Iterable[tuple[str, tuple[str, str]]]:
    for node in graph.nodes:
        if _is_attention(node):
            names = [str(getattr(a, "name", "")) for a in node.args[:2]]
            if all(n in graph.tensors and not graph.tensors[n].array for n in names):
                yield node.name, (names[0], names[1])


def _is_attention(node: Node) -> bool:
    return node.op in ATTENTION or node.op.rsplit(".", 1)[0] in ATTENTION


# --- of scores alone ------------------------------------------------------------------------------


def of_scores(groups: Iterable[Group], scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return what scores that are in hand say of each group, as plain data.

    `zero` counts slices whose score is zero: nothing that was measured depends on them.
    """
    return [{"group": g.name, "slices": g.size, "zero": int((scores[g.name] == 0).sum()),
             "pq": round(pq_index(scores[g.name]), 4)}
            for g in groups if g.name in scores]
