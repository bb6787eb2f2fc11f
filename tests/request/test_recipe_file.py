"""Recipes as files: read within bounds, mistakes told with their line, written and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spacompiler.errors import UsageError
from spacompiler.request import recipe_file
from spacompiler.request.options import known
from spacompiler.request.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs"
GALLERY = sorted((DOCS / "recipes").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    """Write a recipe and return its path."""
    def make(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return path
    return make


@pytest.mark.parametrize("text, what, where", [
    ("target: params=70%\ntarge: 1\n", "no option 'targe'", "line 2"),
    ("target: params=70%\n\nfloor: a\n", "floor must be a number", "line 3"),
    ("target: params=70%\nfloor: 2\n", "floor must be a share", "line 3"[:4]),
    ("target: params=70%\nroles: [chanel]\n", "unknown role 'chanel'", "line 2"),
    ("target: params=70%\ntarget: params=60%\n", "stands there twice", "line 2"),
    ("target: 70\n", "target must be text", "line 1"),
    ("target: body=0%\n", "out of range", "r.yaml"),
    ("roles: [channel]\n", "no target", ""),
    ("- a\n- b\n", "no list of options", ""),
    ("target: [params=70%\n", "no YAML", "line 2"),
    ("target: params=70%\nonly: &x [a]\nignore: *x\n", "no YAML", "line 2"),
    ("target: !!python/object/apply:os.system [ls]\n", "no YAML", "line 1"),
    ("target: params=70%\nonly: " + "[" * 2000 + "]" * 2000 + "\n", "no YAML", "line 2"),
    ("target: params=70%\ntrust_remote_code: true\n", "no option", "line 2"),
    ("target: params=70%\nimportance: mine.py:Mine\n", "names code", "line 2"),
    ("target: params=70%\nmodel: nets:make\n", "names code", "line 2"),
    ("target: params=70%\nrecover_samples: 3\n", "nothing to act on", "r.yaml"),
])
def test_a_mistake_is_told_with_its_line(file, text, what, where):
    with pytest.raises(UsageError, match=what) as problem:
        Recipe.read(file(text))
    assert where in problem.value.where


def test_a_suggestion_is_made(file):
    with pytest.raises(UsageError) as problem:
        Recipe.read(file("target: params=70%\ncalibraton: none\n"))
    assert "did you mean 'calibration'?" in problem.value.fix


def test_large_and_missing_files_are_one_error(file, tmp_path):
    for path, why in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "no such file"),
                      (file("#" * (recipe_file.BYTES + 1)), "more than 1,048,576 bytes")):
        with pytest.raises(UsageError, match="cannot be read") as told:
            Recipe.read(path)
        assert why in (told.value.why or "")


def test_code_runs_where_the_caller_names_it_again(file):
    path = file("target: params=70%\nimportance: mine.py:Mine\nmodel: nets:make\n")
    made = Recipe.read(path, importance="mine.py:Mine", model="nets:make")
    assert made.importance == "mine.py:Mine" and made.model == "nets:make"


def test_passes_are_texts_or_mappings_and_numbers_are_numbers(file):
    made = Recipe.read(file("target: params=70%\nimportance: {wanda: {norm: 1}}\n"
                            "recovery: {lora: {lr: 2e-3, init: eva}}\n"))
    assert made.importance == "wanda(norm=1)" and made.recovery == "lora(lr=0.002, init='eva')"


def test_files_beside_the_recipe_are_found(file, tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    made = Recipe.read(file("target: params=70%\ncalibration: text.txt\nadapter: [there=0.5]\n"))
    assert made.calibration == str(tmp_path / "text.txt") and made.adapters == ("there=0.5",)


def test_keywords_replace_what_a_recipe_says(file):
    path = file("target: params=70%\nfloor: 0.2\nlanes: 8\nautomatic: [importance, repair]\n"
                "hashes: {calibration: ab, adapters.0: cd}\nimportance: wanda\n")
    made = Recipe.read(path, target="macs=50%", importance="magnitude", calibration="none",
                       align=2)
    assert (made.target, made.floor, made.importance) == ("macs=50%", 0.2, "magnitude")
    assert made.automatic == () and made.repair == "auto" and made.hashes == ("adapters.0=cd",)
    assert Recipe.read(path, target="macs=50%").automatic == ("importance", "repair")
    assert (made.align, made.lanes) == (2, None)
    with pytest.raises(UsageError, match="no option 'targ'"):
        Recipe.read(path, targ=1)


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_written_is_read_again(file, whole):
    made = Recipe("params~70%", importance="taylor(per='batch')", roles=("head", "head dim"),
                  only=["a: b", "*.w#"], align=4, calibration="ü.txt", hashes=["calibration=ab"],
                  automatic=("repair",), model="zoo:mlp", blocks="4", seed=3)
    assert Recipe.read(file(recipe_file.text(made, whole=whole))) == made


@pytest.mark.parametrize("path", GALLERY, ids=lambda p: p.stem)
def test_recipes_of_the_gallery_fit_the_schema(path):
    made = Recipe.read(path)
    words = {e.name: e.keyword for e in known(Recipe)}
    given = {words[k]: v for k, v in made.as_dict().items()}
    properties = json.loads((DOCS / "recipe.schema.json").read_text())["properties"]
    assert given.keys() == properties.keys()
    assert path.stem in (DOCS / "recipes" / "README.md").read_text()
