"""Importance and allocation passes: formulas against brute force, registry, legal counts."""

import dataclasses

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError, TargetError, UsageError
from spacompiler.evidence.losses import default_loss
from spacompiler.groups.cost import cost
from spacompiler.groups.solution import solve
from spacompiler.models_zoo import load
from spacompiler.plan import legal as allocation
from spacompiler.request import registry
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.records import Scored
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.read.export import trace


def context(name, seed=0):
    module, inputs = load(name).build(seed)
    traced = trace(module, inputs)
    return module, inputs, fresh_context(traced, solve(traced.graph, TABLE), seed)


@pytest.fixture(scope="module")
def llama():
    return context("llama-gqa")


def test_magnitude_is_the_mean_of_powers(llama):
    module, _, ctx = llama
    group = ctx.solution.groups["model.layers.0.mlp.gate_proj.weight:0"]
    mlp = module.model.layers[0].mlp
    parts = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], dim=1)
    for norm in (1, 2):
        got = registry.find("importance", f"magnitude(norm={norm})").score(group, ctx)
        torch.testing.assert_close(got, parts.abs().pow(norm).mean(1).double())


def test_rows_of_a_fibred_group_put_outer_slices_first(llama):
    module, _, ctx = llama
    group = next(g for g in ctx.solution.groups.values() if g.name.endswith("q_proj.weight:0.1"))
    member = next(m for m in group.members if "q_proj" in m.weight)
    weight = module.model.layers[0].self_attn.q_proj.weight
    assert group.shape == (2, 3)
    want = weight.reshape(2, 3, -1)
    assert torch.equal(ctx.rows(member, group), want.detach())


