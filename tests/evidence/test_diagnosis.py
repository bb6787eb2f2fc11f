"""What a network says of itself: indices by hand, silent units, tables, and two runs compared."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import spacompiler
from spacompiler.artifact import report
from spacompiler.cli import pass_tags
from spacompiler.cli.look import _passes
from spacompiler.cli.main import app
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.diagnosis import pq_index, spare
from spacompiler.trials.regime import cka, regime


def test_the_pq_index_by_hand():
    w = np.array([4.0, 1.0, 0.0, 1.0])
    half = (2 + 1 + 0 + 1) ** 2
    assert pq_index(w) == pytest.approx(1 - half / 4 / 6)
    kept = 4 * (1 - pq_index(w, 1.0, 2.0)) ** 2
    assert spare(w, 1.0, 2.0) == pytest.approx(1 - kept / 4)
    assert pq_index(np.zeros(3)) == 0 and pq_index(3 * w) == pytest.approx(pq_index(w))


class Net(nn.Module):
    """Two heads of attention behind ReLU units, of which some never act."""

    def __init__(self):
        super().__init__()
        self.up, self.qkv, self.out = nn.Linear(6, 10), nn.Linear(10, 24), nn.Linear(8, 3)

    def forward(self, x):
        y = self.up(x).relu()
        q, k, v = self.qkv(y).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        made.up.bias[[1, 4, 7]] = -50.0
        made.up.weight[2] *= 30
    return made


def test_silent_units_zeros_and_largest_scores(net):
    x = torch.randn(4, 5, 6)
    found = spacompiler.diagnose(net, (x,), calibration=[(x,), (x + 1,)])
    up = next(g for g in found.groups if g.group.startswith("up"))
    with torch.no_grad():
        y = torch.cat([net.up(part).relu() for part in (x, x + 1)])
        q, k = (torch.cat([net.qkv(net.up(p).relu()) for p in (x, x + 1)])[..., n * 8:n * 8 + 8]
                for n in (0, 1))
    assert up.silent == 3 == int((y == 0).all(0).all(0).sum())
    assert up.zeros == pytest.approx(float((y == 0).double().mean()))
    norms = torch.cat([net.up.weight, net.qkv.weight.T], 1).norm(dim=1).detach().numpy()
    assert up.pq == pytest.approx(pq_index(norms), abs=1e-6) and up.pq > 0.1
    attention, = found.attentions
    assert attention.queries == pytest.approx(float(q.abs().max()), rel=1e-5)
    assert attention.keys == pytest.approx(float(k.abs().max()), rel=1e-5)
    assert attention.bound == pytest.approx(np.log(5) ** 0.5)


def test_a_report_says_how_uneven_scores_are(net):
    done = spacompiler.compile(net, (torch.randn(4, 5, 6),), target="params~70%", align=1,
                               importance="magnitude", onnx=False, latency=False, prove=False)
    data = report.facts(done.job)
    of = {d["group"]: d for d in data["diagnosis"]}
    name = data["shrunk"][0]["group"]
    assert of[name]["pq"] == pytest.approx(pq_index(done.job.scores[name]), abs=1e-4)
    assert f"{of[name]['pq']:.2f}" in report.markdown(data)


def test_the_command_line_shows_it():
    run = CliRunner()
    data = json.loads(run.invoke(app, ["inspect", "zoo:mlp", "--diagnose", "--json"]).stdout)
    assert len(data["groups"]) == 2 and 0.2 < data["dead"] < 0.8
    assert "PQ index" in run.invoke(app, ["inspect", "zoo:mlp", "--diagnose"]).stdout
    alone = run.invoke(app, ["inspect", "zoo:mlp", "--calibration", "sampled"])
    assert alone.exit_code == 2 and "--diagnose" in alone.stderr


def test_data_of_the_models_own_that_there_is_not_is_refused(net):
    with pytest.raises(UsageError, match="brings no data of its own"):
        spacompiler.diagnose(net, (torch.randn(4, 5, 6),), calibration="own")
    with pytest.raises(UsageError, match="brings no data of its own"):
        spacompiler.compile(net, (torch.randn(4, 5, 6),), target="params~70%", recovery="full",
                            recover_data="own", calibration=[(torch.randn(4, 5, 6),)])


# --- tags -------------------------------------------------------------------------------------


def test_every_pass_has_a_tag_of_each_axis_and_tags_filter():
    axes = [set(pass_tags.AXES[a]) for a in ("when", "how", "what")]
    for words in _passes(None):
        assert all(len(axis & set(words.tags)) == 1 for axis in axes), words.name
    run = CliRunner()
    names = {p["name"] for p in json.loads(run.invoke(app, [
        "passes", "--tag", "adapters", "--tag", "during", "--json"]).stdout)}
    assert {"lora-prune", "compresso"} <= names and not {"lapp", "lora"} & names
    wrong = run.invoke(app, ["passes", "--tag", "lerned"])
    assert wrong.exit_code == 2 and "'learned'" in wrong.stderr
    none = run.invoke(app, ["passes", "--tag", "slices", "--tag", "widths"])
    assert none.exit_code == 2 and "no pass is tagged" in none.stderr
    of_one = run.invoke(app, ["passes", "taylor", "--tag", "during"])
    assert of_one.exit_code == 2 and "taylor is not tagged during" in of_one.stderr
    assert "gradients" in of_one.stderr and "passes --tag during" in of_one.stderr


def test_a_pass_of_ones_own_says_its_tags():
    class Own:
        tags = ("before", "weights", "slices", "quantised")

    assert pass_tags.tags("importance", "own", Own, {}) == Own.tags


# --- two runs ---------------------------------------------------------------------------------


def test_cka_by_hand():
    torch.manual_seed(0)
    x = torch.randn(40, 5)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    assert cka(x, 3 * x @ turn + 2) == pytest.approx(1, abs=1e-6)
    assert cka(x, torch.randn(40, 5)) < 0.4 and cka(x, torch.ones(40, 5)) == 0


def trained(seed):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(made(X), Y).backward()
        optimizer.step()
    return made


X = torch.randn(64, 2, generator=torch.Generator().manual_seed(5))
Y = (X[:, 0] * X[:, 1] > 0).long()
BATCHES = [((X,), {"labels": Y})]


def test_two_runs_by_hand_and_by_a_curve():
    one, other = trained(1), trained(2)
    found = regime(one, other, BATCHES, points=5)
    middle = trained(1)
    with torch.no_grad():
        for p, a, b in zip(middle.parameters(), one.parameters(), other.parameters(), strict=True):
            p.copy_((a + b) / 2)
        losses = [float(F.cross_entropy(m(X), Y)) for m in (one, middle, other)]
    assert [found.losses[i] for i in (0, 2, 4)] == pytest.approx(losses, rel=1e-4)
    assert found.connectivity < -0.1 and "barrier" in found.advice
    bent = regime(one, other, BATCHES, points=5, steps=40, lr=0.05)
    assert bent.connectivity > found.connectivity and bent.cka == pytest.approx(found.cka)
    assert bent.losses[0] == pytest.approx(losses[0], rel=1e-4)
    same = regime(one, one, BATCHES, points=3)
    assert same.cka == pytest.approx(1) and abs(same.connectivity) < 1e-5


def test_what_cannot_be_compared():
    one = trained(1)
    with pytest.raises(SpaError, match="not two runs"):
        regime(one, nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), BATCHES)
    with pytest.raises(UsageError, match="labels"):
        regime(one, one, [((X,), {})])
    with pytest.raises(UsageError, match="nothing to compare"):
        regime(one, one, [])


def test_a_diagnosis_does_not_drop_what_else_was_asked(tmp_path):
    from typer.testing import CliRunner

    from spacompiler.cli.main import app

    done = CliRunner().invoke(app, ["inspect", "zoo:mlp", "--diagnose", "--html",
                                    str(tmp_path / "page.html")])
    assert done.exit_code == 2 and "--html has nothing to act on" in done.output
