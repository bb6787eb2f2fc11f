"""What may be aimed at, and wished for single layers: read from text, or one error."""

from __future__ import annotations

import pytest

from spacompiler.errors import UsageError
from spacompiler.request.recipe import Recipe
from spacompiler.request.targets import Target, parse_target, parse_targets
from spacompiler.request.wishes import Wish, parse_wish


@pytest.mark.parametrize("text, found", [
    ("params=70%", (Target("params", 0.7),)),
    ("macs~0.5", (Target("macs", 0.5, nearest=True),)),
    ("params=1.5M", (Target("params", 1.5e6, absolute=True),)),
    ("bytes=80MB", (Target("bytes", 80e6, absolute=True),)),
    ("memory@4x4096=2GiB", (Target("memory", 2**31, True, batch=4, length=4096),)),
    ("memory=300MB", (Target("memory", 300e6, True, length=2048),)),
    ("latency=12ms", (Target("latency", 12.0, True, length=128),)),
    ("latency@1x64=0.5s,params=60%", (Target("latency", 500.0, True, length=64),
                                      Target("params", 0.6))),
    (" active = 50% ", (Target("active", 0.5),))])
def test_targets_are_shares_and_amounts(text, found):
    assert parse_targets(text) == found
    assert Recipe(text).target == text


@pytest.mark.parametrize("text, what", [
    ("params=12ms", "unknown unit 'ms'"), ("latncy=12ms", "unknown metric"), ("params", "cannot"),
    ("params=70%,params=60%", "twice"), ("params@1x2=70%", "has a shape"), ("params=100%", "range"),
    ("bytes=0MB", "range"), ("latency=.ms", "cannot"), ("params=70%,", "cannot"), (0.5, "text")])
def test_what_is_no_target_is_one_error(text, what):
    with pytest.raises(UsageError, match=what):
        parse_targets(text)


def test_ways_that_go_by_one_share_say_so():
    for text in ("params=70%,macs=60%", "bytes=1MB", "latency=60%"):
        with pytest.raises(UsageError, match="not one share"):
            parse_target(text)


@pytest.mark.parametrize("text, wish, left", [
    ("a=100%", Wish("a", "share", 1.0), (32,)), ("*.w:0=0.5", Wish("*.w:0", "share", 0.5), (16,)),
    ("a>=60%", Wish("a", "least", 0.6), (24, 32)), ("a=>=60%", Wish("a", "least", 0.6), (24, 32)),
    ("a=x16", Wish("a", "multiple", 16.0), (16, 32))])
def test_wishes_leave_counts(text, wish, left):
    assert parse_wish(text) == wish and wish.of((8, 16, 24, 32), 32) == left


@pytest.mark.parametrize("text", ["a", "a=", "=50%", "a=0%", "a=120%", "a=x0", "a=x1.5", "a=x8%"])
def test_what_is_no_wish_is_one_error(text):
    with pytest.raises(UsageError, match="wish"):
        Recipe("params=50%", keep=text)


def test_wishes_are_given_as_a_dict_too():
    assert Recipe("params=50%", keep={"*mlp*": 0.5, "*attn*": ">=30%"}).keep == (
        "*mlp*=0.5", "*attn*=>=30%")
