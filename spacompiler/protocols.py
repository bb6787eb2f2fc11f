"""What a pass is: a frozen dataclass with a name, options as fields, and one method.

An importance pass scores slices, an allocation pass turns scores into counts under a budget, a
compensation pass repairs what stays, a recovery pass trains it. Fifteen lines make one's own:

    @dataclass(frozen=True)
    class Largest:
        name: ClassVar[str] = "largest"
        needs: ClassVar[tuple[str, ...]] = ()

        def score(self, group, ctx):
            return sum(ctx.rows(m, group).abs().amax(-1) for m in group.members)

Each protocol stands where it is used; this page gathers them for authors of passes.
"""

from __future__ import annotations

from .evidence.protocol import AdapterStep as AdapterStep
from .evidence.protocol import Context as Context
from .evidence.protocol import Importance as Importance
from .evidence.statistics import View as View
from .groups.solution import Group as Group
from .groups.solution import Member as Member
from .groups.solution import Solution as Solution
from .plan.problem import Allocation as Allocation
from .plan.problem import Problem as Problem
from .plan.problem import Unit as Unit
from .plan.settling import refine as refine
from .repair.evidence import Compensation as Compensation
from .repair.evidence import Evidence as Evidence
from .request.registry import KINDS as KINDS
from .stages.records import Schedule as Schedule
from .stages.records import Scheduling as Scheduling
from .stages.records import Scored as Scored
from .train.hooks import Hooks as Hooks
from .train.loop import Recovery as Recovery
from .train.loop import Training as Training
from .train.loop import train as train
