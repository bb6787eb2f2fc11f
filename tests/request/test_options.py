"""Options are written once: command line, Python, recipes and docs/options.md follow the table."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import spacompiler
from spacompiler import api
from spacompiler.cli import compile as writing
from spacompiler.cli.main import app
from spacompiler.cli.options import Panels, taking
from spacompiler.errors import UsageError
from spacompiler.request.options import (
    DANGEROUS,
    DATA,
    MAIN,
    PANELS,
    Options,
    at_least,
    by_panel,
    known,
    one_of,
    option,
    spoken,
)
from spacompiler.request.recipe import Errand, Recipe

ROOT = Path(__file__).parents[2]
RUN = CliRunner()
TABLES = [entry for table in (Recipe, Errand) for entry in spoken(table)]


@dataclass(frozen=True)
class More(Recipe):
    """A recipe with two options besides."""

    spoons: int = option(3, DATA, "Spoons in the drawer.",
                         check=at_least(1, "spoons: one or more, not {value}"))
    forks: tuple[str, ...] = option((), DATA, "Forks.", flag="--fork")


def flags(entry):
    return entry.flag.split("/")


def panels(*command):
    """The headings of a help page, each with its text."""
    shown = RUN.invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    found, heading = {}, ""
    for line in shown.stdout.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line[:-1]
        found[heading] = found.get(heading, "") + line + "\n"
    return found


# --- one field is an option everywhere ----------------------------------------------------------


@pytest.fixture
def more(monkeypatch):
    """The program as it is where the table has two more fields."""
    for place in (api, writing):
        monkeypatch.setattr(place, "Recipe", More)
    made = typer.Typer(rich_markup_mode=None)
    made.command(cls=Panels)(taking(More, Errand)(inspect.unwrap(writing.compile)))
    return made


def test_a_field_that_is_added_is_an_option_of_everything(more, tmp_path):
    shown = RUN.invoke(more, ["--help"]).stdout
    assert "--spoons <int>" in shown and "Spoons in the drawer.  [default: 3]" in shown
    done = RUN.invoke(more, ["zoo:mlp", "--target", "macs=60%", "--importance", "magnitude",
                             "--align", "1", "--no-onnx", "--out", str(tmp_path / "out"),
                             "--spoons", "5", "--fork", "a", "--fork", "b"])
    assert done.exit_code == 0, done.stderr
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["spoons"] == 5 and recipe["forks"] == ["a", "b"]
    done = RUN.invoke(more, ["zoo:mlp", "--target", "macs=60%", "--dry-run", "--spoons", "0"])
    assert done.exit_code == 2 and "spoons: one or more, not 0" in done.stderr


def test_a_field_that_is_added_is_a_keyword_of_the_api(monkeypatch):
    monkeypatch.setattr(api, "Recipe", More)
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    asked = {"target": "params=60%", "importance": "magnitude", "align": 1, "dry_run": True}
    found = spacompiler.compile(net, (torch.randn(4, 12),), spoons=4, forks="a", **asked)
    assert found.job.recipe.as_dict()["spoons"] == 4 and found.job.recipe.forks == ("a",)
    with pytest.raises(UsageError, match="no option 'spoon'") as problem:
        spacompiler.compile(net, (torch.randn(4, 12),), spoon=4, **asked)
    assert "did you mean 'spoons'?" in problem.value.fix


# --- the table and what follows it --------------------------------------------------------------


@pytest.mark.parametrize("entry", TABLES, ids=lambda e: e.name)
def test_an_option_has_a_heading_and_words_and_stands_in_the_help(entry):
    assert entry.about.panel in PANELS and entry.about.help.endswith(".")
    text = panels("compile")[entry.about.panel]
    assert all(flag in text.split() for flag in flags(entry))


def test_what_the_api_spells_out_is_in_the_table_or_said_beside_it():
    words = {entry.keyword: entry.default for entry in TABLES}
    public = inspect.signature(spacompiler.compile).parameters
    for name, parameter in public.items():
        assert f"{name}: " in spacompiler.compile.__doc__ or name == "options"
        if name in words and words[name] not in ("", ()) and name != "target":
            assert parameter.default == words[name], name
    assert set(public) - set(words) == {
        "model", "example_inputs", "recipe", "loss", "tokenizer", "name", "progress", "quiet",
        "options"}
    assert {entry.keyword for entry in known(Errand)} <= set(public)


def test_the_docstring_lists_every_option():
    for entry in TABLES:
        assert f"\n        {entry.keyword}: " in spacompiler.compile.__doc__, entry.keyword


def test_the_page_of_options_is_what_the_table_says():
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_options.py", "--check"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_are_used_once():
    for names in ([f for e in TABLES for f in flags(e)], [e.keyword for e in TABLES]):
        assert len(names) == len(set(names))


def test_options_that_a_pruner_cannot_use_are_refused():
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    with pytest.raises(UsageError, match="no option 'samples'"):
        spacompiler.Pruner(net, (torch.randn(4, 12),), target="params=60%", samples=4)


# --- checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("check, good, bad", [
    (at_least(2, "no"), [2, None, (2, 3)], [1, (2, 1)]),
    (one_of(("a", "b"), "letter"), ["a", ("a", "b"), ()], ["c", ("a", "c")])])
def test_checks_hold_for_values_and_for_each_of_a_list(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(UsageError):
            check(value)


def test_options_under_unknown_headings_are_not_lost():
    entry = known(More)[0]
    odd = replace(entry, about=replace(entry.about, panel="Odd"))
    assert list(by_panel([odd, entry])) == [MAIN, "Odd"]
    assert issubclass(More, Options)


# --- the program --------------------------------------------------------------------------------


def test_help_stands_under_headings_and_foreign_code_comes_last():
    for command, flag in (("compile", "--trust-remote-code"), ("inspect", "--trust-remote-code"),
                          ("verify", "--source"), ("bench", "--source")):
        found = panels(command)
        assert list(found)[-1] == DANGEROUS and flag in found[DANGEROUS]
        assert flag not in found[MAIN]
    assert list(panels("compile"))[2:] == list(PANELS)


def test_a_bare_call_prints_the_help_and_the_version_is_told():
    bare, asked = RUN.invoke(app, []), RUN.invoke(app, ["--help"])
    assert bare.exit_code == 0 and bare.stdout.strip() == asked.stdout.strip()
    assert "compile" in bare.stdout
    version = RUN.invoke(app, ["--version"])
    assert (version.exit_code, version.stdout) == (0, f"spacompiler {spacompiler.__version__}\n")


@pytest.mark.parametrize("arguments, code", [
    (["compile", "--help"], 0), (["--version"], 0), ([], 0),
    (["compile", "zoo:mlp", "--target", "params=0%", "--dry-run"], 2),
    (["compile", "zoo:mlp", "--target", "params=50%", "--floor", "2", "--dry-run"], 2),
    (["compile", "zoo:mlp", "--target", "params=50%", "--repair", "refitt", "--dry-run"], 2),
    (["compile", "zoo:mlp", "--target", "params=50%"], 2),
    (["bench", "nowhere.onnx", "--batch", "0"], 2)])
def test_help_and_early_errors_bring_no_framework(arguments, code):
    script = ("import sys\nfrom spacompiler.cli.main import main\n"
              f"sys.argv = ['spacompiler', *{arguments!r}]\n"
              "try: main()\nexcept SystemExit as e: code = e.code or 0\n"
              "brought = {'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
              "assert not brought, brought\nsys.exit(code)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "AssertionError" not in done.stderr


def test_a_table_is_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    lines = RUN.invoke(app, ["passes"]).stdout.splitlines()
    assert max(map(len, lines)) == 70
    monkeypatch.delenv("COLUMNS")
    lines = RUN.invoke(app, ["passes"]).stdout.splitlines()
    assert max(map(len, lines)) == 80


def test_a_value_of_another_type_is_told_what_the_option_is_for():
    with pytest.raises(UsageError) as told:
        spacompiler.compile(nn.Linear(8, 8), target="params=50%",
                            inputs={"x": torch.zeros(64, 64)})
    assert "example_inputs" in str(told.value)
    assert len(str(told.value)) < 400
