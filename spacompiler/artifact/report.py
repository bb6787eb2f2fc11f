"""The report: what a compile did, as data and as a page that a person can read."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from ..evidence.diagnosis import of_scores
from ..evidence.statistics import forward_only
from ..groups.repeats import family
from ..groups.solution import Solution
from ..plan.plan import widths
from ..stages.compiled import Compiled
from ..stages.spelled import spelled
from ..torch_backend.gather.heads import Fitting
from .pictures import BINS

TIMES = {"latency": "latency in ONNX Runtime, ms",
         "decode_latency": "latency of a decode step, ms"}
"""Times that a report may hold, and what they are called."""
LABELS = {"params": "parameters", "body": "parameters of the body", "macs": "MACs",
          "bytes": "bytes of weights", "memory": "bytes of weights and caches",
          "active": "active parameters"}


def facts(job: Compiled) -> dict[str, Any]:
    """Return everything that is known before files are written."""
    plan = job.plan
    return {
        "model": job.name,
        "target": plan.target,
        "source": job.source,
        "costs": plan.costs,
        "importance": spelled("importance", job.importance),
        "allocation": spelled("allocation", job.allocation),
        "repair": "none" if job.compensation is None or job.idle else
        spelled("compensation", job.compensation),
        "calibration": {"origin": job.calibration.origin if job.importance.needs else "not needed",
                        "batches": len(job.calibration.batches) if job.importance.needs else 0},
        "loss": _loss(job),
        "layout": job.layout,
        "emission": job.emission,
        "groups": {"found": len(job.solution.groups), "candidates": len(job.candidates),
                   "shrunk": len(plan.kept)},
        "widths": [{"array": name, "before": before, "after": after}
                   for name, before, after in widths(job.solution, job.choices)],
        "shrunk": [{"group": g.name, "role": g.role, "before": g.size,
                    "after": job.choices[g.atom].count}
                   for g in job.candidates if g.atom in job.choices],
        "frozen": {why: len(dims) for why, dims in frozen_reasons(job.solution).items()},
        "unknown_operators": sorted({n.title() for n in job.solution.solver.opaque}),
        "proof": None if job.proof is None else {
            "precision": job.proof.precision, "tolerance": job.proof.tolerance,
            "relative_error": job.proof.error, "negative_control": job.proof.control,
            "control_array": job.proof.swapped, "approximate_by": job.proof.approximate},
        "recovery": job.trained, "quality": job.quality,
        "blocks": None if job.dropped is None else {
            "dropped": list(job.dropped.paths), "relative_error": job.dropped.error,
            "negative_control": job.dropped.control, "control_block": job.dropped.bypassed},
        "low_rank": None if job.now.factored is None else asdict(job.now.factored),
        "scores": distributions(job), "diagnosis": of_scores(job.scored.candidates, job.scores),
        "class": type(job.pruned if job.pruned is not None else job.module).__name__,
        "environment": environment(),
        "notes": job.notes,
    }


def summary(job: Compiled, path: Path | None) -> str:
    """Return at most 20 lines: what is left, how it was proved, notes, and where it lies."""
    where = f"written to {path}" if path else "in memory" if job.emitted else "a dry run"
    lines = [f"{job.name}: {job.plan.target}, layout {job.layout}, {where}" if job.emitted else
             f"{job.name}: {job.plan.target}, {where}"]
    lines += [f"{LABELS[metric]}: {pair['dense']:,} -> {pair['pruned']:,} ({share(pair)} stays)"
              for metric, pair in job.plan.costs.items() if metric in LABELS]
    lines.append(f"groups: {len(job.plan.kept)} of {len(job.solution.groups)} shrunk")
    if job.proof is not None:
        lines.append(f"proof: relative error {job.proof.error:.1e}; a wrong index gives "
                     f"{job.proof.control or 0:.1e}")
    lines += [f"note: {shorten(note, 160)}" for note in job.notes[:8]]
    more = len(job.notes) - 8
    return "\n  ".join(lines + ([f"and {more} more notes"] if more > 0 else []))


def _loss(job: Compiled) -> dict[str, str] | None:
    """The loss that was used, and where its labels came from; None where none was."""
    if isinstance(job.loss, Fitting):
        return job.loss.facts()
    used = not forward_only(job.importance.needs) and bool(job.importance.needs)
    return {"name": "given by the user", "labels": "as it takes them"} if used or job.recovery \
        else None


def share(pair: Mapping[str, int]) -> str:
    """Return what is left, {dense, pruned}, in per cent; "-" of nothing."""
    return f"{pair['pruned'] / pair['dense']:.1%}" if pair["dense"] else "-"


def table_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (what, dense, pruned, share) rows for a terminal or a page."""
    rows = [(LABELS[m], f"{c['dense']:,}", f"{c['pruned']:,}", share(c))
            for m, c in data["costs"].items()]
    for what in ("perplexity", "loss"):
        if found := (data.get("quality") or {}).get(what):
            rows.append((f"{what}, {data['quality']['data']}", f"{found['dense']:.4g}",
                         f"{found['pruned']:.4g}", f"{found['pruned'] / found['dense']:.1%}"
                         if found["dense"] else "-"))
            break
    if found := data.get("quality"):
        rows.append(("same likeliest answer as the dense model", "100.0%",
                     f"{found['agreement']:.1%}", f"{found['agreement']:.1%}"))
    if data.get("bytes"):
        sizes = data["bytes"]
        rows.append(("bytes of weights", f"{sizes['dense']:,}", f"{sizes['pruned']:,}",
                     share(sizes)))
    for key, label in TIMES.items():
        if latency := data.get(key):
            ratio = latency["pruned"]["median_ms"] / latency["dense"]["median_ms"]
            rows.append((label, f"{latency['dense']['median_ms']:.2f}",
                         f"{latency['pruned']['median_ms']:.2f}", f"{ratio:.1%}"))
    return rows


