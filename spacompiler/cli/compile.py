"""Commands that write: compile, and lift for what was trained on the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..request.options import MAIN, known
from ..request.recipe import Errand, Recipe
from ..system.launched import launched
from .console import errors, progress
from .options import AsJson, ModelOrNone, Telling, asked, taking

Saved = Annotated[Path | None, typer.Option(
    "--recipe", metavar="FILE", rich_help_panel=MAIN,
    help="A recipe in YAML, of which the options that are given replace parts.")]


@taking(Recipe, Errand, Telling)
def compile(model: ModelOrNone = None, recipe: Saved = None, as_json: AsJson = False,
            **given: object) -> None:
    """Prune MODEL to a target and write a smaller model that is proved right."""
    place, speaks = given.get("out"), True
    with errors(as_json, place if isinstance(place, Path) else None):
        words, errand = asked(Recipe, given), {"processes": "auto", **asked(Errand, given)}
        errand["processes"] = errand["processes"].replace("auto", "together")
        if errand["processes"] == "together":
            speaks = (launched() or (0, 1))[0] == 0
        out = errand.get("out")
        if out is None and not errand.get("dry_run"):
            raise UsageError("no output directory", fix="give --out DIR, or --dry-run")
        wanted = request(model, recipe, words)
        check_early(wanted, out)
        from .. import api
        from ..artifact import report

        with progress(speaks, **asked(Telling, given)) as tick:
            result = api.compile(model or wanted, recipe=wanted, progress=tick, **errand)
        if not speaks:
            return
        data = result.report or report.facts(result.job)
        if as_json:
            print(json.dumps({**data, "out": str(out) if out else None}, default=str))
        else:
            _print_compiled(data, None if errand.get("dry_run") else out)


def request(model: str | None, file: Path | None, words: Mapping[str, object]) -> Recipe:
    """Return what a command line asks for, by a recipe or without.

    Raises UsageError where no model or no target is named.
    """
    if file is not None:
        found = Recipe.read(file, **words, **({"model": model} if model else {}))
    elif "target" not in words:
        raise UsageError("there is no target", fix="say what stays: --target params=70%")
    else:
        found = Recipe.of(words)
    if not model and not found.model:
        raise UsageError("no model is named", fix="give MODEL: zoo:NAME, a directory, an .onnx "
                         "file or package.module:factory")
    return found


def check_early(recipe: Recipe, out: Path | None) -> None:
    """Find mistakes in the request before torch is imported.

    Raises UsageError for a place that cannot be written, or a pass that there is not.
    """
    from ..request import registry
    from ..store.place import check_out

    if out is not None:
        check_out(out)
    for entry in known(type(recipe)):
        name = getattr(recipe, entry.name)
        if entry.about.passes and (name or entry.default):
            registry.check_name(entry.about.passes, name)


def _print_compiled(data: Mapping[str, Any], out: Path | None) -> None:
    from rich.console import Console

    from ..artifact.report import deployed, loading
    from .tables import compiled

    console = Console(soft_wrap=True)
    console.print(compiled(data))
    if data["proof"]:
        proof = data["proof"]
        console.print(f"proof: relative error {proof['relative_error']:.1e} in "
                      f"{proof['precision']}; a wrong index gives {proof['negative_control']:.1e}")
    for check, result in deployed(data):
        console.print(f"{check}: {result}", highlight=False, markup=False)
    for note in data["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    if out is None:
        console.print("dry run: nothing written")
        return
    console.print(f"written to {out}, layout {data['layout']}; to load it:", markup=False)
    lines = loading(data).replace("DIR", str(out)).splitlines()
    console.print("\n".join(f"    {line}" for line in lines if line), highlight=False,
                  markup=False)


def lift(
    adapter: Annotated[Path, typer.Argument(
        metavar="ADAPTER", help="A directory in peft's format, trained on the pruned model.")],
    plan: Annotated[Path, typer.Option(
        metavar="DIR", help="The pruned model's directory, as `compile` wrote it.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write; must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Scatter an adapter of a pruned model to the dense model."""
    with errors(as_json, out):
        from ..store.place import check_artifact, check_out

        check_out(out)
        check_artifact(plan)
        from ..adapters.lifting import lift as run

        run(adapter, plan, out)
        print(json.dumps({"out": str(out)}) if as_json else f"written to {out}")
