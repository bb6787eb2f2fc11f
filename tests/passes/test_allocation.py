"""Allocation: optimal where it claims to be, formulas as published, measurements as defined."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError
from spacompiler.evidence.losses import default_loss, divergence
from spacompiler.groups.cost import cost
from spacompiler.passes.dynamic import Dynamic
from spacompiler.passes.global_ranking import GlobalRanking
from spacompiler.passes.layers import AdaptLayers, CfspLayers
from spacompiler.passes.measured import Measured
from spacompiler.passes.refit import Refit
from spacompiler.passes.standardised import Standardised
from spacompiler.plan import legal as allocation
from spacompiler.plan.plan import make_plan
from spacompiler.plan.problem import Problem
from spacompiler.repair.repairer import Repairer
from spacompiler.repair.sites import sites
from spacompiler.torch_backend.backend import TORCH
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.run.observe import ProgramNetwork
from spacompiler.trials.measure import Measure, angles
from spacompiler.trials.sensitivity import Change, Sensitivity


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    """Residual blocks of several widths: what they cost adds up."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(w) for w in widths)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


WIDTHS = (5, 8, 12)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    net = Blocks(*WIDTHS)
    return net, *TORCH.trace(net, (torch.randn(16, 8),))


def problem(network: Any, seed: int = 0, share: float = 0.6, **more: Any) -> Problem:
    """A problem over random curves; `scores` may be given by group."""
    solution = network[2]
    groups = allocation.candidates(solution, roles=("channel",))
    rng = np.random.default_rng(seed)
    scores = more.pop("scores", None) or {g.name: rng.random(g.size) ** 3 for g in groups}
    found = allocation.units(solution, groups, scores, uniform=False, align=1, lanes=8, floor=0,
                             absolute=True)
    price = cost(solution, "params")
    return Problem(found, price, share * price.total, price.total, tolerance=0.05,
                              **more)


def lost(p: Problem, kept: dict[str, int]) -> float:
    return sum(float(u.losses[kept[u.name]]) for u in p.units)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bumpy", [False, True])
def test_dynamic_programming_is_as_good_as_trying_everything(network: Any, seed: int,
                                                             bumpy: bool) -> None:
    p = problem(network, seed)
    if bumpy:  # curves that no greedy choice gets right
        rng = np.random.default_rng(seed)
        for unit in p.units:
            unit.losses[:-1] = np.sort(rng.random(len(unit.losses) - 1) ** 4)[::-1]
    every = (dict(zip((u.name for u in p.units), counts, strict=True))
             for counts in itertools.product(*(u.legal for u in p.units)))
    best = min(lost(p, kept) for kept in every if p.price(kept) <= p.target)
    kept = Dynamic().allocate(p)
    assert p.met(kept) and lost(p, kept) <= best + 1e-9


def test_global_ranking_matches_dynamic_on_convex_curves(network: Any) -> None:
    for seed in range(4):
        p = problem(network, seed)
        assert lost(p, GlobalRanking().allocate(p)) <= 1.3 * lost(p, Dynamic().allocate(p)) + 0.02


def test_standardised_keeps_what_lies_above_one_z_score(network: Any) -> None:
    p = problem(network, 3)
    kept = Standardised().allocate(p)
    z = {}
    for u in p.units:
        s = u.losses[:-1] - u.losses[1:]
        z[u.name] = (s - s.mean()) / s.std()
    lowest = {n: np.sort(v)[::-1][kept[n] - 1] for n, v in z.items()}
    highest = {n: np.sort(v)[::-1][kept[n]] for n, v in z.items() if kept[n] < len(v)}
    assert max(highest.values()) <= min(v for n, v in lowest.items() if kept[n] > 1)


def measured(network: Any, compensation: Any = None) -> Measure:
    net, trace, solution = network
    torch.manual_seed(1)
    batches = [((torch.randn(32, 8) + 1,), {}) for _ in range(3)]
    context = fresh_context(trace, solution)
    groups = allocation.candidates(solution, roles=("channel",))
    scores = {g.name: np.arange(g.size, dtype=float) for g in groups}

    def plan(p: Problem, kept: Any) -> Any:
        counts = {g.name: kept[u.name] for u in p.units for g in u.groups}
        return make_plan(groups, scores, counts).choices(solution)

    return Measure(net, trace, solution, batches, default_loss, context, compensation, plan)


