"""From an ONNX graph to the IR: each node's inputs and attributes as its row's arguments.

`places` remembers where an argument came from, so that what the solver wants edited is found
again in the file: an attribute, or an element of a constant input.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ...errors import SpaError
from ...graph.ir import Graph, Node, Ref, Tensor
from ...rows.onnx_table import OPS
from .examples import GUESSES, example, guess
from .file import OnnxFile
from .shapes import Facts, body_graphs, infer

_QUANTISED = ("DequantizeLinear", "QuantizeLinear", "ConvInteger", "MatMulInteger", "QLinear")


class Place(NamedTuple):
    """Where an argument stands in the file: `("input", 1)` or `("attr", "group")`."""

    kind: str
    key: Any


class Unknown(Exception):
    """An argument that must be known is computed from data."""


@dataclass
class OnnxTrace:
    """A file's graph as IR, with what is needed to go back: nodes, places, facts, inputs.

    Nothing is `tied` by name: a shared initialiser has one. `repaired` are the arrays that a repair
    puts in place of the file's own, which stay as they are.
    """

    file: OnnxFile
    graph: Graph
    facts: Facts
    feeds: dict[str, np.ndarray]
    nodes: dict[str, ir.Node] = field(default_factory=dict)
    places: dict[tuple[str, int], Place] = field(default_factory=dict)
    filled: dict[str, ir.Node] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def model(self) -> ir.Model:
        return self.file.model

    def stored(self, name: str) -> np.ndarray:
        """Return a stored array (mapped from disk where it lies), or what is in place of it."""
        if name in self.repaired:
            return self.repaired[name]
        if name in self.filled:
            node = self.filled[name]
            value = node.attributes.get("value")
            fill = value.as_tensor().numpy().reshape(()) if value else np.float32(0)
            return np.broadcast_to(fill, self.facts.shapes[name])
        tensor = self.model.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def array(self, name: str, value: np.ndarray) -> np.ndarray:
        """Return a value for a stored array in that array's type."""
        kept = ir.DataType(self.facts.types[name]).numpy()
        return np.ascontiguousarray(value.astype(kept, copy=False))


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
        self.stored = made.model.graph.initializers

    def run(self) -> None:
        for value in self.made.file.inputs():
            self.graph.inputs.append(self._input(value))
        self._nodes(self.made.model.graph)
        for value in self.made.model.graph.outputs:
            self.graph.outputs.append(self._ref(value).name)

    def _input(self, value: ir.Value) -> str:
        name = value.name or ""
        dynamic = frozenset(d for d, n in enumerate(value.shape or ())
                            if not (isinstance(n, int) and n > 0))
        self.graph.tensors[name] = Tensor(name, self.facts.shapes[name], self._dtype(name),
                                          "input", None, dynamic)
        return name

    def _dtype(self, name: str) -> str:
        number = self.facts.types.get(name, 1)
        return ir.DataType(number).numpy().name if number and number != 8 else "object"

    def _nodes(self, graph: ir.Graph) -> None:
        for node in graph:
            if all(o.name in self.facts.known for o in node.outputs if o.name):
                continue
            if node.op_type == "ConstantOfShape" and self._is_array(node):
                self._fill(node)
                continue
            if self.facts.entered(node):
                for body in body_graphs(node):
                    self._nodes(body)
            self._node(node)

    def _is_array(self, node: ir.Node) -> bool:
        source, out = node.inputs[0], node.outputs[0].name or ""
        return source is not None and source.name in self.facts.fixed and \
            "float" in self._dtype(out)

    def _fill(self, node: ir.Node) -> None:
        """A constant fill of fixed shape is a stored array like any other."""
        name = node.outputs[0].name or ""
        self.made.filled[name] = node
        self.graph.tensors[name] = Tensor(name, self.facts.shapes[name], self._dtype(name),
                                          "parameter", name)

    # --- tensors ------------------------------------------------------------------------------

    def _ref(self, value: ir.Value) -> Ref:
        name = value.name or ""
        if name not in self.graph.tensors:
            self.graph.tensors[name] = self._tensor(value)
        return Ref(name)

    def _tensor(self, value: ir.Value) -> Tensor:
        name, dtype = value.name or "", self._dtype(value.name or "")
        weight = name in self.stored and self._is_weight(value, dtype)
        kind = "constant" if not weight else \
            "buffer" if all(n.op_type == "BatchNormalization" and i > 2
                            for n, i in value.uses()) else "parameter"
        if name not in self.facts.shapes:
            raise SpaError(f"value {name!r} is used before it is made",
                           fix="the file is damaged; export it again")
        return Tensor(name, self.facts.shapes[name], dtype, kind, name if weight else None)

    def _is_weight(self, value: ir.Value, dtype: str) -> bool:
        return "float" in dtype or dtype in ("int8", "uint8", "int4", "uint4") or any(
            n.op_type.startswith(_QUANTISED) for n, _ in value.uses())

    # --- nodes --------------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> None:
        name = node.name or f"{node.op_type}_{next((o.name for o in node.outputs if o.name), '')}"
        while name in self.made.nodes:
            name += "_"
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        args: list[Any] = []
        try:
            for spec in OPS[op].spec.split() if op in OPS else [".."]:
                args += self._argument(node, name, spec, len(args))
            while args and args[-1] is None:
                args.pop()
            args += self._captured(node)
        except Unknown as problem:
            op = f"{op} ({problem})"
            args = [self._ref(v) for v in node.inputs if v is not None and v.name]
            args += self._captured(node) or [
                self._ref(v) for body in body_graphs(node) for v in body.outputs]
        self.made.nodes[name] = node
        self.graph.nodes.append(Node(name, op, tuple(args), {}, self._results(node, name),
                                     node.name or name))

    def _results(self, node: ir.Node, name: str) -> tuple[str, ...]:
        """Register a node's results; those left out get a name that nothing reads."""
        last = max((i for i, o in enumerate(node.outputs) if o.name), default=-1)
        names = [o.name or f"{name}.{i}" for i, o in enumerate(node.outputs[:last + 1])]
        for out in names:
            self.graph.tensors[out] = Tensor(out, self.facts.shapes.get(out, ()), self._dtype(out))
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
        return [self._ref(v) for n, v in found.items() if n in self.facts.shapes]

    def _argument(self, node: ir.Node, name: str, spec: str, position: int) -> list[Any]:
        if spec == "..":
            return self._all(node, name)
        if spec == "*":
            return [[self._ref(v) for v in node.inputs if v is not None and v.name]]
        if spec == "_":
            return [None]
        if spec[0] == "=":
            return [ast.literal_eval(spec[1:])]
        if spec[0] == ":":
            return COMPUTED[spec[1:]](self, node, name, position)
        if spec.isdigit():
            value = _input_at(node, int(spec))
            return [None if value is None else self._ref(value)]
        return [self._number(node, name, spec, position)]

    def _all(self, node: ir.Node, name: str) -> list[Any]:
        """All inputs; single numbers beside tensors are given as numbers."""
        values = [v for v in node.inputs if v is not None and v.name]
        plain = [v.name in self.facts.known and self.facts.known[v.name].size == 1
                 and self.facts.known[v.name].ndim <= 1 for v in values]
        made: list[Any] = []
        for value, number in zip(values, plain, strict=True):
            if number and not all(plain) and value.name not in self.graph.outputs:
                self.made.places[name, len(made)] = Place("input", len(made))
                made.append(self.facts.known[value.name or ""].reshape(()).item())
            else:
                made.append(self._ref(value))
        return made

    def _number(self, node: ir.Node, name: str, spec: str, position: int) -> Any:
        """The numbers at `#1`, `@axis`, `@axis=0` or at the first of `#1|@axes` that is there."""
        for part in spec.split("|"):
            key, has_default, default = part[1:].partition("=")
            if part[0] == "#":
                value = _input_at(node, int(key))
                if value is not None:
                    self.made.places[name, position] = Place("input", int(key))
                    return self.known(value, int(key))
            else:
                self.made.places[name, position] = Place("attr", key)
                if key in node.attributes:
                    return _plain(node.attributes[key])
                if has_default:
                    return ast.literal_eval(default)
        return None

    def known(self, value: ir.Value, index: int) -> Any:
        """Return the numbers of an input as plain Python; raises Unknown if data decide them."""
        array = self.facts.known.get(value.name or "")
        if array is None and value.const_value is not None and value.const_value.size <= 4096:
            array = value.const_value.numpy()
        if array is None:
            raise Unknown(f"its input {index} is computed from data")
        return array.tolist()


