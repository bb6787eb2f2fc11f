"""Two runs of one program that differ in a few stored arrays: what comes before is computed once.

The proof runs a pruned program as it is and with one wrong index. Up to the node that reads the
wrong array, both compute the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .runner import Runner


@dataclass
class Aside:
    """The arrays, by all of their names, in which a second run differs from the first.

    The first run leaves the values that are alive where one of them is read; the second one goes
    on from there. Programs that write into values are run whole.
    """

    arrays: Collection[str]
    _values: dict[str, Any] = field(default_factory=dict)

    def call(self, runner: Runner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the results of the first run, or of the second."""
        nodes = list(runner.graph.nodes)
        given = sum(node.op == "placeholder" for node in nodes)
        at = self._read(runner, nodes)
        if at is None or any(map(_writes, nodes)):
            return runner.call(args, kwargs)
        runner.start(args, kwargs)
        if self._values:
            for node in nodes[:given]:
                runner.step(node)
            runner.env.update({node: self._values[node.name] for node in nodes[given:at]
                               if node.name in self._values})
            self._values = {}
        else:
            for node in nodes[:at]:
                runner.step(node)
            self._values = {node.name: value for node, value in runner.env.items()
                            if node.op != "placeholder"}
        for node in nodes[at:-1]:
            runner.step(node)
        return runner.asked(list(runner.run_node(nodes[-1])))

    def _read(self, runner: Runner, nodes: list[fx.Node]) -> int | None:
        """Which node reads one of the arrays first."""
        held = runner.holding(self.arrays)
        return next((i for i, node in enumerate(nodes[:-1])
                     if not held.isdisjoint(node.all_input_nodes)), None)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
