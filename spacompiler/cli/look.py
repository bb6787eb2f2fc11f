"""Commands that look: inspect, verify, bench and passes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, did_you_mean
from ..request.options import DANGEROUS, MAIN, Options, at_least, option
from ..request.recipe import Trusting
from .console import errors, progress, show
from .options import AsJson, Model, asked, taking

if TYPE_CHECKING:
    from ..groups.solution import Solution
    from .pass_words import Words

NARROW = 80
"""Columns that lists of groups and passes fit where there is no terminal."""
UNCHECKED = 3
"""Exit code of what could not be checked whole."""

_count = at_least(1, "sizes and numbers must be at least 1, not {value}")


@dataclass(frozen=True)
class Dense(Options):
    """Where the dense model of an artifact is, if its record is not followed."""

    source: str | None = option(
        None, DANGEROUS, "The dense model, as given to compile. What artifacts name is followed to "
        "the zoo and transformers' classes only.", metavar="MODEL")


@dataclass(frozen=True)
class Timing(Dense):
    """How files are timed."""

    batches: tuple[int, ...] = option(
        (1, 8), MAIN, "Batch size. Repeatable. Default: 1 and 8.", flag="--batch", check=_count)
    threads: tuple[int, ...] = option(
        (1, 2), MAIN, "Threads inside an operator. Repeatable. Default: 1 and 2.", check=_count)
    length: int = option(128, MAIN, "Tokens of a prompt, or of other free axes.", check=_count)
    repeats: int = option(20, MAIN, "Timed turns of each case.", check=_count)
    seconds: float = option(
        20.0, MAIN, "Begin no turn of a case after this time, once five are done.")


@dataclass(frozen=True)
class Looking(Trusting):
    """Whether a model is run when it is looked at, and on what."""

    diagnose: bool = option(False, MAIN, "Run it: silent units, how uneven slices are and how many "
                            "may go by that, the largest queries and keys.")
    calibration: str | None = option(
        None, MAIN, "Data to run it on, as of compile. Default: the example inputs.")


@taking(Looking)
def inspect(
    model: Model,
    other: Annotated[str | None, typer.Argument(metavar="[PARAM:DIM]", hidden=True)] = None,
    why: Annotated[str | None, typer.Option(
        metavar="PARAM:DIM [PARAM:DIM]", help="Say what may go from a dimension and why the rest "
        "stays; of two, print the chain of operators that couples them.")] = None,
    page: Annotated[Path | None, typer.Option(
        "--html", metavar="FILE", help="Write the groups as a page to search and fold.")] = None,
    graph: Annotated[Path | None, typer.Option(
        help="Write groups and dimensions as a graph: .dot, .graphml or .html.")] = None,
    module: Annotated[list[str] | None, typer.Option(
        help="Path of a sub-module to look at in place of the whole. Repeatable.")] = None,
    full: Annotated[bool, typer.Option("--full", help="List members and frozen arrays.")] = False,
    as_json: AsJson = False, **given: object,
) -> None:
    """Show the coupled groups of MODEL."""
    with errors(as_json):
        from ..pipeline import inspected
        from . import inspection

        if _diagnosed(model, as_json, asked(Looking, given), {
                "why": why, "html": page, "graph": graph, "module": module, "full": full}):
            return
        if other is not None and why is None:
            raise UsageError(f"unexpected {other!r}", fix="a second dimension goes with --why")
        for place in filter(None, (graph, page)):
            inspection.check_graph(place)
        with progress() as tick:
            tick(f"tracing {model}", 0, 1)
            solution = inspected.inspect(model, modules=tuple(module or ()),
                                         **asked(Trusting, given))
        if graph is not None:
            inspection.write_graph(solution, graph)
        if page is not None:
            inspection.write_page(solution, page, f"Groups of {model}")
        if why is not None:
            chain = inspection.explained(solution, why, other)
            print(json.dumps(chain) if as_json else "\n".join(chain))
        else:
            _show_groups(solution, full, as_json)


def _show_groups(solution: Solution, full: bool, as_json: bool) -> None:
    """Print groups as data, as text with all members, or as a table."""
    from . import inspection

    if as_json:
        print(json.dumps(inspection.as_data(solution)))
    elif full:
        print(solution)
    else:
        show(inspection.table(solution), NARROW)


def _diagnosed(model: str, as_json: bool, words: dict[str, Any],
               others: dict[str, object]) -> bool:
    """Show what a model says of itself while it runs, if that is asked for."""
    if not words.pop("diagnose", False):
        if "calibration" in words:
            raise UsageError("calibration has nothing to act on", fix="give --diagnose too")
        return False
    if beside := [name for name, value in others.items() if value]:
        raise UsageError(f"--{beside[0]} has nothing to act on", why="a diagnosis is of the whole",
                         fix="ask for one of them at a time")
    from dataclasses import asdict

    from ..pipeline.diagnosed import diagnose
    from .inspection import diagnosed

    with progress() as tick:
        tick(f"running {model}", 0, 1)
        found = diagnose(model, **words)
    if as_json:
        print(json.dumps({**asdict(found), "dead": found.dead}))
        return True
    for table in diagnosed(found):
        show(table, NARROW)
    return True


@taking(Dense)
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `compile` "
                                                                  "wrote.")],
    strict: Annotated[bool, typer.Option(
        "--strict", help="What could not be checked has failed: exit code 1.")] = False,
    as_json: AsJson = False, **given: object,
) -> None:
    """Check an artifact again: hashes, reload, plan identity, ONNX parity.

    Exit code 0: all is ok; 1: something failed; 3: nothing failed, but not all could be checked.
    """
    with errors(as_json):
        from ..store.place import check_artifact

        check_artifact(directory)
        from ..artifact.verify import verify as run

        with progress() as tick:
            tick(f"verifying {directory}", 0, 1)
            found = run(directory, Dense.of(asked(Dense, given)).source)
        if as_json:
            print(json.dumps([{"check": c.name, "passed": c.passed, "detail": c.detail}
                              for c in found]))
        else:
            words = {True: "ok", False: "FAILED", None: "skipped"}
            for check in found:
                print(f"{words[check.passed]:8}{check.name}: {check.detail}")
        bad = {check.passed for check in found} - {True}
        if bad:
            raise typer.Exit(1 if False in bad or strict else UNCHECKED)


@taking(Timing)
def bench(
    path: Annotated[Path, typer.Argument(
        metavar="DIR_OR_ONNX", help="A directory that `compile` wrote (alone: against the dense "
                                    "model of its recipe), or an .onnx file.")],
    other: Annotated[Path | None, typer.Argument(
        metavar="OTHER", help="A directory or file to compare with it.")] = None,
    as_json: AsJson = False, **given: object,
) -> None:
    """Time ONNX files against each other in ONNX Runtime, turn by turn."""
    with errors(as_json):
        timing = asked(Timing, given)
        Timing.of(timing)
        for place in (path, other):
            if place is not None and not place.exists():
                raise UsageError(f"there is nothing at {str(place)!r}",
                                 fix="give an .onnx file or a directory that `compile` wrote")
        from . import bench as benchmark

        with progress() as tick:
            tick(f"timing {path}", 0, 1)
            rows = benchmark.run(path, other, **timing)
        if as_json:
            print(json.dumps(rows))
        else:
            show(benchmark.table(rows))


def passes(
    name: Annotated[str | None, typer.Argument(
        metavar="NAME", help="Say all there is to say of one.")] = None,
    tag: Annotated[list[str] | None, typer.Option(
        help="List what has this tag: when (before, during, after), how (weights, gradients, "
        "measured, ...), what (slices, widths, values), fused with (adapters, ...). "
        "Repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the installed passes, or tell when to use one and what it needs."""
    with errors(as_json):
        named = _passes(name)
        found = [w for w in named if set(tag or ()) <= set(w.tags)]
        _check_tags(tag or (), named, found)
        if as_json:
            print(json.dumps([
                {"kind": w.kind, "name": w.name, "options": ", ".join(w.options),
                 "what": " ".join(w.text.split("\n\n")[0].split()), "tags": w.tags}
                for w in found]))
            return
        if name is None:
            from .tables import table

            show(table(("kind", "name", "use it when", "ONNX"),
                       [(w.kind, w.name, w.use, w.onnx) for w in found]), NARROW)
            print("spacompiler passes NAME says more: options, needs, formula, tags")
        for each in found if name is not None else ():
            print("\n".join(_of_pass(each)))


