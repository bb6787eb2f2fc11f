"""Allocation: optimal where it claims to be, formulas as published, measurements as defined."""

from __future__ import annotations

import copy
import itertools
import zlib
from dataclasses import replace
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
from spacompiler.passes.layers import AdaptLayers, CfspLayers, EcoLayers, filled
from spacompiler.passes.measured import Measured
from spacompiler.passes.refit import Refit
from spacompiler.passes.standardised import Standardised
from spacompiler.passes.uniform import Uniform
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


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, Any, Any]:
    """Three blocks of a hundred channels, which turn the state by different angles."""
    torch.manual_seed(0)
    net = Blocks(100, 100, 100)
    for i, block in enumerate(net.blocks):
        block.down.weight.data *= 0.5 + i
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


def levelled(p: Problem, levels: dict[str, Any], **more: Any) -> Problem:
    """The same problem with other scores, highest first."""
    return replace(p, **more, units=tuple(replace(
        u, levels=np.array(levels.get(u.groups[0].name, u.levels), dtype=float)) for u in p.units))


def test_estimates_of_the_loss_are_ranked_with_a_bar_before_the_end_of_a_layer(
        network: Any) -> None:
    """-T log(1 - s) lost per cost saved, by hand; no unit below half of what uniform keeps."""
    p = problem(network, 1, share=0.5, losses="comparable")
    cheap = p.units[0].groups[0].name
    p = levelled(p, {cheap: [1e-3] * 5})
    kept = GlobalRanking(checked=False).allocate(p)
    floor = Uniform().allocate(p)
    assert p.met(kept) and all(kept[n] >= floor[n] / 2 for n in kept)
    now, price = p.full(), p.price(p.full())
    while price > p.target:
        best = {}
        for u in p.units:
            k, total = now[u.name], u.levels.sum()
            if k > 1 and k - 1 >= floor[u.name] / 2:
                lost = total * np.log(u.levels[:k].sum() / u.levels[: k - 1].sum())
                p.price(now)
                best[u.name] = lost / -p.cost.change(u.counts(k - 1))
        name = min(best, key=best.__getitem__)
        now[name] -= 1
        price = p.price(now)
    assert all(abs(now[n] - kept[n]) <= 1 for n in now)
    assert kept[p.units[0].name] == min(kept.values())  # what costs little goes first


def test_scores_in_no_common_unit_are_ranked_by_their_order(network: Any) -> None:
    """One group's scores times a thousand change nothing, and a note says so."""
    p = problem(network, 1, losses="unlike", criterion="magnitude")
    kept = GlobalRanking(checked=False).allocate(p)
    other = levelled(p, {u.groups[0].name: u.levels * 1000.0 ** i for i, u in enumerate(p.units)})
    assert GlobalRanking(checked=False).allocate(other) == kept and p.met(kept)
    assert "scores of magnitude are in no common unit" in p.notes[0]


@pytest.mark.parametrize(("same", "apart", "want"), [
    ([0.9, 0.93, 0.95, 0.96, 0.95], [1.0] * 5, 3),  # beyond the error of the count
    ([0.9, 0.91, 0.91, 0.91, 0.91], [1.0, 0.9, 0.8, 0.8, 0.76], 0),  # not beyond it
    ([0.9, 0.91, 0.9, 0.88, 0.9], [1.0, 0.9, 0.7, 0.1, 0.74], 2),  # as good, and much nearer
    ([0.9, 1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 0.4, float("nan"), 0.6], 2)])
def test_no_plan_replaces_the_uniform_one_but_a_better_one(
        wide: Any, same: list[float], apart: list[float], want: int) -> None:
    plans: list[dict[str, int]] = []

    def fidelity(p: Problem, kept: dict[str, int], batches: int) -> tuple[float, float, int]:
        plans.append(kept)
        return same[len(plans) - 1], apart[len(plans) - 1], 400

    p = problem(wide, 1, share=0.5, measure=SimpleNamespace(fidelity=fidelity), scores={
        f"blocks.{i}.up.weight:0": (1 + i) * np.arange(100.0) for i in range(3)})
    got = GlobalRanking().allocate(p)
    assert len(plans) == 5 and plans[0] == Uniform().allocate(p) and got == plans[want]
    assert plans[-1] == GlobalRanking(checked=False).allocate(p)
    assert p.notes[-1].startswith("global allocation: ")
    p.on_data = False
    assert GlobalRanking().allocate(p) == plans[-1] and len(plans) == 5


def test_fidelity_is_that_of_the_pruned_and_repaired_network(network: Any) -> None:
    p = problem(network, measure=measured(network, Refit(damping=0.05)))
    kept = {u.name: u.nearest(u.size * 0.6) for u in p.units}
    made, net = p.measure, copy.deepcopy(network[0])
    for name, array in made.repaired(p, made.plan(p, kept)).items():
        net.get_parameter(name).data = array
    same = torch.cat([net(*a).argmax(-1) == network[0](*a).argmax(-1) for a, _ in made.batches])
    share, apart, rows = made.fidelity(p, kept, 3)
    assert share == pytest.approx(float(same.float().mean())) and rows == len(same)
    assert apart == pytest.approx(made.changes(p, kept, {}, 3)[1], rel=1e-4)


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

    return Measure(solution, batches, default_loss, plan, net, trace, context, compensation)


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


