"""ONNX's own checks, for files that ONNX Runtime runs and the checker does not know.

ONNX Runtime writes some of its operators into ONNX's domain, and runs versions of operators that
were withdrawn since. Such nodes are checked as those of another domain are: their own attributes
and shapes are not looked at, all else is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import defs

UNCHECKED = "spacompiler.unchecked"
_NEWEST_IR = 14


def check(proto: onnx.ModelProto, known: Collection[str]) -> None:
    """Raise what onnx.checker raises; nodes of the operators `known` need no ONNX schema."""
    for graph in _graphs(proto.graph):
        for value in graph.output:  # ONNX Runtime wants no shape of results
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    set_aside(proto, known)
    onnx.checker.check_model(proto)


def full_check(path: Path, known: Collection[str]) -> None:
    """Check a file as it lies there, shape inference included."""
    proto = onnx.load(path, load_external_data=False)
    if not set_aside(proto, known):
        onnx.checker.check_model(str(path), full_check=True)
        return
    beside = path.with_name(f".{path.name}.check")
    try:
        beside.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(str(beside), full_check=True)
    finally:
        beside.unlink(missing_ok=True)


def set_aside(proto: onnx.ModelProto, known: Collection[str]) -> bool:
    """Move nodes that the checker refuses by name into a domain of their own; True if any was."""
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    found = [node for graph in _graphs(proto.graph) for node in graph.node
             if node.domain in ("", "ai.onnx") and node.op_type in known
             and not is_current(node.op_type, version)]
    for node in found:
        node.domain = UNCHECKED
    if found:
        proto.opset_import.append(onnx.helper.make_opsetid(UNCHECKED, 1))
    return bool(found)


@cache
def is_current(name: str, version: int) -> bool:
    """True if ONNX has the operator in this version, and has not withdrawn it."""
    try:
        return not defs.get_schema(name, version, "").deprecated
    except defs.SchemaError:
        return False


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node:
                    yield from _graphs(body)


@cache
def runtime_ir() -> int:
    """The newest IR version that the installed ONNX Runtime reads."""
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value],
                                   [onnx.helper.make_tensor_value_info("y", 1, [1])])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for version in range(_NEWEST_IR, 10, -1):
        model = onnx.helper.make_model(graph, ir_version=version,
                                       opset_imports=[onnx.helper.make_opsetid("", 17)])
        try:
            ort.InferenceSession(model.SerializeToString(), options,
                                 providers=["CPUExecutionProvider"])
        except Exception:  # ONNX Runtime raises its own kinds
            continue
        return version
    return 10
