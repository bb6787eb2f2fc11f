"""The dense network as the ONNX file of the pruned one with other arrays: a file to be timed.

Where a plan changes no more than the sizes of stored arrays, both networks are the same operators.
So the dense one need not be exported again: it is the pruned file with the arrays as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from safetensors.torch import save_file
from torch import Tensor

from .weights_beside import places


@contextmanager
def twin(pruned: Path, changed: Mapping[str, Tensor]) -> Iterator[Path | None]:
    """Give the pruned file with dense arrays, by name, in place of those of changed sizes.

    It lies beside the pruned file, whose other arrays it reads, and is gone afterwards. None if
    an array is not in the file: what was folded into other constants has no name there, and the
    dense network has to be exported.
    """
    model = ir.load(pruned)
    if not changed.keys() <= model.graph.initializers.keys():
        yield None
        return
    file, data = (pruned.with_name(f".dense.{end}") for end in ("onnx", "safetensors"))
    try:
        save_file({name: array.detach().contiguous() for name, array in changed.items()}, data)
        for name, place in places(data).items():
            value = model.graph.initializers[name]
            value.shape = ir.Shape(changed[name].shape)
            value.const_value = ir.ExternalTensor(
                data.name, place.offset, place.length, value.dtype,  # type: ignore[arg-type]
                shape=value.shape, name=name, base_dir=data.parent)  # type: ignore[arg-type]
        for node in model.graph.all_nodes():  # the runtime infers what it needs
            for made in node.outputs:
                made.shape = None
        ir.save(model, file)
        yield file
    finally:
        for left in (file, data):
            left.unlink(missing_ok=True)