def _input_at(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if value is not None and value.name else None


def _plain(attribute: Any) -> Any:
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


# --- arguments that take more than a look-up --------------------------------------------------


def _normalised(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
    shape = low.facts.shapes[node.inputs[0].name or ""]  # type: ignore[union-attr]
    axis = node.attributes.get_int("axis", -1) if "axis" in node.attributes else -1
    return [list(shape[axis % len(shape):])]


def _last(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
    return [[low.facts.shapes[node.inputs[0].name or ""][-1]]]  # type: ignore[union-attr]


def _pieces(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
    axis = node.attributes.get_int("axis", 0) if "axis" in node.attributes else 0
    old = low.made.model.opset_imports.get("", 0) < 13
    low.made.places[name, at] = Place("attr", "split") if old else Place("input", 1)
    return [[low.facts.shapes[o.name or ""][axis] for o in node.outputs]]


def _pads(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
    """ONNX gives all begins, then all ends; rows want (begin, end) from the last dimension."""
    pads = low._number(node, name, "#1|@pads|@paddings", at)
    rank = len(low.facts.shapes[node.inputs[0].name or ""])  # type: ignore[union-attr]
    axes = _input_at(node, 3)
    named = low.known(axes, 3) if axes is not None else range(rank)
    both = {d % rank: (pads[i], pads[i + len(pads) // 2]) for i, d in enumerate(named)}
    return [[n for d in reversed(range(rank)) for n in both.get(d, (0, 0))]]


def _window(attribute: str) -> Callable[[_Lowering, ir.Node, str, int], list[Any]]:
    def read(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
        rank = len(low.facts.shapes[node.inputs[0].name or ""]) - 2  # type: ignore[union-attr]
        given = node.attributes.get(attribute)
        return [list(given.value) if given is not None else [1] * rank]

    return read


def _padding(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
    """Return (begin, end) for each spatial dimension of a convolution."""
    both = (0, 3) if node.op_type == "QLinearConv" else (0, 1)
    x, w = (low.facts.shapes[node.inputs[i].name or ""][2:]  # type: ignore[union-attr]
            for i in both)
    (strides,), (dilations,) = (_window(a)(low, node, name, at) for a in ("strides", "dilations"))
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
                 for n, k, s, d in zip(x, w, strides, dilations, strict=True)]
        small, large = [n // 2 for n in total], [n - n // 2 for n in total]
        begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
        return [list(zip(begin, end, strict=True))]
    given = node.attributes.get("pads")
    pads = list(given.value) if given is not None and auto != "VALID" else [0] * 2 * len(x)
    return [list(zip(pads[:len(x)], pads[len(x):], strict=True))]


def _index(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
    value = _input_at(node, 1)
    assert value is not None
    known = low.facts.known.get(value.name or "")
    if known is not None and known.size == 1 and known.ndim <= 1 and value.name in low.facts.fixed:
        low.made.places[name, at] = Place("input", 1)
        return [known.tolist()]
    return [low._ref(value)]


def _softmax(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
    """Until opset 13 softmax went over all dimensions from its axis on."""
    old = low.made.model.opset_imports.get("", 0) < 13
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else (1 if old else -1)
    rank = len(low.facts.shapes[node.inputs[0].name or ""])  # type: ignore[union-attr]
    return [list(range(axis % max(rank, 1), rank)) if old else axis]


def _branches(low: _Lowering, node: ir.Node, name: str, at: int) -> list[Any]:
    if not low.facts.entered(node):
        raise Unknown("its branches are not understood in every value")
    results = [list(g.outputs) for g in body_graphs(node)]
    shapes = [[low.facts.shapes.get(v.name or "") for v in side] for side in results]
    if shapes[0] != shapes[1]:
        raise Unknown("its branches return different shapes")
    return [[low._ref(v) for v in side] for side in results]


COMPUTED: Mapping[str, Callable[[_Lowering, ir.Node, str, int], list[Any]]] = {
    "normalised": _normalised, "last": _last, "pieces": _pieces, "pads": _pads,
    "strides": _window("strides"), "dilations": _window("dilations"), "padding": _padding,
    "index": _index, "softmax": _softmax, "branches": _branches,
}


def initializers(trace: OnnxTrace) -> Iterator[str]:
    """Yield the names of all stored arrays of the IR."""
    yield from trace.graph.weights()
