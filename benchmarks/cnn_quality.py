"""Accuracy against MACs on real images, for every criterion, with and without repair.

    python benchmarks/cnn_quality.py                             # the table, on standard output
    python benchmarks/cnn_quality.py --out docs/cnn-quality.md   # and a picture beside it
    python benchmarks/cnn_quality.py --only wanda --also my_file.py:MyCriterion

A ResNet, a MobileNetV2 and a ViT are trained on scikit-learn's digits (1,200 images; 597 are held
out for the accuracies), then pruned to shares of their MACs: one share for all groups, no training
afterwards. Criteria see 128 training images with their labels; so does repair. SNIP and GraSP,
made for networks that are not trained yet, are applied to the trained ones like the others.
Rows "global" let groups keep different shares; rows "no data" see 128 made-up inputs in place of
the images, for criterion and repair.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from small_images import MODELS, accuracy, digits, trained
from torch.nn import functional

from spacompiler.errors import SpaError
from spacompiler.evidence.losses import default_loss
from spacompiler.pipeline import finish
from spacompiler.pipeline.analyse import analyse
from spacompiler.pipeline.decide import decide
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.score import score
from spacompiler.request import registry
from spacompiler.request.recipe import Recipe
from spacompiler.stages.records import Request, Scored, Subject
from spacompiler.torch_backend.emit.program import Rewritten, rewrite
from spacompiler.torch_backend.gather.sampling import sampled

SHARES = (80, 60, 40)
CRITERIA = ("random", "magnitude", "geometric-median", "batch-norm-scale", "wanda", "fluctuation",
            "cfsp", "obs", "curvature", "taylor", "taylor(per='example')", "taylor-vector",
            "taylor-element", "taylor-element(order=2)", "taylor-element(order='mixed')", "gblm",
            "relevance", "snip", "grasp")
GLOBAL = ("magnitude", "curvature", "taylor", "taylor(per='example')", "taylor-vector",
          "taylor-element", "snip")
NO_DATA = ("magnitude", "wanda", "fluctuation(published=False)", "taylor", "obs")
IMAGES = 128


@dataclass(frozen=True)
class Row:
    """A criterion, how its scores are allocated, and whether it sees images."""

    criterion: str
    allocation: str = "uniform"
    data: bool = True

    def __str__(self) -> str:
        """What the table calls it."""
        return ("" if self.data else "no data, ") + (
            "" if self.allocation == "uniform" else f"{self.allocation}, ") + self.criterion


@dataclass(frozen=True)
class Point:
    """One pruned network: measured share of MACs and accuracy, in percent."""

    model: str
    criterion: str
    repair: str
    target: int
    macs: float
    accuracy: float


def prunings(name: str, rows: Sequence[Row], repairs: Sequence[str], seed: int,
             shares: Sequence[int]) -> Iterator[Point]:
    """Train a model and yield it pruned by each row, each repair and each share."""
    x, y, test_x, test_y = digits(seed)
    module = trained(name, seed=seed)
    labels = y[:IMAGES]
    images: Any = [((x[:IMAGES],), {"labels": labels})]
    made = sampled(module, (x[:IMAGES],), None, samples=IMAGES, length=1, batch=IMAGES, seed=seed)
    yield Point(name, "dense", "none", 100, 100.0, 100 * accuracy(module, test_x, test_y))

    def loss(outputs: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if "labels" not in kwargs:
            return default_loss(outputs, args, kwargs)
        return functional.cross_entropy(outputs[0], kwargs["labels"])

    def asked(row: Row, repair: str, share: int) -> tuple[Request, Subject]:
        return _request(module, images if row.data else made, loss, row, repair, share, seed)

    ask, subject, first = analyse(*asked(rows[0], "none", 60))
    kept = {n: t.detach().clone() for n, t in first.trace.program.state_dict.items()}
    for row in rows:
        scored: Scored | None = None
        for repair in repairs:
            for share in shares:
                ask, subject = asked(row, repair, share)
                if scored is None:
                    try:
                        scored = score(ask, subject, first)
                    except SpaError:  # a criterion that this model has no use for
                        break
                decided = decide(ask, subject, first, scored)
                if repair != "none":
                    decided = finish.repair(ask, subject, scored, decided)
                scored = replace(scored, context=None)
                pruned = Rewritten(rewrite(decided.trace, decided.solution, decided.choices, {}))
                cost = decided.plan.costs["macs"]
                yield Point(name, str(row), repair, share, 100 * cost["pruned"] / cost["dense"],
                            100 * accuracy(pruned, test_x, test_y))
                with torch.no_grad():
                    for key, value in first.trace.program.state_dict.items():
                        value.copy_(kept[key])
                first.trace.repaired.clear()


def _request(module: Any, batches: Any, loss: Callable[..., torch.Tensor], row: Row,
             repair: str, share: int, seed: int) -> tuple[Request, Subject]:
    recipe = Recipe(f"macs={share}%", importance=row.criterion, allocation=row.allocation, align=1,
                    layout="any", seed=seed, floor=0.05)
    return make_request(module, batches[0][0], recipe, Given(
        importance=row.criterion, repair=repair, calibration=batches, loss=loss))


def table(points: Sequence[Point], shares: Sequence[int], repairs: Sequence[str]) -> str:
    """Return one markdown table for each model: criteria down, repairs and shares across."""
    parts = []
    for model in dict.fromkeys(p.model for p in points):
        own = {(p.criterion, p.repair, p.target): p for p in points if p.model == model}
        dense = own["dense", "none", 100]
        heads = [f"{s}%{'' if r == 'none' else ' ' + r}" for r in repairs for s in shares]
        rows = [f"### {model}: dense {dense.accuracy:.1f}%", "",
                "| criterion | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for criterion in dict.fromkeys(c for c, _, t in own if t != 100):
            cells = [own.get((criterion, r, s)) for r in repairs for s in shares]
            rows.append(f"| {criterion} | " + " | ".join(
                f"{p.accuracy:.1f}" if p else "" for p in cells) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def picture(points: Sequence[Point], repairs: Sequence[str], path: Path) -> None:
    """Draw accuracy against MACs, one panel for each model and repair."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "spacompiler"
    from matplotlib import pyplot

    models = list(dict.fromkeys(p.model for p in points))
    figure, axes = pyplot.subplots(len(repairs), len(models), squeeze=False, sharey=True,
                                   figsize=(4 * len(models), 3.2 * len(repairs) + 1))
    colours = pyplot.get_cmap("tab20").colors
    names = [c for c in dict.fromkeys(p.criterion for p in points) if c != "dense"]
    for row, repair in enumerate(repairs):
        for column, model in enumerate(models):
            panel = axes[row][column]
            panel.set_title(model + ("" if repair == "none" else f", {repair}"))
            for i, name in enumerate(names):
                own = [p for p in points if p.model == model and (
                    p.target == 100 or (p.criterion, p.repair) == (name, repair))]
                if len(own) > 1:
                    panel.plot([p.macs for p in own], [p.accuracy for p in own], marker=".",
                               color=colours[i % 20], label=name)
            panel.set_xlabel("MACs, % of dense")
        axes[row][0].set_ylabel("accuracy, %")
    handles, labels = max((a.get_legend_handles_labels() for a in axes.flat),
                          key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0.8 / figure.get_figheight(), 1, 1))
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--only", action="append", help="a criterion of the table; repeatable")
    parser.add_argument("--also", action="append", default=[], help="one more; repeatable")
    parser.add_argument("--allocation", action="append", default=[],
                        help="the criteria of --only by another allocation, too; repeatable")
    parser.add_argument("--repair", action="append", help="none, or a pass; repeatable")
    parser.add_argument("--out", type=Path, help="write the table here, the picture beside it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = [Row(c) for c in (*(options.only or CRITERIA), *options.also)]
    if not options.only:
        chosen += [Row(c, "global") for c in GLOBAL] + [Row(c, data=False) for c in NO_DATA]
    for allocation in options.allocation:
        chosen += [Row(r.criterion, allocation) for r in chosen if r.allocation == "uniform"]
    known = {e.name for kind, e in registry.available() if kind == "compensation"}
    repairs = options.repair or ["none", *(["refit"] if "refit" in known else [])]
    start, points = time.process_time(), []
    for model in options.model or MODELS:
        for point in prunings(model, chosen, repairs, options.seed, SHARES):
            points.append(point)
            print(point, file=sys.stderr, flush=True)
    text = table(points, SHARES, repairs)
    print(f"{text}\n\n{time.process_time() - start:.0f} CPU seconds, training included.")
    if options.out:
        image = options.out.with_suffix(".svg")
        picture([p for p in points if not p.criterion.startswith(("global, ", "no data, "))],
                repairs, image)
        head = "# Accuracy against MACs\n\n" + "\n\n".join(
            p for p in (__doc__ or "").split("\n\n") if not p.startswith("    "))
        shown = "Columns: share of MACs that stays, and the repair; cells: accuracy, percent."
        options.out.write_text(f"{head.strip()}\n\n{shown}\n\n{text}\n\n![accuracy against MACs]"
                               f"({image.name})\n", encoding="utf-8")


if __name__ == "__main__":
    main()
