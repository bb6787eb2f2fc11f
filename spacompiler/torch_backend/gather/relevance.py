"""Layer-wise relevance propagation as a changed backward pass: gradient x input is relevance.

Each rule keeps an operator's value and changes its derivative, so that what flows back, times what
flowed forward, is the relevance of the place. Products with weights follow the z+ (alpha1 beta0)
rule R_j = sum_k x_j w_jk+ / (sum_j' x_j' w_j'k+) R_k, without biases; norms and smooth
activations pass relevance on as it is; a product of two activations halves it between them.
Sums, ReLU, pooling and views need no rule: gradient x input is theirs.
(Yeom et al., Pruning by explaining, Pattern Recognition 115, 2021.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...evidence.consumers import consumer
from ...evidence.losses import first_floating
from ...graph.ir import Graph, Node, Ref
from ..run.runner import Override

_EPSILON = 1e-12
_PASS = """
batch_norm _native_batch_norm_legit_no_training layer_norm group_norm instance_norm rms_norm gelu
silu sigmoid tanh hardswish hardsigmoid elu selu celu mish softplus softmax _softmax relu6 hardtanh
leaky_relu
""".split()


def largest(outputs: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the sum of each example's largest logit: where relevance starts."""
    return first_floating(outputs).amax(-1).sum()


def rules(graph: Graph) -> dict[str, Override]:
    """Return what to run in place of each node that has a rule."""
    found: dict[str, Override] = {}
    for node in graph.nodes:
        name = node.op.removeprefix("aten.").rsplit(".", 1)[0]
        operator = _operator(node)
        at = consumer(graph, node)
        if at is not None and at.route is None and operator is not None:
            found[node.name] = _positive(node, at.tensor, at.operand, operator)
        elif name in _PASS and operator is not None:
            found[node.name] = _through(operator)
        elif name == "mul" and all(
                isinstance(a, Ref) and not graph.tensors[a.name].static for a in node.args):
            found[node.name] = _halves
    return found


def _operator(node: Node) -> Callable[..., Any] | None:
    space, _, rest = node.op.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, space, None), packet, None)
    return getattr(found, overload or "default", None)


def _like(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The value of `other` with the derivative of `value`, in proportion."""
    safe = torch.where(value.abs() < _EPSILON, torch.full_like(value, float("inf")), value)
    return value * (other / safe).detach()


def _positive(node: Node, x: str, w: str, operator: Callable[..., Any]) -> Override:
    places = [a.name if isinstance(a, Ref) else None for a in node.args]
    at_x, at_w = places.index(x), places.index(w)
    bias = next((i for i, name in enumerate(places) if name not in (None, x, w)), None)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        def product(low: float | None, high: float | None) -> torch.Tensor:
            own = list(args)
            own[at_x] = args[at_x].clamp(low, high)
            own[at_w] = args[at_w].clamp(low, high)
            if bias is not None:
                own[bias] = torch.zeros_like(args[bias])
            return operator(*own, **kwargs)

        z = product(0, None) + product(None, 0)
        return _like(z, operator(*args, **kwargs))

    return run


def _through(operator: Callable[..., Any]) -> Override:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = operator(*args, **kwargs)
        if isinstance(made, tuple):
            return (_like(args[0], made[0]), *made[1:])
        return _like(args[0], made)

    return run


def _halves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    one, two = args
    return (one * two.detach() + one.detach() * two) / 2
