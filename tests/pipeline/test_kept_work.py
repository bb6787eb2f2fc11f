"""`--work DIR`: a compile that was killed goes on from what it had finished, to the same bytes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.scores import Scores
from spacompiler.pipeline import run
from spacompiler.repair.repairer import Repairer
from spacompiler.store.work import FACTS, Work
from spacompiler.train.checkpoint import FILE

BATCHES = [(torch.randn(4, 12, generator=torch.Generator().manual_seed(i)),) for i in range(3)]


def made(out, work=None, **more):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(),
                        nn.Linear(24, 3))
    spacompiler.compile(net, BATCHES[0], out=out, work=work, **{
        "target": "params=60%", "align": 1, "latency": False, "onnx": False, "repair": "refit",
        "calibration": BATCHES, "quiet": True, **more})
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made(tmp_path_factory.mktemp("plain") / "out")


class Killed(BaseException):
    """What a signal would do."""


def killed(*_, **__):
    raise Killed


def killed_at(monkeypatch, place, name, tmp_path, after=0, **more):
    """Compile, killed when something is called once more than `after` times."""
    real, calls = getattr(place, name), []

    def called(*args, **kwargs):
        calls.append(1)
        return killed() if len(calls) > after else real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, name, called)
        made(tmp_path / "never", tmp_path / "work", **more)
    assert not (tmp_path / "never").exists()


def test_a_killed_compile_goes_on_to_the_same_bytes(tmp_path, plain, monkeypatch):
    killed_at(monkeypatch, run, "decide", tmp_path)
    monkeypatch.setattr(Scores, "calibrate", killed)  # scores and statistics are kept
    killed_at(monkeypatch, Repairer, "_mended", tmp_path, after=1)
    solved, real = [], Repairer._mended
    monkeypatch.setattr(Repairer, "_mended", lambda self, site, *rest, **more: (
        solved.append(site), real(self, site, *rest, **more))[1])
    assert made(tmp_path / "out", tmp_path / "work") == plain
    assert len(solved) == 1  # the other layer's was kept
    monkeypatch.setattr(Repairer, "_mended", killed)
    assert made(tmp_path / "again", tmp_path / "work") == plain


def test_what_is_damaged_is_made_again_and_said(tmp_path, plain, monkeypatch):
    work = tmp_path / "work"
    killed_at(monkeypatch, run.finish, "repair", tmp_path)
    damaged = sorted(p for p in work.iterdir() if p.name not in (FACTS, "scores.safetensors"))
    for place in damaged:
        data = bytearray(place.read_bytes())
        data[-1] ^= 1
        place.write_bytes(data)
    (work / "counts.safetensors").write_bytes(b"nothing")
    found = made(tmp_path / "out", work)
    notes = json.loads(found["report.json"])["notes"]
    assert any("counts.safetensors of the kept work is damaged" in note for note in notes)
    assert {n: b for n, b in found.items() if n.endswith((".safetensors", "plan.json"))} == \
        {n: b for n, b in plain.items() if n.endswith((".safetensors", "plan.json"))}


def test_the_work_of_another_compile_is_refused(tmp_path, monkeypatch):
    killed_at(monkeypatch, run, "decide", tmp_path)
    for more, what in (({"target": "params=50%"}, "recipe"), ({"calibration": BATCHES[:2]}, "data"),
                       ({"importance": "magnitude", "repair": "none"}, "passes, recipe")):
        with pytest.raises(UsageError, match="of another compile") as problem:
            made(tmp_path / "out", tmp_path / "work", **more)
        assert what in problem.value.why
    (tmp_path / "work" / FACTS).write_text("{")
    with pytest.raises(SpaError, match="cannot be read"):
        made(tmp_path / "out", tmp_path / "work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds other files"):
        made(tmp_path / "out", tmp_path / "other")


def test_work_is_one_compiles_at_a_time(tmp_path):
    first = Work(tmp_path / "work", {"a": "b"})
    with pytest.raises(UsageError, match="is being worked in"):
        Work(tmp_path / "work", {"a": "b"})
    first.write("a/b", [(("x", 1), [torch.ones(2)])])
    first.close()
    again = Work(tmp_path / "work", {"a": "b"})
    ((key, (value,)),) = again.read("a/b")
    assert key == ("x", 1) and torch.equal(value, torch.ones(2)) and again.read("c") is None
    again.close()


@pytest.mark.parametrize("work, why", [
    ("out", "appears as a whole"), ("out/x", "appears as a whole"), ("file", "is a file"),
    ("file/x", "is a file")])
def test_a_place_that_cannot_be_is_refused_before_work_begins(tmp_path, work, why):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="work") as caught:
        spacompiler.compile("zoo:mlp", target="params=60%", importance="magnitude", onnx=False,
                            latency=False, out=tmp_path / "out", work=tmp_path / work)
    assert why in caught.value.why and not (tmp_path / "out").exists()


def test_facts_that_are_no_object_are_one_error(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "work.json").write_text("[]")
    with pytest.raises(SpaError, match="kept work cannot be read"):
        spacompiler.compile("zoo:mlp", target="params=60%", importance="magnitude", onnx=False,
                            latency=False, out=tmp_path / "out", work=tmp_path / "work")


def test_a_choice_of_windows_without_a_text_is_refused():
    with pytest.raises(UsageError, match="choice has nothing to act on"):
        spacompiler.compile("zoo:mlp", target="params=60%", importance="magnitude", choice="near",
                            onnx=False, latency=False)


def test_a_checkpoint_that_is_damaged_is_made_again(tmp_path):
    """One bit of it, which safetensors does not see."""
    more = {"importance": "magnitude", "repair": "none", "recovery": "norms(accumulate=1)",
            "calibration": None, "recover_data": BATCHES}
    want = made(tmp_path / "first", tmp_path / "work", **more)
    place = tmp_path / "work" / "training" / FILE
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    found = made(tmp_path / "out", tmp_path / "work", **more)
    assert any("training began anew" in n for n in json.loads(found["report.json"])["notes"])
    assert found["model.safetensors"] == want["model.safetensors"]


@pytest.mark.parametrize("change", ["data", "weights"])
def test_a_checkpoint_belongs_to_its_data_and_weights(tmp_path, change):
    """Of the same shapes, and from the same place."""
    def trained(data, repair):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
        spacompiler.compile(net, BATCHES[0], target="params~60%", align=1, latency=False,
                            onnx=False, prove=False, importance="magnitude", repair=repair,
                            calibration=BATCHES, recovery="norms", recover_data=data,
                            checkpoint=tmp_path, quiet=True)

    trained(BATCHES, "bias")
    with pytest.raises(SpaError, match="of another run"):
        trained(BATCHES[::-1] if change == "data" else BATCHES,
                "none" if change == "weights" else "bias")