def sentence(data: Mapping[str, Any]) -> str:
    """Say what was made and how, in a line or two."""
    blocks = f"{len(data['blocks']['dropped'])} blocks left out, " if data["blocks"] else ""
    return (f"{blocks}{data['groups']['shrunk']} groups of {data['groups']['found']} made smaller "
            f"(importance `{data['importance']}`, allocation `{data['allocation']}`, repair "
            f"`{data['repair']}`, calibration: {data['calibration']['origin']}). "
            f"{_lossed(data['loss'])}Layout {data['layout']} (by {data['emission']}).").strip()


LOADERS = {
    "uniform": "from transformers import {class_}\n\nmodel = {class_}.from_pretrained(\"DIR\")",
    "per-layer": "import spacompiler\nfrom transformers import AutoModel\n\n"
                 "spacompiler.register()  # or trust_remote_code=True\n"
                 "model = AutoModel.from_pretrained(\"DIR\")  # or AutoModelForCausalLM, ...",
    "any": "import spacompiler\n\nmodel = spacompiler.load(\"DIR\"{model})",
    "onnx": "import onnxruntime\n\nsession = onnxruntime.InferenceSession(\"DIR/model.onnx\")"}


def loading(data: Mapping[str, Any]) -> str:
    """Return the lines of Python that load what was written."""
    kind = (data.get("source") or {}).get("kind", "module")
    given = "" if kind in ("zoo", "hub", "directory") else ", model=dense"
    said = LOADERS.get(data["layout"], "").format(class_=data.get("class") or "AutoModel",
                                                  model=given)
    return said + "  # dense: the module that was compiled" * ("dense" in said)


