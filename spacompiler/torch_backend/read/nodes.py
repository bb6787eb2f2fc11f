"""Nodes of a program under way: added without what fx does for each that no recorded program needs.

fx looks through all arguments of a node for symbolic sizes, to warn of them, and makes its name up
anew; in a trace of a large network that is a third of the time. Arguments that are set afterwards
are not looked through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import fx


def call(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...],
         kwargs: dict[str, Any]) -> fx.Node:
    """Return a new node that calls a function."""
    return _filled(graph.create_node("call_function", target, name=_name(target)), args, kwargs)


def again(graph: fx.Graph, node: fx.Node, change: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Return a new node that does what another does, of other arguments."""
    made = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    made.meta.update(node.meta)
    args: Any = fx.map_arg(node.args, change)
    kwargs: Any = fx.map_arg(node.kwargs, change)
    return _filled(made, args, kwargs)


def _filled(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


@cache
def _name(target: Callable[..., Any]) -> str:
    """What fx calls a node of a target, before it is told apart from others."""
    return fx.Graph()._target_to_str(target)
