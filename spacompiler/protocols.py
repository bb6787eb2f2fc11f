"""What a pass is: a frozen dataclass with a name, options as fields, and one method.

An importance pass scores slices, an allocation pass turns scores into counts under a budget, a
compensation pass repairs what stays, a recovery pass trains it. Fifteen lines make one's own:

    @dataclass(frozen=True)
    class Largest:
        name: ClassVar[str] = "largest"
        needs: ClassVar[tuple[str, ...]] = ()

        def score(self, group, ctx):
            return sum(ctx.rows(m, group).abs().amax(-1) for m in group.members)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:

    pass