def test_angles_are_those_of_the_hidden_states(network: Any) -> None:
    net, x = network[0], torch.randn(7, 8)
    found = angles(net, ["blocks.0", "blocks.1"], [((x,), {})])
    after = net.blocks[0](x)
    cosine = torch.cosine_similarity(x, after, -1)
    assert found["blocks.0"] == pytest.approx(
        (float(cosine.arccos().mean()) / torch.pi, float(cosine.mean())), rel=1e-4)
    assert set(found) == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("layers", [CfspLayers(tokens=100_000), AdaptLayers()])
def test_layers_that_turn_the_state_more_keep_more(network: Any, layers: Any) -> None:
    p = problem(network, measure=measured(network))
    turned = {u: a for u, (a, _) in p.measure.blocks(p).items()}
    kept = layers.allocate(p)
    sizes = {u.name: u.size for u in p.units}
    most, least = max(turned, key=turned.get), min(turned, key=turned.get)
    assert kept[most] / sizes[most] > kept[least] / sizes[least]
    with pytest.raises(SpaError, match="needs measurements"):
        layers.allocate(problem(network))


def test_salience_estimates_the_gradient_from_two_losses(network: Any) -> None:
    p = problem(network, measure=measured(network))
    found = p.measure.salience(p, step=1e-3, batches=2)
    net, batches = network[0], p.measure.batches[:2]
    for unit, path in ((p.units[0], "blocks.0"), (p.units[2], "blocks.2")):
        arrays = [w for w in net.get_submodule(path).parameters() if w.ndim > 1]
        loss = sum(default_loss([net(*args)], args, kwargs) for args, kwargs in batches) / 2
        gradients = torch.autograd.grad(loss, arrays)
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(w.shape, generator=generator) for w in arrays]
        slope = sum((g * z).sum() for g, z in zip(gradients, noise, strict=True)).abs()
        want = torch.cat([(w.abs() * z.abs() * slope).flatten()
                          for w, z in zip(arrays, noise, strict=True)])
        torch.testing.assert_close(found[unit.name], want, rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("compensation", [None, Refit(), Refit(damping=0.05)])
def test_changes_foresee_what_moves_do(network: Any, compensation: Any) -> None:
    """Against the divergence with each move made, one at a time."""
    p = problem(network, measure=measured(network, compensation))
    kept = {u.name: u.nearest(u.size * 0.6) for u in p.units}
    moves = {u.name: [k for k in u.legal if 0 < abs(k - kept[u.name]) <= 3] for u in p.units}
    torch.manual_seed(2)
    changes, lost = p.measure.changes(p, kept, moves, 3)
    assert set(changes) == {(u, k) for u, some in moves.items() for k in some} and lost > 0
    actual = {(u, k): p.measure.changes(p, {**kept, u: k}, {}, 3)[1] - lost for u, k in changes}
    foreseen = np.array([sum(changes[m]) for m in actual])
    found = np.array(list(actual.values()))
    assert np.corrcoef(foreseen, found)[0, 1] > 0.97
    assert np.abs(foreseen - found).mean() < 0.25 * np.abs(found).mean()
    slopes = np.array([changes[m].slope for m in actual])
    assert np.abs(foreseen - found).mean() < 0.7 * np.abs(slopes - found).mean()
    assert all(c.curvature >= 0 for c in changes.values())


def test_slopes_are_derivatives(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and biases go a little of the way to a move, and as little to the other side."""
    p = problem(network, measure=measured(network, Refit(damping=0.05)))
    kept = {u.name: u.nearest(u.size * 0.6) for u in p.units}
    moves = {u.name: [kept[u.name] - 1] for u in p.units}
    changes, _ = p.measure.changes(p, kept, moves, 3)
    plain = Sensitivity._arrays

    def divergence_at(move: dict[str, int], by: float) -> float:
        def blended(self: Sensitivity, choices: Any, among: set[str]) -> Any:
            start = plain(self, p.measure.plan(p, kept), among)
            return {name: tuple(a + by * (b - a) for a, b in zip(start[name], to, strict=True))
                    for name, to in plain(self, choices, among).items()}

        with monkeypatch.context() as patch:
            patch.setattr(Sensitivity, "_arrays", blended)
            return p.measure.changes(p, {**kept, **move}, {}, 3)[1]

    for (unit, count), change in changes.items():
        ends = [divergence_at({unit: count}, by) for by in (1e-2, -1e-2)]
        assert change.slope == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02, abs=1e-6)


def test_divergence_is_that_of_the_pruned_network(network: Any) -> None:
    """Sliced for real, the network is as far from the dense one as the measurement says."""
    p = problem(network, measure=measured(network, Refit(damping=0.05)))
    kept = {u.name: u.nearest(u.size * 0.6) for u in p.units}
    made = p.measure
    found, _ = sites(made.solution, made.plan(p, kept))
    lost = made.changes(p, kept, {}, 3)[1]
    net = copy.deepcopy(network[0])
    worker = Repairer(ProgramNetwork(made.trace), made.solution, made.plan(p, kept),
                      made.compensation)
    for site in found:
        weight, bias = worker.weights(site, worker.of_dense(made.context, site))
        net.get_parameter(site.weight).data = weight
        if bias is not None:
            net.get_parameter(site.bias).data = bias
    want = sum(divergence(net(*args), network[0](*args), 1.0) for args, _ in made.batches) / 3
    assert lost == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("rounds", [1, 3])
def test_measured_is_never_worse_than_what_the_curves_foresee(network: Any, rounds: int) -> None:
    p = problem(network, 2, measure=measured(network, Refit()))
    first = GlobalRanking().allocate(problem(network, 2))
    kept = Measured(rounds=rounds, caution=2.0).allocate(p)
    after, before = (p.measure.changes(p, k, {}, 6)[1] for k in (kept, first))
    assert p.met(kept) and after < before


@pytest.mark.parametrize(("lost", "plan", "bold"), [
    ({(2, 2.0): 0.5, (2, 1.0): 0.4, (2, 0.5): 0.45}, (2, 1.0), True),
    ({(1, 2.0): 0.5, (1, 1.0): 0.6}, (1, 2.0), False),
    ({(1, 8.0): 0.5, (1, 16.0): 0.4, (2, 1.0): 0.1}, (1, 8.0), False),
    ({(1, 32.0): 0.5}, None, False),
    ({}, None, False),
], ids=["less caution", "no large steps", "more caution", "tries run out", "none"])
def test_measured_tries_plans_until_the_next_is_no_better(
        lost: Any, plan: Any, bold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is (moves to choose from, caution) here; u cannot go down without leaving reach."""
    monkeypatch.setattr("spacompiler.passes.measured._moved", lambda problem, kept, changes,
                        caution: {"plan": (len(changes), caution)})
    p: Any = SimpleNamespace(units=[SimpleNamespace(name="u", size=3),
                                    SimpleNamespace(name="v", size=100)])
    kept, changes = {"u": 3, "v": 100}, {("u", 2): Change(0, 0), ("v", 90): Change(0, 0)}
    best, caution, left = Measured()._best(
        p, lambda made: lost.get(made["plan"], 1.0), kept, changes, 0.9, 2.0, True)
    assert best == ({"plan": plan} if plan else kept) and left is bold
    assert caution == (plan[1] if plan else 2.0)
    if not bold:  # where no step down is within reach, all of them stay
        del changes["v", 90]
        assert Measured()._best(p, lambda made: 1.0, kept, changes, 0.9, 2.0, True)[2]


def test_half_of_what_is_measured_on_is_the_models_own_text(
        network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sensitivity, "changes", lambda self, p, kept, moves, batches: batches)
    p = problem(network, measure=measured(network))
    given, own = p.measure.batches, [((torch.randn(32, 8),), {}) for _ in range(3)]
    for beside, count, want in (([], 2, given[:2]), (own, 2, [given[0], own[0]]),
                                (own, 3, [*given[:2], own[0]]), (own[:1], 6, [*given, own[0]])):
        p.measure.beside = beside
        found = p.measure.changes(p, {u.name: u.size for u in p.units}, {}, count)
        assert [id(b) for b in found] == [id(b) for b in want]


@pytest.mark.parametrize("name", ["global", "dynamic", "measured", "standardised", "cfsp-layers",
                                  "adapt-layers", "eco-layers"])
def test_every_allocation_compiles_with_repair(name: str) -> None:
    torch.manual_seed(0)
    net = Blocks(16, 24, 32)
    data = [(torch.randn(16, 8),) for _ in range(4)]
    result = spacompiler.compile(
        net, data[0], target="params=70%", importance="curvature", allocation=name,
        repair="refit", calibration=data, align=1, layout="any")
    assert result.job.proof.holds and abs(
        result.plan.costs["params"]["pruned"] / result.plan.costs["params"]["dense"] - 0.7) < 0.01
