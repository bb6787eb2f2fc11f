"""Rivals as released: counts by rules that are recomputed here, over all layers at once."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import spacompiler
from spacompiler.evidence.losses import default_loss
from spacompiler.groups.cost import cost
from spacompiler.passes.candidates import Candidates
from spacompiler.passes.densities import Erk, PqIndex, index
from spacompiler.passes.distortion import Distortion
from spacompiler.passes.fluctuation import Fluctuation
from spacompiler.passes.layers import EcoLayers
from spacompiler.passes.magnitude import Magnitude
from spacompiler.passes.threshold import Threshold
from spacompiler.passes.uniform import Uniform
from spacompiler.plan import legal
from spacompiler.plan.plan import make_plan
from spacompiler.plan.problem import Problem
from spacompiler.torch_backend.backend import TORCH
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.gather.sampling import sampled
from spacompiler.trials.measure import Measure

RULES = {r.name: r for r in (Threshold(), Distortion(), Erk(), PqIndex(), Candidates())}

HIDDEN, HEADS, DIM, WIDTH, LAYERS = 24, 4, 6, 40, 3


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any, list[torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = LlamaForCausalLM(LlamaConfig(
            hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=50,
            intermediate_size=WIDTH, num_hidden_layers=LAYERS)).eval()
        for i, layer in enumerate(net.model.layers):  # so that layers differ
            layer.mlp.down_proj.weight.data *= torch.rand(WIDTH) * (1 + i)
            layer.self_attn.o_proj.weight.data *= torch.rand(HIDDEN) * (4 - i)
        ids = [torch.randint(0, 50, (1, 16)) for _ in range(5)]
    return net, TORCH.trace(net, {"input_ids": ids[0]}), ids


def problem_of(solution: Any, scores: dict[str, np.ndarray], share: float,
               metric: str = "params") -> Problem:
    groups = [g for g in solution.groups.values() if g.name in scores]
    units = legal.units(solution, groups, scores, uniform=False, align=1, lanes=8, floor=0.0)
    price = cost(solution, metric)
    prunable = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDTH)
    return Problem(units, price, price.total - (1 - share) * prunable, price.total)


def read(net: Any, ids: list[torch.Tensor], path: str) -> list[torch.Tensor]:
    """What a layer reads of each example: (positions, features)."""
    found: list[torch.Tensor] = []
    hook = net.get_submodule(path).register_forward_pre_hook(
        lambda module, args: found.append(args[0][0].double()))
    with torch.no_grad():
        for one in ids:
            net(input_ids=one)
    hook.remove()
    return found


def released(net: Any, ids: list[torch.Tensor], path: str, power: int) -> torch.Tensor:
    """FLAP's metric of a layer's features, example by example, and its z-scores."""
    mean, value = torch.zeros(()), torch.zeros(())
    for n, x in enumerate(read(net, ids, path)):
        mean = (n * mean + x.mean(0)) / (n + 1)
        if n:
            value = value * (n - 1) / n + (x - mean).square().sum(0) / (n + 1)
    metric = (value * net.get_submodule(path).weight.double().square().sum(0)) ** power
    return (metric - metric.mean()) / metric.std()


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_flap_keeps_what_its_released_rule_keeps(llama: Any, share: float) -> None:
    """One threshold over z-scores of heads (means) and channels, heads weighed by their cost."""
    net, (trace, solution), ids = llama
    context = fresh_context(trace, solution)
    groups = [g for g in solution.groups.values() if g.role in ("head", "channel")]
    criterion = Fluctuation(standardised=True)
    batches: Any = [((), {"input_ids": one}) for one in ids]
    context.calibrate(criterion.needs, batches, default_loss, groups=groups)
    scores = {g.name: criterion.score(g, context).numpy() for g in groups}
    wanted: dict[str, torch.Tensor] = {}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        heads = next(g.name for g in groups if g.name.startswith(at) and g.role == "head")
        wanted[heads] = released(net, ids, at + "self_attn.o_proj", 2).reshape(HEADS, DIM).mean(1)
        wanted[at + "mlp.gate_proj.weight:0"] = released(net, ids, at + "mlp.down_proj", 1)
    for name, want in wanted.items():
        np.testing.assert_allclose(scores[name].reshape(-1), want.detach(), rtol=1e-4, atol=1e-6)
    every = torch.cat([v for v in wanted.values()])
    weights = torch.cat([torch.full((len(v),), 4 * HIDDEN * DIM if len(v) == HEADS else 3 * HIDDEN)
                         for v in wanted.values()]).double()
    order = every.argsort(descending=True)
    spent = weights[order].cumsum(0)
    threshold = every[order][(spent - share * weights.sum()).abs().argmin()]
    kept = Threshold().allocate(problem_of(solution, scores, share))
    for name, want in wanted.items():  # the released code leaves the last one out
        assert max(1, int((want > threshold).sum())) <= kept[name] \
            <= max(1, int((want >= threshold).sum()))
    assert len({kept[n] for n in wanted}) > 2


def test_global_magnitude_keeps_what_one_threshold_keeps(llama: Any) -> None:
    """Mean squares of all groups under one threshold, the floor its least share of each."""
    _, (trace, solution), _ = llama
    context = fresh_context(trace, solution)
    groups = [g for g in solution.groups.values() if g.role == "channel"]
    scores = {g.name: Magnitude().score(g, context).numpy() for g in groups}
    problem = problem_of(solution, scores, 0.8)
    kept = Threshold().allocate(problem)
    every = np.sort(np.concatenate(list(scores.values())))
    miss = {}
    for threshold in every:
        counts = {n: max(1, int((s > threshold).sum())) for n, s in scores.items()}
        miss[abs(problem.price(counts) - problem.target)] = counts
    assert kept == miss[min(miss)]
    lowest = np.concatenate([np.sort(s)[::-1][:kept[n]] for n, s in scores.items()]).min()
    assert all((s > lowest).sum() <= kept[n] for n, s in scores.items())
    floored = legal.units(solution, groups, scores, uniform=False, align=1, lanes=8, floor=0.6)
    problem.units = floored
    assert min(Threshold().allocate(problem).values()) >= 0.6 * WIDTH


# --- allocations over a small convolutional network ---------------------------------------------


class Small(nn.Module):
    """Three convolutions, two of them normalised, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.three, self.head = nn.Conv2d(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(self.norm2(self.two(x)))
        return self.head(torch.relu(self.three(x)).mean((2, 3)))


GROUPS = {"one.weight:0": 8, "two.weight:0": 16, "three.weight:0": 12}


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Any, Any, list[Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Small()
        data = [torch.randn(8, 3, 6, 6) * 2 + 1 for _ in range(3)]
        for x in data:  # so that norms have met something
            net(x)
    return net.eval(), *TORCH.trace(net, (data[0],)), data


def over(small: Any, share: float = 0.6) -> Problem:
    net, trace, solution, data = small
    groups = [solution.groups[name] for name in GROUPS]
    scores = {g.name: Magnitude(norm=1).score(g, fresh_context(trace, solution)).numpy()
              for g in groups}

    def plan(p: Problem, kept: Any) -> Any:
        counts = {g.name: kept[u.name] for u in p.units for g in u.groups}
        return make_plan(groups, scores, counts).choices(solution)

    batches: Any = [((x,), {}) for x in data]
    measure = Measure(solution, batches, default_loss, plan, net, trace,
                      fresh_context(trace, solution), None)
    price = cost(solution, "params")
    units = legal.units(solution, groups, scores, uniform=False, align=1, lanes=8, floor=0.0)
    return Problem(units, price, share * price.total, price.total, measure=measure, tolerance=0.03,
                   shapes={n: t.shape for n, t in solution.graph.weights().items()})


def without(net: nn.Module, p: Problem, kept: dict[str, int]) -> nn.Module:
    """The network in which what goes reads as zero."""
    net = copy.deepcopy(net)
    for name, reader in (("one.weight:0", net.two), ("two.weight:0", net.three),
                         ("three.weight:0", net.head)):
        levels = p.measure.plan(p, {**GROUPS, **kept})  # which slices these are, by scores
        table = {g.name: levels[g.atom].table for u in p.units for g in u.groups
                 if g.atom in levels}
        gone = torch.from_numpy(~table[name]) if name in table else []
        with torch.no_grad():
            reader.weight[:, gone] = 0
    return net


def test_distortions_are_measured_one_group_at_a_time_and_add_up_best(small: Any) -> None:
    net, data, p = small[0], small[3], over(small)
    kept = Distortion(levels=99, batches=2).allocate(p)
    full = dict(GROUPS)
    curves = {}
    with torch.no_grad():
        for name, size in GROUPS.items():
            for k in range(1, size + 1):
                lame = without(net, p, {**full, name: k})
                curves[name, k] = sum(float((lame(x) - net(x)).square().sum(1).mean())
                                      for x in data[:2]) / 2
    for name in GROUPS:
        assert p.measure.distortion(p, {**full, name: 3}, 2) == pytest.approx(
            curves[name, 3], rel=1e-4)

    def total(counts: dict[str, int]) -> float:
        return sum(curves[item] for item in counts.items())

    every = [dict(zip(GROUPS, counts, strict=True)) for counts in itertools.product(
        *(range(1, n + 1) for n in GROUPS.values()))]
    within = [c for c in every if p.price(c) <= p.target]
    # savings are priced one group at a time, so that the best of all may lie a step away
    assert p.met(kept) and total(kept) <= 1.3 * min(map(total, within))


def test_densities_are_those_of_erdos_renyi_kernels(small: Any) -> None:
    """(n_in + n_out + kernel) over their product, times what meets the budget, at most 1."""
    p = over(small, 0.5)
    kept = Erk().allocate(p)
    shapes = {"one.weight:0": (8, 3, 3, 3), "two.weight:0": (16, 8, 3, 3),
              "three.weight:0": (12, 16, 1, 1)}
    raw = {n: sum(s) / np.prod(s) for n, s in shapes.items()}
    assert {u.name: Erk._density(p, u) for u in p.units} == pytest.approx(raw)
    best = min((abs(p.price(c) - p.target), i, c) for i, c in enumerate(
        {n: max(1, min(GROUPS[n], round(min(1.0, scale * raw[n]) * GROUPS[n]))) for n in GROUPS}
        for scale in np.linspace(0, 60, 4000)))[2]
    assert all(abs(kept[n] - best[n]) <= 1 for n in GROUPS) and p.met(kept)
    assert kept["one.weight:0"] / 8 > kept["two.weight:0"] / 16


def test_pq_indices_say_what_goes_in_each_round(small: Any) -> None:
    p = over(small)
    made = PqIndex()
    for unit in p.units:  # by hand, with p = 1/2 and q = 1: r = d (1 - I)
        w = unit.levels
        d = len(w)
        found = 1 - d ** (1 - 2) * (w ** 0.5).sum() ** 2 / w.sum()
        assert index(w) == pytest.approx(found)
        assert made._left(w) == d - int(np.floor(d * min(1 - d * (1 - found) / d, 0.9)))
    peaked = dataclasses.replace(p, units=tuple(dataclasses.replace(
        u, levels=np.sort(np.arange(u.size) ** (1.0 + 6 * i))[::-1].astype(float))
        for i, u in enumerate(p.units)))
    kept = made.allocate(peaked)
    assert p.met(kept)
    assert [kept[n] / s for n, s in GROUPS.items()] == sorted(
        (kept[n] / s for n, s in GROUPS.items()), reverse=True)
    even = dataclasses.replace(p, units=tuple(dataclasses.replace(
        u, levels=np.ones(u.size)) for u in p.units))
    assert p.met(made.allocate(even)) and "goes evenly" in p.notes[-1]


def test_candidates_are_chosen_by_their_loss_with_norms_taken_anew(small: Any) -> None:
    net, data, p = small[0], small[3], over(small)
    kept = Candidates(count=5, batches=2).allocate(p)
    assert p.met(kept) and p.notes[-1].startswith("5 candidates")

    def loss(counts: dict[str, int]) -> float:
        lame = without(net, p, counts)
        lame.norm.train(), lame.norm2.train()
        with torch.no_grad():
            return sum(float(default_loss([lame(x)], (x,), {})) for x in data[:2]) / 2

    assert p.measure.renewed(p, kept, 2) == pytest.approx(loss(kept), rel=1e-4)
    draws, count = np.random.default_rng(0), len(p.units)
    plans = [Candidates._drawn(p, logs) for logs in (
        np.zeros(count), *(0.25 * draws.standard_normal(count) for _ in range(4)))]
    assert kept == min(plans, key=loss) and loss(kept) <= loss(Uniform().allocate(p))
    assert len({tuple(plan.values()) for plan in plans}) > 2


@pytest.mark.parametrize("name", ["threshold", "distortion", "erk", "pq-index", "candidates"])
def test_every_rule_meets_a_target(small: Any, name: str) -> None:
    net, data = small[0], small[3]
    result = spacompiler.compile(
        net, (data[0],), target="params=60%", importance="magnitude", allocation=RULES[name],
        calibration=[(x,) for x in data], align=1, repair="none", onnx=False, latency=False)
    assert result.job.proof.holds and abs(
        result.plan.costs["params"]["pruned"] / result.plan.costs["params"]["dense"] - 0.6) < 0.01


@pytest.mark.parametrize("rule", [EcoLayers(examples=3, step=1e-2), Distortion(levels=4)],
                         ids=lambda rule: rule.name)
def test_forward_passes_are_enough_on_a_file(rule: Any, tmp_path: Any) -> None:
    """A module and a file of the same network are measured, and pruned, alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 20), nn.ReLU(),
                        nn.Linear(20, 3)).eval()
    nodes, arrays, x = [], [], "x"
    for name, part in net.named_children():
        if isinstance(part, nn.Linear):
            arrays += [onnx.numpy_helper.from_array(v.detach().numpy(), f"{name}.{k}")
                       for k, v in part.named_parameters()]
            nodes.append(onnx.helper.make_node(
                "Gemm", [x, f"{name}.weight", f"{name}.bias"], [f"y{name}"], transB=1))
        else:
            nodes.append(onnx.helper.make_node("Relu", [x], [f"y{name}"]))
        x = f"y{name}"
    value = partial(onnx.helper.make_tensor_value_info, elem_type=1)
    graph = onnx.helper.make_graph(nodes, "net", [value("x", shape=["n", 6])],
                                   [value(x, shape=["n", 3])], arrays)
    path = str(tmp_path / "net.onnx")
    onnx.save(onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    data, plans = [torch.randn(4, 6) for _ in range(2)], []
    for model, batch in ((net, lambda x: (x,)), (path, lambda x: {"x": x})):
        result = spacompiler.compile(
            model, batch(data[0]), target="params=60%", importance="magnitude", allocation=rule,
            calibration=[batch(x) for x in data], align=1, repair="none", onnx=False,
            latency=False)
        plans.append(sorted(map(len, result.plan.kept.values())))
    assert plans[0] == plans[1] and plans[0]


# --- data that is made up -----------------------------------------------------------------------


def test_made_up_inputs_agree_with_what_batch_norms_met(small: Any) -> None:
    """Noise of mean 0 and variance 1 is not what this network was trained on."""
    net, data = small[0], small[3]
    before = copy.deepcopy(net.state_dict())
    made = sampled(net, (data[0],), None, samples=16, length=1, batch=8, seed=0)
    again = sampled(net, (data[0],), None, samples=16, length=1, batch=8, seed=0)
    assert len(made) == 2 and all(args[0].shape == data[0].shape for args, _ in made)
    assert all(torch.equal(a[0], b[0]) for (a, _), (b, _) in zip(made, again, strict=True))

    def gap(batches: list[torch.Tensor]) -> float:
        found = []
        with torch.no_grad():
            for norm, x in ((net.norm, net.one(torch.cat(batches))), (net.norm2, net.two(
                    torch.relu(net.norm(net.one(torch.cat(batches))))))):
                spread = (norm.running_var + norm.eps).sqrt()
                found.append(((x.mean((0, 2, 3)) - norm.running_mean) / spread).square().mean()
                             + (x.std((0, 2, 3)) / spread - 1).square().mean())
        return float(sum(found))

    draws = torch.Generator().manual_seed(0)
    noise = [torch.randn(data[0].shape, generator=draws) for _ in made]
    assert gap([args[0] for args, _ in made]) < 0.3 * gap(noise)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(p.grad is not None for p in net.parameters())
    fresh = Small().eval()  # norms that have met nothing say nothing
    assert torch.equal(sampled(fresh, (data[0],), None, samples=8, length=1, batch=8, seed=0)
                       [0][0][0], noise[0])
