"""One place for every option: what a field of a dataclass says of itself, beside its default.

From it follow the flag on the command line, the keyword in Python, the entry of a recipe, and the
line in docs/options.md.

>>> @dataclass(frozen=True)
... class Cake(Options):
...     eggs: int = option(3, "Dough", "Eggs that go in.", check=at_least(1, "eggs: one or more"))
>>> Cake.of({"eggs": 4}).as_dict()
{'eggs': 4}
>>> known(Cake)[0].flag
'--eggs'
"""

from __future__ import annotations

import operator
import reprlib
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar, get_type_hints

from ..errors import UsageError, did_you_mean

MAIN, GOES, QUALITY, DATA = "Options", "What goes", "Quality", "Data"
ADAPTERS, RECOVERY, EXPORTS, CHECKS = "Adapters", "Recovery", "Exports", "Checks"
DANGEROUS = "Dangerous (runs code of others)"
PANELS = (MAIN, GOES, QUALITY, DATA, ADAPTERS, RECOVERY, EXPORTS, CHECKS, DANGEROUS)
"""Headings of the help, in their order."""

Check = Callable[[Any], object]
"""Raises UsageError for a value, of the right type, that an option cannot have.

What it says of values in JSON Schema, if anything, is its attribute `schema`.
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class About:
    """What is said of an option beside its name, type and default.

    `flag` and `keyword` are its names on the command line and in Python where they are not the
    field's own; `passes` is the kind of pass that its value names. What is `recorded` stands in
    recipes alone: it is no flag and no keyword.
    """

    panel: str
    help: str
    flag: str = ""
    keyword: str = ""
    metavar: str = ""
    passes: str = ""
    check: Check | None = None
    recorded: bool = False


def option(default: T, panel: str, help: str, **more: Any) -> T:
    """Return a dataclass field: an option with a default. `more` are fields of `About`."""
    made: T = field(default=default, metadata={"about": About(panel, help, **more)})
    return made


def required(panel: str, help: str, **more: Any) -> Any:
    """Return a dataclass field: an option that has to be given."""
    return field(metadata={"about": About(panel, help, **more)})


@dataclass(frozen=True, slots=True)
class Known:
    """An option of a table: a field with its type, its default (or MISSING), and its words."""

    name: str
    type: object
    default: object
    about: About

    @property
    def keyword(self) -> str:
        """Its name in Python's calls."""
        return self.about.keyword or self.name

    @property
    def flag(self) -> str:
        """Its name on the command line; what is on by default has a second one that says no."""
        name = self.name.replace("_", "-")
        return self.about.flag or (f"--{name}/--no-{name}" if self.default is True else f"--{name}")

    @property
    def repeatable(self) -> bool:
        """Whether it is a list, given item by item on the command line."""
        return self.type in (tuple[str, ...], tuple[int, ...])


@dataclass(frozen=True)
class Options:
    """A table of options: its fields are made by `option`. Values are checked when it is made."""

    def __post_init__(self) -> None:
        table = known(type(self))
        for entry in table:
            object.__setattr__(self, entry.name, typed(entry, getattr(self, entry.name)))
        for entry in table:
            if entry.about.check is not None:
                entry.about.check(getattr(self, entry.name))

    @classmethod
    def of(cls, given: Mapping[str, object], beside: Iterable[str] = (),
           among: Collection[str] | None = None) -> Self:
        """Return the table with the values of some keywords.

        `among` are the keywords that the caller can use (None: all), and `beside` further ones that
        it takes itself.
        Raises UsageError for a keyword that is none, or for a value that cannot be.
        """
        names = {entry.keyword: entry.name for entry in spoken(cls)
                 if among is None or entry.keyword in among}
        for word in given:
            if word not in names:
                raise UsageError(f"there is no option {word!r}",
                                 fix=did_you_mean(word, {*names, *beside}))
        return cls(**{names[word]: value for word, value in given.items()})

    def as_dict(self) -> dict[str, Any]:
        """Return names and values as plain data."""
        return asdict(self)


