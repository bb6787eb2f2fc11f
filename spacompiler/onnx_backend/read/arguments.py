"""A node's inputs and attributes as the arguments that its row asks for.

The table's specs (`rows/onnx_table.py`) say where each stands in the file; what takes more than a
look-up is computed here, by the names after `:` in a spec.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from ...errors import SpaError
from ...graph.ir import Ref, Tensor
from .bodies import body_graphs, body_of
from .trace import OnnxTrace, Place

_QUANTISED = ("DequantizeLinear", "QuantizeLinear", "ConvInteger", "MatMulInteger", "QLinear")


class Unknown(Exception):
    """An argument that must be known is computed from data."""


class Arguments:
    """The arguments of a trace's nodes; tensors that they name enter its graph."""

    def __init__(self, made: OnnxTrace) -> None:
        self.made, self.graph, self.facts = made, made.graph, made.facts
        self.stored = made.model.graph.initializers

    def dtype(self, name: str) -> str:
        """Return a value's type by numpy's name; "object" for what numpy has none for."""
        number = self.facts.types.get(name, 1)
        return ir.DataType(number).numpy().name if number and number != 8 else "object"

    def ref(self, value: ir.Value) -> Ref:
        """Return a value as an argument. Raises SpaError if nothing makes it."""
        name = value.name or ""
        if name not in self.graph.tensors:
            self.graph.tensors[name] = self._tensor(value)
        return Ref(name)

    def _tensor(self, value: ir.Value) -> Tensor:
        name, dtype = value.name or "", self.dtype(value.name or "")
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

    def of(self, node: ir.Node, name: str, spec: str, position: int) -> list[Any]:
        """Return the arguments of one part of a spec, the first of them at `position` of the row's.

        Raises Unknown if data decide numbers that must be known.
        """
        if spec == "..":
            return self._all(node, name)
        if spec == "*":
            return [[self.ref(v) for v in node.inputs if v is not None and v.name]]
        if spec == "_":
            return [None]
        if spec[0] == "=":
            return [ast.literal_eval(spec[1:])]
        if spec[0] == ":":
            return COMPUTED[spec[1:]](self, node, name, position)
        if spec.isdigit():
            value = _input_at(node, int(spec))
            return [None if value is None else self.ref(value)]
        return [self.number(node, name, spec, position)]

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
                made.append(self.ref(value))
        return made

    def number(self, node: ir.Node, name: str, spec: str, position: int) -> Any:
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


def _plain(attribute: ir.Attr) -> Any:
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


# --- arguments that take more than a look-up --------------------------------------------------


def _normalised(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
    shape = low.facts.shapes[node.inputs[0].name or ""]  # type: ignore[union-attr]
    axis = node.attributes.get_int("axis", -1) if "axis" in node.attributes else -1
    return [list(shape[axis % len(shape):])]


def _last(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
    return [[low.facts.shapes[node.inputs[0].name or ""][-1]]]  # type: ignore[union-attr]


def _pieces(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
    axis = node.attributes.get_int("axis", 0) if "axis" in node.attributes else 0
    old = low.made.model.opset_imports.get("", 0) < 13
    low.made.places[name, at] = Place("attr", "split") if old else Place("input", 1)
    return [[low.facts.shapes[o.name or ""][axis] for o in node.outputs]]


def _pads(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
    """ONNX gives all begins, then all ends; rows want (begin, end) from the last dimension."""
    pads = low.number(node, name, "#1|@pads|@paddings", at)
    rank = len(low.facts.shapes[node.inputs[0].name or ""])  # type: ignore[union-attr]
    axes = _input_at(node, 3)
    named = low.known(axes, 3) if axes is not None else range(rank)
    both = {d % rank: (pads[i], pads[i + len(pads) // 2]) for i, d in enumerate(named)}
    return [[n for d in reversed(range(rank)) for n in both.get(d, (0, 0))]]


def _window(attribute: str) -> Callable[[Arguments, ir.Node, str, int], list[Any]]:
    def read(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
        rank = len(low.facts.shapes[node.inputs[0].name or ""]) - 2  # type: ignore[union-attr]
        given = node.attributes.get(attribute)
        return [list(given.value) if given is not None else [1] * rank]

    return read


def _padding(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
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


def _index(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
    value = _input_at(node, 1)
    assert value is not None
    known = low.facts.known.get(value.name or "")
    if known is not None and known.size == 1 and known.ndim <= 1 and value.name in low.facts.fixed:
        low.made.places[name, at] = Place("input", 1)
        return [known.tolist()]
    return [low.ref(value)]


def _softmax(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
    """Until opset 13 softmax went over all dimensions from its axis on."""
    old = low.made.model.opset_imports.get("", 0) < 13
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else (1 if old else -1)
    rank = len(low.facts.shapes[node.inputs[0].name or ""])  # type: ignore[union-attr]
    return [list(range(axis % max(rank, 1), rank)) if old else axis]


def _branches(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
    if not low.facts.entered(node):
        raise Unknown("its branches are not understood in every value")
    results = [list(g.outputs) for g in body_graphs(node)]
    shapes = [[low.facts.shapes.get(v.name or "") for v in side] for side in results]
    if shapes[0] != shapes[1]:
        raise Unknown("its branches return different shapes")
    return [[low.ref(v) for v in side] for side in results]


def _body(low: Arguments, node: ir.Node, name: str, at: int) -> list[Any]:
    body = body_of(node)
    if body is None or not low.facts.entered(node):
        raise Unknown("its body is not understood in every value")
    sides = (body.states, body.after, body.steps)
    return [*([low.ref(v) for v in side] for side in sides), list(body.axes[1])]


COMPUTED: Mapping[str, Callable[[Arguments, ir.Node, str, int], list[Any]]] = {
    "normalised": _normalised, "last": _last, "pieces": _pieces, "pads": _pads,
    "strides": _window("strides"), "dilations": _window("dilations"), "padding": _padding,
    "index": _index, "softmax": _softmax, "branches": _branches, "body": _body,
}
