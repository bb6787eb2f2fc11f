"""What a sweep found: a table, a picture, the winner and its recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..store.place import check_out
from .sweep import Point, winner


@dataclass(frozen=True, repr=False)
class Sweep:
    """Points of a sweep, the largest size first; `dense` is the dense network's score, if any."""

    model: str
    points: Sequence[Point]
    allow: float
    dense: float | None = None

    @property
    def winner(self) -> Point | None:
        """The smallest size that lost no more than was allowed."""
        return winner(self.points, self.allow)

    @property
    def rule(self) -> str:
        """By what the winner was chosen."""
        what = "the score" if self.dense is not None else \
            "perplexity" if any((p.quality or {}).get("loss") for p in self.points) else \
            "the likeliest answers"
        on = next((f" on {p.quality['data']}" for p in self.points if p.quality), "")
        return f"the smallest size that loses no more than {self.allow:.0%} of {what}{on}"

    def rows(self) -> list[dict[str, Any]]:
        """Return the points as plain data: shares that stay, quality, and which one wins."""
        best = self.winner
        return [{"target": p.target, **{m: c["pruned"] / c["dense"] for m, c in p.costs.items()
                                        if c["dense"]},
                 "lost": p.lost if isfinite(p.lost) else None, "score": p.score,
                 "latency": p.latency, "quality": p.quality, "why": p.why, "winner": p is best}
                for p in self.points]

    def as_dict(self) -> dict[str, Any]:
        """Return the whole as plain data."""
        return {"model": self.model, "rule": self.rule, "dense": self.dense, "sizes": self.rows()}

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the head and the rows of a table of texts."""
        head = ("target", "params", "MACs", "score" if self.dense is not None else "quality",
                "lost", "latency", "")
        return head, [(r["target"], _share(r.get("params")), _share(r.get("macs")), _said(r),
                       _share(r["lost"]), _share(r["latency"]),
                       "winner" if r["winner"] else r["why"][:40]) for r in self.rows()]

    def __repr__(self) -> str:
        head, rows = self.cells()
        wide = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip()
                 for row in (head, *rows)]
        return "\n".join([f"{self.model}: {self.rule}", *lines])

    def save(self, out: str | Path) -> Path:
        """Write sweep.json, sweep.svg and, if one wins, recipe.yaml to a new directory."""
        place = check_out(Path(out))
        place.mkdir(parents=True)
        (place / "sweep.json").write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        (place / "sweep.svg").write_text(self._repr_svg_(), encoding="utf-8")
        if self.winner is not None:
            self.winner.recipe.write(place / "recipe.yaml")
        return place

    def recipe(self) -> Any:
        """Return the winner's recipe; raises UsageError where there is none."""
        if self.winner is None:
            raise UsageError("no size wins", why=f"none is {self.rule}",
                             fix="allow more, or try larger sizes")
        return self.winner.recipe

    def _repr_svg_(self) -> str:
        """A picture: size to the right, what is lost upwards, for a notebook or a file."""
        rows = [r for r in self.rows() if r["lost"] is not None]
        top = max([self.allow * 1.5, *(r["lost"] for r in rows)])
        at = [(60 + 400 * r["params"], 220 - 190 * max(0.0, r["lost"]) / top, r) for r in rows]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
        limit = 220 - 190 * self.allow / top
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if r["winner"] else 4}" '
            f'fill="{"#d1432b" if r["winner"] else "#0b6bcb"}"/>'
            f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{r["params"]:.0%}</text>'
            for x, y, r in at)
        return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 500 260" '
                'font-family="sans-serif" font-size="12"><rect width="500" height="260" '
                'fill="#fff"/><path d="M60 20V220H480" fill="none" stroke="#888"/>'
                f'<path d="M60 {limit:.1f}H480" stroke="#d1432b" stroke-dasharray="4 4"/>'
                f'<polyline points="{line}" fill="none" stroke="#0b6bcb"/>{dots}'
                '<text x="270" y="250" text-anchor="middle">parameters that stay</text>'
                f'<text x="56" y="24" text-anchor="end">{top:.0%}</text>'
                '<text x="56" y="224" text-anchor="end">0%</text>'
                '<text x="66" y="16">lost</text></svg>\n')


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _said(row: dict[str, Any]) -> str:
    if row["score"] is not None:
        return f"{row['score']:.4g}"
    quality = row["quality"] or {}
    if "perplexity" in quality:
        return f"perplexity {quality['perplexity']['pruned']:.4g}"
    if "loss" in quality:
        return f"loss {quality['loss']['pruned']:.4g}"
    return f"{quality['agreement']:.1%} alike" if quality else ""
