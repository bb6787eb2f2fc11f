"""The report as one page of HTML that needs nothing else: no script, no font, no network.

What matters first stands first: how small, how fast, how good, and how to load it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..groups.repeats import family
from . import pictures, report

STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6570;--line:#d9dee3;--back:#fff;--d:#b9c3cd;
--p:#0b6bcb;--c:#d1432b;--box:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a0aab4;--line:#39424b;--back:#14181c;
--d:#4a5560;--p:#4da3ff;--c:#ff7a63;--box:#1d2329}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:0 auto;
max-width:1080px;padding:16px}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:.95rem;margin:1rem 0 .25rem;font-weight:600;overflow-wrap:anywhere}
h3 .soft{font-weight:400}
p,li{max-width:46rem}.soft{color:var(--soft);font-size:.9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:1rem 0}
.tile{background:var(--box);border-radius:10px;padding:12px}
.tile b{display:block;font-size:1.6rem;line-height:1.2}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:24px}
.small{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:12px}
pre{background:var(--box);border-radius:8px;padding:12px;overflow-x:auto;font-size:.85rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
td,th{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}td:first-child{min-width:9rem}
th{overflow-wrap:normal}.n{white-space:nowrap}.bars svg{max-width:560px}
svg{display:block;max-width:100%;height:auto}svg.wide{width:100%}svg text{font:12px system-ui,
sans-serif;fill:var(--ink)}.d{fill:var(--d)}.p{fill:var(--p)}.c{stroke:var(--c);stroke-width:2}
summary{cursor:pointer}ul{padding-left:1.2rem}.key i{display:inline-block;width:.8em;height:.8em}
.key .d{background:var(--d)}.key .p{background:var(--p)}
"""

SHORT = 14
"""Characters that are not worth a second line."""


def page(data: Mapping[str, Any]) -> str:
    """Return the report of a compile, from its data alone."""
    title = f"{data['model']}, {data['target']}"
    parts = [_verdict(data), _load(data), _sizes(data), _widths(data), _scores(data),
             _proof(data), _stayed(data), _notes(data), _environment(data)]
    return ("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
            "<link rel=\"icon\" href=\"data:,\">"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
            f"<main><h1>{html.escape(title)}</h1>{''.join(parts)}</main></body></html>\n")


def table(data: Mapping[str, Any]) -> str:
    """Return the figures of a compile as a table, for a notebook."""
    rows = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>"
                   for row in report.table_rows(data))
    return (f"<table><caption>{_e(data['model'])}, {_e(data['target'])}</caption><tr><th></th>"
            f"<th>dense</th><th>pruned</th><th>stays</th></tr>{rows}</table>")


def _verdict(data: Mapping[str, Any]) -> str:
    tiles = [(share, what, f"{dense} → {pruned}")
             for what, dense, pruned, share in report.table_rows(data)]
    boxes = "".join(f'<div class="tile"><b>{_e(share)}</b>{_e(what)}'
                    f'<div class="soft">{_e(said)}</div></div>' for share, what, said in tiles)
    return f'<div class="tiles">{boxes}</div><p>{_e(report.sentence(data))}</p>'


def _load(data: Mapping[str, Any]) -> str:
    return f"<h2>How to load it</h2><pre>{_e(report.loading(data))}</pre>"


def _sizes(data: Mapping[str, Any]) -> str:
    rows = [(report.LABELS.get(m, m), float(c["dense"]), float(c["pruned"]),
             f"{c['dense']:,} → {c['pruned']:,}") for m, c in data["costs"].items() if c["dense"]]
    timed = []
    for latency, label in ((data[k], label) for k, label in report.TIMES.items() if data.get(k)):
        times = [latency[n]["median_ms"] for n in ("dense", "pruned")]
        rows.append((label, *times, "{:.2f} → {:.2f}".format(*times)))
        timed.append(f"{_at(latency)}, {latency['threads']} thread")
    said = f"Timed in ONNX Runtime at {'; '.join(timed)}; this machine." if timed else ""
    return (f"<h2>Size and speed</h2>{_key()}<div class='bars'>{pictures.bars(rows)}</div>"
            f'<p class="soft">{_e(said)}</p>')


