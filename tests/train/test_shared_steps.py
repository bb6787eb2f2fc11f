"""Several processes on one training: the bits of one, whatever their number."""

from __future__ import annotations

import copy

import pytest
import torch
from threads import in_threads
from torch import nn

from spacompiler.errors import SpaError
from spacompiler.evidence.losses import default_loss
from spacompiler.evidence.reused import again, kept
from spacompiler.passes.full import Full
from spacompiler.system.group import Team
from spacompiler.train.checkpoint import FILE
from spacompiler.train.hooks import Hooks
from spacompiler.train.loop import Training, train
from spacompiler.train.shared import changing

DRAWS = torch.Generator().manual_seed(0)
BATCHES = [((torch.randn(3, 4, generator=DRAWS) * 10.0 ** (i % 3),), {}) for i in range(14)]


LAYERS = nn.Linear(4, 9), nn.Linear(9, 5, bias=False), nn.Linear(5, 5)


class Branching(nn.Module):
    """A network one of whose layers not every batch reaches."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.more = copy.deepcopy(LAYERS)

    def forward(self, x):
        y = self.two(self.one(x).relu())
        return self.more(y) if x[0, 0] > 0 else y


class Beside(Hooks):
    """A term of the loss and gradients that are looked at, as recoveries have them."""

    def __init__(self, net):
        self.net, self.seen = net, []

    def loss(self):
        return self.net.one.weight.square().mean()

    def graded(self, step):
        self.seen.append([p.grad.float().norm().item() for p in self.net.parameters()
                          if p.grad is not None])


def trained(team, dtype=torch.float32, **more):
    net = Branching().to(dtype)
    hooks = Beside(net)
    options = Full(lr=1e-2, accumulate=5, epochs=2, evaluations=2)
    calls = [((x.to(dtype),), {}) for (x,), _ in BATCHES]
    facts = train(Training(net, None, calls[:12], calls[12:], default_loss, team=team, **more),
                  options, dict(net.named_parameters()), hooks)
    return [p.detach() for p in net.parameters()], facts, hooks.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_steps_have_the_bits_of_one_process(size, dtype):
    arrays, *rest = trained(Team(), dtype)
    for found, *others in in_threads(size, lambda team: trained(team, dtype)):
        assert all(torch.equal(a, b) for a, b in zip(arrays, found, strict=True))
        assert others == rest


def test_a_training_goes_on_with_another_number_of_processes(tmp_path):
    def stop(stage, done, total):
        if done == 4:
            raise InterruptedError

    want, facts, _ = trained(Team())
    with pytest.raises(InterruptedError):
        trained(Team(), checkpoint=tmp_path, progress=stop)
    kept = (tmp_path / FILE).read_bytes()
    steps = []
    for found, after, _ in in_threads(3, lambda team: trained(
            team, checkpoint=tmp_path, progress=lambda stage, done, total: steps.append(done))):
        assert after["history"] == facts["history"]
        assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
    assert min(steps) > 1, "it started anew"
    assert (tmp_path / FILE).read_bytes() != kept


def test_processes_that_train_apart_are_told():
    def work(team):
        net = Branching()
        if team.rank == 1:
            net.one.weight.data[2, 2] += 1e-7
        with pytest.raises(SpaError, match="do not agree on what is trained"):
            Full().run(Training(net, None, BATCHES[:12], BATCHES[12:], default_loss, team=team))
        return True

    assert in_threads(2, work) == [True, True]


def test_what_follows_from_one_batch_after_the_other_is_named():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    before = {n: t.clone() for n, t in net.state_dict().items()}
    torch.manual_seed(0)
    assert changing(net.eval(), BATCHES[0]) == [
        "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    drawn = torch.rand(1)
    assert changing(Branching(), BATCHES[0]) == [] and not net.training
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_memory_that_an_array_lies_in_is_not_given_again():
    x = torch.ones(600, 500)
    with kept():
        first = again(x)
        part = first[3:].fill_(7.0)
        del first
        other = again(x).fill_(0.0)
        assert bool((part == 7.0).all()) and other.shape == x.shape
        place = other.data_ptr()
        del other
        assert again(x).data_ptr() == place and not place % 64
