"""Arrays that lie in files: read where they are used, and let go after it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..system.pages import give_back


def let_go(arrays: Iterable[torch.Tensor]) -> None:
    """Free the memory of arrays that are shown out of a file; they are read again when used.

    Others, and those that were written to, stay as they are.
    """
    for array in arrays:
        if array.device.type == "cpu" and array.layout is torch.strided and array.is_contiguous():
            give_back(array.data_ptr(), array.nbytes)
