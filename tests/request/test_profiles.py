"""Profiles: values of options that a runtime wants, and what cannot go together with it."""

import pytest

from spacompiler.errors import UsageError
from spacompiler.request.options import known
from spacompiler.request.profiles import PROFILES, profile, settled
from spacompiler.request.recipe import Recipe

DEFAULTS = {entry.name: entry.default for entry in known(Recipe)}


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_makes_a_recipe_that_stays_as_it_is(name):
    made = Recipe("body=60%", runtime=name)
    assert Recipe(**made.as_dict()) == made
    assert all(getattr(made, option) == value for option, value in profile(name).options.items())
    assert settled(name, vars(made), DEFAULTS) == {}


@pytest.mark.parametrize("name, given, wrong", [
    ("llama.cpp-q8", {"align": 64}, {"align": 8}), ("llama.cpp-k", {"align": 512}, {"align": 32}),
    ("llama.cpp-q8", {"gguf": "q4_0"}, {"gguf": "f16"}), ("llama.cpp", {"gguf": "bf16"},
                                                          {"gguf": "q8_0"}),
    ("ctranslate2", {"roles": ("channel",)}, {"roles": ("head",)}),
    ("vllm", {"layout": "uniform"}, {"layout": "any"})])
def test_given_values_hold_where_they_would_do(name, given, wrong):
    made = Recipe("body=60%", runtime=name, **given)
    assert all(getattr(made, option) == value for option, value in given.items())
    with pytest.raises(UsageError, match="cannot go together") as problem:
        Recipe("body=60%", runtime=name, **wrong)
    assert problem.value.code == 2


def test_quantised_files_want_whole_blocks():
    assert Recipe("body=60%", gguf="q8_0").align == 32
    assert Recipe("body=60%", gguf="f16").align is None
    with pytest.raises(UsageError, match="no multiple of 32"):
        Recipe("body=60%", gguf="q4_0", align=8)


@pytest.mark.parametrize("given, word", [
    ({"runtime": "llama.ccp"}, "llama.cpp"), ({"gguf": "q8"}, "q8_0"), ({"opset": 16}, "17 to 24")])
def test_unknown_names_are_usage_errors(given, word):
    with pytest.raises(UsageError) as problem:
        Recipe("body=60%", **given)
    assert word in str(problem.value)
