"""Write docs/options.md and docs/recipe.schema.json from the table of options; with --check, only
say whether they are up to date.

    python docs/make_options.py [--check]
"""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING
from pathlib import Path

from spacompiler.request.options import Known, by_panel, known
from spacompiler.request.recipe import Errand, Recipe
from spacompiler.request.recipe_file import schema

PAGE = Path(__file__).with_name("options.md")
SCHEMA = Path(__file__).with_name("recipe.schema.json")
HEAD = """# Options of a compile

Made by `python docs/make_options.py` from the fields of `Recipe` and `Errand` in
`spacompiler/request/recipe.py`, where each is written once: the command line, the keywords of
`spacompiler.compile` and the entries of [a recipe](recipes/README.md) (keys as in Python, and
[a schema](recipe.schema.json) for editors) follow from there.

**Patterns** (`--only`, `--ignore`, `--keep`, `--low-rank`) are a shell's, and match
whole names: `*` is any text, dots included, `?` one character, `[0-3]` one of these; put quotes
around them. Names are those of parameters (`model.layers.0.mlp.up_proj.weight`) and of groups,
which are called by their first dimension (`model.layers.0.mlp.gate_proj.weight:0`); `inspect`
lists the groups, `inspect --full` the parameters in each. `--ignore` and `--keep` take every
group that has a parameter of such a name, `--only` those of which all parameters match;
`--low-rank` goes by layers (`model.layers.0.mlp.up_proj`). A pattern that matches nothing is an
error.

| pattern | what it means |
|---|---|
| `--ignore '*.layers.1.*'` | layer 1 stays as it is (`'*layers.1*'` would be 10 to 19, too) |
| `--ignore 'lm_head.*' --ignore '*embed*'` | several: each counts |
| `--only '*mlp*'` | nothing but MLPs goes |
| `--keep '*.mlp.*=50%' --keep '*.attn.*>=70%'` | half of each MLP, 70% of attention at least |
| `--keep '*=x32'` | all widths are multiples of 32 |
| `--keep '*.layers.[0-3].*=100%'` | layers 0 to 3 stay whole |
"""


def cell(text: str) -> str:
    """A text as it stands in a table of markdown."""
    return text.replace("|", "\\|")


def row(entry: Known) -> str:
    """One option as a line of a table."""
    flags = "in recipes alone" if entry.about.recorded else \
        " ".join(f"`{flag}`" for flag in entry.flag.split("/"))
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
    """Write the files, or compare them; exit code 1 says that it is out of date."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    made = {PAGE: page(), SCHEMA: json.dumps(schema(Recipe), indent=1) + "\n"}
    for place, text in made.items():
        if not arguments:
            place.write_text(text, encoding="utf-8")
        elif not place.exists() or place.read_text(encoding="utf-8") != text:
            print(f"{place.name} is out of date: run python docs/make_options.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
