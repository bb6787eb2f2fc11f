"""Covariances that do not fit into memory lie in files; nothing that follows from them differs."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spacompiler.evidence import room
from spacompiler.evidence.room import Room
from spacompiler.models_zoo import load
from spacompiler.pipeline.analyse import analyse
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.score import score
from spacompiler.request import registry
from spacompiler.request.recipe import Recipe


def test_what_does_not_fit_lies_in_a_file_that_vanishes(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "LIMIT", 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept, value = Room(), torch.randn(3, 4)
    one, other = kept.take(value), kept.take(value)
    assert (kept.held, kept.filed) == (96, 96)
    assert torch.equal(one, other.add_(value).sub_(value.double()))
    assert not list(tmp_path.iterdir()), "its file has no name any more"
    del one, other
    gc.collect()
    assert (kept.held, kept.filed) == (0, 0)


def test_scores_from_files_are_those_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = load("llama-gqa").build()
    ask, subject, traced = analyse(*make_request(module, inputs, Recipe("params=80%"), Given(
        calibration=[inputs, inputs], owned=True)))
    ask = replace(ask, importance=registry.find("importance", "curvature"))
    within = score(ask, subject, traced)
    monkeypatch.setattr(room, "LIMIT", 0)
    filed = score(ask, subject, traced)
    assert filed.context.room.filed and not filed.context.room.held
    assert within.context.room.held and not within.context.room.filed
    assert all((within.scores[n] == filed.scores[n]).all() for n in within.scores)
