"""The command sweep: several sizes of one model, and which one to take."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..request.code import imported
from ..request.options import DANGEROUS, MAIN, Options, option
from ..request.recipe import Recipe, Trusting
from ..system.launched import launched
from .compile import Saved
from .console import errors, progress, show
from .options import AsJson, ModelOrNone, Telling, asked, taking


def _check_allow(allow: float) -> None:
    if not 0 <= allow < 10:
        raise UsageError(f"allow must be a share from 0, not {allow}")


@dataclass(frozen=True)
class Sizes(Options):
    """What a sweep tries, and what it goes by."""

    sizes: str = option("90,75,60,50", MAIN, "Shares that stay, in per cent, commas between.",
                        metavar="90,75,…")
    metric: str = option("params", MAIN, "What the shares are of: params, body, macs, bytes, …")
    allow: float = option(
        0.05, MAIN, "The winner is the smallest size that loses no more than this share of its "
        "score, or of perplexity.", check=_check_allow)
    timed: bool = option(False, MAIN, "Time each size in ONNX Runtime too.", flag="--time")
    evaluate: str = option(
        "", DANGEROUS, "module:function or file.py:function: takes a module and returns a number, "
        "more is better. Default: the loss on held-out data.", flag="--eval", metavar="PLACE")
    folder: Path | None = option(
        None, MAIN, "Directory to write sweep.json, sweep.svg and the winner's recipe.yaml to.",
        flag="--out", metavar="DIR")


@taking(Recipe, Sizes, Trusting, Telling)
def sweep(model: ModelOrNone = None, recipe: Saved = None, as_json: AsJson = False,
          **given: object) -> None:
    """Try several sizes of MODEL, traced and scored once, and say which one to take."""
    words, wanted = asked(Recipe, given), Sizes.of(asked(Sizes, given))
    with errors(as_json, wanted.folder):
        if launched() is not None:
            raise UsageError("a sweep runs in one process", why="a launcher started several",
                             fix="start it without a launcher; compile takes several")
        if "target" in words:
            raise UsageError("a sweep takes sizes in place of a target",
                             fix="give --sizes 90,75,60,50 and --metric params")
        words.pop("latency", None)  # --time asks for it here
        shares = _shares(wanted.sizes)
        if recipe is None and not model:
            raise UsageError("no model is named", fix="give MODEL, or a recipe that names one")
        if wanted.folder is not None:
            from ..store.place import check_out

            check_out(wanted.folder)
        from .. import api

        judge = _evaluate(wanted.evaluate) if wanted.evaluate else None
        base: dict[str, Any] = {} if recipe is None else {"recipe": Recipe.read(
            recipe, target=f"{wanted.metric}~{shares[0]:.6g}",
            **({"model": model} if model else {}))}
        with progress(**asked(Telling, given)) as tick:
            found = api.sweep(model or base["recipe"], sizes=shares, metric=wanted.metric,
                              evaluate=judge, allow=wanted.allow, latency=wanted.timed,
                              progress=tick, **base, **words, **asked(Trusting, given))
        if wanted.folder is not None:
            found.save(wanted.folder)
        if as_json:
            print(json.dumps(found.as_dict()))
        else:
            from .tables import table

            show(table(*found.cells(), f"{found.model}: {found.rule}"))
            if wanted.folder is not None and found.winner is not None:
                print(f"spacompiler compile {model or ''} --recipe {wanted.folder}/recipe.yaml "
                      "--out DIR")


def _shares(text: str) -> list[float]:
    """Read shares in per cent; raises UsageError for what is none."""
    try:
        found = [float(part.strip().rstrip("%")) / 100 for part in text.split(",")]
    except ValueError as problem:
        raise UsageError(f"cannot read sizes {text!r}", fix="write 90,75,60,50") from problem
    if not all(0 < share < 1 for share in found):
        raise UsageError(f"sizes {text!r} are out of range",
                         why="each is a share that stays, between 0% and 100%",
                         fix="write 90,75,60,50")
    return found


def _evaluate(place: str) -> Callable[[Any], float]:
    """Load the user's function; raises UsageError where there is none."""
    module, _, name = place.rpartition(":")
    try:
        found = getattr(imported(module), name)
    except Exception as problem:  # any code may run here
        raise UsageError(f"cannot load {place!r}", why=str(problem) or type(problem).__name__,
                         fix="give module:function or file.py:function") from problem
    if not callable(found):
        raise UsageError(f"{place} is no function", fix="give one that takes a module")
    return found  # type: ignore[no-any-return]
