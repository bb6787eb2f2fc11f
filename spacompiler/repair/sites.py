"""Where weights can be fit anew: arrays whose inputs a plan makes narrower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..axes.choices import Choices, keep_mask
from ..evidence.consumers import Consumer, consumer, gain
from ..graph.ir import Ref
from ..groups.solution import Group, Solution

_BIAS = {"aten.addmm": 0, "aten.layer_norm": 3, **dict.fromkeys(
    "aten.linear aten.conv1d aten.conv2d aten.conv3d aten.conv_transpose1d aten.convolution "
    "aten.conv_transpose2d aten.conv_transpose3d".split(), 2)}


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Site:
    """A consumer that loses features: `kept` (shared, features); `bias` is its stored bias."""

    consumer: Consumer
    weight: str
    bias: str | None
    kept: torch.Tensor


def sites(solution: Solution, choices: Choices, among: set[str] | None = None, *,
          every: bool = False) -> tuple[list[Site], list[str]]:
    """Return the consumers that a plan takes features from, in program order, and what is left out.

    Arrays that several operators read (tied ones), products with computed arrays and products of
    nothing (no samples) stay as they are. `among` names the nodes to look at; with `every`,
    consumers that keep all features are sites too, from the first that loses some; for one that
    must stay as it is, the gain of the norm before it is (a head that is tied to an embedding).
    """
    graph = solution.graph
    nodes = {node.name: node for node in graph.nodes}
    readers = Counter(graph.tensors[name].weight or name for node in graph.nodes
                      for name in dict.fromkeys(node.refs()))
    wanted = {read.node for group in solution.groups.values() if group.atom in choices
              for read in group.reads}
    wanted = wanted if among is None else wanted & among
    found: list[Site] = []
    left: list[str] = []
    gains: dict[str, Consumer] = {}
    for node in (n for n in graph.nodes if n.name in wanted or (every and found)):
        at = consumer(graph, nodes[node.name])
        if at is None and node.name in wanted and any(
                graph.tensors[ref].looked for ref in node.refs()):
            left.append(node.title())
        if at is None or 0 in graph.tensors[at.tensor].shape:
            continue
        weight = graph.tensors[at.weight].weight
        kept = _kept(solution, at, choices)
        if kept.all() and not (every and found):
            continue
        if weight is None or any(readers[name] > 1 for name in (weight, *at.views)):
            left.extend([] if kept.all() else [node.title()])
            before = gain(graph, at.tensor) if kept.all() else None
            gains |= {} if before is None else {before.node.name: before}
            continue
        found.append(Site(at, weight, _bias(solution, at, readers), kept))
    for at in gains.values():
        tensor, whole = graph.tensors[at.weight], keep_mask(solution.dims(at.tensor), choices)
        if tensor.weight is not None and tensor.kind == "parameter" and whole.all() \
                and readers[tensor.weight] == 1:
            found.append(Site(at, tensor.weight, _bias(solution, at, readers),
                              torch.ones(*tensor.shape, 1, dtype=torch.bool)))
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda site: order[site.consumer.node.name]), left


def _bias(solution: Solution, at: Consumer, readers: Counter[str]) -> str | None:
    position = _BIAS.get(at.node.op.rsplit(".", 1)[0], _BIAS.get(at.node.op))
    ref = at.node.arg(position, "bias", None) if position is not None else None
    name = solution.graph.tensors[ref.name].weight if isinstance(ref, Ref) else None
    return name if name and readers[name] == 1 and len(solution.dims(name)) == 1 else None


def _kept(solution: Solution, at: Consumer, choices: Choices) -> torch.Tensor:
    """Which features stay, as the consumer sees them: (shared, features)."""
    dims = solution.dims(at.tensor)
    mask = torch.from_numpy(keep_mask(dims, choices))
    dynamic = solution.graph.tensors[at.tensor].dynamic
    for d in dynamic:
        mask = mask.narrow(d, 0, 1)
    shape = [1 if d in dynamic else e.size for d, e in enumerate(dims)]
    return at.inputs(mask.double().expand(shape)).amax(1) > 0.5


def unbiased(module: nn.Module, solution: Solution, groups: Sequence[Group]) -> list[str]:
    """Return the linear layers and convolutions that read a group and could have a bias."""
    nodes = {node.name: node for node in solution.graph.nodes}
    read = dict.fromkeys(r.node for g in groups for r in g.reads)
    found = []
    for node in (nodes[name] for name in read):
        at = consumer(solution.graph, node)
        weight = solution.graph.tensors[at.weight].weight if at is not None else None
        path = weight.rpartition(".")[0] if weight else ""
        if path and getattr(module.get_submodule(path), "bias", 0) is None \
                and isinstance(module.get_submodule(path), (nn.Linear, *_CONVS)):
            found.append(path)
    return list(dict.fromkeys(found))
