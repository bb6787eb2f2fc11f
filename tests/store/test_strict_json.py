"""JSON of strangers: bounded, of the expected form, or one clear error."""

import os

import pytest

from spacompiler.errors import SpaError
from spacompiler.store import strict_json
from spacompiler.store.forms import FORMS, check_slices


@pytest.mark.parametrize("text", [
    "", "[", "{", '"', "[1", "nul", '{"a": 1, "a": 1}', "NaN", "-Infinity", "1e999", "[" * 65,
    "[" * 10**6, '{"a":' * 10**5, '"' + '\\"' * 10**5, "9" * 5000, '{"a": 1}x', "\\"])
def test_unsound_text_is_one_error(text):
    with pytest.raises(SpaError, match=r"^x.json cannot be read") as caught:
        strict_json.parse(text, object, "x.json", where="here", fix="do it again")
    assert caught.value.why and caught.value.where == "here" and caught.value.fix


def test_brackets_in_strings_are_no_depth():
    assert strict_json.parse('"' + "[" * 500 + '\\"' + "{" * 500 + '"', str, "x")


@pytest.mark.parametrize("data, form, wrong", [
    (True, int, "it is no int"), (True, float, "it is no float"), (1, float, ""),
    (1, bool, "it is no bool"), ([1, "a"], [int], "[1] is no int"),
    ({"a": {"b": 1}}, {"a": {"b": str}}, ".a.b is no str"),
    ({}, {"a": int}, "it lacks 'a'"), ({}, {"a?": int}, ""), ({"b": 1}, {"a?": int}, ""),
    (None, (None, str), ""), ("x", ("y", "x"), ""), ("z", ("y", "x"), "it is none of 'y', 'x'"),
    ({"k": 1}, {str: str}, "['k'] is no str"), ([], {str: str}, "it is no object"),
    ({}, [int], "it is no list"), ("any", object, ""), (True, object, "")])
def test_forms(data, form, wrong):
    found = strict_json.mismatch(data, form)
    assert found.startswith(wrong) and bool(found) == bool(wrong)


@pytest.mark.parametrize("file, data", [
    ("MANIFEST.json", {"files": {"a": {"sha256": "A" * 64, "bytes": 1}}}),
    ("plan.json", {"kept": {"g": [1, 1]}, "sizes": {}}),
    ("plan.json", {"kept": {"g": [[0, 1], [2, 1]]}, "sizes": {}}),
    ("plan.json", {"kept": {"g": [True]}, "sizes": {}}),
    ("model.safetensors.index.json", {"weight_map": {"a": "../b.safetensors"}}),
    ("model.safetensors.index.json", {"weight_map": {"a": "/b.safetensors"}}),
    ("adapter_config.json", [])])
def test_forms_of_an_artifact(file, data):
    assert strict_json.mismatch(data, FORMS[file])


def test_slices_must_fit_their_shapes():
    good = {"indices": {"0": [0, 2]}, "arrays": {"a": ["0", None], "b": "joint"},
            "shapes": {"a": [3, 4]}}
    check_slices(good, "here")
    for bad in ({"indices": {}}, {"shapes": {"a": [2, 4]}}, {"shapes": {"a": [3]}}):
        with pytest.raises(SpaError, match=r"slices.json cannot be read"):
            check_slices({**good, **bad}, "here")


def test_what_is_no_file_or_too_large_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", ".", "missing.json"):
        with pytest.raises(SpaError, match="cannot be read"):
            strict_json.read(tmp_path / name)
    (tmp_path / "x.json").write_text("[1, 2]")
    assert strict_json.read(tmp_path / "x.json", [int]) == [1, 2]
    monkeypatch.setattr(strict_json, "BYTES", 3)
    with pytest.raises(SpaError, match="cannot be read") as caught:
        strict_json.read(tmp_path / "x.json")
    assert "6 bytes" in caught.value.why