def known(table: type[Options]) -> tuple[Known, ...]:
    """Return the options of a table, in the order of its fields."""
    types = get_type_hints(table)
    return tuple(Known(f.name, types[f.name], f.default, f.metadata["about"])
                 for f in fields(table))


def spoken(table: type[Options]) -> tuple[Known, ...]:
    """Return the options that are given by flags and keywords."""
    return tuple(entry for entry in known(table) if not entry.about.recorded)


def by_panel(options: Iterable[Known]) -> dict[str, list[Known]]:
    """Sort options under the headings of the help."""
    found: dict[str, list[Known]] = {panel: [] for panel in PANELS}
    for entry in options:
        found.setdefault(entry.about.panel, []).append(entry)
    return {panel: entries for panel, entries in found.items() if entries}


def listing(table: type[Options], indent: str) -> str:
    """Return keywords with their defaults and what they say, as lines of a docstring."""
    return "\n".join(
        textwrap.fill(f"{entry.keyword}: {entry.about.help}" + (
            "" if entry.default in (MISSING, "", None, ()) else f" [{entry.default!r}]"),
            100, initial_indent=indent, subsequent_indent=indent + "    ")
        for entry in spoken(table))


# --- values -------------------------------------------------------------------------------------


_TYPES: Mapping[object, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    int: ((int,), "a whole number"),
    int | None: ((int, type(None)), "a whole number or None"),
    float: ((float, int), "a number"),
    bool: ((bool,), "True or False"),
    tuple[str, ...]: ((tuple,), "a list of texts"),
    tuple[int, ...]: ((tuple,), "a list of whole numbers"),
    str | None: ((str, type(None)), "text or None"),
    Path | None: ((Path, type(None)), "a path or None"),
}
_ITEMS: Mapping[object, type] = {tuple[str, ...]: str, tuple[int, ...]: int}


def typed(entry: Known, value: object) -> object:
    """Return a value of the option's type: one text alone is a list of one, an index an int, and
    a mapping a list of `key=value`.

    Raises UsageError for any other type.
    """
    item = _ITEMS.get(entry.type)
    if item is str and isinstance(value, Mapping):
        value = tuple(f"{key}={each}" for key, each in value.items())
    if item is not None and isinstance(value, (str, list, tuple)):
        value = (value,) if isinstance(value, str) else tuple(value)
    if entry.type in (int, int | None) and hasattr(value, "__index__") \
            and not isinstance(value, bool):
        value = operator.index(value)
    if entry.type == Path | None and isinstance(value, str):
        value = Path(value)
    types, words = _TYPES[entry.type]
    fits = isinstance(value, types) and (entry.type is bool or not isinstance(value, bool))
    if fits and item is not None and isinstance(value, tuple):
        fits = all(isinstance(v, item) for v in value)
    if not fits:
        raise UsageError(f"{entry.name} must be {words}, not {reprlib.repr(value)}",
                         fix=f"{entry.name} is this: {entry.about.help}")
    return value


@dataclass(frozen=True)
class _AtLeast:
    least: int
    words: str

    @property
    def schema(self) -> dict[str, object]:
        """The same in JSON Schema."""
        return {"minimum": self.least}

    def __call__(self, value: float | Sequence[float] | None) -> None:
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and each < self.least:
                raise UsageError(self.words.format(value=each))


@dataclass(frozen=True)
class _OneOf:
    words: Collection[str]
    what: str

    @property
    def schema(self) -> dict[str, object]:
        """The same in JSON Schema."""
        return {"enum": list(self.words)}

    def __call__(self, value: str | tuple[str, ...]) -> None:
        for each in (value,) if isinstance(value, str) else value:
            if each not in self.words:
                raise UsageError(f"unknown {self.what} {each!r}",
                                 fix=did_you_mean(each, self.words))


def at_least(least: int, words: str) -> Check:
    """Return a check of numbers, or of each number of a list; `{value}` in the words is it."""
    return _AtLeast(least, words)


def one_of(words: Collection[str], what: str) -> Check:
    """Return a check of a text, or of each text of a list, against the words that there are."""
    return _OneOf(words, what)
