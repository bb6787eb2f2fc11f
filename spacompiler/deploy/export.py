"""From an exported program to an ONNX file, in the same bytes every time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import onnxscript.optimizer
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Node

from ..errors import SpaError
from ..onnx_backend.run.sizes import settle
from ..system.process import quiet
from ..system.staging import Scratch
from ..torch_backend.emit.refresh import drop_metadata_asserts, memory, rebuild
from ..torch_backend.trace import copied
from .decomposed import LocallyDecomposed
from .exporter import OLDEST, translated
from .lowered import lower
from .spelled import spell_out, without_zero_biases
from .weights_beside import refer_to_safetensors

OPSET = 20
"""Version 20 runs everywhere; 23 fuses rotary embeddings that ONNX Runtime gets wrong at batch > 1.
"""
EXTERNAL_BYTES = 200 * 2**20
"""Weights above this go to a ``.data`` file beside the model."""

_INLINE_LIMIT = 2**30
_FOLD_LIMIT = 1024
_LOGGERS = ("torch.onnx", "torch.export", "torch._subclasses", "onnxscript", "onnx_ir")
_ATEN = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Form:
    """How a file is written: the version of operators, the name of its file of weights.

    Weights of more than `external` bytes in all go there; `optimize` folds what is constant.
    """

    opset: int = OPSET
    data: str = "{}.data"
    external: int = EXTERNAL_BYTES
    optimize: bool = True


FORM = Form()


def tensor_inputs(ep: ExportedProgram) -> list[str]:
    """The names of the ONNX inputs, in order: those of forward's tensor arguments.

    Arguments that are constants of the trace (``use_cache=False``, ``None``) are left out; members
    of a nested argument get joined names such as ``past_key_values_0_0``.
    """
    specs = [s for s in ep.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    return [s.arg.name for s in specs if not isinstance(s.arg, ConstantArgument)]


def output_count(ep: ExportedProgram) -> int:
    """How many tensors the program returns: a model output's fields in order, without ``None``."""
    specs = [s for s in ep.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    return sum(not isinstance(s.arg, ConstantArgument) for s in specs)


def export_onnx(
    ep: ExportedProgram,
    path: Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    axes: Mapping[str, Mapping[int, str]] | None = None,
    beside: Sequence[Path] = (),
    form: Form = FORM,
) -> tuple[Path, ...]:
    """Write a program as an ONNX file, the same bytes for the same program.

    ``axes`` names dynamic axes by input name, ``{"input_ids": {0: "batch", 1: "sequence"}}``.
    Weights go into the file, to one of their own (see ``Form``), or stay where they are: those
    found bit-equal in safetensors files ``beside`` it are read from there. They keep their names
    and layout; tied ones are written once. Returns the files written; on failure there are none
    and earlier ones stay as they were.

    Raises:
        SpaError: the names do not fit the program, a named axis is fixed, or torch's exporter
            cannot express the program.
    """
    path = Path(path)
    names = _check_names(ep, input_names, output_names)
    model = translated(_without_idle_nodes(ep), names, output_names, form.opset)
    settle(model)
    without_zero_biases(model)
    _name_axes(model, axes or {})
    _share_tied(model, [*ep.state_dict, *ep.constants])
    limit = min(form.external, _INLINE_LIMIT)
    shared = bool(beside) and _weight_bytes(model) > limit
    if form.optimize:
        _simplify(model, keep_layout=shared)
    _strip(model)
    if shared:
        refer_to_safetensors(model, beside, limit)
    if form.opset < OLDEST:
        lower(model, form.opset)
    return _save(model, path, limit, form.data.format(path.name))


def _check_names(
    ep: ExportedProgram, inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> list[str]:
    """The input names to use; the exporter itself ignores a wrong count without a word."""
    own = tensor_inputs(ep)
    names = own if inputs is None else list(inputs)
    count = output_count(ep)
    if len(names) != len(own) or (outputs is not None and len(outputs) != count):
        raise SpaError(
            what="the names do not fit the program",
            why=f"it has the inputs {own} and {count} outputs; names given: {inputs}, {outputs}",
            fix="give one name for every tensor that goes in and comes out",
        )
    return names


def _without_idle_nodes(ep: ExportedProgram) -> ExportedProgram:
    """Drop checks and whole-range slices; each would cost the exporter ten ONNX nodes."""
    module = copied(ep.graph_module)
    drop_metadata_asserts(module)
    spell_out(module)
    for node in list(module.graph.nodes):
        if _is_idle_slice(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    return rebuild(ep, module, kind=LocallyDecomposed)


def _is_idle_slice(node: Node) -> bool:
    """Whether a slice takes all of its axis, and is no output (outputs are known by name)."""
    if node.target is not _ATEN.slice.Tensor or any(u.op == "output" for u in node.users):
        return False
    start, stop, step = (*node.args[2:], *(None,) * 3)[:3]
    whole = stop is None or (isinstance(stop, int) and stop == 2**63 - 1)
    return not node.kwargs and start in (None, 0) and whole and step in (None, 1)


def _name_axes(model: ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Replace the tracer's symbols (s72) by readable names, in expressions of them too."""
    shapes = {value.name: value.shape for value in model.graph.inputs}
    mapping: dict[str | ir.SymbolicDim, str] = {}
    for name, wanted in axes.items():
        for axis, label in wanted.items():
            mapping.setdefault(_symbol(name, shapes.get(name), axis), label)
    if mapping:
        # The program object only carries the model to the public renaming method.
        torch.onnx.ONNXProgram(model, None).rename_axes(mapping)


def _symbol(name: str, shape: ir.Shape | None, axis: int) -> str:
    """The tracer's symbol for an axis of an input."""
    size = shape[axis] if shape is not None and axis < len(shape) else None
    if isinstance(size, ir.SymbolicDim) and size.value is not None:
        return size.value
    if shape is None:
        raise SpaError(
            what=f"there is no input named {name!r} to name the axes of",
            fix="use the names that the inputs have in the file",
        )
    raise SpaError(
        what=f"axis {axis} of input {name!r} is not dynamic",
        why=f"the program was traced with the shape {shape}",
        fix="mark the axis as dynamic when capturing, or do not name it",
    )


def _share_tied(model: ir.Model, order: Sequence[str]) -> None:
    """Let weights that share memory be one initialiser, named as the first of them in ``order``."""
    first: dict[Any, ir.Value] = {}
    initializers = model.graph.initializers
    for name in [name for name in order if name in initializers]:
        value = initializers[name]
        raw = getattr(value.const_value, "raw", None)
        key = memory(raw) if isinstance(raw, Tensor) else None
        if key is None or value.is_graph_output():
            continue
        keeper = first.setdefault(key, value)
        if keeper is not value:
            ir.convenience.replace_all_uses_with(value, keeper)
            del initializers[name]


def _simplify(model: ir.Model, keep_layout: bool) -> None:
    """Fold what is constant and drop what is unused; weights stay as stored if `keep_layout`.

    The exporter's own optimiser is not used: its pattern matching takes time quadratic in the
    nodes, and it replaces named weights by anonymous transposed copies. Fusing is the runtime's.
    """
    with quiet():
        ir_passes.InlinePass()(model)
        onnxscript.optimizer.fold_constants_ir(
            model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT,
            should_fold=lambda node: False if keep_layout and node.op_type == "Transpose" else None,
        )
        _divide(model)
        for step in (
            ir_passes.IdentityEliminationPass(),
            ir_passes.RemoveUnusedNodesPass(),
            ir_passes.RemoveUnusedFunctionsPass(),
            ir_passes.RemoveUnusedOpsetsPass(),
            ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            ir_passes.DeduplicateInitializersPass(size_limit=_FOLD_LIMIT),
            ir_passes.CommonSubexpressionEliminationPass(),
            ir_passes.RemoveUnusedNodesPass(),
            ir_passes.OutputFixPass(),
            ir_passes.NameFixPass(),
        ):
            step(model)


def _divide(model: ir.Model) -> None:
    """Write x * (1 / y) as x / y: in that form runtimes know a root-mean-square norm and fuse it.
    """
    for inverse in [n for n in model.graph if n.op_type == "Reciprocal"]:
        uses = list(inverse.outputs[0].uses())
        if len(uses) == 1 and uses[0].node.op_type == "Mul":
            node, old = uses[0].node, uses[0].node.outputs[0]
            quotient = ir.node("Div", [node.inputs[1 - uses[0].idx], inverse.inputs[0]],
                               name=node.name)
            out = quotient.outputs[0]
            out.name, out.shape, out.type = old.name, old.shape, old.type
            model.graph.insert_before(node, quotient)
            ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
            model.graph.remove((node, inverse), safe=True)


def _strip(model: ir.Model) -> None:
    """Remove stack traces, paths and notes, which differ from machine to machine."""
    graphs: list[Any] = [model.graph, *model.functions.values()]
    for graph in graphs:
        _clear(graph)
        for node in graph.all_nodes():
            _clear(node, *node.outputs)
    _clear(model, *model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())
    model.producer_name, model.producer_version = "spacompiler", None


class _Noted(Protocol):
    """A part of a model that carries notes."""

    doc_string: str | None

    @property
    def metadata_props(self) -> dict[str, str]: ...


def _clear(*parts: _Noted) -> None:
    """Empty the notes of parts of a model."""
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None


def _weight_bytes(model: ir.Model) -> int:
    """Size of all weights that are not in a file yet, in bytes."""
    values = (v.const_value for v in model.graph.initializers.values())
    return sum(v.nbytes for v in values if v is not None and not isinstance(v, ir.ExternalTensor))


def _save(model: ir.Model, path: Path, limit: int, data: str) -> tuple[Path, ...]:
    """Write the model; a failure leaves nothing behind and the earlier files as they were."""
    try:
        return _write(model, path, _weight_bytes(model) > limit, path.with_name(data))
    except OSError as error:
        raise SpaError(
            what="the ONNX file cannot be written",
            where=str(path),
            why=str(error),
            fix="choose a folder that exists, is writable and has space left",
        ) from error


def _write(model: ir.Model, path: Path, external: bool, data: Path) -> tuple[Path, ...]:
    """Fill a hidden folder beside the target, then move its files into place."""
    with Scratch(path.parent, path.name) as folder:
        ir.save(
            model,
            folder / path.name,
            external_data=data.name if external else None,
            size_threshold_bytes=_FOLD_LIMIT,
        )
        if external:
            os.replace(folder / data.name, data)
        os.replace(folder / path.name, path)
    if not external:
        data.unlink(missing_ok=True)
    return (path, data) if external else (path,)
