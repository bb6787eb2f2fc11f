"""Recipes as YAML: read within bounds, with the line of what is wrong, and written in order.

    # llama.yaml
    model: zoo:llama-gqa
    target: body=60%
    importance: {wanda: {norm: 1}}     # or, as on the command line, wanda(norm=1)
    align: 1

A recipe is data: no tags, anchors or aliases, and no code that it names is run unless the caller
names it again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, did_you_mean
from .options import Known, Options, by_panel, known, typed

BYTES, DEPTH = 2**20, 8
"""Larger files and deeper nests are not read."""
FILES = ("model", "inputs", "calibration", "recover_data", "adapters")
"""Options that may name files: those that lie beside the recipe are found there."""
GIVEN = "given"
WORDS = ("", "sampled", "own", "python", "none", GIVEN)
"""What says where data comes from and is no file; `given` was handed over in Python."""


class _Numbers(yaml.SafeLoader):
    """A safe loader that reads 1e-3 as the number that it is in YAML 1.2."""


_Numbers.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"))


def read(path: Path) -> str:
    """Return the text of a recipe; raises UsageError if there is none, or too much of it."""
    try:
        if path.is_file() and path.stat().st_size <= BYTES:
            return path.read_text(encoding="utf-8")
        why = f"it has more than {BYTES:,} bytes" if path.is_file() else "there is no such file"
    except (OSError, ValueError) as problem:
        why = str(problem)
    raise UsageError(f"recipe {str(path)!r} cannot be read", why=why, fix="give a YAML file")


def values(kind: type[Options], text: str, name: str, folder: Path,
           replaced: Collection[str] = ()) -> dict[str, Any]:
    """Return what a text gives the options of a table; it is named `name`.

    Paths are looked up in `folder` first. `replaced` are keywords whose values the caller has
    given himself. Raises UsageError with the line of what is wrong.
    """
    found, lines = _values(kind, text, name)
    for entry in known(kind):
        if entry.keyword in replaced:
            found.pop(entry.name, None)
    _no_code(kind, found, lines)
    for option in FILES:
        if option in found:
            found[option] = _beside(found[option], folder)
    return found


def _values(kind: type[Options], text: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What each option is given, of its type and within its bounds, and where that stands."""
    table = {word: entry for entry in known(kind) for word in (entry.keyword, entry.name)}
    values: dict[str, Any] = {}
    lines: dict[str, str] = {}
    for line, key, value in _entries(text, name):
        where = f"{name}, line {line}"
        if key not in table:
            raise UsageError(f"there is no option {key!r}", where=where,
                             fix=did_you_mean(str(key), {e.keyword for e in table.values()}))
        entry = table[str(key)]
        if entry.name in values:
            raise UsageError(f"{key} stands there twice", where=where, fix="leave one out")
        try:
            values[entry.name] = typed(entry, _pass(value) if entry.about.passes else value)
            if entry.about.check is not None:
                entry.about.check(values[entry.name])
        except UsageError as problem:
            raise at(problem, where) from None
        lines[entry.name] = where
    return values, lines


def at(problem: UsageError, where: str) -> UsageError:
    """Return a problem with the place where it lies, if that is not said yet."""
    return UsageError(problem.what, problem.where or where, problem.why, problem.fix)


def _entries(text: str, name: str) -> Iterator[tuple[int, object, object]]:
    """Yield (line, key, value) of a mapping in YAML; raises UsageError for anything else."""
    try:
        _bounded(text)
        loader = _Numbers(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"recipe {name} is no list of options",
                             fix="write one `option: value` a line")
        for key, value in root.value:
            yield (key.start_mark.line + 1, loader.construct_object(key, deep=True),
                   loader.construct_object(value, deep=True))
    except (yaml.YAMLError, ValueError) as problem:
        mark = getattr(problem, "problem_mark", None)
        why = getattr(problem, "problem", None) or str(problem)
        raise UsageError(f"recipe {name} is no YAML", why=str(why),
                         where=f"{name}, line {mark.line + 1}" if mark else name,
                         fix="write one `option: value` a line") from problem