def markdown(data: Mapping[str, Any]) -> str:
    """Return the report as a page of text; the whole of it is report.json, and report.html."""
    lines = [f"# {data['model']}: {data['target']}", "", sentence(data), "",
             *_table(("", "dense", "pruned", "stays"), table_rows(data)), "",
             "## How to load it", "", "```python", loading(data), "```", "",
             "## Proof", "", *_proof(data), "",
             *_recovery(data["recovery"]),
             "## Widths", "",
             *_table(("groups", "role", "before", "after", "PQ index of scores", "scores of zero"),
                     _folded(data["shrunk"], data.get("diagnosis", ()))), "",
             "## Frozen", "",
             *_table(("why", "dimensions"), list(data["frozen"].items())), ""]
    lines += _source(data.get("source") or {}, data.get("files") or {})
    if data["unknown_operators"]:
        lines += ["## Unknown operators", "", *(f"- {n}" for n in data["unknown_operators"]), ""]
    if data["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in data["notes"]), ""]
    return "\n".join(lines)


def _folded(shrunk: Iterable[Mapping[str, Any]],
            diagnosis: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Groups of repeated blocks in one row each."""
    known = {d["group"]: d for d in diagnosis}
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for g in shrunk:
        found.setdefault((family(g["group"]), g["role"], g["before"]), []).append(
            {"pq": None, "zero": None, **known.get(g["group"], {}), "after": g["after"]})
    return [(f"`{name}`" + (f" ({len(own)})" if len(own) > 1 else ""), role, str(before),
             *(_range([one[what] for one in own]) for what in ("after", "pq", "zero")))
            for (name, role, before), own in found.items()]


def _range(values: Sequence[Any]) -> str:
    """One number where all are equal, else from which to which; "-" where one is not known."""
    if None in values:
        return "-"
    low, high = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def distributions(job: Compiled) -> list[dict[str, Any]]:
    """Return a histogram of each shrunken group's scores, the cut, and which shares went."""
    found = []
    for g in job.scored.candidates:
        if g.atom not in job.decided.choices or g.name not in job.scores:
            continue
        scores = np.sort(job.scores[g.name].reshape(-1, g.size).astype(float).mean(0))
        gone = g.size - job.decided.choices[g.atom].count
        low, high = float(scores[0]), float(scores[-1])
        cut = float(scores[gone]) if gone < g.size else high
        found.append({"group": g.name, "gone": round(gone / g.size, 4), "lost": round(float(
                          scores[:gone].clip(0).sum() / (scores.clip(0).sum() or 1)), 4),
                      "bins": np.histogram(scores, BINS, (low, high))[0].tolist()
                      if high > low else [g.size],
                      "cut": round((cut - low) / (high - low), 4) if high > low else 0.0})
    return found


def environment() -> dict[str, str]:
    """Return versions of what computed, and the kind of processor."""
    names = ("spacompiler", "torch", "transformers", "onnxruntime", "onnx", "numpy")
    found = {name: version(name) for name in names}
    return {"python": platform.python_version(), **found,
            "machine": f"{platform.system()} {platform.machine()}"}


SOURCE = {"class": "class", "dtype": "type of its numbers", "bytes": "bytes of weights as stored",
          "quantised": "quantised by", "recreated": "arrays made by the class itself",
          "ignored": "stored arrays that the class does not read", "unused": "arrays left out",
          "carried": "files carried over", "adapted": "files written anew",
          "left": "files left behind"}
"""What a page says of a source, by key; lists are counted, with the first of their names."""


def _source(source: Mapping[str, Any], files: Mapping[str, Any]) -> list[str]:
    rows = [(SOURCE[key], _some(value)) for key, value in {**source, **files}.items()
            if key in SOURCE and value]
    return ["## Source", "", *_table(("what", "of the model that was compiled"), rows), ""] \
        if rows else []


def _some(value: int | str | Mapping[str, str] | Sequence[str], most: int = 8) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    names = [f"{n} ({why})" for n, why in value.items()] if isinstance(value, Mapping) else value
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _lossed(loss: Mapping[str, str] | None) -> str:
    return f"Loss: {loss['name']}; labels: {loss['labels']}. " if loss else ""


def _recovery(done: Mapping[str, Any] | None) -> list[str]:
    if done is None:
        return []
    rows = [[h.pop("step"), *(f"{x:.4f}" for x in h.values())] for h in map(dict, done["history"])]
    heads = ("step", "held-out objective", "held-out loss", "of further tokens")[:len(rows[0])]
    return ["## Recovery", "",
            f"`{done['pass']}` on {done['amount']:,} {done['unit']} ({done['data']}; "
            f"{done['held_out']:,} held out): {done['parameters']:,} parameters trained, the state "
            f"of step {done['best_step']} was kept. The proof above is of the plan, before "
            "training; reload and ONNX were checked after it.", "", *_table(heads, rows), ""]


def _shape(shape: Iterable[object]) -> str:
    return " × ".join(map(str, shape))


def _table(head: tuple[str, ...], rows: Iterable[Iterable[object]]) -> list[str]:
    body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def _proof(data: Mapping[str, Any]) -> list[str]:
    rows = proof_rows(data)
    if data["proof"] is None:
        return ["**No width changed.**" if data["blocks"] and not data["shrunk"] else
                "**Skipped on request.**", "",
                *(_table(("check", "result"), rows) if data["blocks"] else ())]
    return _table(("check", "result"), rows)


def proof_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (check, result) of the proof, its control, and of the files."""
    rows = _blocks(data)
    if proof := data["proof"]:
        rows += [(f"masked dense ≡ pruned, {proof['precision']}, relative error",
                  f"{proof['relative_error']:.1e}"),
                 (f"negative control (one wrong index in `{proof['control_array']}`)",
                  f"{proof['negative_control']:.1e}")]
        if proof["approximate_by"] is not None:
            rows.append(("LayerNorm over fewer slices differs from masked dense by",
                         f"{proof['approximate_by']:.1e}"))
    return rows + _written(data)


def _blocks(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was checked of the blocks that went."""
    if not (found := data["blocks"]):
        return []
    rows = [(f"dense network that bypasses {len(found['dropped'])} blocks ≡ the one without them, "
             "relative error", f"{found['relative_error']:.1e}")]
    if found["control_block"]:
        rows.append((f"negative control (`{found['control_block']}` bypassed as well)",
                     f"{found['negative_control']:.1e}"))
    return rows


def _written(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was checked of the files."""
    rows = []
    for check in data.get("onnx", ()):
        other = "masked dense" if data["layout"] == "onnx" else "torch"
        rows.append((f"ONNX Runtime ≡ {other} at {check['shapes']}, max difference",
                     f"{check['max_abs']:.1e}"))
    rows += deployed(data)
    if data.get("reload"):
        rows.append(("reload ≡ memory", data["reload"]))
    return rows


def deployed(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (check, result) for what was written on request: a decoder's cache, int8 weights."""
    rows = [(f"ONNX Runtime with its cache ≡ torch, {check['batch']} rows: likeliest tokens that "
             "agree, logits' relative difference",
             f"{check['same']} of {check['tokens']}, {check['max_rel']:.1e}")
            for check in data.get("decoder", ())]
    if int8 := data.get("int8"):
        rows.append((f"int8 against float on {int8['on']}: likeliest answers that agree, results' "
                     "relative difference (root mean square), bytes "
                     f"({int8['bits']} bits; this processor's products: {int8['kernels']})",
                     f"{int8['same']:.1%}, {int8['rms_rel']:.1e}, {int8['bytes']:,} of "
                     f"{int8['float_bytes']:,}"))
    if gguf := data.get("gguf"):
        rows.append((f"model.gguf read back: {gguf['tensors']} tensors for llama.cpp's "
                     f"{gguf['architecture']}, weights {gguf['type']}, tokenizer "
                     f"{gguf['tokenizer']}", "bit-equal"))
    if (there := data.get("runtime")) and "same" in there:
        rows.append((f"{there['name']} ≡ torch, greedy tokens that agree",
                     f"{there['same']} of {there['tokens']}"))
    return rows


def frozen_reasons(solution: Solution) -> dict[str, list[str]]:
    """Return {reason: dimensions that it freezes}, most frequent first."""
    found: dict[str, list[str]] = {}
    for weight, dim, why in solution.frozen():
        for reason in why[:1]:
            found.setdefault(reason, []).append(f"{weight}:{dim}")
    return dict(sorted(found.items(), key=lambda kv: -len(kv[1])))
