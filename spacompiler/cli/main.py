"""The command line: compile, inspect, verify, passes. Results go to stdout, progress to stderr.

Exit codes: 0 done, 1 failed (nothing written), 2 the request was malformed, 3 not all of an
artifact could be checked.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SpaError, UsageError

app = typer.Typer(
    help="Prune a network: find coupled channels, heads and neurons, remove whole slices, "
         "prove the result, and write a smaller model.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None)

Model = Annotated[str, typer.Argument(
    metavar="MODEL", help="zoo:NAME, a transformers directory or hub id, an .onnx file, or "
                          "package.module:factory (returns module, example inputs)")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Source = Annotated[str | None, typer.Option(
    "--source", metavar="MODEL", help="The dense model, as given to compile. What artifacts name is"
                                      " followed to the zoo and transformers' classes only.")]
UNCHECKED = 3
Trust = Annotated[bool, typer.Option(
    "--trust-remote-code", help="Dangerous: run code that the checkpoint brings along.")]


@app.command()
def compile(
    model: Model,
    target: Annotated[str, typer.Option(help="What stays: params=70%, body=75% (all but embeddings "
                                             "and output layer) or macs=60%; params~70%: the "
                                             "nearest that can be reached.")],
    out: Annotated[Path | None, typer.Option(help="Directory to write; must not exist.")] = None,
    importance: Annotated[str, typer.Option(
        help="Pass that scores slices (see `passes`). Default: taylor; for ONNX files one without "
             "gradients.")] = "auto",
    allocation: Annotated[str, typer.Option(help="Pass that turns scores into counts.")]
    = "uniform",
    schedule: Annotated[str, typer.Option(
        help="Pass that decides what goes while it trains on the calibration data, e.g. "
             "'lora-prune(steps=200)'. Default: none, one shot.")] = "",
    repair: Annotated[str, typer.Option(help="Pass that mends what stays: refit, bias, batch-norm "
                                             "or none; auto: refit where scoring reads real "
                                             "calibration data anyway.")]
    = "auto",
    calibration: Annotated[str | None, typer.Option(
        help="A text file, sampled (what the model makes up) or none (example inputs only). "
             "Default: the model's own data, or text that Python carries.")] = None,
    continued: Annotated[bool, typer.Option(
        "--continued", help="Let the model write on from each calibration window; repair, and "
                            "scores by covariance and curvature, see that text too.")] = False,
    role: Annotated[list[str] | None, typer.Option(
        help="What may go: channel, head, 'head dim', hidden, expert. Repeatable. "
             "Default: channel and head.")] = None,
    only: Annotated[list[str] | None, typer.Option(
        help="Pattern over groups and parameters: nothing else goes. Repeatable.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(
        help="Pattern over groups and parameters that stay. Repeatable.")] = None,
    module: Annotated[list[str] | None, typer.Option(
        help="Path of a sub-module to compile in place of the whole. Repeatable.")] = None,
    blocks: Annotated[str, typer.Option(
        "--drop-blocks", metavar="N|auto|PATHS",
        help="Whole blocks to leave out before widths are cut: how many, auto (as many as are "
             "cheaper than widths), or which (paths, commas between).")] = "",
    approximate: Annotated[bool, typer.Option(
        help="Let axes go whose norm takes other statistics then.")] = False,
    align: Annotated[int | None, typer.Option(
        help="Widths become multiples of this. Default: what this CPU's kernels want.")] = None,
    floor: Annotated[float, typer.Option(help="Least share of each group that stays.")] = 0.1,
    layout: Annotated[str, typer.Option(help="auto, uniform (stock transformers) or any.")]
    = "auto",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 128,
    batch: Annotated[int, typer.Option(help="Windows in a calibration batch.")] = 2,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    prove: Annotated[bool, typer.Option(help="Prove masked dense = pruned in float64.")] = True,
    onnx: Annotated[bool, typer.Option(help="Export model.onnx and check it.")] = True,
    decoder: Annotated[bool, typer.Option(
        "--decoder", help="Give model.onnx a key/value cache, for writing text: a causal language "
                          "model of transformers.")] = False,
    int8: Annotated[bool, typer.Option(
        "--int8", help="Write model.int8.onnx too: int8 weights, the difference measured.")]
    = False,
    int8_bits: Annotated[int, typer.Option(
        help="Bits of int8 weights: 7 is right on every processor, 8 on those with VNNI alone.")]
    = 7,
    latency: Annotated[bool, typer.Option(help="Time dense against pruned in ONNX Runtime.")]
    = True,
    adapter: Annotated[list[str] | None, typer.Option(
        metavar="PATH[=WEIGHT]", help="An adapter, merged before pruning: a directory of peft's or "
                                      "a file of another origin. Repeatable.")] = None,
    combine: Annotated[str, typer.Option(help="How several adapters become one: cat (exact "
                                              "weighted sum), linear, svd, ties, dare_linear, "
                                              "dare_ties, dare, lego, fair; with options, "
                                              "dare(density=0.1, q='auto').")] = "cat",
    keep_adapter: Annotated[bool, typer.Option(
        "--keep-adapter", help="Keep the adapter beside the pruned base, cut to its size.")]
    = False,
    recover: Annotated[str, typer.Option(
        metavar="PASS", help="Train what is left: lora, norms, full, or lora(lr=2e-3, logits=1).")]
    = "",
    recover_data: Annotated[str | None, typer.Option(
        metavar="FILE", help="Text to train on. Default: where calibration comes from.")] = None,
    recover_samples: Annotated[int, typer.Option(help="Windows to train on.")] = 512,
    checkpoint: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Save the training here, and continue it if it was stopped.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop at the plan.")] = False,
    as_json: AsJson = False,
    unused: Annotated[list[str] | None, typer.Option(
        metavar="PATTERN", help="Arrays of the checkpoint that the network has no use for, such as "
                                "a head of another task. Repeatable.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Prune MODEL to a target and write a smaller model that is proved right."""
    with _errors(as_json, out):
        if out is None and not dry_run:
            raise UsageError("no output directory", fix="give --out DIR, or --dry-run")
        options: dict[str, Any] = {
            "roles": tuple(role or ("channel", "head")), "only": tuple(only or ()),
            "ignore": tuple(ignore or ()), "modules": tuple(module or ()),
            "blocks": blocks, "continued": continued, "approximate": approximate, "align": align,
            "floor": floor, "layout": layout, "samples": samples,
            "length": length, "batch": batch, "seed": seed, "prove": prove, "onnx": onnx,
            "decoder": decoder, "int8": int8, "unused": tuple(unused or ()),
            "int8_bits": int8_bits, "latency": latency,
            "combine": combine, "keep_adapter": keep_adapter, "recover_samples": recover_samples}
        _check_early(target, out, importance, allocation, recover,
                     {**options, "repair": repair, "adapters": tuple(adapter or ()),
                      "schedule": schedule})
        from .. import api
        from ..artifact import report

        with _progress() as tick:
            result = api.compile(
                model, target=target, out=out, importance=importance, allocation=allocation,
                schedule=schedule, repair=repair, calibration=calibration,
                adapter=tuple(adapter or ()),
                recovery=recover or None, recover_data=recover_data, checkpoint=checkpoint,
                dry_run=dry_run, trust_remote_code=trust_remote_code, progress=tick, **options)
        data = result.report or report.facts(result.job)
        if as_json:
            print(json.dumps({**data, "out": str(out) if out else None}, default=str))
        else:
            _print_compiled(data, out if not dry_run else None)


