"""The page of systems: its rows are whole, its commands are understood, the quick ones are run."""

import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

import spacompiler.api
from spacompiler.cli.main import app
from spacompiler.models_zoo import load
from spacompiler.pipeline.analyse import analyse
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.run import DRY_STAGES, Walk, carry_on
from spacompiler.request import registry

ROOT = Path(__file__).parents[2]


def benchmark():
    path = ROOT / "benchmarks/systems.py"
    spec = importlib.util.spec_from_file_location("systems_benchmark", path)
    module = sys.modules["systems_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = benchmark()
SYSTEMS = BENCHMARK.systems()
COMMANDS = list(dict.fromkeys(words for s in SYSTEMS for words in s.commands))
COMMAND = typer.main.get_command(app)
COMPILES = [words for words in COMMANDS if words[:2] == ("spacompiler", "compile")]


def test_every_system_has_a_command_or_a_reason():
    assert [s.number for s in SYSTEMS] == list(range(1, 65))
    for system in SYSTEMS:
        assert system.commands or "not yet" in system.stands or "out of kind: " in system.stands


def recipes(monkeypatch, words):
    """What a command asks for, found by the command line itself."""
    asked = []

    def seen(model, *, recipe, **errand):
        asked.append((model, recipe))
        raise SystemExit(0)

    monkeypatch.setattr(spacompiler.api, "compile", seen)
    with pytest.raises(SystemExit) as done:
        COMMAND.main(list(words[1:]))
    assert asked and not done.value.code, shlex.join(words)
    return asked[0]


def test_the_words_of_commands_are_understood(monkeypatch):
    for words in COMPILES:
        _, recipe = recipes(monkeypatch, words)
        for kind in registry.KINDS:
            name = getattr(recipe, "repair" if kind == "compensation" else kind)
            if name not in ("", "auto", "none"):
                registry.find(kind, name)


def test_tests_that_are_named_are_there():
    named = [words for words in COMMANDS if "pytest" in words]
    assert named
    for words in named:
        text = "".join((ROOT / path).read_text(encoding="utf-8")
                       for path in (words[4], "tests/help/made_adapters.py"))  # names of cases
        for word in re.findall(r"[\w-]+", words[6]):
            assert word in ("and", "or") or word in text, (words, word)


@pytest.mark.parametrize("model", ["zoo:llama-gqa", "zoo:resnet"])
def test_plans_of_what_needs_no_training_are_made(model, monkeypatch, tmp_path):
    """One trace serves all: from scores to the plan, and some in as many words."""
    module, inputs = load(model.partition(":")[2]).build()
    traced, plans = None, {}
    for words in COMPILES:
        name, recipe = recipes(monkeypatch, words)
        if name != model or recipe.recovery or recipe.schedule:
            continue
        recipe = replace(recipe, repair="none")
        ask, subject = make_request(module, inputs, recipe, Given(
            **{w: getattr(recipe, w) for w in ("importance", "allocation", "repair")},
            calibration=BENCHMARK.tokens(tmp_path) if "tokens" in recipe.calibration
                           else recipe.calibration or None))
        if traced is None:
            ask, subject, traced = analyse(ask, subject)
        do = Walk(ask, subject, DRY_STAGES).knowing(ask, traced)
        made = carry_on(do, subject, traced, dry_run=True)
        metric = re.split("[=~]", recipe.target)[0]
        cost = made.plan.costs[metric]
        assert cost["pruned"] <= 0.85 * cost["dense"], shlex.join(words)
        plans[words] = str(made.plan.kept)
    assert len(set(plans.values())) > len(plans) / 2, "criteria differ"
