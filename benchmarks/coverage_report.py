"""The table of a coverage run as Markdown: one row a model, and what was not known or is frozen."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import dataclass, field

TARGET = "body=50%"


@dataclass
class Row:
    """What became of one model."""

    model: str
    weights: int = 0
    traced: bool = False
    solve_ms: float = 0.0
    share: float | None = None
    groups: int = 0
    exact: bool | None = None
    roles: str = ""
    emission: str = ""
    reload: str = ""
    generate: str = ""
    cpu_s: float = 0.0
    rss_mb: float = 0.0
    result: str = ""
    kind: str = "error"
    opaque: dict[str, int] = field(default_factory=dict)
    clashes: list[str] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    commit: str = ""


HEAD = ("model", "weights", "traced", "solve ms", "prunable share", "groups", "exact", "roles",
        "emitted as", "reload", "generates", "CPU s", "peak MB", "result")


def _cells(row: Row) -> tuple[str, ...]:
    if row.exact is None:
        exact = ""
    else:
        exact = "yes" if row.exact else "no"
    return (row.model, f"{row.weights:,}", "yes" if row.traced else "no",
            f"{row.solve_ms:.0f}" if row.traced else "",
            f"{row.share:.0%}" if row.share is not None else "", str(row.groups), exact,
            row.roles or "default", row.emission, row.reload[:60], row.generate[:60],
            f"{row.cpu_s:.1f}", f"{row.rss_mb:.0f}",
            row.result[:160].replace("|", "/"))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_text(found: dict[str, list[str]]) -> str:
    ordered = sorted(found.items(), key=lambda kv: (-len(set(kv[1])), kv[0]))
    return table(("what", "times", "models"), [
        (f"`{what}`", str(len(models)), ", ".join(dict.fromkeys(models)))
        for what, models in ordered]) if ordered else "None."


def _masked(text: str) -> str:
    return re.sub(r"\d+", "N", text).replace("|", "/")[:150]


def report(suite: str, rows: list[Row], widened: bool = False) -> str:
    """The whole text: summary, table, what was not known, what could not be solved."""
    opaque: dict[str, list[str]] = {}
    clashes: dict[str, list[str]] = {}
    frozen: dict[str, list[str]] = {}
    for row in rows:
        for op, times in row.opaque.items():
            opaque.setdefault(op, []).extend([row.model] * times)
        for clash in row.clashes:
            clashes.setdefault(_masked(clash), []).append(row.model)
        for why, numel in row.frozen.items():
            if numel >= 0.02 * row.weights:
                frozen.setdefault(_masked(why), []).append(row.model)
    return "\n\n".join([
        f"# Coverage of {suite}",
        f"Made by `python benchmarks/coverage.py {suite} --json FILE`, on commit "
        f"{_by_commit(rows)}. Random models, target {TARGET} "
        "with magnitude scores and the default roles" + ("; where that is out of reach, once more "
        "with all roles and approximate groups" if widened else "") + ". A weight is prunable if "
        "one of its dimensions lies in a group.",
        summary(rows), table(HEAD, [_cells(row) for row in rows]),
        "## Unknown operators", _by_text(opaque),
        "## Equations without a solution", _by_text(clashes),
        "## Why weights are frozen (2% of a model or more)", _by_text(frozen)]) + "\n"


def _by_commit(rows: list[Row]) -> str:
    found = Counter(row.commit for row in rows).most_common()
    return found[0][0] if len(found) == 1 else ", ".join(f"{c} ({n} models)" for c, n in found)


def summary(rows: list[Row]) -> str:
    kinds = Counter(row.kind for row in rows)
    shares = [row.share for row in rows if row.share is not None]
    lines = [
        f"- tried: {len(rows)}; traced: {sum(r.traced for r in rows)}",
        f"- compiled with proof, emitted model checked: {kinds['ok']} "
        f"({sum(r.kind == 'ok' and not r.roles for r in rows)} with default roles, "
        f"{sum(r.kind == 'ok' and bool(r.exact) for r in rows)} exact)",
        f"- wrong outputs or failed proofs: {kinds['wrong']}",
        f"- target out of reach: {kinds['target']}; other errors: {kinds['error']}",
    ]
    if shares:
        full = sum(s >= 0.9 for s in shares)
        lines.append(f"- prunable share of the body: median {statistics.median(shares):.0%}; "
                     f"at least 90% in {full} of {len(shares)}")
    return "\n".join(lines)