def _check_early(target: str, out: Path | None, importance: str, allocation: str,
                 recover: str, options: dict[str, Any]) -> None:
    """Find mistakes in the request before torch is imported."""
    from ..request import registry
    from ..request.recipe import Recipe
    from ..store import place as artifact_path

    Recipe(target=target, **options)
    if out is not None:
        artifact_path.check_out(out)
    wanted = [("importance", importance), ("allocation", allocation),
              ("compensation", options["repair"])]
    wanted += [("recovery", recover)] if recover else []
    wanted += [("schedule", options["schedule"])] if options["schedule"] else []
    for kind, name in wanted:
        registry.check_name(kind, name)


def _print_compiled(data: dict[str, Any], out: Path | None) -> None:
    from rich.console import Console

    from ..artifact.report import deployed
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
    console.print(f"written to {out}" if out else "dry run: nothing written", markup=False)


@app.command()
def lift(
    adapter: Annotated[Path, typer.Argument(
        metavar="ADAPTER", help="A directory in peft's format, trained on the pruned model.")],
    plan: Annotated[Path, typer.Option(
        metavar="DIR", help="The pruned model's directory, as `compile` wrote it.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write; must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Scatter an adapter of a pruned model to the dense model."""
    with _errors(as_json, out):
        from ..store.place import check_artifact, check_out

        check_out(out)
        check_artifact(plan)
        from ..adapters.lifting import lift as run

        run(adapter, plan, out)
        print(json.dumps({"out": str(out)}) if as_json else f"written to {out}")


@app.command()
def inspect(
    model: Model,
    why: Annotated[tuple[str, str] | None, typer.Option(
        metavar="PARAM:DIM PARAM:DIM", help="Print the chain of operators that couples two "
                                            "dimensions.")] = None,
    graph: Annotated[Path | None, typer.Option(
        help="Write groups and dimensions as a graph: .dot, .graphml or .html.")] = None,
    module: Annotated[list[str] | None, typer.Option(
        help="Path of a sub-module to look at in place of the whole. Repeatable.")] = None,
    full: Annotated[bool, typer.Option("--full", help="List members and frozen arrays.")] = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show the coupled groups of MODEL."""
    with _errors(as_json):
        from .. import api
        from . import inspection

        if graph is not None:
            inspection.check_graph(graph)
        with _progress() as tick:
            tick(f"tracing {model}", 0, 1)
            solution = api.inspect(model, modules=tuple(module or ()),
                                   trust_remote_code=trust_remote_code)
        if graph is not None:
            inspection.write_graph(solution, graph)
        if why is not None:
            chain = inspection.explain(solution, *why)
            print(json.dumps(chain) if as_json else "\n".join(chain))
        elif as_json:
            print(json.dumps(inspection.as_data(solution)))
        elif full:
            print(solution)
        else:
            _print(inspection.table(solution))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `compile` "
                                                                  "wrote.")],
    source: Source = None,
    strict: Annotated[bool, typer.Option(
        "--strict", help="What could not be checked has failed: exit code 1.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check an artifact again: hashes, reload, plan identity, ONNX parity.

    Exit code 0: all is ok; 1: something failed; 3: nothing failed, but not all could be checked.
    """
    with _errors(as_json):
        from ..store.place import check_artifact

        check_artifact(directory)
        from ..artifact.verify import verify as run

        with _progress() as tick:
            tick(f"verifying {directory}", 0, 1)
            found = run(directory, source)
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


@app.command()
def bench(
    path: Annotated[Path, typer.Argument(
        metavar="DIR_OR_ONNX", help="A directory that `compile` wrote (alone: against the dense "
                                    "model of its recipe), or an .onnx file.")],
    other: Annotated[Path | None, typer.Argument(
        metavar="OTHER", help="A directory or file to compare with it.")] = None,
    batch: Annotated[list[int] | None, typer.Option(
        help="Batch size. Repeatable. Default: 1 and 8.")] = None,
    threads: Annotated[list[int] | None, typer.Option(
        help="Threads inside an operator. Repeatable. Default: 1 and 2.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a prompt, or of other free axes.")] = 128,
    repeats: Annotated[int, typer.Option(help="Timed turns of each case.")] = 20,
    seconds: Annotated[float, typer.Option(
        help="Begin no turn of a case after this time, once five are done.")] = 20.0,
    source: Source = None,
    as_json: AsJson = False,
) -> None:
    """Time ONNX files against each other in ONNX Runtime, turn by turn."""
    with _errors(as_json):
        numbers = (*(batch or (1, 8)), *(threads or (1, 2)), length, repeats)
        if min(numbers) < 1:
            raise UsageError(f"sizes and numbers must be at least 1, not {min(numbers)}")
        for place in (path, other):
            if place is not None and not place.exists():
                raise UsageError(f"there is nothing at {str(place)!r}",
                                 fix="give an .onnx file or a directory that `compile` wrote")
        from . import bench as benchmark

        with _progress() as tick:
            tick(f"timing {path}", 0, 1)
            rows = benchmark.run(path, other, batches=batch or (1, 8), threads=threads or (1, 2),
                                 length=length, repeats=repeats, seconds=seconds,
                                 source=source)
        if as_json:
            print(json.dumps(rows))
        else:
            _print(benchmark.table(rows))


@app.command()
def passes(as_json: AsJson = False) -> None:
    """List the installed passes."""
    with _errors(as_json):
        from ..request import registry

        rows = [(kind, entry.name, *registry.describe(entry))
                for kind, entry in registry.available()]
        if as_json:
            print(json.dumps([dict(zip(("kind", "name", "options", "what"), row, strict=True))
                              for row in rows]))
        else:
            from .tables import table

            _print(table(("kind", "name", "options", "what"), rows))


def _print(renderable: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(renderable)


@contextmanager
def _errors(as_json: bool, out: Path | None = None) -> Iterator[None]:
    """Print a SpaError as one message on stderr and exit with its code.

    `out` is what appears as the last thing, whole: an interrupt says whether it is there.
    """
    before = out is not None and out.exists()
    try:
        yield
    except SpaError as error:
        raise _told(error, as_json) from None
    except OSError as problem:
        raise _told(_of_the_system(problem), as_json) from None
    except KeyboardInterrupt:
        there = out is not None and out.exists() and not before
        print(f"interrupted: {out} was written, and is whole" if there else
              "interrupted: nothing written", file=sys.stderr)
        raise typer.Exit(130) from None


def _told(error: SpaError, as_json: bool) -> typer.Exit:
    """Print an error, and return the exit with its code."""
    if as_json:
        print(json.dumps({"error": error.what, "where": error.where, "why": error.why,
                          "fix": error.fix}))
    print(f"error: {error}", file=sys.stderr)
    return typer.Exit(error.code)


def _of_the_system(problem: OSError) -> SpaError:
    """Say what the operating system refused; a name that no file can have is the request's."""
    usage = problem.errno in (errno.ENAMETOOLONG, errno.ELOOP)
    where = str(problem.filename) if problem.filename is not None else ""
    return (UsageError if usage else SpaError)(
        "a file or directory cannot be used", where=where,
        why=problem.strerror or str(problem), fix="see that it is there, and free space and rights")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; plain lines where stderr is no terminal."""
    from ..system.process import no_warnings

    with no_warnings(), _lines_or_bar() as tick:
        yield tick


@contextmanager
def _lines_or_bar() -> Iterator[Callable[[str, int, int], None]]:
    if not sys.stderr.isatty():
        yield lambda stage, done, total: print(f"… {stage}" + (
            f" {done}/{total}" if stage == "calibrating" else ""), file=sys.stderr, flush=True) \
            if not stage.startswith("training") or done % max(1, total // 10) == 0 else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
               TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda stage, done, total: bar.update(
            task, description=stage, completed=done, total=total)


def main() -> None:
    """Run the command line."""
    app(prog_name="spacompiler")


if __name__ == "__main__":
    main()