def _bounded(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Numbers):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        odd = isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None
        if depth > DEPTH or odd or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="recipes have no tags, anchors or aliases, and no deep nests",
                problem_mark=event.start_mark)


def _pass(value: object) -> object:
    """A pass as text: `{wanda: {norm: 1}}` is `wanda(norm=1)`."""
    if not (isinstance(value, Mapping) and len(value) == 1):
        return value
    (name, options), = value.items()
    if not isinstance(options, Mapping):
        return value
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _no_code(kind: type[Options], values: Mapping[str, Any], lines: Mapping[str, str]) -> None:
    """Raise UsageError for a pass or a model whose code would be run because a file says so."""
    for entry in known(kind):
        value = values.get(entry.name)
        code = entry.about.passes and ":" in str(value or "").partition("(")[0]
        if entry.name == "model" and isinstance(value, str):
            code = ":" in value and not value.startswith("zoo:") and not Path(value).exists()
        if code:
            again = "MODEL" if entry.name == "model" else entry.flag
            raise UsageError(f"the recipe names code: {value}", where=lines[entry.name],
                             why="a recipe is data, and code runs only where you ask for it",
                             fix=f"read it, and name it yourself: {again} {value}")


def _beside(value: Any, folder: Path) -> Any:
    if isinstance(value, tuple):
        return tuple(_beside(each, folder) for each in value)
    path, equals, weight = value.rpartition("=") if "=" in value else (value, "", "")
    if value in WORDS or Path(path).is_absolute() or not path:
        return value
    return f"{folder / path}{equals}{weight}" if (folder / path).exists() else value


# --- writing ------------------------------------------------------------------------------------


def text(recipe: Options, *, whole: bool = False) -> str:
    """Return a recipe as YAML, under the headings of the help; `whole` says defaults too."""
    table = known(type(recipe))
    lead = next(e for e in table if e.name == "model")
    lines: list[str] = []
    for panel, entries in by_panel([lead, *(e for e in table if e is not lead)]).items():
        said = [line for entry in entries for line in _line(entry, getattr(recipe, entry.name),
                                                            whole)]
        lines += [f"# {panel}", *said] if said else []
    return "\n".join(lines) + "\n"


def _line(entry: Known, value: object, whole: bool) -> list[str]:
    if value == entry.default and not (whole and not entry.about.recorded):
        return []
    data: object = list(value) if isinstance(value, tuple) else value
    if entry.name == "hashes" and isinstance(value, tuple):
        data = dict(each.split("=", 1) for each in value)
    flow = isinstance(data, (list, dict))
    made = yaml.safe_dump(data if flow else {entry.keyword: data}, width=10**6, sort_keys=False,
                          allow_unicode=True, default_flow_style=flow).rstrip("\n")
    return [f"{entry.keyword}: {made}" if flow else made]


# --- what may stand in one ----------------------------------------------------------------------


_SCHEMAS: Mapping[object, Mapping[str, Any]] = {
    str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"},
    bool: {"type": "boolean"}, int | None: {"type": ["integer", "null"]},
    str | None: {"type": ["string", "null"]}, Path | None: {"type": ["string", "null"]},
    tuple[str, ...]: {"type": "array", "items": {"type": "string"}},
    tuple[int, ...]: {"type": "array", "items": {"type": "integer"}}}


def schema(kind: type[Options]) -> dict[str, Any]:
    """Return the JSON Schema of recipes: one property an option."""
    found = {entry.keyword: _schema(entry) for entry in known(kind)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "A recipe of spacompiler", "type": "object", "properties": found,
            "required": ["target"], "additionalProperties": False}


def _schema(entry: Known) -> dict[str, Any]:
    made = dict(_SCHEMAS[entry.type])
    bounds = getattr(entry.about.check, "schema", {})
    if entry.repeatable:
        made["items"] = {**made["items"], **bounds}
        made = {"anyOf": [made, made["items"], {"type": "object"}]}
    elif entry.about.passes:
        made = {"anyOf": [made, {"type": "object", "maxProperties": 1}]}
    else:
        made |= bounds
    return {**made, "description": entry.about.help,
            **({} if entry.default in (None, (), "") or not isinstance(
                entry.default, (str, int, float, bool)) else {"default": entry.default})}
