"""From an ONNX graph to the IR: each node's inputs and attributes as its row's arguments.

A trace's `places` remember where an argument came from, so that what the solver wants edited is
found again in the file: an attribute, or an element of a constant input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import SpaError
from ...graph.ir import Graph, Node, Ref, Tensor
from ...rows.onnx_bodies import START
from ...rows.onnx_table import OPS
from .arguments import Arguments, Unknown
from .bodies import body_graphs, body_of
from .examples import GUESSES, example, guess
from .file import OnnxFile
from .shapes import Facts, infer
from .trace import OnnxTrace


def trace(file: OnnxFile, feeds: Mapping[str, np.ndarray] | None = None) -> OnnxTrace:
    """Lower a file at the sizes of `feeds`, or at guessed ones.

    Raises SpaError if no sizes are found at which every value has a shape.
    """
    from ..run.session import run

    if feeds is not None:
        given = dict(feeds)
        facts = infer(file.model, {n: a.shape for n, a in given.items()},
                      observe=lambda names: run(file.model, given, names))
        return lower(file, facts, given)
    first: SpaError | None = None
    tried = set()
    for attempt in range(GUESSES):
        sizes = guess(file, attempt)
        key = tuple(sorted(sizes.items()))
        if key in tried:
            continue
        tried.add(key)
        made = example(file, sizes)
        try:
            facts = infer(file.model, sizes, observe=_observer(file, made))
            return lower(file, facts, made)
        except SpaError as problem:
            first = first or problem
    assert first is not None
    raise first


def _observer(file: OnnxFile, feeds: Mapping[str, np.ndarray]) -> Callable[[list[str]], Any]:
    from ..run.session import run

    return lambda names: run(file.model, feeds, names)


def lower(file: OnnxFile, facts: Facts, feeds: dict[str, np.ndarray]) -> OnnxTrace:
    """Return the IR of a model whose values are known by `facts`."""
    made = OnnxTrace(file, Graph(), facts, feeds)
    _Lowering(made).run()
    _declare_results(file, facts)
    return made


def _declare_results(file: OnnxFile, facts: Facts) -> None:
    """Give graph outputs the shapes that they have: unknown sizes where a file says wrong ones."""
    free = any(not isinstance(n, int) or n <= 0 for v in file.inputs() for n in v.shape or ())
    for value in file.model.graph.outputs:
        shape, number = facts.shapes.get(value.name or ""), facts.types.get(value.name or "")
        if shape is None or not number:
            continue
        said: list[Any] = list(value.shape) if value.shape is not None else \
            [None if free else n for n in shape]
        if len(said) != len(shape):
            said = [None] * len(shape)
        value.shape = ir.Shape([None if isinstance(n, int) and n != size else n
                                for n, size in zip(said, shape, strict=True)])
        value.type = value.type or ir.TensorType(ir.DataType(number))


class _Lowering:
    def __init__(self, made: OnnxTrace) -> None:
        self.made, self.graph, self.facts = made, made.graph, made.facts
        self.arguments = Arguments(made)

    def run(self) -> None:
        for value in self.made.file.inputs():
            self.graph.inputs.append(self._input(value))
        self._nodes(self.made.model.graph)
        for value in self.made.model.graph.outputs:
            self.graph.outputs.append(self.arguments.ref(value).name)

    def _input(self, value: ir.Value) -> str:
        name = value.name or ""
        dynamic = frozenset(d for d, n in enumerate(value.shape or ())
                            if not (isinstance(n, int) and n > 0))
        self.graph.tensors[name] = Tensor(name, self.facts.shapes[name], self.arguments.dtype(name),
                                          "input", None, dynamic)
        return name

    def _nodes(self, graph: ir.Graph) -> None:
        for node in graph:
            if all(o.name in self.facts.known for o in node.outputs if o.name):
                continue
            if node.op_type == "ConstantOfShape" and self._is_array(node):
                self._fill(node)
                continue
            if self.facts.entered(node):
                self._start(node)
                for body in body_graphs(node):
                    self._nodes(body)
            self._node(node)

    def _start(self, node: ir.Node) -> None:
        """The node by which a body of Loop or Scan begins: it makes what the body reads."""
        body = body_of(node)
        if body is None:
            return
        name = self._free_name(f"{node.name or node.op_type}_{node.outputs[0].name}{START}")
        outs = [v.name or "" for v in (*body.counters, *body.inside, *body.each)]
        for out in outs:
            self.graph.tensors[out] = Tensor(out, self.facts.shapes[out], self.arguments.dtype(out))
        args = ([self.arguments.ref(v) for v in body.states],
                [self.arguments.ref(v) for v in body.scanned], list(body.axes[0]))
        self.made.nodes[name] = node
        self.graph.nodes.append(Node(name, node.op_type + START, args, {}, tuple(outs), name))

    def _free_name(self, name: str) -> str:
        while name in self.made.nodes:
            name += "_"
        return name

    def _is_array(self, node: ir.Node) -> bool:
        source, out = node.inputs[0], node.outputs[0].name or ""
        return source is not None and source.name in self.facts.fixed and \
            "float" in self.arguments.dtype(out)

    def _fill(self, node: ir.Node) -> None:
        """A constant fill of fixed shape is a stored array like any other."""
        name = node.outputs[0].name or ""
        self.made.filled[name] = node
        self.graph.tensors[name] = Tensor(name, self.facts.shapes[name], self.arguments.dtype(name),
                                          "parameter", name)

    def _node(self, node: ir.Node) -> None:
        name = self._free_name(
            node.name or f"{node.op_type}_{next((o.name for o in node.outputs if o.name), '')}")
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        args: list[Any] = []
        try:
            for spec in OPS[op].spec.split() if op in OPS else [".."]:
                args += self.arguments.of(node, name, spec, len(args))
            while args and args[-1] is None:
                args.pop()
            args += self._captured(node)
        except Unknown as problem:
            op = f"{op} ({problem})"
            args = [self.arguments.ref(v) for v in node.inputs if v is not None and v.name]
            args += self._captured(node) or [
                self.arguments.ref(v) for body in body_graphs(node) for v in body.outputs]
        self.made.nodes[name] = node
        self.graph.nodes.append(Node(name, op, tuple(args), {}, self._results(node, name),
                                     node.name or name))

    def _results(self, node: ir.Node, name: str) -> tuple[str, ...]:
        """Register a node's results; those left out get a name that nothing reads."""
        last = max((i for i, o in enumerate(node.outputs) if o.name), default=-1)
        names = [o.name or f"{name}.{i}" for i, o in enumerate(node.outputs[:last + 1])]
        for out in names:
            self.graph.tensors[out] = Tensor(out, self.facts.shapes.get(out, ()),
                                             self.arguments.dtype(out))
        return tuple(names)

    def _captured(self, node: ir.Node) -> list[Ref]:
        """What bodies that are not entered read from around them."""
        if self.facts.entered(node):
            return []
        found: dict[str, ir.Value] = {}
        for body in body_graphs(node):
            own = {v.name for v in (*body.inputs, *body.initializers.values())}
            for inner in body.all_nodes():
                own |= {o.name for o in inner.outputs}
                found |= {v.name: v for v in inner.inputs if v is not None and v.name}
            found |= {v.name: v for v in body.outputs if v.name}
            found = {n: v for n, v in found.items() if n not in own}
        return [self.arguments.ref(v) for n, v in found.items() if n in self.facts.shapes]
