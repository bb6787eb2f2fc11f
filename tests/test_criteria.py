"""Criteria against direct re-derivations of their formulas on tiny models, element by element."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from spacompiler import registry
from spacompiler.calibration import default_loss
from spacompiler.frontends.aten import TABLE
from spacompiler.frontends.torch_export import trace
from spacompiler.groups import solve
from spacompiler.models_zoo import load
from spacompiler.scores import Scores

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
    return Scores(*solved(module))


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
    "fluctuation(metric='IFV')": lambda x, w, n: variance(x),
    "fluctuation(metric='WIFV')": lambda x, w, n: variance(x) * w.square().sum(1),
    "fluctuation(metric='WIFN')": lambda x, w, n: w.abs().mean(1) * x.norm(dim=1),
    "fluctuation(published=True)": lambda x, w, n: flap(x, n) * w.square().sum(1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FORMULAS)
def test_forward_criteria_are_their_formulas(place, name, request):
    which, group, gather, shape, per = PLACES[place]
    module, batches = request.getfixturevalue(which)
    x, w = gather(module, batches)
    features = FORMULAS[name](x, w.detach(), BATCHES * (2 if which == "llama" else 4))
    if "published" in name and place in ("kv", "query"):
        features = features.square()
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


def test_one_pass_for_all_statistics_equals_separate_passes(net):
    module, batches = net
    together = context(module, batches)
    kinds = ("moments", "covariance", "fluctuation", "gates", "token_gates", "weight_gradients")
    groups = list(together.solution.groups.values())
    together.calibrate(kinds, batches, default_loss, groups=groups)
    for name in ("wanda", "fluctuation", "fluctuation(published=True)", "taylor",
                 "taylor(per='batch')", "taylor-element"):
        criterion = registry.find("importance", name)
        for group in groups:
            alone = scored(name, group.name, module, batches)
            torch.testing.assert_close(criterion.score(group, together), alone,
                                       rtol=1e-5, atol=1e-8)
