"""The command line: compile, sweep, inspect, verify, passes.

Results go to stdout, progress to stderr.

Exit codes: 0 done, 1 failed (nothing written), 2 the request was malformed, 3 not all of an
artifact could be checked.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from ..system.process import collect_rarely
from .compile import compile, lift
from .look import bench, inspect, passes, verify
from .options import Panels
from .sweep import sweep

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

for command in (compile, sweep, lift, inspect, verify, bench, passes):
    app.command(cls=Panels)(command)


@app.callback(invoke_without_command=True)
def start(context: typer.Context, version: Annotated[bool, typer.Option(
        "--version", help="Print the version and exit.")] = False) -> None:
    """Prune a network: find coupled channels, heads and neurons, remove whole slices, prove the
    result, and write a smaller model.
    """
    if version:
        print(f"spacompiler {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line."""
    collect_rarely()
    app(prog_name="spacompiler")


if __name__ == "__main__":
    main()
