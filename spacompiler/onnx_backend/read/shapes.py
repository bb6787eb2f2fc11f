"""Shapes and small constants of an ONNX graph, inferred anew with concrete sizes.

What a file says about its own values may be stale, so nothing of it is trusted. Every node is
inferred by ONNX's own functions, at one set of concrete input sizes; shape arithmetic (Shape,
Gather, Concat ... Reshape) is computed on the way, so that targets of reshapes are known. What has
no inference function is observed by running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, TypeProto, defs, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.shape_inference import infer_node_outputs

from ...errors import SpaError
from .bodies import LOOPS, body_graphs, body_of

Shape = tuple[int, ...]
SMALL = 4096
"""Values of at most this many elements are computed."""
LIMIT = 2**34
"""No value of a real network has more elements; a hostile file asks for them."""
_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")


@dataclass
class Facts:
    """What is known of each value: shape, type, and the numbers in it where they are few.

    `fixed` are the known values that follow from stored constants alone (not from a shape);
    `closed` names the nodes with bodies (by first result) that are not entered.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    known: dict[str, np.ndarray] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)

    def entered(self, node: ir.Node) -> bool:
        """True for an If, Loop or Scan whose bodies are understood in every value."""
        return node.op_type in ("If", *LOOPS) and bool(node.outputs) and \
            node.outputs[0].name not in self.closed


Observe = Callable[[list[str]], Mapping[str, Any]]


def sizes_of(tensor: ir.TensorProtocol) -> Shape:
    """Return the shape of a stored tensor as plain numbers."""
    return tuple(int(n) for n in tensor.shape)  # type: ignore[arg-type]


def infer(model: ir.Model, sizes: Mapping[str, Shape], *, observe: Observe | None = None,
          visit: Callable[[ir.Node, Facts], None] | None = None) -> Facts:
    """Return the facts of a model whose inputs have these sizes.

    `observe(names)` runs the model and returns the named values, for what cannot be inferred;
    `visit` sees (and may re-write) each node before it is inferred.

    Raises SpaError where a value has no shape.
    """
    facts = Facts()
    pass_ = _Inference(model, facts, visit)
    for value in model.graph.inputs:
        if value.name not in model.graph.initializers:
            _put(facts, value, sizes[value.name or ""], int(value.dtype or 1))
    missing = pass_.graph(model.graph)
    if missing and observe is not None:
        for name, found in observe(missing).items():
            _observed(facts, name, found)
        pass_.visit = None
        missing = pass_.graph(model.graph)
    if missing:
        raise SpaError(f"the shape of {missing[0]!r} cannot be determined",
                       why=f"inference stops at {len(missing)} values",
                       fix="give example inputs (--calibration inputs.npz)")
    return facts


def _put(facts: Facts, value: ir.Value, shape: Shape, dtype: int) -> None:
    name = value.name or ""
    if any(n < 0 for n in shape) or np.prod([max(n, 1) for n in shape], dtype=float) > LIMIT:
        raise SpaError(f"value {name!r} has the absurd shape {list(shape)}",
                       fix="the file is damaged, or its inputs need other sizes")
    facts.shapes[name], facts.types[name] = shape, dtype


def _observed(facts: Facts, name: str, found: object) -> None:
    array = np.asarray(found) if not isinstance(found, (list, tuple, dict)) else None
    if array is not None:
        facts.shapes[name] = array.shape
        facts.types[name] = int(ir.DataType.from_numpy(array.dtype)) \
            if array.dtype.kind in "fiub" else 0
    else:
        facts.shapes[name], facts.types[name] = (), 0


