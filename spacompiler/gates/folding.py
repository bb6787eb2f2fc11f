"""Fold what gates learned into weights: factors into the products that read what they scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import ProofError
from ..evidence.consumers import Consumer, consumer
from ..groups.solution import Group, Solution
from ..repair.sites import readings
from ..stages.proof import relative_error
from ..torch_backend.run.observe import ProgramNetwork
from .network import Gated, Place, Values

ALLOWED: Mapping[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-4}
"""How far the folded network's results may lie from the gated one's, both computed in float64.

Folding multiplies each weight once, in the weight's own precision: 2^-24 of it in float32, over
some hundred layers; 1e-10 leaves six digits to what float64 rounds.
"""
COARSE = 3e-2


def products(solution: Solution, places: Sequence[Place]) -> dict[Place, Consumer]:
    """Return the places that are read by a product with a stored array that nothing else reads."""
    graph = solution.graph
    nodes = {node.name: node for node in graph.nodes}
    readers = readings(graph)
    found = {}
    for node, tensor in places:
        at = consumer(graph, nodes[node])
        weight = graph.tensors[at.weight].weight if at is not None else None
        if at is not None and at.tensor == tensor and weight is not None \
                and all(readers[name] == 1 for name in (weight, *at.views)):
            found[node, tensor] = at
    return found


def scalable(gated: Gated) -> set[str]:
    """Return the groups whose slices can be scaled: each is read by products of its own alone."""
    found = products(gated.solution, list(gated.places))
    own, tensors = {node for node, _ in found}, gated.solution.graph.tensors
    return {g.name for g in gated.groups if g.reads and all(
        (r.node, r.tensor) in found or (r.node in own and tensors[r.tensor].array)
        for r in g.reads)}


def fold(gated: Gated, network: ProgramNetwork, gates: Values) -> None:
    """Multiply the weights of what reads each group by the group's gates, in the program.

    Groups that cannot be scaled have gates of one (where they stay); of one that goes, the masks
    of the plan stand where it is read.
    """
    able = scalable(gated)
    for place, at in products(gated.solution, list(gated.places)).items():
        own = [(g, dim) for g, dim in gated.places[place]
               if g.name in able and not bool((gates[g.name] == 1).all())]
        if own:
            name = gated.solution.graph.tensors[at.weight].weight
            assert name is not None
            old = network.stored(name)
            made = at.matrix(old).double() * _factors(gated, place, at, own, gates).unsqueeze(1)
            network.put(name, at.array(made.to(old.dtype), tuple(old.shape)))


def _factors(gated: Gated, place: Place, at: Consumer, own: Sequence[tuple[Group, int]],
             gates: Values) -> torch.Tensor:
    """The factor of each feature of a consumer: (shared, features)."""
    shape = gated.shape(at)
    made = torch.ones(shape, dtype=torch.float64)
    for group, dim in own:
        made = made * gated.spread(place, group, dim, gates[group.name].double(), made)
    return at.inputs(made.expand(shape)).amax(1)


def check(gated: Gated, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor],
          kinds: set[torch.dtype], where: str) -> float:
    """Return how far the folded network's results are from the gated one's.

    Raises ProofError if they are further than the precision of the weights explains.
    """
    error = relative_error(list(after), list(before))
    allowed = max((ALLOWED.get(kind, COARSE) for kind in kinds if kind.is_floating_point),
                  default=ALLOWED[torch.float32])
    if not error <= allowed:
        raise ProofError("the folded network is not the gated one", where=where,
                         why=f"relative error {error:.1e}, allowed {allowed:.0e}",
                         fix="please report it")
    return error
