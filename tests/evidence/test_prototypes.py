"""Windows chosen by their distance to k-means centres, and at random."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spacompiler.errors import UsageError
from spacompiler.evidence.calibration import begins, from_string
from spacompiler.evidence.prototypes import by_prototype, distances
from spacompiler.pipeline.request import Windows


def test_distances_are_those_to_the_nearest_centre():
    """Three tight clusters, and one row that lies apart from the cluster it belongs to."""
    torch.manual_seed(0)
    middles = torch.eye(4)[:3] * 10
    rows = (middles.repeat_interleave(8, 0) + 0.01 * torch.randn(24, 4)).double()
    rows[5] = middles[0] + torch.tensor([0.0, 0.0, 0.0, 3.0])
    found = distances(rows, 3, seed=1)
    assert int(found.argmax()) == 5
    own = torch.stack([rows[8 * i:8 * i + 8].mean(0) for i in range(3)])
    torch.testing.assert_close(found, torch.cdist(rows, own).amin(1))


def test_typical_windows_come_first_or_last():
    """Windows of one token each way but for one, which mixes tokens of both."""
    table = torch.eye(6)
    ids = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [4, 5, 4, 5], [5, 5, 4, 4], [0, 1, 4, 2]])
    near = by_prototype(table, "near", 0)(ids)
    far = by_prototype(table, "far", 0)(ids)
    assert int(near[-1]) == int(far[0]) == 4 and sorted(near.tolist()) == list(range(5))


def test_calibration_takes_windows_in_the_order_that_is_asked_for():
    def tokenizer(text, **options):
        return SimpleNamespace(input_ids=torch.tensor([[int(w) for w in text.split()]]))

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 6, _weight=torch.eye(6))

        def get_input_embeddings(self):
            return self.table

    text = "0 0 1 1 1 0 0 1 4 5 4 5 5 5 4 4 0 1 4 2"
    taken = {}
    for choice in ("random", "near", "far"):
        windows = Windows(2, 4, 1, 0, choice)
        made = from_string(text, tokenizer, origin="text", order=windows.order(Words()),
                           **windows.drawn())
        taken[choice] = [tuple(k["input_ids"][0].tolist()) for _, k in made.batches]
        held = [tuple(k["input_ids"][0].tolist()) for _, k in made.held_out]
        assert len(set(taken[choice]) | set(held)) == 5  # what is held out is none of those read
    assert (0, 1, 4, 2) in taken["far"] and (0, 1, 4, 2) not in taken["near"]
    with pytest.raises(UsageError, match="cannot be chosen by near"):
        Windows(choice="near").order(nn.Linear(2, 2))


def test_windows_begin_as_the_tokenizer_begins_a_text():
    def tokenizer(text, *, add_special_tokens, **options):
        ids = [2] * add_special_tokens + [int(w) for w in text.split()] + [3] * add_special_tokens
        return SimpleNamespace(input_ids=torch.tensor([ids]))

    made = from_string("5 6 7 8 9 5 6", tokenizer, origin="text", samples=9, length=4, batch=9,
                       seed=0)
    assert begins(tokenizer, "5 6").tolist() == [2]
    assert sorted(made.batches[0][1]["input_ids"].tolist()) == [[2, 5, 6, 7], [2, 8, 9, 5]]
