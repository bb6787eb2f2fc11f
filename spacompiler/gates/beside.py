"""What trains beside gates: nothing, adapters, or everything. One row of a table each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from ..errors import SpaError
from ..request.registry import row
from ..torch_backend.trace import Trace

Stored = Callable[[str], torch.Tensor]


class Beside:
    """Arrays of a program, as they are, and as they train."""

    def __init__(self) -> None:
        self.parameters: dict[str, torch.Tensor] = {}

    def start(self, trace: Trace, stored: Stored, draws: torch.Generator) -> None:
        """Make parameters of a program's arrays."""
        self._tied, self._stored = trace.tied, stored

    def weight(self, name: str) -> torch.Tensor:
        """Return an array as it is now, differentiably; tied ones are one."""
        return self._stored(self._tied.get(name, name)).detach()

    def trained(self) -> dict[str, torch.Tensor]:
        """Return the arrays that are others than they were."""
        return {}


class Nothing(Beside):
    """The network is frozen."""


class Adapters(Beside):
    """W + (alpha / rank) B A on matrices whose names `targets` matches (Hu et al., 2021)."""

    def __init__(self, rank: int = 8, alpha: float = 8.0, targets: str = "q_proj|v_proj") -> None:
        super().__init__()
        self.rank, self.scale, self.targets = rank, alpha / rank, targets

    def start(self, trace: Trace, stored: Stored, draws: torch.Generator) -> None:
        """A is drawn, B is zero. Raises SpaError if there is no such matrix."""
        super().start(trace, stored, draws)
        self._on = [name for name in trace.program.state_dict if re.search(self.targets, name)
                    and trace.tied.get(name, name) == name and stored(name).ndim == 2]
        if not self._on:
            raise SpaError("no matrix can be adapted", why=f"no name matches {self.targets!r}",
                           fix="give targets, a regular expression over names of weights")
        for name in self._on:
            out, into = stored(name).shape
            kind = stored(name).dtype
            a = torch.randn(self.rank, into, generator=draws, dtype=torch.float32) / into**0.5
            self.parameters[f"{name} A"] = a.to(kind).requires_grad_()
            self.parameters[f"{name} B"] = torch.zeros(out, self.rank, dtype=kind,
                                                       requires_grad=True)

    def weight(self, name: str) -> torch.Tensor:
        """W, or W + (alpha / rank) B A."""
        first = self._tied.get(name, name)
        held = self._stored(first).detach()
        b = self.parameters.get(f"{first} B")
        return held if b is None else held + self.scale * (b @ self.parameters[f"{first} A"])

    def trained(self) -> dict[str, torch.Tensor]:
        """Weights with their adapters merged."""
        return {name: self.weight(name).detach() for name in self._on}


class Everything(Beside):
    """All parameters train."""

    def start(self, trace: Trace, stored: Stored, draws: torch.Generator) -> None:
        """Copies of all floating-point parameters."""
        super().start(trace, stored, draws)
        learned = [name for name, t in trace.graph.weights().items() if t.kind == "parameter"]
        self.parameters = {
            first: stored(first).detach().clone().requires_grad_()
            for first in dict.fromkeys(trace.tied.get(name, name) for name in learned)
            if stored(first).is_floating_point()}

    def weight(self, name: str) -> torch.Tensor:
        """The copy that trains."""
        first = self._tied.get(name, name)
        return self.parameters.get(first, self._stored(first).detach())

    def trained(self) -> dict[str, torch.Tensor]:
        """All copies."""
        return {name: p.detach() for name, p in self.parameters.items()}


BESIDE: Mapping[str, type[Beside]] = {
    "nothing": Nothing, "adapters": Adapters, "everything": Everything}


def beside(text: str) -> Beside:
    """Return a new row for `name(option=value)`. Raises UsageError for an unknown one."""
    return row(BESIDE, text, "way to train beside gates")
