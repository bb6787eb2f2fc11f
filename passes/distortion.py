"""Rate-distortion allocation: exact under a budget, on curves measured one group at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from spacompiler.errors import SpaError
from spacompiler.passes.dynamic import Dynamic
from spacompiler.plan.problem import Measured, Problem, Unit


@dataclass(frozen=True)
class Distortion(Dynamic):
    """min sum_u D_u(k_u) under the budget, D_u(k) = E ||f(x) - f_u,k(x)||^2 measured, f_u,k the
    network in which unit u alone keeps its k best slices.

    Joint rate-distortion pruning (ICCV 2023): distortions of results add up to a good first
    approximation, so that dynamic programming finds the counts. Each curve is measured at
    `levels` counts over `batches` of the calibration, forward passes alone (a file for ONNX
    Runtime will do), and drawn straight between them.
    """

    name: ClassVar[str] = "distortion"
    by_layer: ClassVar[bool] = True
    on_files: ClassVar[bool] = True
    levels: int = 8
    batches: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.levels, self.batches) < 1:
            raise TypeError("levels and batches must be at least 1")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit. Raises SpaError where nothing can be measured."""
        if problem.measure is None or not problem.measure.batches:
            raise SpaError("distortions are measured on calibration data, and there is none",
                           fix="give --calibration, or use --allocation dynamic")
        return super().allocate(replace(problem, units=tuple(
            self._measured(problem, problem.measure, unit) for unit in problem.units)))

    def _measured(self, problem: Problem, measure: Measured, unit: Unit) -> Unit:
        """The unit with its measured curve: distortion by count, nothing at the full one."""
        if len(unit.legal) == 1:
            return unit
        places = np.linspace(0, len(unit.legal) - 1, min(self.levels + 1, len(unit.legal)))
        counts = sorted({unit.legal[round(float(at))] for at in places})
        full = problem.full()
        found = [measure.distortion(problem, {**full, unit.name: k}, self.batches)
                 for k in counts[:-1]]
        curve = np.interp(np.arange(len(unit.losses)), counts, [*found, 0.0])
        return replace(unit, losses=curve)
