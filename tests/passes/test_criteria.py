"""Criteria against direct re-derivations of their formulas on tiny models, element by element."""

import functools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import spacompiler
from spacompiler.cli.main import app
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.losses import default_loss
from spacompiler.evidence.statistics import OF_INPUTS
from spacompiler.evidence.surgeon import blocks, removals
from spacompiler.groups.solution import solve
from spacompiler.models_zoo import load
from spacompiler.request import registry
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.backend import TORCH
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.gather.gradients import KINDS
from spacompiler.torch_backend.gather.relevance import _like, rules
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.run.runner import OverridingRunner

BATCHES = 3


class Net(nn.Module):
    """A plain convolution, a grouped one with stride, batch norms, and a linear head."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 12, 3, stride=2, groups=2), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(self.norm2(self.two(x)))
        return self.head(x.mean((2, 3)))


@functools.cache
def solved(module):
    batch = BATCH[module]
    traced = trace(module, batch[0] or batch[1])
    return traced, solve(traced.graph, TABLE)


BATCH = {}


def context(module, batches):
    BATCH.setdefault(module, batches[0])
    return fresh_context(*solved(module))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net().eval()
        for norm in (module.norm, module.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        batches = [((torch.randn(4, 3, 9, 9),), {}) for _ in range(BATCHES)]
    return module, batches


@pytest.fixture(scope="module")
def llama():
    module, _ = load("llama-gqa").build(0)
    size = module.config.vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batches = [((), {"input_ids": torch.randint(0, size, (2, 12))}) for _ in range(BATCHES)]
    return module.eval(), batches


def seen(module, layer, batches):
    """What a layer reads, example after example."""
    found = []
    hook = layer.register_forward_pre_hook(lambda m, args: found.append(args[0].detach()))
    with torch.no_grad():
        for args, kwargs in batches:
            module(*args, **kwargs)
    hook.remove()
    return torch.cat(found)


def scored(name, group, module, batches):
    ctx = context(module, batches)
    criterion = registry.find("importance", name)
    wanted = ctx.solution.groups[group]
    ctx.calibrate(criterion.needs, batches, default_loss, groups=[wanted])
    return criterion.score(wanted, ctx)


# --- statistics of inputs, by hand: X (shared, samples, features) and W (shared, outputs, features)


def mlp(module, batches):
    layer = module.model.layers[0].mlp.down_proj
    return seen(module, layer, batches).reshape(1, -1, 40), layer.weight[None]


def attention(module, batches):
    layer = module.model.layers[0].self_attn.o_proj
    return seen(module, layer, batches).reshape(1, -1, 48), layer.weight[None]


def grouped(module, batches):
    x = functional.unfold(seen(module, module.two, batches), 3, stride=2)
    x = x.reshape(len(x), 2, 36, -1).permute(1, 0, 3, 2).reshape(2, -1, 36)
    return x, module.two.weight.reshape(2, 6, 36)


PLACES = {
    "mlp": ("llama", "model.layers.0.mlp.gate_proj.weight:0", mlp, (40,), 1),
    "kv": ("llama", "model.layers.0.self_attn.q_proj.weight:0.0", attention, (2,), 24),
    "query": ("llama", "model.layers.0.self_attn.q_proj.weight:0.1", attention, (2, 3), 8),
    "grouped": ("net", "one.weight:0.1", grouped, (2, 4), 9),
}


def sliced(values, shape, per):
    return values.reshape(-1, per).sum(1).reshape(shape)


def variance(x):
    return x.double().var(1, correction=0)


def flap(x, examples):
    """The released code's running value, over examples of equal length."""
    mean, value = 0.0, 0.0
    for n, one in enumerate(x.double().unflatten(1, (examples, -1)).unbind(1)):
        mean = (n * mean + one.mean(1)) / (n + 1)
        value = value * (n - 1) / n + (one - mean[:, None]).square().sum(1) / (n + 1) if n else 0.0
    return value


