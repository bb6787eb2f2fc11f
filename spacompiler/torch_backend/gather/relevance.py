"""Layer-wise relevance propagation as a changed backward pass: gradient x input is relevance.

Each rule keeps an operator's value and changes its derivative, so that what flows back, times what
flowed forward, is the relevance of the place. Products with weights that a rule is for follow z+
(alpha1 beta0): R_j = sum_k x_j w_jk+ / (sum_j' x_j' w_j'k+) R_k, without biases; norms and smooth
activations pass relevance on as it is; a product of two activations halves it between them. Sums,
ReLU, pooling, views, and products by the epsilon rule need none: gradient x input is theirs.

Two ways: `relevance` is the released code's (z+ for convolutions, epsilon for linear layers, from
1 at each example's true class), `relevance_positive` the paper's (z+ throughout, from the logit).
(Yeom et al., Pruning by explaining, Pattern Recognition 115, 2021.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...evidence.consumers import consumer
from ...evidence.labels import is_label
from ...evidence.losses import first_floating
from ...graph.ir import Graph, Node, Ref
from ..run.runner import Override

_EPSILON = 1e-12
_PASS = """
batch_norm _native_batch_norm_legit_no_training layer_norm group_norm instance_norm rms_norm gelu
silu sigmoid tanh hardswish hardsigmoid elu selu celu mish softplus softmax _softmax relu6 hardtanh
leaky_relu
""".split()


def _classes(logits: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """The true class of each example, the likeliest where there are no labels: (..., 1)."""
    labels = next((v for k, v in kwargs.items() if is_label(k) and isinstance(v, torch.Tensor)
                   and v.shape == logits.shape[:1] and not v.is_floating_point()), None)
    likeliest = logits.argmax(-1, keepdim=True)
    if labels is None or logits.ndim != 2:
        return likeliest
    return torch.where(labels >= 0, labels, likeliest.squeeze(-1)).unsqueeze(-1)


def of_class(outputs: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return where relevance starts: the sum over examples of the logit of the true class.

    Without labels it is the likeliest class. Classes are the last dimension.
    """
    logits = first_floating(outputs)
    return logits.gather(-1, _classes(logits, kwargs)).sum()


def from_one(outputs: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the same, each logit over its own value: every example has a relevance of 1."""
    logits = first_floating(outputs)
    ones = _like(logits, torch.ones_like(logits))
    return ones.gather(-1, _classes(logits, kwargs)).sum()


def rules(graph: Graph, kind: str) -> dict[str, Override]:
    """Return what to run in place of each node that has a rule: `kind` is a key of STARTS."""
    found: dict[str, Override] = {}
    for node in graph.nodes:
        name = node.op.removeprefix("aten.").rsplit(".", 1)[0]
        operator = _operator(node)
        at = consumer(graph, node)
        if at is not None and at.route is None and operator is not None:
            if at.patch is not None or kind == "relevance_positive":
                found[node.name] = _positive(node, at.tensor, at.operand, operator)
        elif name in _PASS and operator is not None:
            found[node.name] = _through(operator)
        elif name == "mul" and all(
                isinstance(a, Ref) and not graph.tensors[a.name].static for a in node.args):
            found[node.name] = _halves
    return found


STARTS: dict[str, Callable[..., torch.Tensor]] = {
    "relevance": from_one, "relevance_positive": of_class}
"""By kind of relevance: what it starts from."""


def _operator(node: Node) -> Callable[..., Any] | None:
    space, _, rest = node.op.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, space, None), packet, None)
    return getattr(found, overload or "default", None)


def _like(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The value of `other`, as it is, with the derivative of `value` in proportion."""
    safe = torch.where(value.abs() < _EPSILON, torch.full_like(value, float("inf")), value)
    return other.detach() + (value - value.detach()) * (other / safe).detach()


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
