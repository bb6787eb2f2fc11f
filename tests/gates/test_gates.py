"""Learned gates: what is folded computes what the gates did, targets are met, mechanisms act."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import spacompiler
from spacompiler.artifact.recorded import claims
from spacompiler.errors import SpaError, TargetError, UsageError
from spacompiler.evidence.calibration import Calibration
from spacompiler.evidence.losses import labelled
from spacompiler.gates import gating, network, scaling
from spacompiler.gates.beside import beside
from spacompiler.gates.network import Gated, ones
from spacompiler.gates.projection import Projection, choices, tables
from spacompiler.gates.refits import _fit
from spacompiler.gates.relaxations import relaxation
from spacompiler.gates.soft_cost import SoftCost
from spacompiler.groups.cost import cost
from spacompiler.models_zoo import load
from spacompiler.passes.bip import Bip
from spacompiler.passes.compresso import Compresso
from spacompiler.passes.ddp import Ddp
from spacompiler.passes.factors import Factors
from spacompiler.passes.gates import Gates
from spacompiler.passes.grasp_gates import GraspGates
from spacompiler.passes.lapp import Lapp
from spacompiler.passes.pat import Pat
from spacompiler.passes.polarise import Polarise
from spacompiler.passes.progressive import Progressive
from spacompiler.passes.tas import Tas
from spacompiler.plan import legal
from spacompiler.plan.plan import Plan
from spacompiler.plan.problem import Problem
from spacompiler.stages.proof import relative_error
from spacompiler.stages.records import Scheduling
from spacompiler.torch_backend.backend import TORCH
from spacompiler.torch_backend.prove import masked_dense
from spacompiler.torch_backend.run.recompute import Budget


class Images(nn.Module):
    """Convolutions with batch norms and a residual sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.one, self.two = nn.Conv2d(24, 40, 3, padding=1), nn.Conv2d(40, 24, 3, padding=1)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.two(torch.relu(self.one(x)))).mean((2, 3)))