FORMULAS = {
    "wanda": lambda x, w, n: w.abs().mean(1) * x.norm(dim=1),
    "fluctuation(metric='IFV', published=False)": lambda x, w, n: variance(x),
    "fluctuation(published=False)": lambda x, w, n: variance(x) * w.square().sum(1),
    "fluctuation(metric='WIFN', published=False)":
        lambda x, w, n: w.abs().mean(1) * x.norm(dim=1),
    "fluctuation(metric='IFV')": lambda x, w, n: flap(x, n),
    "fluctuation": lambda x, w, n: flap(x, n) * w.square().sum(1),
    "fluctuation(metric='WIFN')":
        lambda x, w, n: w.abs().mean(1) * (x.square().sum(1) / n).sqrt(),
    "fluctuation(standardised=True)": lambda x, w, n: flap(x, n) * w.square().sum(1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FORMULAS)
def test_forward_criteria_are_their_formulas(place, name, request):
    which, group, gather, shape, per = PLACES[place]
    module, batches = request.getfixturevalue(which)
    x, w = gather(module, batches)
    features = FORMULAS[name](x, w.detach(), BATCHES * (2 if which == "llama" else 4))
    if "fluctuation" in name and "published" not in name and place in ("kv", "query"):
        features = features.square()
    if "standardised" in name:  # feature by feature, then the mean over a slice
        features = (features - features.mean()) / features.std(correction=1) / per
    want = sliced(features, shape, per)
    got = scored(name, group, module, batches)
    torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("place", PLACES)
def test_covariance_is_that_of_the_inputs(place, request):
    which, name, gather, _, _ = PLACES[place]
    module, batches = request.getfixturevalue(which)
    ctx = context(module, batches)
    group = ctx.solution.groups[name]
    x, w = gather(module, batches)
    ctx.calibrate(("covariance",), batches, default_loss, groups=[group])
    (view,) = ctx.consumers(group)
    gram = x.double().mT @ x.double()
    assert torch.equal(view.weight, w)
    torch.testing.assert_close(view.covariance.gram, gram, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(view.covariance.centred[0], x[0].double().T.cov(correction=0),
                               rtol=1e-4, atol=1e-6)


def test_streaming_gives_the_same_statistics_and_drops_them(llama):
    module, batches = llama
    whole, streamed = context(module, batches), context(module, batches)
    groups = [g for g in whole.solution.groups.values() if g.role in ("channel", "head")]
    whole.calibrate(("covariance",), batches, default_loss, groups=groups)
    held = []
    for group in streamed.stream(("covariance",), batches, groups):
        held.append((group.name.split(".self")[0], len(streamed._inputs)))
        (a,), (b,) = whole.consumers(group), streamed.consumers(group)
        assert torch.equal(a.covariance.gram, b.covariance.gram)
    assert len(held) == len(groups) == 6
    assert [n for _, n in held] == [4, 4, 3, 2, 2, 1]  # what went by is dropped
    assert not streamed._inputs


# --- gradients, by hand ------------------------------------------------------------------------


def gradients(module, batches, single=False):
    """Gradients of all parameters for each batch, or for each example."""
    found = []
    for args, kwargs in batches:
        parts = [(args, kwargs)]
        if single:
            count = len(args[0] if args else kwargs["input_ids"])
            parts = [(tuple(a[i:i + 1] for a in args), {k: v[i:i + 1] for k, v in kwargs.items()})
                     for i in range(count)]
        for part in parts:
            module.zero_grad()
            out = module(*part[0], **part[1])
            default_loss([getattr(out, "logits", out)], *part).backward()
            found.append({n: p.grad.clone() for n, p in module.named_parameters()
                          if p.grad is not None})
    module.zero_grad()
    return found


# for each group: its parameters and how each is cut: (name, function to (*shape, channels, rest))
def _kv(name, heads, whole):
    def cut(w):
        rows = w.T if name == "o_proj" else w
        split = rows.reshape(2, heads, -1, 48)
        return split.flatten(1, 2) if whole else split

    return f"model.layers.0.self_attn.{name}.weight", cut


MLP = "model.layers.0.mlp."
CUTS = {
    "mlp": [(MLP + "gate_proj.weight", lambda w: w[:, None]),
            (MLP + "up_proj.weight", lambda w: w[:, None]),
            (MLP + "down_proj.weight", lambda w: w.T[:, None])],
    "kv": [_kv("q_proj", 3, True), _kv("k_proj", 1, True), _kv("v_proj", 1, True),
           _kv("o_proj", 3, True)],
    "query": [_kv("q_proj", 3, False), _kv("o_proj", 3, False)],
    "grouped": [("one.weight", lambda w: w.reshape(2, 4, 1, -1)),
                ("one.bias", lambda w: w.reshape(2, 4, 1, 1)),
                ("norm.weight", lambda w: w.reshape(2, 4, 1, 1)),
                ("norm.bias", lambda w: w.reshape(2, 4, 1, 1)),
                ("two.weight", lambda w: w.reshape(2, 6, 4, 9).permute(0, 2, 1, 3).reshape(
                    2, 4, 1, -1))],
}


def mean(arrays):
    return {k: sum(a[k] for a in arrays) / len(arrays) for k in arrays[0]}


def squares(arrays):
    return mean([{k: v.double().square() for k, v in a.items()} for a in arrays])


def _element(module, batches, cuts):
    g = mean(gradients(module, batches))
    return [cut(w * g[n] * len(batches)).abs().sum((-1, -2)) for n, cut, w in cuts]


def _batched(per_batch):
    return lambda module, batches, cuts: [
        sum(per_batch(cut(w * g[n])) for g in gradients(module, batches)) for n, cut, w in cuts]


def _second(module, batches, cuts):
    f = squares(gradients(module, batches, single=True))
    return [cut(w.double().square() * f[n]).sum((-1, -2)) for n, cut, w in cuts]


def _mixed(module, batches, cuts):
    g, f = mean(gradients(module, batches)), squares(gradients(module, batches, single=True))
    return [cut(w * g[n] - w.double().square() * f[n] / 2).abs().sum((-1, -2))
            for n, cut, w in cuts]


def _norms(power):
    return lambda module, batches, cuts: [
        cut(w).norm(p=power, dim=-1).sum(-1) for _, cut, w in cuts if w.ndim > 1]


def _hessian(module, batches, cuts):
    """w (H g), H and g over all parameters, batch by batch."""
    weights, total = dict(module.named_parameters()), []
    for args, kwargs in batches:
        with sdpa_kernel(SDPBackend.MATH):
            out = module(*args, **kwargs)
            loss = default_loss([getattr(out, "logits", out)], args, kwargs)
            g = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            h = torch.autograd.grad(g, list(weights.values()), [x.detach() for x in g])
        total.append(dict(zip(weights, h, strict=True)))
    return [sum(cut(w * t[n]).sum((-1, -2)) for t in total) for n, cut, w in cuts]


OF_GRADIENTS = {
    "taylor-element": _element,
    "taylor-element(per='batch')": _batched(lambda x: x.abs().sum((-1, -2))),
    "taylor-vector": _batched(lambda x: x.sum(-1).abs().sum(-1)),
    "taylor-element(order=2)": _second,
    "taylor-element(order='mixed')": _mixed,
    "snip": _batched(lambda x: x.abs().sum((-1, -2))),
    "magnitude(norm=1, reduce='sum')": _norms(1),
    "magnitude(norm=2, reduce='sum')": _norms(2),
    "grasp": _hessian,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_weight_criteria_are_their_formulas(place, name, request):
    which, group, *_ = PLACES[place]
    module, batches = request.getfixturevalue(which)
    weights = dict(module.named_parameters())
    cuts = [(n, cut, weights[n].detach()) for n, cut in CUTS[place]]
    want = torch.stack([part.double() for part in OF_GRADIENTS[name](module, batches, cuts)])
    got = scored(name, group, module, batches)
    torch.testing.assert_close(got, want.sum(0).reshape(got.shape), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("how", ["mean", "max", "prod", "first", "last"])
def test_members_are_reduced_by_name(how, llama):
    module, batches = llama
    parts = torch.stack([cut(w).norm(dim=-1).sum(-1).double() for _, cut, w in [
        (n, cut, module.get_parameter(n).detach()) for n, cut in CUTS["mlp"]]])
    want = {"mean": parts.mean(0), "max": parts.amax(0), "prod": parts.prod(0),
            "first": parts[0], "last": parts[-1]}[how]
    got = scored(f"magnitude(reduce={how!r})", PLACES["mlp"][1], module, batches)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_fisher_of_gates_is_that_of_single_examples(llama):
    module, batches = llama
    want = torch.zeros(40)
    for _, kwargs in batches:
        for ids in kwargs["input_ids"].split(1):
            gate = torch.ones(40, requires_grad=True)
            hook = module.model.layers[0].mlp.down_proj.register_forward_pre_hook(
                lambda m, args, gate=gate: (args[0] * gate,))
            loss = default_loss([module(ids).logits], (), {"input_ids": ids})
            want += torch.autograd.grad(loss, gate)[0].square()
            hook.remove()
    got = scored("taylor(per='example')", PLACES["mlp"][1], module, batches)
    torch.testing.assert_close(got.float(), want, rtol=1e-3, atol=1e-12)


# --- the others -------------------------------------------------------------------------------


def test_one_example_has_no_running_variance(llama):
    module, batches = llama
    ids = batches[0][1]["input_ids"][:1]
    with pytest.raises(SpaError, match="needs two examples"):
        scored("fluctuation", PLACES["mlp"][1], module, [((), {"input_ids": ids})])


def test_gblm_is_its_formula(llama):
    """As released, and as the paper writes it: there the gradient is n sqrt(n) times weaker."""
    module, batches = llama
    x, w = mlp(module, batches)
    name, single = MLP + "down_proj.weight", gradients(module, batches, single=True)
    n, norm = len(single), x[0].norm(dim=0)
    total = sum(g[name].double().square() for g in single).sqrt()
    absolute = sum(g[name].double().abs() for g in single)
    for text, means in (("", norm / n ** 0.5 + 100 * total),
                        ("(alpha=10, norm=1)", norm / n ** 0.5 + 10 * absolute),
                        ("(published=False)", norm + 100 * total / n),
                        ("(norm=1, published=False)", norm + 100 * absolute / n)):
        want = (w[0].abs() * means).mean(0)
        got = scored("gblm" + text, PLACES["mlp"][1], module, batches)
        torch.testing.assert_close(got, want.detach().double(), rtol=1e-4, atol=0)
    ranks = [scored(c, PLACES["mlp"][1], module, batches).argsort().tolist()
             for c in ("gblm", "wanda")]
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("axis, relative", [(0, "column"), (1, "row")])
def test_cfsp_is_its_formula(axis, relative, llama):
    module, batches = llama
    x, w = mlp(module, batches)
    norm = x[0].norm(dim=0)
    block = module.model.layers[0].mlp
    parts = [w[0].abs() * norm, block.gate_proj.weight.T.abs(), block.up_proj.weight.T.abs()]
    want = (sum(p / p.sum(axis, keepdim=True) for p in parts) * norm).mean(0)
    got = scored(f"cfsp(relative={relative!r})", PLACES["mlp"][1], module, batches)
    torch.testing.assert_close(got, want.detach().double(), rtol=1e-4, atol=0)


def test_geometric_median_sums_distances_between_filters(net):
    module, batches = net
    filters = module.two.weight.detach().reshape(2, 6, -1)
    want = (filters[:, :, None] - filters[:, None]).norm(dim=-1).sum(-1)
    got = scored("geometric-median", "two.weight:0.1", module, batches)
    torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=1e-6)


def test_batch_norm_scale_is_the_gain(net):
    module, batches = net
    got = scored("batch-norm-scale", "one.weight:0.1", module, batches)
    assert torch.equal(got, module.norm.weight.detach().double().abs().reshape(2, 4))


def test_batch_norm_scale_refuses_a_group_without_a_gain(llama):
    with pytest.raises(SpaError, match="no normalisation with a gain"):
        scored("batch-norm-scale", PLACES["mlp"][1], *llama)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_relevance_goes_from_the_true_class(published, labels):
    """Released: 1 at the class, epsilon rule before it. The paper: the logit, z+ throughout."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3),
                               nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)).eval()
        x, y = torch.randn(7, 3, 6, 6), torch.randint(0, 4, (7,))
    with torch.no_grad():
        a = torch.relu(module[0](x))
        b = torch.relu(module[2](a)).flatten(1)
        out, head = module[5](b), module[5].weight
        start = functional.one_hot(y if labels else out.argmax(1), 4)
        if published:  # b_j w_jk / z_k, the bias in z
            low = b * ((start / out) @ head)
        else:
            low = b * ((out * start / (b @ head.clamp(min=0).T)) @ head.clamp(min=0))
        w = module[2].weight.clamp(min=0)
        share = low.reshape(7, 5, 2, 2) / functional.conv2d(a, w).clamp(min=1e-9)
        high = a * functional.conv_transpose2d(share, w)
    batch = ((x,), {"labels": y} if labels else {})
    for group, want in (("0.weight:0", high.abs().sum((0, 2, 3))),
                        ("2.weight:0", low.abs().reshape(7, 5, 4).sum((0, 2)))):
        got = scored(f"relevance(published={published})", group, module, [batch])
        torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-6)


def test_rules_of_relevance_leave_what_is_computed_as_it_is():
    """Also where the positive part of a product is nothing, and the product is not."""
    value, other = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([5.0, -3.0, 0.0])
    assert torch.equal(_like(value, other), other)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(),
                           nn.Linear(9, 4)).eval()
    x = torch.randn(5, 10)
    traced, solution = TORCH.trace(module, (x,))
    for kind in ("relevance", "relevance_positive"):
        changed = OverridingRunner(traced.program, override=rules(solution.graph, kind)).call(
            (x,), {})
        torch.testing.assert_close(changed[0], module(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bias", [True, False])
def test_obs_adds_up_to_the_error_of_a_refit(place, bias, request):
    which, group, gather, shape, per = PLACES[place]
    module, batches = request.getfixturevalue(which)
    x, w = gather(module, batches)
    x, w = x.double(), w.detach().double()
    x = x - x.mean(1, keepdim=True) if bias else x
    h = x.mT @ x / x.shape[1]
    h = h + 0.01 * h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(h.shape[-1])
    got = scored(f"obs(rounds=99, bias={bias})", group, module, batches)
    # the first slices to go (one under each outer slice) score their joint error after a refit
    gone = got == got.amin(-1, keepdim=True)
    total = 0.0
    slot = torch.arange(got.numel()).repeat_interleave(per).reshape(w.shape[0], -1)
    for hs, ws, ss in zip(h, w, slot, strict=True):
        total += refit_error(hs, ws, ~gone.reshape(-1)[ss])
    torch.testing.assert_close(got[gone].sum(), total, rtol=1e-5, atol=1e-12)
    # and no other choice is cheaper where slices do not share a round
    if len(shape) == 1 and w.shape[0] == 1:
        inverse = torch.linalg.inv(h[0])
        sets = [torch.arange(i * per, (i + 1) * per) for i in range(shape[0])]
        alone = [(w[0][:, b] @ torch.linalg.inv(inverse[b][:, b]) * w[0][:, b]).sum()
                 for b in sets]
        assert int(torch.stack(alone).argmin()) == int(gone.nonzero())


def refit_error(h, w, keep):
    """E||(W - W') x||^2 with W' the least-squares refit of the features in `keep`."""
    miss = w.clone()
    if keep.any():
        miss[:, keep] -= (w @ h[:, keep]) @ torch.linalg.inv(h[keep][:, keep])
    return ((miss @ h) * miss).sum()


def test_rounds_of_removal_cost_what_refits_from_scratch_do(llama):
    module, batches = llama
    ctx = context(module, batches)
    group = ctx.solution.groups[PLACES["mlp"][1]]
    ctx.calibrate(("covariance",), batches, default_loss, groups=[group])
    views = ctx.consumers(group)
    h = views[0].covariance.second[0]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    w, spent, keep = views[0].weight[0].double(), 0.0, torch.ones(40, dtype=torch.bool)
    for gone, errors, cost in removals(blocks(views, centred=False), (40,), rounds=7):
        assert errors[gone].max() <= errors[keep & ~gone].min() if (keep & ~gone).any() else True
        keep &= ~gone
        spent += cost
        torch.testing.assert_close(torch.tensor(spent).double(), refit_error(h, w, keep),
                                   rtol=1e-6, atol=1e-12)
    assert not keep.any()


def test_one_pass_for_all_statistics_equals_separate_passes(net):
    module, batches = net
    together = context(module, batches)
    kinds = {*OF_INPUTS, *KINDS}
    groups = list(together.solution.groups.values())
    together.calibrate(kinds, batches, default_loss, groups=groups)
    names = [e.name for kind, e in registry.available() if kind == "importance"
             and kinds.issuperset(registry.find(kind, e.name).needs)]  # not a training run's
    assert len(names) >= 15
    for name in (*names, *FORMULAS, *OF_GRADIENTS, "taylor(per='batch')", "taylor(per='example')"):
        criterion = registry.find("importance", name)
        for group in groups:
            alone = scored(name, group.name, module, batches)
            torch.testing.assert_close(criterion.score(group, together), alone,
                                       rtol=1e-5, atol=1e-8)


# --- one's own --------------------------------------------------------------------------------

OWN = '''
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Loudest:
    """score_i = largest ||X_j|| of the slice's features."""

    name: ClassVar[str] = "loudest"
    needs: ClassVar[tuple[str, ...]] = ("moments",)
    power: float = 1.0

    def score(self, group, ctx):
        return sum(view.onto(view.moments.norm ** self.power) for view in ctx.consumers(group))
'''


def test_a_criterion_of_ones_own_works_on_the_command_line(tmp_path, capsys):
    assert len(OWN.strip().splitlines()) <= 15
    path = tmp_path / "my_file.py"
    path.write_text(OWN)
    with pytest.raises(SystemExit) as done:
        app(["compile", "zoo:mlp", "--target", "params=70%", "--dry-run", "--json",
             "--align", "1", "--importance", f"{path}:Loudest(power=2)"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["importance"] == "Loudest(power=2)"


@pytest.mark.parametrize("what, why", [
    ("nowhere.py:Mine", "no file"), ("{0}:Other", "Other"), ("{0}:Mine(x=1)", "no arguments")])
def test_files_that_hold_no_criterion_are_named(what, why, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Mine:\n    needs = ()\n    def score(self, group, ctx): ...\n")
    with pytest.raises(UsageError) as caught:
        registry.find("importance", what.format(path))
    assert why in caught.value.why


def test_an_unknown_statistic_is_named(net):
    module, batches = net
    with pytest.raises(UsageError, match="no statistic 'momentz'"):
        context(module, batches).calibrate(("momentz",), batches, default_loss, groups=[])


def test_seeds_give_equal_plans_twice():
    for model, name in (("mlp", "random"), ("llama-gqa", "taylor"), ("mlp", "obs"),
                        ("mlp", "taylor-element")):
        plans = [spacompiler.compile(f"zoo:{model}", target="body~70%", importance=name,
                                     dry_run=True, seed=7).plan.to_json() for _ in range(2)]
        assert plans[0] == plans[1]
