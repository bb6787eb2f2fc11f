"""The operators that torch's ONNX exporter can translate: its table, read once, as it is needed.

Half a thousand functions stand in it, and of each the source is parsed for its signature; a program
needs some dozens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def words(opset: int) -> Any:
    """Return the exporter's table for a version of ONNX's operators."""
    from torch.onnx._internal.exporter import _registration

    try:
        return _read_late(opset)
    except Exception as problem:  # the table is built otherwise in the torch that is installed
        logging.getLogger(__name__).debug("reading the whole table: %s", problem)
    return _registration.ONNXRegistry.from_torchlib(opset_version=opset)


def _read_late(opset: int) -> Any:
    """The same table, in which a signature is worked out when its operator is asked for."""
    from onnxscript.function_libs.torch_lib import ops, registration
    from torch.onnx._internal.exporter import _registration
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry

    class Late(_registration.ONNXRegistry):
        """Signatures are filled in where functions are taken out."""

        def get_decomps(self, target: Callable[..., Any]) -> list[Any]:
            found = super().get_decomps(target)
            for meta in found:
                if id(meta) in late:
                    late.remove(id(meta))
                    meta.skip_signature_inference = False
                    meta.__post_init__()
            return found

        def is_registered(self, target: Callable[..., Any]) -> bool:
            return bool(super().get_decomps(target))

    made, late = Late(), set[int]()
    made._opset_version = opset
    for meta in _torchlib_registry.get_torchlib_ops():
        made._register(meta.fx_target, meta)
    assert ops is not None  # importing it fills the registry
    for name, functions in registration.default_registry.items():
        target = None if name.startswith("internal::") else _registration._get_overload(name)
        if target is None:
            continue
        for function, is_complex in (*((f, False) for f in functions.overloads),
                                     *((f, True) for f in functions.complex)):
            meta = _registration.OnnxDecompMeta(
                function, target, None, is_complex=is_complex, skip_signature_inference=True)
            late.add(id(meta))
            made._register(target, meta)
    made._cleanup_registry_based_on_opset_version()
    return made