def _at(latency: Mapping[str, Any]) -> str:
    """What was timed: a case of a decoder by its name, else the shapes of inputs."""
    return latency["case"] if "case" in latency else ", ".join(
        f"{n} {'×'.join(map(str, s))}" for n, s in latency["shapes"].items())


def _key() -> str:
    return ('<p class="soft key"><i class="d"></i> dense <i class="p"></i> pruned</p>')


def _widths(data: Mapping[str, Any]) -> str:
    families: dict[str, list[tuple[str, int, int]]] = {}
    for g in data["shrunk"]:
        families.setdefault(family(g["group"]), []).append((g["group"], g["before"], g["after"]))
    made = "".join(
        f"<div><h3>{_e(name)} <span class=\"soft\">{_spread(rows)}</span></h3>"
        f"{pictures.widths(rows)}</div>" for name, rows in families.items())
    return f'<h2>Widths, layer by layer</h2><div class="two">{made}</div>' if made else ""


def _spread(rows: Sequence[tuple[str, int, int]]) -> str:
    after, before = [a for _, _, a in rows], rows[0][1]
    kept = f"{after[0]}" if min(after) == max(after) else f"{min(after)} to {max(after)}"
    return f"{kept} of {before}" + (f", {len(rows)} layers" if len(rows) > 1 else "")


def _scores(data: Mapping[str, Any]) -> str:
    found = data.get("scores") or ()
    made = "".join(
        f"<div><h3>{_e(s['group'])} <span class=\"soft\">{s['gone']:.0%} of the slices went, "
        f"{s['lost']:.1%} of their scores</span></h3>{pictures.distribution(s)}</div>"
        for s in found)
    return (f"<h2>Scores, and where they were cut</h2><details><summary>{len(found)} groups; what "
            f'lies left of the line went</summary><div class="small">{made}</div></details>'
            ) if made else ""


def _proof(data: Mapping[str, Any]) -> str:
    rows = report.proof_rows(data)
    done = _table(("check", "result"), rows) if rows else "<p>Skipped on request.</p>"
    return f"<h2>Proof and control</h2>{done}"


def _stayed(data: Mapping[str, Any]) -> str:
    rows = [(why, count) for why, count in data["frozen"].items()]
    found = data["groups"]
    said = (f"{found['shrunk']} of {found['candidates']} groups that might go became smaller; "
            f"{found['found']} were found.")
    unknown = data["unknown_operators"]
    more = f"<p>Unknown operators: {_e(', '.join(unknown))}</p>" if unknown else ""
    return (f"<h2>What stayed, and why</h2><p>{_e(said)}</p>"
            f"{_table(('why', 'dimensions'), rows) if rows else ''}{more}")


def _notes(data: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{_e(note)}</li>" for note in data["notes"])
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _environment(data: Mapping[str, Any]) -> str:
    rows = list((data.get("environment") or {}).items())
    how = [("importance", data["importance"]), ("allocation", data["allocation"]),
           ("repair", data["repair"]), ("calibration", data["calibration"]["origin"]),
           ("layout", f"{data['layout']}, by {data['emission']}")]
    return (f"<h2>How it was made</h2>{_table(('', ''), [*how, *rows])}"
            '<p class="soft">recipe.yaml makes it again; every number here stands in report.json.'
            "</p>")


def _table(head: tuple[str, ...], rows: Iterable[Iterable[object]]) -> str:
    top = "".join(f"<th>{_e(h)}</th>" for h in head) if any(head) else ""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _cell(what: object) -> str:
    """A cell of a table; numbers and the like stay on one line."""
    short = ' class="n"' * (len(str(what)) <= SHORT)
    return f"<td{short}>{_e(what)}</td>"


def _e(what: object) -> str:
    return html.escape(str(what).replace("`", ""))