class Small(nn.Module):
    """Two readers of one hidden axis, so that a gate has two places to act."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(9, 4)

    def forward(self, x, gate=None):
        hidden = torch.tanh(self.first(x))
        read = hidden if gate is None else hidden * gate
        return self.left(read) * torch.sigmoid(self.right(read))


def small():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Small(), torch.randn(5, 6)


def test_taylor_is_the_derivative_of_a_gate():
    module, x = small()
    traced = trace(module, (x,))
    ctx = fresh_context(traced, solve(traced.graph, TABLE))
    group = ctx.solution.groups["first.weight:0"]
    ctx.calibrate(("gates",), [((x,), {})], default_loss, groups=[group])
    gate = torch.ones(9, requires_grad=True)
    (want,) = torch.autograd.grad(default_loss([module(x, gate)], (x,), {}), gate)
    got = registry.find("importance", "taylor(per='batch')").score(group, ctx)
    torch.testing.assert_close(got.float(), want.abs(), rtol=1e-4, atol=1e-7)
    assert want.abs().min() > 1e-6


def test_taylor_per_token_adds_absolute_values():
    module, x = small()
    traced = trace(module, (x,))
    ctx = fresh_context(traced, solve(traced.graph, TABLE))
    group = ctx.solution.groups["first.weight:0"]
    taylor = registry.find("importance", "taylor")
    ctx.calibrate(taylor.needs, [((x,), {})], default_loss, groups=[group])
    gates = [torch.ones(5, 9, requires_grad=True) for _ in range(2)]
    hidden = torch.tanh(module.first(x))
    out = module.left(hidden * gates[0]) * torch.sigmoid(module.right(hidden * gates[1]))
    found = torch.autograd.grad(default_loss([out], (x,), {}), gates)
    want = sum(g.abs().sum(0) for g in found)
    torch.testing.assert_close(taylor.score(group, ctx).float(), want, rtol=1e-4, atol=1e-7)


def test_taylor_element_is_weight_times_gradient():
    module, x = small()
    traced = trace(module, (x,))
    ctx = fresh_context(traced, solve(traced.graph, TABLE))
    group = ctx.solution.groups["first.weight:0"]
    ctx.calibrate(("weight_gradients",), [((x,), {})], default_loss, groups=[group])
    default_loss([module(x)], (x,), {}).backward()
    parts = [module.first.weight, module.first.bias[:, None], module.left.weight.T,
             module.right.weight.T]
    grads = [module.first.weight.grad, module.first.bias.grad[:, None], module.left.weight.grad.T,
             module.right.weight.grad.T]
    want = sum((w * g).abs().sum(1) for w, g in zip(parts, grads, strict=True))
    got = registry.find("importance", "taylor-element").score(group, ctx)
    torch.testing.assert_close(got.float(), want.detach(), rtol=1e-4, atol=1e-7)


def test_random_depends_on_seed_and_group_only(llama):
    _, _, ctx = llama
    score = registry.find("importance", "random").score
    a, b = list(ctx.solution.groups.values())[:2]
    other = dataclasses.replace(ctx, seed=1)
    assert torch.equal(score(a, ctx), score(a, ctx))
    assert not torch.equal(score(a, ctx), score(a, other))
    assert score(b, ctx).shape == b.shape


@pytest.mark.parametrize("allocator", ["uniform", "global"])
@pytest.mark.parametrize("name", ["resnet", "densenet", "mobilenet", "llama-gqa", "gpt2"])
@pytest.mark.parametrize("target", ["params=80%", "macs=60%", "body=55%"])
def test_targets_are_met_within_a_point(allocator, name, target):
    module, inputs = load(name).build()
    result = spacompiler.compile(module, inputs, target=target, importance="magnitude",
                                 allocation=allocator, align=1, layout="any", dry_run=True)
    metric, share = target.split("=")
    pair = result.plan.costs[metric]
    assert abs(pair["pruned"] / pair["dense"] - float(share[:-1]) / 100) <= 0.01


def test_global_prunes_the_least_important_layer_more():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    class Ends:
        name, needs, comparable = "ends", (), True

        def score(self, group, ctx):
            ramp = torch.ones(group.shape)
            if group.name.startswith("b"):
                ramp[4:] = 1e-3
            return ramp

    result = spacompiler.compile(Two(), (torch.randn(2, 8),), target="params=70%",
                                 importance=Ends(), allocation="global", align=1, dry_run=True)
    kept = {g: len(k) for g, k in result.plan.kept.items()}
    assert set(kept) == {"b.weight:0"}
    assert set(range(4)) <= set(result.plan.kept["b.weight:0"])


def test_cost_is_counted_on_the_real_arrays():
    module, inputs = load("mobilenet").build()
    solution = spacompiler.inspect(module, inputs)
    assert cost(solution, "params").total == sum(p.numel() for p in module.parameters())
    linear = nn.Linear(6, 5)
    solution = spacompiler.inspect(linear, (torch.randn(3, 6),))
    assert cost(solution, "macs").total == 3 * 6 * 5


def test_marginal_cost_equals_the_difference():
    module, inputs = load("densenet").build()
    solution = spacompiler.inspect(module, inputs)
    price = cost(solution, "macs")
    for group in solution.groups.values():
        before = price.total
        change = price.change({group.atom: group.size - 1})
        assert price.total == before
        assert price.set({group.atom: group.size - 1}) == before + change < before


def test_unreachable_target_names_what_binds():
    module, inputs = load("resnet").build()
    with pytest.raises(TargetError) as caught:
        spacompiler.compile(module, inputs, target="params=5%", importance="magnitude",
                            floor=0.8, dry_run=True)
    assert "floor" in caught.value.why and "remain" in caught.value.why


@dataclasses.dataclass(frozen=True)
class Keeps:
    """A schedule that leaves nothing that may go, and allocates all the same."""

    name = "keeps"

    def run(self, task):
        counts, uniform = task.allocate((), {})
        return Scored(None, (), {}, counts, uniform)


@pytest.mark.parametrize("options, why, fix", [
    ({"only": ("model.layers.0.mlp.gate_proj.weight:0",)},
     "no stock config of LlamaConfig can say fewer", "--layout any"),
    ({"floor": 0.99}, "leave every group its full size", "lower --floor"),
    ({"schedule": Keeps()}, "there is none", "let more go"),
])
def test_a_uniform_layout_in_which_nothing_can_shrink_says_why(options, why, fix):
    module, inputs = load("llama-gqa").build()
    with pytest.raises(TargetError, match="no group can shrink in the uniform layout") as caught:
        spacompiler.compile(module, inputs, target="body=85%", importance="magnitude", align=1,
                            layout="uniform", dry_run=True, **options)
    assert why in caught.value.why and fix in caught.value.fix


def normed():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def pair():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


@pytest.mark.parametrize("make, options, more", [
    (lambda: nn.Linear(4, 4), {}, ""), (lambda: nn.Linear(4, 4), {"roles": ("head",)}, ""),
    (pair, {"roles": ("head",)}, "--role channel"), (pair, {"ignore": ("*",)}, "fewer --ignore"),
    (normed, {}, "--role hidden --approximate"), (normed, {"roles": ("hidden",)}, "--approximate"),
    (normed, {"roles": ("head",), "approximate": True}, "--role hidden"),
])
def test_nothing_to_prune_is_an_error_that_names_what_could_help(make, options, more):
    with pytest.raises(TargetError, match="nothing to prune") as caught:
        spacompiler.compile(make(), (torch.randn(2, 4),), target="params=50%",
                            importance="magnitude", dry_run=True, **options)
    assert caught.value.fix.partition("; let more go with ")[2] == more


@pytest.mark.parametrize("patterns, gone", [
    ({"only": ("*mlp*",)}, lambda n: "mlp" in n),
    ({"ignore": ("*layers.0*",)}, lambda n: "layers.1" in n),
    ({"roles": ("channel",)}, lambda n: "mlp" in n),
])
def test_the_user_says_what_may_go(patterns, gone):
    module, inputs = load("llama-gqa").build()
    result = spacompiler.compile(module, inputs, target="body=85%", importance="magnitude",
                                 align=1, layout="any", dry_run=True, **patterns)
    assert result.plan.kept and all(gone(name) for name in result.plan.kept)


def test_pattern_that_matches_nothing_is_an_error():
    module, inputs = load("mlp").build()
    with pytest.raises(UsageError, match="matches no group"):
        spacompiler.compile(module, inputs, target="params=50%", importance="magnitude",
                            only=("*atention*",), dry_run=True)


@pytest.mark.parametrize("what, error", [
    ("taylr", "unknown importance pass"),
    ("nowhere:Pass", "cannot load"),
    ("math:pi", "is no importance pass"),
    ("magnitude(norm=3)", "cannot make pass"),
    ("magnitude(nrm=1)", "cannot make pass"),
    ("magnitude(norm=", "cannot read the options"),
    (object(), "is no importance pass"),
])
def test_unfit_passes_are_named(what, error):
    with pytest.raises(UsageError, match=error):
        registry.find("importance", what)


def test_did_you_mean():
    with pytest.raises(UsageError) as caught:
        registry.find("importance", "taylr")
    assert "did you mean 'taylor'" in caught.value.fix


def test_a_misspelt_repair_is_offered_the_words_that_are_no_pass():
    module, inputs = load("mlp").build()
    with pytest.raises(UsageError) as caught:
        spacompiler.compile(module, inputs, target="params=50%", repair="nonne", dry_run=True)
    assert "did you mean 'none'" in caught.value.fix and "auto" in caught.value.fix
    with pytest.raises(UsageError, match="unknown compensation") as caught:
        registry.check_name("compensation", "nonne")
    assert "did you mean 'none'" in caught.value.fix
    registry.check_name("compensation", "none")


@pytest.mark.parametrize("bad", [
    lambda g: torch.ones(3), lambda g: torch.full(g.shape, float("nan"))])
def test_invalid_scores_are_refused(bad):
    class Bad:
        name, needs = "bad", ()

        def score(self, group, ctx):
            return bad(group)

    module, inputs = load("mlp").build()
    with pytest.raises(SpaError, match="no valid scores"):
        spacompiler.compile(module, inputs, target="params=50%", importance=Bad(), dry_run=True)


@pytest.mark.parametrize("size, multiple, floor, legal", [
    (40, 16, 0.0, (16, 32, 40)), (40, 8, 0.5, (24, 32, 40)), (3, 1, 0.1, (1, 2, 3)),
    (5, 8, 0.0, (5,)),
])
def test_legal_counts(size, multiple, floor, legal):
    assert allocation.legal_counts(size, multiple, floor) == legal


def test_widths_are_aligned_by_default():
    module, inputs = load("vgg").build()
    result = spacompiler.compile(module, inputs, target="macs=60%", importance="magnitude",
                                 align=4, dry_run=True)
    for name, kept in result.plan.kept.items():
        assert len(kept) % 4 == 0, name
