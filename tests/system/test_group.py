"""Several processes: what a launcher says, what they say to each other, sums in one order."""

from __future__ import annotations

import pytest
import torch
from threads import in_threads
from typer.testing import CliRunner

from spacompiler.cli.main import app
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.statistics import Fluctuation
from spacompiler.evidence.turns import Sums, Turns
from spacompiler.system.group import Team
from spacompiler.system.launched import launched
from spacompiler.system.messages import decoded, encoded

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("said, found", [
    ({}, None), ({"RANK": "3"}, None), ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    ({"RANK": "1", "WORLD_SIZE": "2", **MEET}, (1, 2)),
])
def test_what_a_launcher_says_is_read(said, found):
    assert launched(said) == found


@pytest.mark.parametrize("said, why", [
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT is not set"),
    ({"WORLD_SIZE": "2", **MEET}, "RANK is not set"),
    ({"RANK": "2", "WORLD_SIZE": "2", **MEET}, "below WORLD_SIZE"),
    ({"RANK": "x", "WORLD_SIZE": "2", **MEET}, "below WORLD_SIZE"),
])
def test_processes_that_cannot_meet_are_refused(said, why):
    with pytest.raises(UsageError) as problem:
        launched(said)
    assert why in problem.value.why and "torchrun" in problem.value.fix


def test_the_command_line_refuses_ranks_without_a_meeting_place(tmp_path):
    for command in (["compile", "zoo:mlp", "--target", "macs=60%", "--out", str(tmp_path / "out")],
                    ["sweep", "zoo:mlp"]):
        done = CliRunner().invoke(app, command, env={"RANK": "0", "WORLD_SIZE": "2"})
        assert done.exit_code == 2 and "where they meet" in done.stderr
    assert not (tmp_path / "out").exists()


def test_messages_come_out_as_they_went_in():
    arrays = [torch.arange(6).reshape(2, 3), torch.tensor(2.5, dtype=torch.bfloat16),
              torch.zeros(0, 4), torch.tensor([True, False])]
    key = ("sums", ("a", "b", ("w", 0, "producer")))
    (found, got), (other, none) = decoded(encoded([(key, arrays), (7, [])]))
    assert (found, other, none) == (key, 7, [])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(arrays, got, strict=True))


@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_sums_have_the_bits_of_one_process(size):
    batches = [torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(7)]

    def work(team):
        turns, spread = Turns(team), Fluctuation()
        sums = Sums("sums", turns, lambda value: value.double())

        class Home:
            def take(self, key, *parts):
                spread.take(*parts)

        home = Home()
        turns.home("spread", home.take)
        for i, batch in enumerate(turns.own(batches)):
            if batch[0, 0, 0] > 0:  # as an expert that not every batch reaches
                sums.gather(("a", i % 1), batch.sum(1) / 3)
            turns.give("spread", "", *spread.of(batch, 2, None))
            turns.done()
        turns.finish()
        return sums["a", 0], spread.mean, spread.value

    alone = work(Team())
    for found in in_threads(size, work):
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_processes_that_decide_otherwise_are_told():
    def work(team):
        team.agree("same", "it")
        with pytest.raises(SpaError, match="do not agree on the plan"):
            team.agree(f"plan {team.rank}", "the plan")
        return team.of_first(lambda: {"rank": team.rank}, "times")

    assert in_threads(2, work) == [{"rank": 0}] * 2


@pytest.mark.parametrize("said", ["abc", "nan", "0", "-3"])
def test_patience_is_a_number_of_seconds(said):
    from spacompiler.system.group import SILENCE, _patience

    assert _patience("") == SILENCE and _patience("9.5") == 9.5
    with pytest.raises(UsageError, match="SPACOMPILER_SILENCE"):
        _patience(said)
