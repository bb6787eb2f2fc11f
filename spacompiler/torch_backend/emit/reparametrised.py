"""Weights that a module computes from others: weight norm and spectral norm, cut in their terms.

The program holds such a weight as one stored array, and a plan cuts that. The module's own code
goes on computing it: with the direction cut alike, and a length that makes up for what went.

    weight norm      w = g * v / |v|             v cut, g scaled by |v cut| / |v|
    spectral norm    w = v / (left . v right)    v, left and right cut, left scaled
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...plan.terms import terms
from ..trace import Trace
from ..weights import named_arrays
from .slicer import Slicer

Cut = Callable[[Tensor], Tensor]
Terms = Mapping[str, Tensor]
Rule = Callable[[Terms, Cut, Tensor | None], dict[str, Tensor]]


def _weight_norm(given: Terms, cut: Cut, repaired: Tensor | None) -> dict[str, Tensor]:
    """g: 1 where the norm is taken over a dimension, else the size of v there."""
    g, v = given["g"].detach().double(), given["v"].detach()
    over = [d for d, size in enumerate(g.shape) if size == 1]
    if repaired is not None:
        return {"v": repaired, "g": _norm(repaired, over).to(repaired.dtype)}
    scale = cut((g / _norm(v, over)).expand_as(v).contiguous())
    made = cut(v)
    for d in over:
        scale = scale.narrow(d, 0, 1)
    length = scale * _norm(made, over)
    return {"v": made, "g": length.to(given["g"].dtype)}


def _norm(x: Tensor, over: list[int]) -> Tensor:
    return torch.linalg.vector_norm(x.double(), dim=over, keepdim=True)


def _spectral_norm(given: Terms, cut: Cut, repaired: Tensor | None) -> dict[str, Tensor]:
    """left: (rows of v), right: (the rest of v, flat)."""
    v, left, right = (given[name].detach() for name in ("v", "left", "right"))
    made = cut(v) if repaired is None else repaired
    rows = cut(left.reshape(-1, *[1] * (v.ndim - 1)).expand_as(v).contiguous())
    rest = cut(right.reshape(1, *v.shape[1:]).expand_as(v).contiguous())
    rows, rest = rows.flatten(1)[:, 0], rest[0].flatten()
    was, now = (a.double() @ (w.double().flatten(1) @ b.double())
                for a, w, b in ((left, v, right), (rows, made, rest)))
    was = was if repaired is None else torch.ones_like(was)
    return {"v": made, "left": (rows.double() * was / now).to(left.dtype), "right": rest}


RULES: tuple[Rule, ...] = (_weight_norm, _weight_norm, _spectral_norm, _spectral_norm)
"""How a cut of the weight cuts its terms, in the order of their names (see `plan.terms`)."""


def remade(module: nn.Module, trace: Trace, slicer: Slicer) -> dict[str, Tensor]:
    """Return the pruned arrays, by name, from which a module computes weights that a plan cuts."""
    have, made = dict(named_arrays(module)), dict[str, Tensor]()
    for folded, names in trace.graph.sources.items():
        called, rule = terms(names)
        if slicer.untouched(folded) or not called:
            continue
        given = {term: have[name] for term, name in called.items()}
        shape = torch.Size([e.size for e in slicer.dims(folded)])
        if given["v"].shape != shape or ("g" in given and given["g"].ndim != len(shape)) or \
                ("left" in given and given["left"].numel() != shape[0]):
            continue
        repaired = slicer.array(folded).detach() if folded in trace.repaired else None
        cut = RULES[rule](given, partial(slicer.sliced, folded), repaired)
        made |= {called[term]: array for term, array in cut.items()}
    return made
