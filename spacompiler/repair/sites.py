"""Where weights can be fit anew: arrays whose inputs a plan makes narrower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from ..axes.choices import Choices, keep_mask
from ..evidence.consumers import Consumer, consumer
from ..evidence.gains import gain
from ..graph.ir import Graph, Node, Ref
from ..groups.solution import Solution

_BIAS = {"aten.addmm": 0, "aten.layer_norm": 3, **dict.fromkeys(
    "aten.linear aten.conv1d aten.conv2d aten.conv3d aten.conv_transpose1d aten.convolution "
    "aten.conv_transpose2d aten.conv_transpose3d Gemm Conv ConvTranspose".split(), 2)}
_ADDED = {"MatMul": "Add"}
"""Products without a bias of their own, and the operator that adds one."""


@dataclass(frozen=True)
class Site:
    """A consumer that loses features: `kept` (shared, features).

    `bias` is its stored bias, `result` the tensor that product and bias make.
    """

    consumer: Consumer
    weight: str
    bias: str | None
    kept: torch.Tensor
    result: str


def sites(solution: Solution, choices: Choices, among: set[str] | None = None, *,
          every: bool = False) -> tuple[list[Site], list[str]]:
    """Return the consumers that a plan takes features from, in program order, and what is left out.

    Arrays that several operators read (tied ones), products with computed arrays and products of
    nothing (no samples) stay as they are. `among` names the nodes to look at; with `every`,
    consumers that keep all features are sites too, from the first that loses some; for one that
    must stay as it is, the gain of the norm before it is (a head that is tied to an embedding).
    """
    graph = solution.graph
    readers = readings(graph)
    wanted = {read.node for group in solution.groups.values() if group.atom in choices
              for read in group.reads}
    wanted = wanted if among is None else wanted & among
    found: list[Site] = []
    left: list[str] = []
    gains: dict[str, Consumer] = {}
    for node in (n for n in graph.nodes if n.name in wanted or (every and found)):
        at = consumer(graph, node)
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
        bias, result = _bias(graph, at, readers, kept)
        found.append(Site(at, weight, bias, kept, result))
    found.extend(_gains(solution, choices, readers, gains.values()))
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda site: order[site.consumer.node.name]), left


def _gains(solution: Solution, choices: Choices, readers: Counter[str],
           norms: Iterable[Consumer]) -> Iterator[Site]:
    """Yield the gains of norms that keep all features, where nothing else reads them."""
    graph = solution.graph
    for at in norms:
        tensor, whole = graph.tensors[at.weight], keep_mask(solution.dims(at.tensor), choices)
        if tensor.weight is not None and tensor.kind == "parameter" and whole.all() \
                and readers[tensor.weight] == 1:
            every_one = torch.ones(*tensor.shape, 1, dtype=torch.bool)
            bias, result = _bias(graph, at, readers, every_one)
            yield Site(at, tensor.weight, bias, every_one, result)


def readings(graph: Graph) -> Counter[str]:
    """Count who reads each stored array, the caller of the network too, and each other tensor."""
    return Counter(graph.tensors[name].weight or name for names in (
        *(node.refs() for node in graph.nodes), graph.outputs) for name in dict.fromkeys(names))


def _bias(graph: Graph, at: Consumer, readers: Counter[str],
          kept: torch.Tensor) -> tuple[str | None, str]:
    """Return a consumer's stored bias, one number an output, and what holds product and bias."""
    out = at.node.outputs[0]
    outputs = (prod(graph.tensors[at.weight].shape) // kept.shape[1],)
    last = (len(graph.tensors[out].shape) - 1,)
    if at.patch is None and (*at.y_order[0], *at.y_order[2]) != last:
        return None, out  # what is added along the last dimension goes by samples
    for ref, result in _added(graph, at, readers):
        name = graph.tensors[ref].weight
        if name and readers[name] == 1 and graph.tensors[ref].shape == outputs:
            return name, result
    return None, out


def _added(graph: Graph, at: Consumer, readers: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield what may be the bias of a product, with the tensor that holds their sum."""
    node, out = at.node, at.node.outputs[0]
    position = _BIAS.get(node.op.rsplit(".", 1)[0], _BIAS.get(node.op))
    ref = node.arg(position, "bias", None) if position is not None else None
    if isinstance(ref, Ref) and _evenly(node):
        yield ref.name, out
    adds = _ADDED.get(node.op)
    user = next((n for n in graph.nodes if out in n.refs()), None) if adds else None
    if user is not None and user.op == adds and readers[out] == 1:
        yield from ((name, user.outputs[0]) for name in user.refs() if name != out)


def _evenly(node: Node) -> bool:
    """False for a Gemm that scales its bias otherwise than its product (or to nothing)."""
    product, bias = (*node.args[5:7], 1.0, 1.0)[:2] if node.op == "Gemm" else (1.0, 1.0)
    return product == bias != 0


def _kept(solution: Solution, at: Consumer, choices: Choices) -> torch.Tensor:
    """Which features stay, as the consumer sees them: (shared, features)."""
    dims = solution.dims(at.tensor)
    mask = torch.from_numpy(keep_mask(dims, choices))
    dynamic = solution.graph.tensors[at.tensor].dynamic
    for d in dynamic:
        mask = mask.narrow(d, 0, 1)
    shape = [1 if d in dynamic else e.size for d, e in enumerate(dims)]
    return at.inputs(mask.double().expand(shape)).amax(1) > 0.5
