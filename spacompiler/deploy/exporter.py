"""torch's ONNX exporter, step by step: what each program needs anew is made anew, and no more.

Asked as a whole it reads its table of operators again for every program, and computes the types of
all values a second time. Its own steps are taken here, with the table read once and with the types
that the program has; where they are not those of the torch that is installed, it is asked as a
whole. Both ways give the same model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.export import ExportedProgram

from ..errors import SpaError
from ..system.process import quiet
from .decomposed import decomposed
from .words import words

OLDEST = 18
"""The oldest version that torch's exporter writes by itself."""


def translated(ep: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str] | None,
               opset: int) -> ir.Model:
    """Translate a program; the weights stay torch's and are not copied.

    Raises SpaError where an operator cannot be expressed.
    """
    opset = max(opset, OLDEST)
    with quiet():
        try:
            return _by_steps(ep, inputs, outputs, opset)
        except Exception as problem:  # what the exporter says as a whole counts
            logging.getLogger(__name__).debug("asking the whole exporter: %s", problem)
        return _whole(ep, inputs, outputs, opset)


def _whole(ep: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str] | None,
           opset: int) -> ir.Model:
    try:
        program = torch.onnx.export(
            ep,
            dynamo=True,
            opset_version=opset,
            input_names=inputs,
            output_names=outputs,
            optimize=False,
            verify=False,
            verbose=False,
        )
    except Exception as error:
        raise SpaError(
            what="the program cannot be written as ONNX",
            why=str(error.__cause__ or error).strip(),
            fix="replace the operation named above, or emit another format",
        ) from error
    assert program is not None
    return program.model


def _by_steps(ep: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str] | None,
              opset: int) -> ir.Model:
    from torch.fx.experimental import _config
    from torch.onnx._internal.exporter import _core, _fx_passes, _ir_passes

    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        plain = decomposed(ep, _table(opset), words(opset).is_registered)
        for module in plain.graph_module.modules():
            assert isinstance(module, fx.GraphModule)
            _promote(module)
        plain._graph_module = _fx_passes.remove_assertion_nodes(plain.graph_module)
    model: ir.Model = _core._exported_program_to_onnx_program(plain, registry=words(opset)).model
    convert = _core.onnxscript_apis.convert_version  # type: ignore[attr-defined]
    model = convert(model, opset)
    if inputs:
        _ir_passes.rename_inputs(model, inputs)
    if outputs:
        _ir_passes.rename_outputs(model, outputs)
    return model


@cache
def _table(opset: int) -> Mapping[Any, Any]:
    """How torch decomposes what ONNX has no word for in a version of its operators."""
    from torch.onnx._internal.exporter import _decomp

    known = _decomp.get_onnx_implemented_overloads(words(opset))
    return _decomp.create_onnx_friendly_decomposition_table(set(known))


def _promote(module: fx.GraphModule) -> None:
    """Say in a graph which operands torch would cast to the type of others, in place."""
    from torch.onnx._internal.fx import passes
    from torch.onnx._internal.fx.passes import type_promotion

    class Known(type_promotion._TypePromotionInterpreter):
        """Computes only what is cast, and takes the other values as they were traced."""

        def run_node(self, n: fx.Node) -> Any:
            if n.op != "call_function" or "val" not in n.meta:
                return fx.Interpreter.run_node(self, n)
            rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
            if rule:
                with self._set_current_node(n):
                    self._maybe_promote_node(n, rule)
            return n.meta["val"]

    step = passes.InsertTypePromotion(module)
    step.interpreter = Known(module, step.interpreter.type_promotion_table)
    step.run()
