"""Search: several limits at once, never worse than where it starts, one pass a candidate."""

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError
from spacompiler.passes.once_for_all import OnceForAll
from spacompiler.passes.search import Search
from spacompiler.trials.measure import Measure

QUICK = Search(generations=3, offspring=6, batches=2)
OPTIONS = {"align": 1, "importance": "taylor", "onnx": False, "latency": False, "prove": False}


class Net(nn.Module):
    """Early convolutions hold the multiplications, late layers the parameters."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 20, 3, stride=4)
        self.up, self.more, self.out = nn.Linear(80, 90), nn.Linear(90, 70), nn.Linear(70, 6)

    def forward(self, x):
        y = self.two(self.one(x).relu()).relu().flatten(1)
        return self.out(self.more(self.up(y).relu()).relu())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
    return made


IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))
DATA = [(x,) for x in IMAGES.split(16)]


def compiled(net, target, allocation, **more):
    return spacompiler.compile(net, (DATA[0][0][:4],), target=target, allocation=allocation,
                               calibration=DATA, **{**OPTIONS, **more})


def shares(result):
    return {m: c["pruned"] / c["dense"] for m, c in result.plan.costs.items()}


def test_two_limits_are_met_at_once(net):
    """One ranking meets one of them and leaves the other unused."""
    one = shares(compiled(net, "params=50%,macs=50%", "global"))
    both = shares(compiled(net, "params=50%,macs=50%", QUICK))
    assert min(one["params"], one["macs"]) < 0.47
    assert all(0.47 <= both[m] <= 0.51 for m in ("params", "macs"))


@pytest.mark.parametrize("repair", ["none", "refit"])
def test_what_is_found_is_better_than_what_it_started_from(net, repair, monkeypatch):
    seen = {}
    plain = Measure.diverges

    def measured(self, problem, kept, batches, skip=0):
        found = plain(self, problem, kept, batches, skip)
        seen[tuple(kept.values()), skip, batches] = found
        return found

    monkeypatch.setattr(Measure, "diverges", measured)
    result = compiled(net, "params=50%", QUICK, repair=repair)
    note = next(n for n in result.job.notes if n.startswith("search: "))
    first, last = (float(w) for w in note.replace(",", "").split() if w[0].isdigit() and "." in w)
    assert last < 0.95 * first and "a descendant is taken" in note
    assert abs(shares(result)["params"] - 0.5) < 0.01
    assert len({key[0] for key in seen}) >= 10


def test_answers_that_are_kept_change_nothing(net, monkeypatch):
    from spacompiler.trials import sensitivity

    kept = compiled(net, "params=50%", QUICK, repair="refit").plan.kept
    monkeypatch.setattr(sensitivity, "HELD", -1)
    assert compiled(net, "params=50%", QUICK, repair="refit").plan.kept == kept


def test_limits_that_no_plan_holds_are_an_error_that_names_them(net):
    with pytest.raises(SpaError, match="cannot be met"):
        compiled(net, "params=99%,macs=3%", QUICK)


def test_training_for_all_sizes_comes_before_a_search(net):
    y = torch.arange(16) % 6
    data = [((x,), {"labels": y}) for x, in DATA]
    before = {n: p.clone() for n, p in net.state_dict().items()}
    result = spacompiler.compile(
        net, (DATA[0][0][:4],), target="params=60%,macs=60%", allocation=QUICK, calibration=data,
        schedule=OnceForAll(steps=12, beside_lr=3e-3), **{**OPTIONS, "repair": "none"})
    assert all(torch.equal(before[n], p) for n, p in net.state_dict().items())
    assert all(s <= 0.62 for m, s in shares(result).items() if m != "body")
    cut = result.module.out.weight
    assert not any(torch.equal(cut[0, 0], w) for w in net.out.weight[0])