def _passes(name: str | None) -> list[Words]:
    """What is said of every pass, or of those of one name."""
    from ..request import registry
    from . import pass_words

    entries = [(kind, e) for kind, e in registry.available() if name in (None, e.name)]
    if not entries:
        raise UsageError(f"there is no pass {name!r}", fix=did_you_mean(
            str(name), {e.name for _, e in registry.available()}))
    return [pass_words.words(kind, e) for kind, e in entries]


def _check_tags(asked: Sequence[str], named: Sequence[Words], found: Sequence[Words]) -> None:
    """Raise UsageError for a tag that there is not, or that no pass of those named has."""
    from .pass_tags import known

    there = {*known(), *(t for w in found for t in w.tags)}
    for word in asked:
        if word not in there:
            raise UsageError(f"there is no tag {word!r}", fix=did_you_mean(word, known()))
    if not asked or found:
        return
    said = " and ".join(asked)
    if len({w.name for w in named}) == 1:
        own = ", ".join(sorted({t for w in named for t in w.tags}))
        raise UsageError(f"{named[0].name} is not tagged {said}", why=f"its tags are {own}",
                         fix=f"list what is: passes {' '.join(f'--tag {t}' for t in asked)}")
    raise UsageError(f"no pass is tagged {said}", fix="ask for fewer at once"
                     if len(asked) > 1 else "passes NAME shows the tags that a pass has")


def _of_pass(words: Words) -> list[str]:
    """All there is to say of a pass, within 80 columns."""
    rows = [("use it when", words.use), ("needs", words.needs), ("ONNX files", words.onnx),
            ("options", ", ".join(words.options) or "none"), ("tags", ", ".join(words.tags))]
    lines = [f"{words.name} ({words.kind})"]
    lines += [textwrap.fill(f"  {label}: {text}", NARROW, subsequent_indent="    ")
              for label, text in rows if text]
    paragraphs = (" ".join(part.split()) for part in words.text.split("\n\n"))
    return [*lines, *(textwrap.fill(p, NARROW, initial_indent="  ", subsequent_indent="  ")
                      for p in paragraphs if p)]
