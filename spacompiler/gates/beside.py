"""What trains beside gates: nothing, adapters, or everything. One row of a table each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

import torch

from ..axes.expressions import resolve
from ..errors import SpaError
from ..repair.sites import readings
from ..request.registry import row
from .network import Gated

Stored = Callable[[str], torch.Tensor]


class Beside:
    """Arrays of a program, as they are, and as they train."""

    def __init__(self) -> None:
        self.parameters: dict[str, torch.Tensor] = {}

    def start(self, gated: Gated, stored: Stored, draws: torch.Generator) -> None:
        """Make parameters of a program's arrays."""
        self._tied, self._stored = gated.trace.tied, stored

    def weight(self, name: str) -> torch.Tensor:
        """Return an array as it is now, differentiably; tied ones are one."""
        return self._stored(self._tied.get(name, name)).detach()

    def term(self) -> torch.Tensor:
        """Return what is added to the loss."""
        return torch.zeros(())

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

    def start(self, gated: Gated, stored: Stored, draws: torch.Generator) -> None:
        """A is drawn, B is zero. Raises SpaError if there is no such matrix."""
        super().start(gated, stored, draws)
        trace = gated.trace
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


class Operators(Beside):
    """v (I + B A) W on every product that writes slices: along that axis, ahead of a bias.

    Pruning-aware tuning (PAT, AAAI 2025): A has orthonormal rows at first, and `identity` times the
    mean of (A A' - I)^2 keeps them near that; B is zero, v one. With no rank, v alone. Arrays that
    something else reads too stay as they are.
    """

    def __init__(self, rank: int = 32, identity: float = 1.0) -> None:
        super().__init__()
        self.rank, self.identity = rank, identity
        self._dims: dict[str, int] = {}

    def start(self, gated: Gated, stored: Stored, draws: torch.Generator) -> None:
        """Raises SpaError if no product writes any of the slices."""
        super().start(gated, stored, draws)
        readers, solution = readings(gated.solution.graph), gated.solution
        tensors, names = solution.graph.weights(), Counter(self._tied.values())
        self._dims = {m.weight: m.dim for g in gated.groups for m in g.members
                      if m.role == "producer" and len(solution.weights()[m.weight]) > 1
                      and resolve(solution.weights()[m.weight][m.dim]) is g.atom
                      and readers[m.weight] == 1 and names[self._tied.get(m.weight, "")] < 2
                      and tensors[m.weight].kind == "parameter"}
        if not self._dims:
            raise SpaError("no operator can stand anywhere",
                           why="no product with an array of its own writes these slices",
                           fix="use beside='nothing' or 'everything'")
        for name, dim in self._dims.items():
            kind, size = stored(name).dtype, stored(name).shape[dim]
            self.parameters[f"{name} v"] = torch.ones(size, dtype=kind, requires_grad=True)
            rank = min(self.rank, size)
            if rank:
                drawn = torch.randn(size, rank, generator=draws, dtype=torch.float64)
                rows = torch.linalg.qr(drawn)[0].T.to(kind).contiguous()
                self.parameters[f"{name} A"] = rows.requires_grad_()
                self.parameters[f"{name} B"] = torch.zeros(size, rank, dtype=kind,
                                                           requires_grad=True)

    def weight(self, name: str) -> torch.Tensor:
        """W, or v (I + B A) W along the axis that it writes."""
        first = self._tied.get(name, name)
        held, dim = self._stored(first).detach(), self._dims.get(first)
        if dim is None:
            return held
        made = rows = held.movedim(dim, 0).flatten(1)
        if self.rank:
            made = rows + self.parameters[f"{first} B"] @ (self.parameters[f"{first} A"] @ rows)
        made = self.parameters[f"{first} v"].unsqueeze(1) * made
        return made.reshape(held.movedim(dim, 0).shape).movedim(0, dim)

    def term(self) -> torch.Tensor:
        """identity times the mean over operators of (A A' - I)^2."""
        grams = [p @ p.T for name, p in self.parameters.items() if name.endswith(" A")]
        off = [(g - torch.eye(len(g), dtype=g.dtype)).square().mean() for g in grams]
        return self.identity * torch.stack(off).mean() if off else torch.zeros(())

    def trained(self) -> dict[str, torch.Tensor]:
        """Weights with their operators in them."""
        return {name: self.weight(name).detach() for name in self._dims}


class Everything(Beside):
    """All parameters train."""

    def start(self, gated: Gated, stored: Stored, draws: torch.Generator) -> None:
        """Copies of all floating-point parameters."""
        super().start(gated, stored, draws)
        trace = gated.trace
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
    "nothing": Nothing, "adapters": Adapters, "operators": Operators, "everything": Everything}


def beside(text: str) -> Beside:
    """Return a new row for `name(option=value)`. Raises UsageError for an unknown one."""
    return row(BESIDE, text, "way to train beside gates")
