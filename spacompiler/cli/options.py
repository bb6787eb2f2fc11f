"""Options of the command line, made from tables of options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import UsageError
from ..request.options import MAIN, PANELS, Known, Options, option, spoken

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter


def _models(incomplete: str) -> list[str]:
    """What a shell may complete MODEL to: the zoo's names; files and folders it knows itself."""
    from ..models_zoo import names

    return [f"zoo:{name}" for name in names() if f"zoo:{name}".startswith(incomplete)]


_MODEL = typer.Argument(
    metavar="MODEL", autocompletion=_models,
    help="zoo:NAME, a transformers directory or hub id, an .onnx file, or package.module:factory "
         "or file.py:factory (returns module, example inputs)")
Model = Annotated[str, _MODEL]
ModelOrNone = Annotated[str | None, _MODEL]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclass(frozen=True)
class Telling(Options):
    """What is said while the work goes on."""

    quiet: bool = option(False, MAIN, "Say nothing on stderr but errors.")
    log_file: Path | None = option(
        None, MAIN, "Write how far the work has come to this file, too: a line a step, with the "
        "time.", metavar="FILE")


_TYPES: Mapping[object, object] = {
    tuple[str, ...]: list[str] | None, tuple[int, ...]: list[int] | None}
"""What typer calls the types of lists."""


def taking(*tables: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of tables where it is written to take any (`**given`)."""
    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values()
               if p.kind is not p.VAR_KEYWORD]
        made = [_parameter(entry) for table in tables for entry in spoken(table)]
        wanted = [*(p for p in own if p.default is p.empty), *made,
                  *(p.replace(kind=p.KEYWORD_ONLY) for p in own if p.default is not p.empty)]

        @functools.wraps(command)
        def dressed(*args: object, **given: object) -> None:
            command(*args, **given)

        dressed.__signature__ = inspect.Signature(wanted)  # type: ignore[attr-defined]
        dressed.__annotations__ = {p.name: p.annotation for p in wanted}
        return dressed
    return give


def _parameter(entry: Known) -> inspect.Parameter:
    """What typer reads of an option; None stands for one that was not given and has no value."""
    about, default = entry.about, entry.default
    if default is MISSING or default == "" or entry.repeatable:
        default = None
    return inspect.Parameter(
        entry.name, inspect.Parameter.KEYWORD_ONLY, default=default,
        annotation=Annotated[_TYPES.get(entry.type, entry.type), typer.Option(
            entry.flag, help=about.help, metavar=about.metavar or None,
            autocompletion=_passes(about.passes) if about.passes else None,
            rich_help_panel=about.panel)])


def _passes(kind: str) -> Callable[[str], list[str]]:
    """What says of a kind of pass which names a shell may complete to."""
    def complete(incomplete: str) -> list[str]:
        from ..request.registry import available

        return [e.name for of, e in available() if of == kind and e.name.startswith(incomplete)]
    return complete


def asked(table: type[Options], given: Mapping[str, object]) -> dict[str, Any]:
    """Return what a command was given of a table, by Python's keywords.

    Raises UsageError for an empty text: a variable of the shell's may have been meant.
    """
    for entry in spoken(table):
        value = given.get(entry.name)
        if value == "" or (isinstance(value, list) and "" in value):
            raise UsageError(f"{entry.flag} is empty", fix="leave it out, or give it a value")
    found = {entry.keyword: given.get(entry.name) for entry in spoken(table)}
    return {word: tuple(value) if isinstance(value, list) else value
            for word, value in found.items() if value is not None and value != []}


class Panels(TyperCommand):
    """A command whose help lists options under headings, and which hands on what was given alone.
    """

    def invoke(self, ctx: Context) -> object:
        """Run the command; None stands for an option that was not given: tables have defaults."""
        for name in ctx.params:
            source = ctx.get_parameter_source(name)
            if source is not None and source.name == "DEFAULT":
                ctx.params[name] = None
        return super().invoke(ctx)

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the arguments, then each panel's options, those that run foreign code last."""
        found: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{p: [] for p in PANELS}}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                panel = "Arguments" if param.param_type_name == "argument" else \
                    getattr(param, "rich_help_panel", None) or MAIN
                found.setdefault(panel, []).append(row)
        for panel, rows in found.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)