def test_slopes_are_those_of_single_matrices_by_two_losses_each(network: Any) -> None:
    """The released rule: noise drawn for each example and matrix, slopes of a block added up."""
    p = problem(network, measure=measured(network))
    found = p.measure.slopes(p, step=1e-3, examples=34)  # one batch, and 2 examples of the next
    net, batches = network[0], p.measure.batches
    some = torch.cat([args[0] for args, _ in batches])[:34]
    assert [set(units) for _, _, units in found.values()] == [{u.name} for u in p.units]
    for path, (slope, size, _) in found.items():
        want = 0.0
        for name in ("up.weight", "down.weight"):
            weight = net.get_parameter(f"{path}.{name}")
            draws = torch.Generator().manual_seed(zlib.crc32(f"0:{path}.{name}".encode()))
            for x in some.split(1):
                g, = torch.autograd.grad(default_loss([net(x)], (x,), {}), weight)
                want += float((g * torch.randn(weight.shape, generator=draws)).sum().abs())
        assert slope == pytest.approx(want, rel=0.02)
        assert size == 2 * 8 * net.get_submodule(path).up.out_features


def water(scores: list[float], sizes: list[int], keep: float, cap: float) -> list[float]:
    """The released filling, number by number: fixed share first, then by scores, full ones out."""
    have = [(1 - cap) * n for n in sizes]
    scores = list(scores)
    for _ in sizes:
        left = keep * sum(sizes) - sum(have)
        total = sum(scores)
        have = [h + left * s / total for h, s in zip(have, scores, strict=True)]
        scores = [0.0 if h >= n else s for h, s, n in zip(have, scores, sizes, strict=True)]
        have = [min(h, n) for h, n in zip(have, sizes, strict=True)]
        if sum(have) >= keep * sum(sizes) - 1e-9:
            break
    return [h / n for h, n in zip(have, sizes, strict=True)]


@pytest.mark.parametrize(("keep", "cap"), [(0.5, 0.7), (0.8, 0.7), (0.9, 0.3)])
def test_shares_are_filled_up_as_released(keep: float, cap: float) -> None:
    scores, sizes = [1.0, 8.0, 2.0, 0.1], [10, 10, 40, 20]
    got = filled(dict(zip("abcd", scores, strict=True)), dict(zip("abcd", sizes, strict=True)),
                 keep, cap)
    assert list(got.values()) == pytest.approx(water(scores, sizes, keep, cap))
    assert min(got.values()) >= 1 - cap - 1e-9 and max(got.values()) <= 1


def emptied(net: Any, gone: dict[str, Any]) -> Any:
    """The network without the channels marked in `gone`, by block."""
    net = copy.deepcopy(net)
    for path, mask in gone.items():
        net.get_submodule(path).down.weight.data[:, mask] = 0
    return net


def test_adaptive_sparsity_is_the_recurrence_measured_anew(wide: Any) -> None:
    """Each step: cosines of the network without what went so far, centred, over the largest."""
    net, measure = wide[0], measured(wide)
    p = problem(wide, share=0.7, measure=measure, scores={
        f"blocks.{i}.up.weight:0": np.arange(100.0) for i in range(3)})
    p.tolerance = 0.01
    kept = AdaptLayers().allocate(p)
    lost = [0.0] * 3
    while True:
        gone = {f"blocks.{i}": np.arange(100) < 100 - int((1 - s) * 100 + 1e-9)
                for i, s in enumerate(lost)}
        now = emptied(net, gone)
        cosines = []
        for i in range(3):
            values = []
            for args, _ in measure.batches:
                x = args[0]
                for block in now.blocks[:i]:
                    x = block(x)
                values.append(torch.cosine_similarity(x, now.blocks[i](x), -1))
            cosines.append(-float(torch.cat(values).mean()))
        centred = [c - sum(cosines) / 3 for c in cosines]
        widest = max(map(abs, centred))
        then = [min(max(s + 0.02 - 0.02 * c / widest, 0.0), 0.99)
                for s, c in zip(lost, centred, strict=True)]
        if p.price({u.name: int((1 - s) * 100 + 1e-9) for u, s in zip(p.units, then, strict=True)
                    }) <= p.target:
            break
        lost = then
    for u, before, after in zip(p.units, lost, then, strict=True):
        assert (1 - after) * 100 - 1 <= kept[u.name] <= (1 - before) * 100 + 1
    assert p.met(kept) and len(set(kept.values())) == 3


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
    first = GlobalRanking(checked=False).allocate(problem(network, 2))
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
    monkeypatch.setattr("spacompiler.passes.measured.moved", lambda problem, kept, changes,
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
        net, data[0], target="params=70%", importance="curvature",
        allocation=EcoLayers(examples=2) if name == "eco-layers" else name,
        repair="refit", calibration=data, align=1, layout="any")
    assert result.job.proof.holds and abs(
        result.plan.costs["params"]["pruned"] / result.plan.costs["params"]["dense"] - 0.7) < 0.01
