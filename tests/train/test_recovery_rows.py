"""Rows of recovery: each lowers the loss, and what it is named for happens."""

import copy

import pytest
import torch
from torch import nn

from spacompiler.adapters import merging
from spacompiler.errors import SpaError
from spacompiler.evidence.losses import labelled
from spacompiler.passes.allora import Allora, factors
from spacompiler.passes.chosen_ranks import CfspLora, Diffora, Flexora, _Search, turns
from spacompiler.passes.cores import LoraSb, Nlora
from spacompiler.passes.full import Full
from spacompiler.passes.ggpo import Ggpo
from spacompiler.passes.gs_lora import GsLora
from spacompiler.passes.lisa import Lisa, Live, Owlore
from spacompiler.passes.lora import Lora
from spacompiler.passes.sora import Dylora, Increlora, Sora
from spacompiler.passes.triangular import Triadapt
from spacompiler.train import loop
from spacompiler.train.hooks import Hooks
from spacompiler.train.loop import Training
from spacompiler.train.ranks import Ranks, pairs


class Net(nn.Module):
    """Four residual blocks between two linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
                                    for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def task(**options):
    torch.manual_seed(0)
    net = Net()
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 5, generator=g)
    batches = []
    for _ in range(12):
        x = torch.randn(16, 8, generator=g)
        batches.append(((x,), {"labels": (x @ teacher).argmax(-1)}))
    return Training(net, copy.deepcopy(net), batches[:-4], batches[-4:],
                    lambda results, args, kwargs: labelled(results[0], kwargs["labels"]),
                    **options)


FAST = {"lr": 2e-2, "epochs": 4, "accumulate": 2, "evaluations": 4}
ROWS = [Allora(**FAST), Ggpo(**FAST), GsLora(**FAST, lasso=0.3), Sora(**FAST), Dylora(**FAST),
        Increlora(**FAST), LoraSb(**FAST),
        Nlora(**{**FAST, "lr": 2e-3}), CfspLora(**FAST), Flexora(**FAST, search=3),
        Diffora(**FAST, search=3), Triadapt(**FAST, start=1), Lisa(**FAST), Owlore(**FAST),
        Lora(**FAST, plus=3.0)]


@pytest.mark.parametrize("row", ROWS, ids=[r.name for r in ROWS])
def test_the_loss_falls_and_nothing_is_left_behind(row):
    t = task()
    names = set(t.module.state_dict())
    facts = row.run(t)
    assert facts["after"]["loss"] < 0.9 * facts["before"]["loss"]
    assert set(t.module.state_dict()) == names
    assert not any(m._forward_hooks for m in t.module.modules())


class Seen(Hooks):
    """Counts what the loop calls."""

    def __init__(self):
        self.calls = []

    def optimizer(self, parameters, options):
        self.calls.append("optimizer")
        return torch.optim.AdamW([{"params": list(parameters.values()), "times": 0.0}], lr=1.0)

    def begin(self, step, optimizer):
        self.calls.append(("begin", step, optimizer.param_groups[0]["lr"]))

    def loss(self):
        self.calls.append("loss")

    def graded(self, step):
        self.calls.append(("graded", step))

    def done(self, step, rate):
        self.calls.append(("done", step, rate > 0))


def test_the_loop_calls_its_hooks_in_order():
    t, seen = task(), Seen()
    before = {n: p.clone() for n, p in t.module.named_parameters()}
    loop.train(t, Full(accumulate=16), dict(t.module.named_parameters()), seen)
    assert seen.calls == ["optimizer", ("begin", 0, 0.0), "loss", ("graded", 0), ("done", 0, True)]
    assert all(torch.equal(p, before[n]) for n, p in t.module.named_parameters())


def test_rows_of_an_adapter_slow_down_as_they_grow():
    """Gradients by B and A are those of rows of B A, each times its factor."""
    t = task()
    row = Allora(eta=3.0)
    tuned = adapted(t)
    _, down, up = list(pairs(tuned))[1]
    up.weight.data[0] = 5.0
    by = factors(down, up, 3.0)
    assert by[1] == pytest.approx(3.0) and by[0] < 0.5
    x = torch.randn(6, 8)

    def gradients():
        tuned.zero_grad()
        tuned(x).square().sum().backward()
        return up.weight.grad.clone()

    given, plain, hooks = tuned(x), gradients(), row.hooks(t)
    torch.testing.assert_close(gradients(), plain * by.unsqueeze(1))
    torch.testing.assert_close(tuned(x), given)
    hooks.finish()
    torch.testing.assert_close(gradients(), plain)


def test_noise_grows_with_rows_and_their_gradients():
    t = task()
    tuned = adapted(t, init_lora_weights=False).train()
    _, down, up = next(pairs(tuned))
    layer, x = t.module.first, torch.randn(1, 8)
    clean = layer(x).detach()
    hooks = Ggpo(rank=4, sigma=0.3, beta=0.2).hooks(t)
    up.weight.grad = torch.zeros(16, 4)
    up.weight.grad[5] = 3.0
    hooks.graded(0)
    torch.manual_seed(1)
    noise = torch.cat([layer(x).detach() - clean for _ in range(2000)])
    rows = layer.get_base_layer().weight + up.weight @ down.weight  # alpha = rank
    want = 0.3 * rows.norm(dim=1) + 0.2 * up.weight.grad.square().sum(1)
    torch.testing.assert_close(noise.std(0), want.detach() * x.norm() / 8**0.5, rtol=0.1, atol=0)
    assert torch.equal(tuned.eval()(x), tuned(x)) and torch.equal(layer(x), clean)
    hooks.finish()
    assert torch.equal(layer.train()(x), clean)


def test_one_matrix_of_an_adapter_learns_at_another_rate():
    t = task()
    tuned = adapted(t)
    learned = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    plain, faster = Lora(plus=3.0).hooks(t).optimizer(learned, Lora(plus=3.0)).param_groups
    assert {id(p) for p in faster["params"]} == {id(p) for n, p in learned.items() if "_B" in n}
    assert faster["times"] == 3.0 and "times" not in plain and len(plain["params"]) == 2


@pytest.mark.parametrize("kind, more", [(Lisa, {}), (Owlore, {"outlier": 1.5})])
def test_blocks_take_turns(kind, more, monkeypatch):
    t = task()
    sizes = []
    old = loop._graded

    def graded(*args):
        found = old(*args)
        sizes.append([any(p.grad is not None for p in b.parameters()) for b in t.module.blocks])
        assert t.module.head.weight.grad is not None
        return found

    monkeypatch.setattr(loop, "_graded", graded)
    facts = kind(**FAST, layers=1, every=3, **more).run(t)
    assert all(sum(live) == 1 for live in sizes)
    assert len({tuple(live) for live in sizes}) > 1
    assert all(a == b for a, b in zip(sizes[0::3], sizes[1::3], strict=False))
    assert len(facts["blocks drawn"]) == -(-len(sizes) // 3)


def test_outliers_decide_which_blocks_are_drawn():
    t = task()
    t.module.blocks[2][0].weight.data[:, 3] *= 50
    weights = Owlore().weights(t, [f"blocks.{i}" for i in range(4)])
    assert weights.argmax() == 2 and Lisa().weights(t, range(4)).unique().numel() == 1
    drawn = Owlore(**FAST, layers=1, every=1, outlier=8.0).run(t)["blocks drawn"]
    assert len(drawn) > 4 and all(now == [2] for now in drawn)


def test_a_block_that_rests_forgets_its_moments():
    t = task()
    parameters = dict(t.module.named_parameters())
    hooks = Live(parameters, [f"blocks.{i}" for i in range(4)], torch.ones(4), 1, 1, 0)
    optimizer = torch.optim.AdamW(parameters.values())
    for p in parameters.values():
        optimizer.state[p]["step"] = 1
    hooks.begin(0, optimizer)
    (live,), = hooks.drawn
    own = [f"blocks.{i}." for i in range(4) if i != live]
    assert {n for n, p in parameters.items() if p not in optimizer.state} == {
        n for n in parameters if n.startswith(tuple(own))}


def test_without_blocks_none_is_drawn():
    t = task()
    t.module = nn.Linear(8, 5)
    with pytest.raises(SpaError, match="finds no blocks"):
        Lisa().run(t)


def peft():
    return merging.library()


def adapted(t, **options):
    return peft().PeftModel(t.module, peft().LoraConfig(
        r=4, lora_alpha=4, target_modules=["first", "head"], **options))


def size(down, up):
    return float((down.weight.detach().square().sum() + up.weight.detach().square().sum()).sqrt())


def test_whole_adapters_vanish_under_a_group_lasso():
    assert GsLora(**FAST, lasso=0.0).run(task())["adapters left"] == 10
    assert GsLora(**FAST, lasso=40.0).run(task())["adapters left"] == 0
    t = task()
    (_, down, up), (_, other, _) = pairs(adapted(t))
    down.weight.data *= 50
    up.weight.data += 0.1
    norm = size(down, up)
    hooks = GsLora(lasso=10.0).hooks(t)
    hooks.done(0, 0.3)  # 3 of the norm goes
    assert size(down, up) == pytest.approx(norm - 3) and not other.weight.any()
    assert hooks.finish() == {"adapters": 2, "adapters left": 1}


def test_ranks_vanish_and_the_merged_weights_are_those_of_what_is_left():
    t = task()
    tuned = adapted(t, init_lora_weights=False)
    hooks = Sora(threshold=0.25).hooks(t)
    assert all(isinstance(gate, nn.Parameter) for gate in hooks.ranks.gates()), "they do not train"
    hooks.ranks.gates()[0].data = torch.tensor([1.0, 0.3, -0.2, -0.6])
    hooks.done(0, 1e-3)
    torch.testing.assert_close(hooks.ranks.gates()[0].data, torch.tensor([0.75, 0.05, 0.0, -0.35]))
    x = torch.randn(3, 8)
    before = tuned(x)
    assert list(hooks.finish()["ranks"].values()) == [3, 4]
    torch.testing.assert_close(tuned(x), before)
    _, down, _ = next(pairs(tuned))
    assert not down.weight[2].any() and down.weight[0].any()
    facts = Sora(**FAST, threshold=1e-4).run(task())
    assert sum(facts["ranks"].values()) == 80


def test_the_first_step_follows_the_gradient():
    """What the adapters of LoRA-SB add at first is the best of its rank to - lr sign(G)."""
    t = task()
    tuned = adapted(t)
    weight = t.module.head.get_base_layer().weight
    weight.requires_grad_(True)
    for args, kwargs in t.batches[:8]:
        t.loss([t.module(*args)], args, kwargs).backward()
    step, weight.grad = -0.1 * weight.grad.sign(), None
    hooks = LoraSb(rank=4, alpha=4, lr=0.1).hooks(t)
    assert [n for n, p in tuned.named_parameters() if p.requires_grad and "rank_core" not in n
            and "lora" in n] == []
    hooks.finish()
    _, down, up = list(pairs(tuned))[1]
    added = (up.weight @ down.weight).detach()
    u, s, v = torch.linalg.svd(step, full_matrices=False)
    torch.testing.assert_close(added, u[:, :4] * s[:4] @ v[:4], atol=1e-5, rtol=1e-4)


def test_adapters_start_from_the_first_directions_of_the_gradient():
    """LoRA-GA: A and B are apart from each other, within the first 2 r singular vectors."""
    t = task()
    layer = t.module.head
    for args, kwargs in t.batches[:8]:
        t.loss([t.module(*args)], args, kwargs).backward()
    u, _, v = torch.linalg.svd(layer.weight.grad, full_matrices=False)
    t.module.zero_grad()
    Lora(rank=2, init="lora_ga", logits=0.0).attach(peft(), t, {"head": 2})
    _, down, up = next(pairs(t.module))
    for found, first in ((down.weight.detach(), v[:4]), (up.weight.detach().T, u.T[:4])):
        inside = found @ first.T @ first
        torch.testing.assert_close(inside, found, atol=1e-4, rtol=1e-3)
        assert found.norm() > 0 and torch.linalg.matrix_rank(found) == 2


def test_adapters_from_the_weights_leave_the_network_as_it_was():
    t = task()
    tuned = adapted(t)
    x = torch.randn(3, 8)
    before = t.dense(x)
    hooks = Nlora(rank=4, alpha=4).hooks(t)
    assert {n.rpartition(".")[2] for n, p in tuned.named_parameters() if p.requires_grad
            and "lora" in n} == {"weight", "rank_core"}
    torch.testing.assert_close(tuned(x), before, atol=1e-4, rtol=1e-4)
    up = next(pairs(tuned))[2]
    assert up.weight.any() and not torch.equal(
        t.module.first.get_base_layer().weight, t.dense.first.weight)
    hooks.finish()
    torch.testing.assert_close(tuned(x), before, atol=1e-4, rtol=1e-4)
    other = task()
    tuned = adapted(other)
    Nlora(rank=4, alpha=4, intermediate=True).hooks(other)
    assert all("rank_core" in n for n, p in tuned.named_parameters()
               if p.requires_grad and "lora" in n), "more than C trains"


def test_ranks_grow_where_gradients_say_so():
    """By |p dL/dp| and its deviation, and no more of them at a time than is said."""
    t = task()
    tuned = adapted(t, init_lora_weights=False)
    hooks = Increlora(rank=4, start=1, every=2, top=1, more=2).hooks(t)
    for slope in (1.0, 3.0):
        for (_, down, up), much in zip(pairs(tuned), (1.0, 9.0), strict=True):
            for part in (down, up):
                part.weight.grad = torch.full_like(part.weight, much * slope)
        hooks.graded(0)
        hooks.done(0, 0.1)
    assert [int(g.sum()) for g in hooks.ranks.gates()] == [1, 1]
    hooks.done(1, 0.1)
    assert [int(g.sum()) for g in hooks.ranks.gates()] == [1, 3]


def test_ranks_grow_within_the_total():
    facts = Increlora(**FAST, start=1, total=20, every=2).run(task())
    ranks = facts["ranks"].values()
    assert facts["best_step"] > 4 and 10 < sum(ranks) <= 20 and len(set(ranks)) > 1


@pytest.mark.parametrize("kind", [Increlora, Triadapt], ids=lambda kind: kind.name)
def test_growing_ranks_resume_to_the_same_bits(kind, tmp_path):
    recipe = kind(**{**FAST, "evaluations": 8})

    class Stop(Exception):
        pass

    def run(**options):
        t = task(key="k", **options)
        torch.manual_seed(4)
        return recipe.run(t), t.module.state_dict()

    def stop(stage, done, total):
        if done == 9:
            raise Stop

    whole, want = run()
    with pytest.raises(Stop):
        run(checkpoint=tmp_path, progress=stop)
    resumed, got = run(checkpoint=tmp_path)
    assert resumed["ranks"] == whole["ranks"] and resumed["history"] == whole["history"]
    assert all(torch.equal(got[k], v) for k, v in want.items())


def test_ranks_follow_how_far_blocks_turn_what_they_take():
    t = task()
    with torch.no_grad():
        for i, sign in ((3, -1), (1, 1)):  # one turns it about, one gives what it takes
            one, _, two = t.dense.blocks[i]
            one.weight.copy_(torch.eye(24, 16))
            one.bias.fill_(20.0)
            two.weight.copy_(sign * torch.eye(16, 24))
            two.bias.fill_(-20.0 * sign)
    angles = turns(t.dense, t.batches[:2])
    assert angles["blocks.3"] > 0.999 and angles["blocks.1"] < 0.01
    mean = sum(angles.values()) / 4
    ranks = CfspLora(rank=4).ranks(t, ["blocks.3.0", "blocks.1.2", "head"])
    assert ranks == {"blocks.3.0": round(4 * angles["blocks.3"] / mean), "blocks.1.2": 1}
    assert ranks["blocks.3.0"] > 4
    tuned = CfspLora(rank=4, alpha=8).attach(peft(), t, {"blocks.1.0": 7, "head": 4})
    assert {p: len(down.weight) for p, down, _ in pairs(tuned)} == {
        "base_model.model.blocks.1.0": 7, "base_model.model.head": 4}
    assert t.module.blocks[1][0].scaling == t.module.head.scaling == {"default": 2.0}


@pytest.mark.parametrize("kind", [Flexora, Diffora], ids=lambda kind: kind.name)
def test_layers_that_cannot_help_get_no_adapter(kind):
    """Of two layers that the loss asks for and two that it never sees, the first two are chosen."""
    t = task()
    t.module.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    t.loss = lambda results, args, kwargs: labelled(results[0], kwargs["labels"])
    t.module.forward = lambda x: t.module.head(t.module.blocks[0](t.module.blocks[2](
        t.module.first(x)))) + 0 * t.module.blocks[1](t.module.blocks[3](t.module.first(x))).sum()
    before = {n: p.clone() for n, p in t.module.state_dict().items()}
    paths = [f"blocks.{i}" for i in range(4)]
    found = kind(rank=4, lr=0.1, search=6).ranks(t, paths)
    assert found == {"blocks.0": 4, "blocks.1": 0, "blocks.2": 4, "blocks.3": 0}
    assert all(torch.equal(t.module.state_dict()[n], p) for n, p in before.items())


def test_a_choice_looks_through_the_step_that_it_judges():
    """The slope is that of the held-out loss after the step: by differences."""
    t = task()
    t.module.double()
    row = Flexora(rank=2, lr=0.5)
    row.attach(peft(), t, {"first": 2, "head": 2})
    t.batches = [((a[0].double(),), k) for a, k in t.batches]
    search = _Search(t, row, ["first", "head"], torch.arange(2))
    draws = torch.Generator().manual_seed(3)
    start = {n: torch.randn(p.shape, generator=draws, dtype=torch.float64).requires_grad_()
             for n, p in search.now.items()}
    inner, held = t.batches[:2]

    def after(found):
        search.now = start
        return row.slopes(search, found, held, inner), search.at(search.now, found, held)

    found = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    slope, _ = after(found)
    step = torch.tensor([1e-5, 0.0], dtype=torch.float64)
    (_, more), (_, less) = (after((found + s).detach().requires_grad_()) for s in (step, -step))
    assert float(slope[0]) == pytest.approx(float((more - less).detach()) / 2e-5, rel=1e-4)
    direct, = torch.autograd.grad(search.at(search.now, found, held), found)
    assert abs(float(slope[0] - direct[0])) > 1e-3 * abs(float(slope[0]))  # the control


def test_cores_grow_from_a_corner_where_their_norms_rise():
    t = task()
    tuned = adapted(t)
    hooks = Triadapt(rank=4, start=2, every=1, total=6, epochs=1, accumulate=8).hooks(t)
    first, head = (down for _, down, _ in pairs(tuned))
    core = first.rank_core
    assert torch.equal(core.data, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    head.rank_core.data[1, 0] = 2.0  # this one has learned something
    core.grad = torch.ones(4, 4)
    hooks.graded(0)
    assert core.grad.sum() == 4 and core.grad[:2, :2].all()
    hooks.done(0, 0.1)
    assert [int(p.core_size) for p in (first, head)] == [3, 3]
    hooks._total = 7
    head.rank_core.data[2, 0] = 3.0
    hooks.done(1, 0.1)
    assert [int(p.core_size) for p in (first, head)] == [3, 4] and head.rank_core[3, 3] == 1
    assert hooks.finish() == {"ranks": {p: n for (p, _, _), n in zip(pairs(t.module), (3, 4),
                                                                     strict=True)}}


def test_a_prefix_of_the_ranks_is_an_adapter_of_its_own():
    """Two ranks of eight lose less of a nested adapter than of a plain one."""
    lost = {}
    for row in (Lora(**FAST, norms=False), Dylora(**FAST, norms=False)):
        torch.manual_seed(1)
        t = task()
        lost[row.name] = _prefix_loss(row, t)
    assert lost["dylora"] < lost["lora"]
    assert set(Dylora(**FAST, prefix=2).run(task())["ranks"].values()) == {2}


def _prefix_loss(row, t):
    """The held-out loss with two ranks open, before adapters are merged."""
    found = []
    hooks = row.hooks

    def kept(task):
        made = hooks(task)
        finish = made.finish

        def look():
            ranks = getattr(made, "ranks", None) or Ranks(task.module)
            for gate in ranks.gates():
                gate[2:] = 0
            with torch.no_grad():
                found.append(sum(float(task.loss([task.module(*a)], a, k))
                                 for a, k in task.held_out))
            for gate in ranks.gates():
                gate.fill_(1)
            if not hasattr(made, "ranks"):
                ranks.fold()
            return finish()

        made.finish = look
        return made

    object.__setattr__(row, "hooks", kept)
    row.run(t)
    return found[0]
