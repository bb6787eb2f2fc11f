"""A part of a network as a re-written program that other code can take for the part."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from .emit.program import Rewritten
from .weights import named_arrays


class Rebuilt(nn.Module):
    """A part as a re-written program, called like the part.

    Other code may look at the part (at the type of a weight, say): attributes are those of a copy
    of it that holds the pruned arrays.
    """

    def __init__(self, program: ExportedProgram, part: nn.Module, path: str) -> None:
        super().__init__()
        self.body = Rewritten(program)
        arrays = {**program.constants, **program.state_dict}
        memo: dict[int, Any] = {id(t): arrays.get(f"{path}.{name}", t)
                                for name, t in named_arrays(part)}
        vars(self)["_seen"] = copy.deepcopy(part, memo)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_seen" not in vars(self):  # while it is being copied
                raise
            return getattr(vars(self)["_seen"], name)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Return what the part gives, by its re-written program."""
        return self.body((args, kwargs))[0]


def called_like(part: nn.Module) -> type[Rebuilt]:
    """Return Rebuilt with the signature of a part: other code may ask which arguments it takes."""
    def forward(self: Rebuilt, *args: object, **kwargs: object) -> Any:
        return self.body((args, kwargs))[0]

    forward.__signature__ = inspect.signature(type(part).forward)  # type: ignore[attr-defined]
    return type("Rebuilt", (Rebuilt,), {"forward": forward, "__doc__": Rebuilt.__doc__})
