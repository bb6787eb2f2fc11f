"""Groups as one page of HTML: folded by repeated layers, searchable, with what may go and why not.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6570;--line:#d9dee3;--back:#fff;--go:#0b6bcb;
--stay:#a3561b}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a0aab4;--line:#39424b;--back:#14181c;
--go:#4da3ff;--stay:#f0a35e}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:0 auto;
max-width:1000px;padding:12px}
input{font:inherit;width:100%;padding:8px;margin:8px 0;border:1px solid var(--line);
border-radius:8px;background:var(--back);color:var(--ink)}
details{border-top:1px solid var(--line);padding:6px 0}
summary{cursor:pointer;overflow-wrap:anywhere}
ul{margin:.3rem 0;padding-left:1.2rem}li{overflow-wrap:anywhere}
.go{color:var(--go)}.stay{color:var(--stay)}.soft{color:var(--soft)}[hidden]{display:none}
"""
SCRIPT = """
const box=document.querySelector('input'),all=[...document.querySelectorAll('details.f')];
box.addEventListener('input',()=>{const q=box.value.toLowerCase();
for(const d of all)d.hidden=q!==''&&!d.textContent.toLowerCase().includes(q)})
"""
LEGEND = (("go", "may go: the default roles let it shrink"),
          ("stay", "stays unless asked for, with the reason"),
          ("soft", "producer: makes the axis; consumer: reads it; carrier: one number a slice"))


def page(title: str, families: Sequence[Mapping[str, Any]],
         frozen: Mapping[str, Sequence[str]]) -> str:
    """Return the page.

    `families` are groups of repeated layers, {name, role, size, count, may, share, members};
    `frozen` lists dimensions by the reason that they stay.
    """
    legend = "".join(f'<li class="{kind}">{_e(text)}</li>' for kind, text in LEGEND)
    body = "".join(map(_family, families))
    rest = "".join(f'<details class="f"><summary>{_e(why)} <span class="soft">'
                   f"({len(dims)})</span></summary><ul>"
                   f"{''.join(f'<li>{_e(d)}</li>' for d in dims)}</ul></details>"
                   for why, dims in frozen.items())
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>{_e(title)}</title><style>{STYLE}</style></head><body><h1>{_e(title)}</h1>"
            '<input type="search" aria-label="search" placeholder="search groups and arrays">'
            f"<ul>{legend}</ul><h2>Groups</h2>{body}<h2>What nothing can go from</h2>{rest}"
            f"<script>{SCRIPT}</script></body></html>\n")


def _family(found: Mapping[str, Any]) -> str:
    may = found["may"]
    said = "may go" if may == "yes" else may
    times = f" × {found['count']} layers" if found["count"] > 1 else ""
    members = "".join(f"<li>{_e(m)}</li>" for m in found["members"])
    return (f'<details class="f"><summary><b>{_e(found["name"])}</b> {found["size"]} '
            f'{_e(found["role"])}{times}, {found["share"]:.1%} of parameters, '
            f'<span class="{"go" if may == "yes" else "stay"}">{_e(said)}</span></summary>'
            f"<ul>{members}</ul></details>")


def _e(what: object) -> str:
    return html.escape(str(what))
