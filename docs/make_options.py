"""Write docs/options.md from the table of options; with --check, only say whether it is up to date.

    python docs/make_options.py [--check]
"""

from __future__ import annotations

import sys
from dataclasses import MISSING
from pathlib import Path

from spacompiler.request.options import Known, by_panel, known
from spacompiler.request.recipe import Errand, Recipe

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options of a compile

Made by `python docs/make_options.py` from the fields of `Recipe` and `Errand` in
`spacompiler/request/recipe.py`, where each is written once: the command line, the keywords of
`spacompiler.compile` and the entries of a recipe follow from there.
"""


def cell(text: str) -> str:
    """A text as it stands in a table of markdown."""
    return text.replace("|", "\\|")


def row(entry: Known) -> str:
    """One option as a line of a table."""
    flags = " ".join(f"`{flag}`" for flag in entry.flag.split("/"))
    default = "required" if entry.default is MISSING else \
        "" if entry.default in ("", None, ()) else f"`{entry.default!r}`"
    return f"| {flags} | `{entry.keyword}` | {default} | {cell(entry.about.help)} |"


def page() -> str:
    """Return the whole page: a table under each heading of the help."""
    tables = [
        "\n".join([f"## {panel}", "", "| command line | Python | default | |", "|---|---|---|---|",
                   *map(row, entries)])
        for panel, entries in by_panel([*known(Recipe), *known(Errand)]).items()]
    return "\n\n".join([HEAD.rstrip(), *tables]) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it; exit code 1 says that it is out of date."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.name} is out of date: run python docs/make_options.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