class _Inference:
    def __init__(self, model: ir.Model, facts: Facts,
                 visit: Callable[[ir.Node, Facts], None] | None) -> None:
        self.model, self.facts, self.visit = model, facts, visit
        self.imports = [helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]

    def graph(self, graph: ir.Graph) -> list[str]:
        """Infer all nodes; return the values whose shapes stay unknown."""
        for value in graph.initializers.values():
            self._stored(value)
        missing: list[str] = []
        for node in list(graph):
            if self.visit is not None:
                self.visit(node, self.facts)
            if self.facts.entered(node):
                self._enter(node)
            wanted = [o for o in node.outputs if o.name]
            if all(o.name in self.facts.shapes for o in wanted):
                continue
            if all(i is None or i.name in self.facts.shapes for i in node.inputs):
                self._node(node)
            missing += [o.name or "" for o in wanted if o.name not in self.facts.shapes]
        return missing

    def _enter(self, node: ir.Node) -> None:
        """Infer both branches, or the body; where that fails the node stays closed."""
        done = all(o.name in self.facts.shapes for o in node.outputs)
        names = [v.name for body in body_graphs(node) for v in body.inputs] + [
            o.name for body in body_graphs(node) for inner in body.all_nodes()
            for o in inner.outputs if o.name]
        twice = len(set(names)) < len(names) or (
            not done and any(n in self.facts.shapes for n in names))
        try:
            unknown = twice or not self._given(node) or \
                any([self.graph(body) for body in body_graphs(node)]) or not self._kept(node)
        except SpaError:
            unknown = True
        if unknown:
            self.facts.closed.add(node.outputs[0].name or "")

    def _given(self, node: ir.Node) -> bool:
        """Whether what a body that is run again and again reads is known, and noted as such."""
        body, have = body_of(node), self.facts
        if body is None:
            return node.op_type == "If"
        if any(v.name not in have.shapes for v in (*body.states, *body.scanned)):
            return False
        for value, number in zip(body.counters, (ir.DataType.INT64, ir.DataType.BOOL),
                                 strict=False):
            _put(have, value, (), int(number))
        for value, state in zip(body.inside, body.states, strict=True):
            _put(have, value, have.shapes[state.name or ""], have.types[state.name or ""])
        for value, whole, axis in zip(body.each, body.scanned, body.axes[0], strict=True):
            shape = list(have.shapes[whole.name or ""])
            del shape[axis % len(shape)]
            _put(have, value, tuple(shape), have.types[whole.name or ""])
        return True

    def _kept(self, node: ir.Node) -> bool:
        """Whether each state has after a step the shape that it had before."""
        body = body_of(node)
        return body is None or all(
            self.facts.shapes.get(a.name or "") == self.facts.shapes[b.name or ""]
            for a, b in zip(body.after, body.states, strict=True))

    def _repeated(self, node: ir.Node) -> None:
        """Shapes of what a Loop or Scan returns: of stacked results only where steps are known."""
        body = body_of(node)
        assert body is not None
        have = self.facts
        for out, state in zip(node.outputs, body.states, strict=False):
            _put(have, out, have.shapes[state.name or ""], have.types[state.name or ""])
        if not body.scanned:
            return
        first, axis = have.shapes[body.scanned[0].name or ""], body.axes[0][0]
        for out, made, at in zip(node.outputs[len(body.states):], body.steps, body.axes[1],
                                 strict=True):
            shape = list(have.shapes[made.name or ""])
            shape.insert(at % (len(shape) + 1), first[axis % len(first)])
            _put(have, out, tuple(shape), have.types[made.name or ""])

    def _stored(self, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is None:
            return
        shape = sizes_of(tensor)
        _put(self.facts, value, shape, int(tensor.dtype))
        size = int(np.prod(shape, dtype=np.int64))
        few = size <= 1 and (tensor.dtype.is_floating_point() or tensor.dtype.is_integer())
        if few or (size <= SMALL and tensor.dtype in _WHOLE):
            self.facts.known[value.name or ""] = tensor.numpy()
            self.facts.fixed.add(value.name or "")

    def _node(self, node: ir.Node) -> None:
        if node.op_type in ("Shape", "Size") and node.domain in ("", "ai.onnx"):
            self._shape_of(node)
        elif self._foldable(node):
            self._fold(node)
        elif node.op_type == "If":
            self._branches(node)
        elif node.op_type in LOOPS and self.facts.entered(node):
            self._repeated(node)
        else:
            self._infer(node)

    def _shape_of(self, node: ir.Node) -> None:
        assert node.inputs[0] is not None
        shape = self.facts.shapes[node.inputs[0].name or ""]
        if node.op_type == "Size":
            made = np.array(int(np.prod(shape, dtype=np.int64)))
        else:
            start = node.attributes.get_int("start", 0)
            end = node.attributes.get_int("end", len(shape))
            made = np.array(shape[start:end], dtype=np.int64)
        self._know(node.outputs[0], made.astype(np.int64), fixed=node.inputs[0].is_initializer())

    def _know(self, value: ir.Value, array: np.ndarray, fixed: bool) -> None:
        name = value.name or ""
        _put(self.facts, value, array.shape, int(ir.DataType.from_numpy(array.dtype)))
        self.facts.known[name] = array
        if fixed:
            self.facts.fixed.add(name)

    def _foldable(self, node: ir.Node) -> bool:
        return bool(node.inputs) and not any(True for _ in body_graphs(node)) and \
            not node.op_type.startswith(_RANDOM) and node.domain in ("", "ai.onnx") and \
            all(i is None or i.name in self.facts.known for i in node.inputs)

    def _fold(self, node: ir.Node) -> None:
        self._infer(node)
        shapes = [self.facts.shapes.get(o.name or "") for o in node.outputs]
        if any(s is None or np.prod(s, dtype=np.int64) > SMALL for s in shapes):
            return
        names = [i.name for i in node.inputs if i is not None]
        feeds = {n: self.facts.known[n] for n in dict.fromkeys(names) if n}
        try:
            results = node_results(ir.to_proto(node), feeds, self.imports)
        except Exception:  # the reference implementation refuses in many ways
            return
        fixed = all(n in self.facts.fixed for n in names)
        for value, result in zip(node.outputs, results, strict=False):
            small = result.size <= 1 or result.dtype.kind in "iub"
            if small and result.dtype.kind in "iubf":
                self._know(value, result, fixed)

    def _branches(self, node: ir.Node) -> None:
        one, other = (list(g.outputs) for g in body_graphs(node))
        for out, a, b in zip(node.outputs, one, other, strict=True):
            shapes = [self.facts.shapes.get(v.name or "") for v in (a, b)]
            if shapes[0] is not None and shapes[0] == shapes[1]:
                _put(self.facts, out, shapes[0], self.facts.types[a.name or ""])

    def _infer(self, node: ir.Node) -> None:
        version = self.model.opset_imports.get(node.domain, node.version or 1)
        try:
            schema = defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            return
        if schema.deprecated:  # ONNX Runtime may have it still
            return
        proto = ir.to_proto(node)
        types, data = {}, {}
        for value in node.inputs:
            if value is not None and value.name:
                types[value.name] = _type(self.facts, value.name)
                if value.name in self.facts.known:
                    data[value.name] = _tensor(self.facts.known[value.name], value.name)
        try:
            found = infer_node_outputs(schema, proto, types, data, opset_imports=self.imports,
                                       ir_version=self.model.ir_version)
        except Exception as problem:
            raise _failed(node, problem) from problem
        for value in node.outputs:
            shape = _concrete(found.get(value.name or ""))
            if shape is not None:
                _put(self.facts, value, shape, found[value.name or ""].tensor_type.elem_type)


_WHOLE = tuple(ir.DataType[n] for n in
               ("INT64", "INT32", "BOOL", "INT16", "UINT16", "UINT32", "UINT64"))


def _failed(node: ir.Node, problem: Exception) -> SpaError:
    reason = str(problem).strip().splitlines()
    return SpaError(f"{node.op_type} {node.name or ''} has no valid result".replace("  ", " "),
                    why=reason[-1][:300] if reason else type(problem).__name__,
                    fix="the file is damaged, or its inputs need other sizes "
                        "(--calibration inputs.npz)")


def _type(facts: Facts, name: str) -> TypeProto:
    return helper.make_tensor_type_proto(facts.types[name] or 1, facts.shapes[name])


def _tensor(array: np.ndarray, name: str) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)


def _concrete(found: TypeProto | None) -> Shape | None:
    if found is None or not found.HasField("tensor_type") or \
            not found.tensor_type.HasField("shape"):
        return None
    dims = found.tensor_type.shape.dim
    if any(not d.HasField("dim_value") for d in dims):
        return None
    return tuple(d.dim_value for d in dims)


def node_results(node: onnx.NodeProto, feeds: Mapping[str, np.ndarray],
                 imports: list[onnx.OperatorSetIdProto],
                 kernels: Sequence[type[OpRun]] = ()) -> list[np.ndarray]:
    """Compute one node by ONNX's reference implementation, or by `kernels` of the same names."""
    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
              for n, a in feeds.items()]
    outputs = [helper.make_empty_tensor_value_info(o) for o in node.output if o]
    graph = helper.make_graph([node], "node", inputs, outputs)
    model = helper.make_model(graph, opset_imports=imports)
    with np.errstate(all="ignore"):
        results = ReferenceEvaluator(model, new_ops=list(kernels)).run(None, dict(feeds))
    return [np.asarray(r) for r in results]