class Text(nn.Module):
    """Attention of two pairs of heads and a gated MLP on a residual stream."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 16), nn.RMSNorm(16, eps=1e-6)
        for name, width in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8), ("o_proj", 16)):
            setattr(self, name, nn.Linear(16, width, bias=False))
        self.gate, self.up = nn.Linear(16, 40, bias=False), nn.Linear(16, 40, bias=False)
        self.down, self.head = nn.Linear(40, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids)
        h = self.norm(x)
        q = self.q_proj(h).unflatten(-1, (2, 2, 4)).permute(0, 2, 3, 1, 4)
        k, v = (p(h).unflatten(-1, (2, 1, 4)).permute(0, 2, 3, 1, 4)
                for p in (self.k_proj, self.v_proj))
        y = torch.softmax(q @ k.mT / 2, -1) @ v
        x = x + self.o_proj(y.permute(0, 3, 1, 2, 4).flatten(2))
        return self.head(x + self.down(functional.silu(self.gate(x)) * self.up(x)))


def images():
    draws = torch.Generator().manual_seed(1)
    return [((torch.randn(4, 1, 6, 6, generator=draws, dtype=torch.float64),),
             {"labels": torch.randint(0, 4, (4,), generator=draws)}) for _ in range(4)]


def text():
    draws = torch.Generator().manual_seed(1)
    return [((), {"input_ids": torch.randint(0, 16, (2, 8), generator=draws)}) for _ in range(4)]


def loss(results, args, kwargs):
    labels = kwargs.get("labels", kwargs.get("input_ids"))
    return labelled(results[0], labels)


@pytest.fixture(scope="module")
def traced():
    """Both networks in float64, traced once, with their batches."""
    found = {}
    for name, make, batches in (("images", Images, images()), ("text", Text, text())):
        torch.manual_seed(0)
        module = make().double().eval()
        args, kwargs = batches[0]
        kwargs = {k: v for k, v in kwargs.items() if k != "labels"}
        trace, solution = TORCH.trace(module, (args, kwargs))
        found[name] = module, trace, solution, batches, dict(trace.program.state_dict)
    return found


def task_on(found, share=0.6, roles=("channel", "head")):
    module, trace, solution, batches, stored = found
    trace.program.state_dict.update(stored)
    trace.repaired.clear()
    groups = tuple(legal.candidates(solution, roles=roles))
    price = cost(solution, "macs")
    dense = price.total

    def problems(candidates, scores):
        units = legal.units(solution, candidates, scores, uniform=False, align=1, lanes=8,
                            floor=0.0)
        return [(Problem(units, price, share * dense, dense, "macs"), "")]

    return Scheduling(module, trace, solution, groups, Calibration("test", batches), loss,
                      lambda *given: ({}, ""), problems, name="test")


def few(row, **options):
    return replace(row, steps=12, **options)


ROWS = [(few(Gates(), criterion="taylor", length=0, scales=3, streams=True), "text"),
        (few(Gates(), criterion="taylor", scales=3), "images"),
        (few(GraspGates(), scales=3), "text"), (few(Compresso(), beside_lr=0.01), "text"),
        (few(Ddp()), "images"), (few(Lapp()), "images"), (few(Tas()), "images"),
        (few(Bip()), "images"), (few(Polarise()), "images"),
        (few(Progressive(), budget="projection", relaxation="soft-l0"), "text")]


@pytest.mark.parametrize("row, net", ROWS, ids=[f"{r.name}-{n}" for r, n in ROWS])
def test_the_folded_network_computes_what_the_gates_did(row, net, traced, monkeypatch):
    task = task_on(traced[net])
    seen, scaled = [], []
    monkeypatch.setattr(gating, "check", lambda gated, before, after, *rest: seen.append(
        (before, after)))
    fold = scaling.fold
    monkeypatch.setattr(scaling, "fold", lambda gated, network, gates: (
        scaled.append((gated, gates, gated.call(
            call(task), gates, choices=chosen, double=True))), fold(gated, network, gates)))
    with torch.no_grad():
        whole = Gated(task.trace, task.solution, task.candidates).call(
            call(task), ones(task.candidates), double=True)
    scored = row.run(task)
    kept = tables(list(scored.candidates), scored.scores, scored.counts)
    chosen = choices(list(scored.candidates), kept)
    assert_met(task, chosen)
    for before, after in seen:
        assert relative_error(after, before) <= 1e-10
        assert relative_error(whole, before) > 1e-4  # the control: gates do something
        assert relative_error(masked_dense(task.trace, task.solution, chosen), before) <= 1e-10
    unscaled = masked_dense(task.trace, task.solution, chosen)
    row.after(task, chosen)
    if row.scales:
        before = scaled[0][2]
        after = masked_dense(task.trace, task.solution, chosen)
        assert relative_error(after, before) <= 1e-10
        assert relative_error(unscaled, before) > 1e-4
    assert seen or row.scales or scored.scores


def test_the_hidden_dimension_is_gated_and_its_gates_are_one_or_zero(traced):
    task = task_on(traced["text"], roles=("hidden",))
    row = few(GraspGates(), criterion="magnitude", scales=3)
    scored = row.run(task)
    assert [g.role for g in scored.candidates] == ["hidden"]
    chosen = choices(list(scored.candidates), tables(
        list(scored.candidates), scored.scores, scored.counts))
    assert_met(task, chosen)
    row.after(task, chosen)
    assert "no factors were learned" in task.notes[-1] and not task.trace.repaired
    gates = {g.name: torch.from_numpy(chosen[g.atom].table).double() for g in scored.candidates}
    with torch.no_grad():
        gated = Gated(task.trace, task.solution, scored.candidates).call(
            call(task), gates, double=True)
    assert relative_error(gated, masked_dense(task.trace, task.solution, chosen)) <= 1e-10


def test_norms_take_the_statistics_of_what_stays():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3)).double()
    trace, solution = TORCH.trace(net, ((torch.randn(4, 6, dtype=torch.float64),), {}))
    group = next(g for g in solution.groups.values() if g.name == "0.weight:0")
    kept = np.arange(12) % 3 > 0
    gated, gates = Gated(trace, solution, [group]), {group.name: torch.from_numpy(kept).double()}
    chosen, given = choices([group], {group.name: kept}), (trace.args, trace.kwargs)
    want = masked_dense(trace, solution, chosen)
    assert relative_error(gated.call(given, gates, choices=chosen, double=True), want) <= 1e-12
    assert relative_error(gated.call(given, gates, double=True), want) > 1e-3  # the control


def test_operators_on_the_hidden_axis_are_folded_exactly(traced, monkeypatch):
    task, seen = task_on(traced["text"], roles=("hidden",)), []
    monkeypatch.setattr(gating, "check", lambda gated, *both: seen.append(both[:2]))
    with torch.no_grad():
        whole = Gated(task.trace, task.solution, task.candidates).call(
            call(task), ones(task.candidates), double=True)
    row = few(Pat(), beside="operators(rank=4)", beside_lr=0.05)
    scored = row.run(task)
    chosen = choices(list(scored.candidates), tables(
        list(scored.candidates), scored.scores, scored.counts))
    assert_met(task, chosen)
    (before, after), = seen
    assert relative_error(after, before) <= 1e-10 and relative_error(whole, before) > 1e-4
    assert relative_error(masked_dense(task.trace, task.solution, chosen), before) <= 1e-10
    changed = {n for n, x in task.trace.program.state_dict.items() if not torch.equal(
        x, task.module.state_dict()[n])}
    assert changed == {"o_proj.weight", "down.weight"}  # a tied one is read elsewhere, too
    with pytest.raises(SpaError, match="no operator can stand anywhere"):
        beside("operators").start(Gated(task.trace, task.solution, []), dict().__getitem__, None)
    with pytest.raises(TargetError, match="nothing to prune"):
        few(Pat()).run(task_on(traced["text"], roles=("no role",)))


def test_fewer_hidden_dims_load_in_plain_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    module, inputs = load("llama-gqa").build()
    draws = torch.Generator().manual_seed(0)
    result = spacompiler.compile(
        module, inputs, target="params~80%", roles=("hidden",), align=4, onnx=False, latency=False,
        calibration=[{"input_ids": torch.randint(0, 60, (2, 16), generator=draws)}],
        schedule=replace(Pat(), steps=3, beside="operators(rank=4)"))
    result.save(tmp_path / "out")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.hidden_size < 48 and result.job.proof.holds
    ids = torch.randint(0, 60, (1, 9), generator=draws)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, result.module(input_ids=ids).logits)


def test_operators_begin_as_none_and_their_identity_loss_is_that_of_their_rows(traced):
    task = task_on(traced["text"], roles=("hidden",))
    made, stored = beside("operators(rank=3, identity=2.0)"), task.trace.program.state_dict
    made.start(Gated(task.trace, task.solution, task.candidates), stored.__getitem__,
               torch.Generator().manual_seed(0))
    w = stored["down.weight"]
    assert torch.equal(made.weight("down.weight"), w) and float(made.term().detach()) < 1e-20
    a, b, v = (made.parameters[f"down.weight {part}"] for part in "ABv")
    with torch.no_grad():
        for p in (a, b, v):
            p.copy_(torch.randn_like(p))
    want = torch.diag(v) @ (torch.eye(16, dtype=w.dtype) + b @ a) @ w
    torch.testing.assert_close(made.weight("down.weight"), want)
    off = (a @ a.T - torch.eye(3, dtype=w.dtype)).square().mean() / 2  # of two operators
    assert float(made.term().detach()) == pytest.approx(2 * float(off.detach()))


def test_a_mask_hardens_and_then_learns_no_more(traced):
    made = relaxation("annealed(frozen=0.8, strength=2.0)")
    made.parameters = {"g": torch.tensor([0.3, -0.1, 0.7], requires_grad=True)}
    assert torch.allclose(made.gate(0.0, None)["g"], torch.sigmoid(
        made.parameters["g"]) + 0.5)
    assert torch.allclose(made.gate(1.0, None)["g"], torch.tensor([1.0, 0.0, 1.0]), atol=1e-6)
    assert not made.open(0.9)["g"].requires_grad and not made.term().requires_grad
    opened = made.open(0.5)["g"]
    assert opened.tolist() == [1, 0, 1] and torch.autograd.grad(
        opened.sum(), made.parameters["g"])[0].min() > 0
    assert float(made.term().detach()) == pytest.approx(2 * (0.04 + 0.16 + 0.04) / 3)


def test_factors_alone_leave_what_goes_to_the_allocation(traced):
    task = task_on(traced["text"])
    given = task.calibration.batches
    task = replace(task, calibration=Calibration("test", given, beside=given[:1]))
    row = Factors(scales=3, length=0)
    scored = row.run(task)
    assert not scored.counts and set(scored.scores) == {g.name for g in task.candidates}
    seen = {k: float(s["covariance"].count) for k, s in scored.context._inputs.items() if s}
    tokens = sum(b[1]["input_ids"].numel() for b in (*given, given[0]))
    assert seen and set(seen.values()) == {tokens}  # what the model wrote on counts, too
    chosen = choices(list(scored.candidates), tables(
        list(scored.candidates), scored.scores, {g.name: g.size // 2 for g in task.candidates}))
    before = masked_dense(task.trace, task.solution, chosen)
    row.after(task, chosen)
    assert relative_error(masked_dense(task.trace, task.solution, chosen), before) > 1e-4
    assert {n for n, x in task.trace.program.state_dict.items() if not torch.equal(
        x, task.module.state_dict()[n])} == {"o_proj.weight", "down.weight"}


@pytest.mark.parametrize("schedule, words", [("grasp-gates", ""), ("", "repairs nothing")])
def test_factors_are_a_repair_that_the_recipe_names(schedule, words, tmp_path):
    recipe = {"model": "m", "repair": "none", "schedule": schedule}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert words in claims(tmp_path, {}, {"repaired": ["a"]}, Plan({}, {}))
    assert bool(claims(tmp_path, {}, {"repaired": ["a"]}, Plan({}, {}))) == bool(words)


@pytest.mark.parametrize("make, words", [
    (lambda: GraspGates(budget="penalty"), "masks that meet the budget"),
    (lambda: Polarise(budget="projection"), "holds for all inputs"),
    (lambda: Ddp(refit=0.1), "refit needs masks"), (lambda: Ddp(relaxation="l0"), "unknown relax"),
    (lambda: Ddp(budget="none"), "unknown budget"), (lambda: Ddp(beside="all"), "train beside"),
])
def test_what_cannot_be_combined_is_said_at_once(make, words):
    with pytest.raises(UsageError, match=words) as error:
        make()
    assert error.value.fix


def test_what_learned_under_masks_is_not_scaled_and_tied_arrays_stay_one(traced):
    task = task_on(traced["text"])
    scored = few(Progressive(), relaxation="soft-l0", budget="projection").run(task)
    stored, tied = task.trace.program.state_dict, task.trace.tied
    names = [n for n in stored if tied[n] == tied["head.weight"]]
    assert len(names) == 2 and torch.equal(*(stored[n] for n in names))
    assert not torch.equal(stored["head.weight"], task.module.head.weight)
    kept = tables(list(scored.candidates), scored.scores, scored.counts)["gate.weight:0"]
    assert np.array_equal(~(stored["down.weight"] == 0).all(0).numpy(), kept)  # what went is zero


def test_a_budget_comes_down_step_by_step(traced, monkeypatch):
    task, shares = task_on(traced["images"]), []
    old = Projection.counts

    def counts(self, order, *, share=None, exact=False):
        kept = old(self, order, share=share, exact=exact)
        shares.append(self.problem.price(kept) / self.problem.dense)
        return kept

    monkeypatch.setattr(Projection, "counts", counts)
    Progressive(steps=12, every=2).run(task)
    assert shares[0] == 1.0 and all(a >= b - 0.02 for a, b in pairwise(shares))
    assert len({round(s, 2) for s in shares}) > 3 and abs(shares[-1] - 0.6) <= 0.01


@pytest.mark.parametrize("row", [few(Gates(), criterion="taylor", scales=0), few(Compresso())],
                         ids=["gates", "compresso"])
def test_what_is_not_held_for_the_step_back_changes_nothing(row, traced, monkeypatch):
    asked = []
    monkeypatch.setattr(network, "budget", lambda *call: asked.append(Budget(0)) or asked[-1])
    plain = replace(row, lean=False).run(task_on(traced["text"])).scores
    assert not asked
    lean = row.run(task_on(traced["text"])).scores
    assert len(asked) >= row.steps
    assert plain and all((plain[name] == lean[name]).all() for name in plain)


def test_gates_know_how_weights_answer_to_them(traced):
    """The implicit term of bilinear masks: - m |g|^2 / decay, g the gradient by what reads them."""
    task, row = task_on(traced["images"]), few(Bip())
    gated = row._gated(task)
    scores = {g.name: torch.rand(g.shape, generator=torch.Generator().manual_seed(2))
              for g in gated.groups}
    (problem, _), = task.problems(gated.groups, {n: s.numpy() for n, s in scores.items()})
    made, name = row._learner(task, gated, problem, None, scores), "one.weight:0"
    made.decay = 0.5
    made._project(0.0)
    made.objective(traced["images"][3][0], 0.0).backward()
    p = made.relaxation.parameters[name]
    before, slope = p.grad.clone(), torch.sigmoid(p.detach()) * torch.sigmoid(-p.detach())
    made._imply()
    squares = made.beside.parameters["two.weight"].grad.square().sum((0, 2, 3))
    assert squares.any() and 0 < int(made._kept[name].sum()) < 40
    torch.testing.assert_close(p.grad - before, (-made._kept[name].float() * squares * slope / 0.5
                                                 ).float(), rtol=1e-3, atol=1e-9)


def call(task):
    return task.trace.labelled(task.trace.args, task.trace.kwargs)


def assert_met(task, chosen):
    price = cost(task.solution, "macs")
    dense = price.total
    got = price.set({atom: c.count for atom, c in chosen.items()})
    assert abs(got / dense - 0.6) <= 0.01 + 1e-9


def test_a_slice_that_stays_takes_away_what_the_others_cannot_say():
    """Refit without a slice = refit with it, less w'_u r_u; blocks go together."""
    torch.manual_seed(0)
    x = torch.randn(200, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    weight, gram = torch.randn(5, 8, dtype=torch.float64), x.T @ x / 200
    slot = torch.tensor([0, 1, 2, 2, 3, 4, 5, 5])
    kept = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    made, columns, (residual,) = _fit(weight, gram, kept, [slot], 1e-12)
    for u in (1, 2):
        less = _fit(weight, gram, kept & (slot != u), [slot], 1e-12)[0]
        at = slot == u
        own = (x @ residual[:, at]) @ columns[:, at].T
        torch.testing.assert_close(x @ (made - less).T, own, rtol=1e-6, atol=1e-6)
        plain = x[:, at] @ weight[:, at].T  # the control: what it gives by itself is much else
        assert (own - plain).norm() > 0.1 * own.norm()
    out = slot == 3  # what is out would bring what the others do not say
    torch.testing.assert_close((x @ residual[:, out]).T @ x[:, kept],
                               torch.zeros(1, 7, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_soft_cost_is_the_cost_at_whole_counts_and_its_slope_is_a_price(traced):
    _, _, solution, _, _ = traced["images"]
    groups = list(legal.candidates(solution, roles=("channel", "head")))
    price = cost(solution, "macs")
    soft = SoftCost(price, groups)
    opened = {g.name: torch.ones(g.shape, requires_grad=True) for g in groups}
    total = soft(opened)
    assert float(total.detach()) == price.total
    slopes = torch.autograd.grad(total, list(opened.values()))
    for group, slope in zip(groups, slopes, strict=True):
        less = price.change({group.atom: group.size - 1})
        assert float(slope.reshape(-1, group.size).sum(0)[0]) == pytest.approx(-less)


def test_a_projection_keeps_the_best_slices_that_the_budget_has_room_for(traced):
    task = task_on(traced["images"])
    order = {g.name: np.random.default_rng(i).random(g.shape)
             for i, g in enumerate(task.candidates)}
    (problem, _), = task.problems(task.candidates, order)
    counts = Projection(problem).counts(order, exact=True)
    assert problem.met(counts)
    kept = tables(list(task.candidates), order, Projection(problem).by_group(counts))
    lost = [order[n][~t] for n, t in kept.items()]
    stay = [order[n][t] for n, t in kept.items()]
    assert np.quantile(np.concatenate(lost), 0.9) < np.quantile(np.concatenate(stay), 0.3)
