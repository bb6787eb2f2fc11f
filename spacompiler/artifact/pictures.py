"""Pictures as SVG inside a page: bars, widths by layer, scores with the cut. No scripts, no links.

Colours are classes that the page's style sheet gives, so that they follow light and dark.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

BINS = 28
"""Bars of a distribution."""


def bars(pairs: Sequence[tuple[str, float, float, str]]) -> str:
    """Return horizontal bars: (label, dense, pruned, text) a row, each row to its own scale."""
    height, rows = 46, []
    for i, (label, dense, pruned, text) in enumerate(pairs):
        top = max(dense, pruned) or 1.0
        y = i * height
        rows.append(
            f'<text x="0" y="{y + 13}">{html.escape(label)}</text>'
            f'<text x="400" y="{y + 13}" text-anchor="end">{html.escape(text)}</text>'
            f'<rect class="d" x="0" y="{y + 19}" width="{400 * dense / top:.1f}" height="7"/>'
            f'<rect class="p" x="0" y="{y + 28}" width="{400 * pruned / top:.1f}" height="9"/>')
    return _svg(400, height * len(pairs), rows, "dense and pruned side by side")


def widths(rows: Sequence[tuple[str, int, int]]) -> str:
    """Return columns, (name, before, after) a layer: the frame is the dense width."""
    count = max(1, len(rows))
    step = max(6.0, min(44.0, 720 / count))
    top = max((before for _, before, _ in rows), default=1)
    made = []
    for i, (name, before, after) in enumerate(rows):
        x, full, part = i * step, 90 * before / top, 90 * after / top
        said = f"{html.escape(name)}: {after} of {before}"
        made.append(
            f'<g><title>{said}</title>'
            f'<rect class="d" x="{x:.1f}" y="{94 - full:.1f}" width="{step - 2:.1f}" '
            f'height="{full:.1f}"/>'
            f'<rect class="p" x="{x:.1f}" y="{94 - part:.1f}" width="{step - 2:.1f}" '
            f'height="{part:.1f}"/></g>')
    return _svg(count * step, 96, made, "widths, layer by layer", fixed=count * step < 360)


def distribution(found: Mapping[str, object]) -> str:
    """Return a histogram of scores, those left of the cut went."""
    counts: Sequence[int] = found["bins"]  # type: ignore[assignment]
    cut = float(str(found["cut"]))
    top, made = max(counts) or 1, []
    for i, count in enumerate(counts):
        part = 44 * count / top
        kind = "d" if (i + 0.5) / len(counts) < cut else "p"
        made.append(f'<rect class="{kind}" x="{i * 5}" y="{46 - part:.1f}" width="4" '
                    f'height="{part:.1f}"/>')
    x = 5 * len(counts) * min(1.0, max(0.0, cut))
    made.append(f'<line class="c" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="48"/>')
    return _svg(5 * len(counts), 48, made, "scores, and the cut", fixed=True)


def _svg(width: float, height: float, parts: Sequence[str], label: str,
         fixed: bool = False) -> str:
    size = f' width="{width:.0f}"' if fixed else ' class="wide"'
    return (f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
            f'aria-label="{html.escape(label)}"{size}>{"".join(parts)}</svg>')
