"""The table of quality.py and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(done: Mapping[str, Any], shares: Sequence[str]) -> str:
    """Return the results as a Markdown table."""
    texts = done["protocol"]["evaluated"]
    head = ["method", *(f"{s} {t}" for s in shares for t in texts), "CPU s", "MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, cells in done["rows"].items():
        dense = cells.get("100%")
        values = [_number((dense or cells.get(s, {})).get(t)) for s in shares for t in texts]
        some = [c for c in cells.values() if "cpu_seconds" in c]
        seconds = f"{max((c['cpu_seconds'] for c in some), default=0):.0f}"
        memory = f"{max((c['memory_mb'] for c in some), default=0)}"
        lines.append("| " + " | ".join([name, *values, seconds, memory]) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def picture(done: Mapping[str, Any], path: Path) -> None:
    """Draw perplexity against the size of the body, one panel per text (needs matplotlib)."""
    from matplotlib import pyplot

    texts = list(done["protocol"]["evaluated"])
    figure, panels = pyplot.subplots(1, len(texts), figsize=(6 * len(texts), 5), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for name, cells in done["rows"].items():
            points = sorted((c["body"], c[text]) for c in cells.values())
            if name == "dense":
                panel.axhline(points[0][1], color="grey", linestyle=":", label="dense")
            else:
                panel.plot(*zip(*points, strict=True), marker="o", label=name,
                           linewidth=3 if name.startswith("ours") else 1)
        panel.set(yscale="log", xlabel="share of the body that stays", ylabel="perplexity",
                  title=text)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
