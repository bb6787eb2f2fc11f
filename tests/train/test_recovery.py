"""Recovery: it lowers the loss, keeps the dense network as it is, resumes to the same bits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import spacompiler
from spacompiler.artifact import load as loading
from spacompiler.artifact.verify import verify
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.losses import default_loss, divergence, labelled
from spacompiler.models_zoo import load
from spacompiler.passes.full import Full
from spacompiler.passes.lora import Lora
from spacompiler.passes.norms import Norms
from spacompiler.torch_backend.gather.heads import fitting
from spacompiler.train.checkpoint import FILE
from spacompiler.train.lean import lean
from spacompiler.train.loop import Training
from spacompiler.train.objective import Objective
from spacompiler.train.options import Schedule

FAST = {"importance": "magnitude", "latency": False, "align": 1}


def texts(n=24, seed=0):
    """Batches of a language with structure: each token follows from the one before."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 61, (n, 2, 1), generator=g)
    ids = [start]
    for _ in range(11):
        ids.append((ids[-1] * 3 + 1) % 61)
    return [{"input_ids": x} for x in torch.cat(ids, 2)]


@pytest.fixture(scope="module")
def pruned():
    """A function that gives a tiny Llama cut by half, which shares memory with its dense one (as
    where the compiler loaded the model itself)."""
    module, inputs = load("llama-gqa").build()
    cut = spacompiler.compile(module, inputs, target="body=60%", prove=False, **FAST).module
    dense = dict(module.named_parameters())
    shared = {id(p): dense[name] for name, p in cut.named_parameters()
              if torch.equal(p, dense[name])}
    assert shared

    def make():
        return copy.deepcopy(cut, {k: nn.Parameter(p.data) for k, p in shared.items()}), module

    return make


def task(make, **options):
    module, dense = make()
    calls = [((), b) for b in texts()]
    return Training(module, dense, calls[:-4], calls[-4:], default_loss, **options)


PASSES = {
    "lora": Lora(lr=1e-2, epochs=2), "dora": Lora(lr=1e-2, epochs=2, dora=True, norms=False),
    "eva": Lora(lr=1e-2, epochs=2, init="eva"), "norms": Norms(lr=3e-2, epochs=2),
    "full": Full(lr=3e-3, epochs=2), "logits": Full(lr=3e-3, epochs=2, task=0.0, logits=1.0),
    "blocks": Full(lr=3e-3, epochs=2, task=0.0, blocks=1.0),
    "mixed": Lora(lr=1e-2, epochs=2, task=0.5, logits=0.5, blocks=0.1),
}


@pytest.mark.parametrize("name", PASSES)
def test_the_held_out_objective_falls(name, pruned):
    t = task(pruned)
    dense = {k: v.clone() for k, v in t.dense.state_dict().items()}
    names = set(t.module.state_dict())
    facts = PASSES[name].run(t)
    assert facts["after"]["objective"] < 0.98 * facts["before"]["objective"]
    assert facts["amount"] == 2 * 20 * 2 * 12 and facts["unit"] == "tokens"
    assert set(t.module.state_dict()) == names, "adapters were left behind"
    assert all(torch.equal(v, dense[k]) for k, v in t.dense.state_dict().items())


def test_the_best_held_out_state_is_kept(pruned):
    """A rate that destroys the network ends where it began, and stops early."""
    t = task(pruned)
    before = {k: v.clone() for k, v in t.module.state_dict().items()}
    facts = Full(lr=3.0, epochs=4, patience=2).run(t)
    assert facts["best_step"] == 0 and facts["steps"] < facts["planned_steps"]
    assert all(torch.equal(v, before[k]) for k, v in t.module.state_dict().items())


class Stop(Exception):
    """The user's interruption."""


@pytest.mark.parametrize("recipe", [Lora(lr=1e-2, dropout=0.2, evaluations=5),
                                    Full(lr=1e-3, evaluations=5)], ids=["lora", "full"])
def test_a_checkpoint_resumes_to_the_same_bits(recipe, pruned, tmp_path):
    def run(**options):
        t = task(pruned, key="k", **options)
        torch.manual_seed(4)
        return recipe.run(t), t.module.state_dict()

    def stop(stage, done, total):
        if done == 3:
            raise Stop

    whole, want = run()
    with pytest.raises(Stop):
        run(checkpoint=tmp_path, progress=stop)
    steps = []
    resumed, got = run(checkpoint=tmp_path, progress=lambda stage, done, total: steps.append(done))
    assert steps[0] > 1, "it started anew"
    assert resumed["history"] == whole["history"]
    assert all(torch.equal(got[k], v) for k, v in want.items())
    with pytest.raises(SpaError, match="of another run"):
        recipe.run(task(pruned, key="other", checkpoint=tmp_path))
    (tmp_path / FILE).write_bytes(b"x" * 40)
    with pytest.raises(SpaError, match="cannot be read"):
        run(checkpoint=tmp_path)


@pytest.mark.parametrize("breaks, words", [
    (lambda t: setattr(t, "batches", []), "too little data"),
    (lambda t: setattr(t, "held_out", []), "too little data"),
    (lambda t: setattr(t, "loss", lambda *a: torch.tensor(float("nan"), requires_grad=True)),
     "diverged"),
])
def test_errors_say_what_to_do(breaks, words, pruned):
    t = task(pruned)
    breaks(t)
    with pytest.raises(SpaError, match=words) as error:
        Norms().run(t)
    assert error.value.fix


def test_example_inputs_alone_are_too_little_data():
    module, inputs = load("resnet").build()
    with pytest.raises(UsageError, match="too little data"):
        spacompiler.compile(module, inputs, target="macs=60%", recovery=Norms(), **FAST)


def test_lora_on_transposed_linear_layers():
    """GPT-2 holds its weights the other way round."""
    module, _ = load("gpt2").build()
    calls = [((), b) for b in texts()]
    facts = Lora(lr=1e-2).run(Training(copy.deepcopy(module), module, calls[:-4], calls[-4:],
                                       default_loss))
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert facts["parameters"] > sum(p.numel() for p in module.parameters() if p.ndim < 2)


def test_lora_that_starts_from_gradients_does(pruned):
    """The network is the same at first; the first step goes where the full gradient points."""
    t = task(pruned)
    facts = {}
    for init in ("default", "lora_ga"):
        torch.manual_seed(0)
        t = task(pruned)
        facts[init] = Lora(lr=1e-2, init=init, evaluations=2).run(t)
    first = [f["history"][0]["objective"] for f in facts.values()]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    assert facts["default"]["history"][1:] != facts["lora_ga"]["history"][1:]
    assert not any(hasattr(m, "_peft_loraga_grad") for m in t.module.modules())


def test_eva_redistributes_ranks_as_far_as_rho_says(pruned):
    counts = [Lora(init="eva", rank=2, rho=rho, accumulate=20, norms=False).run(task(pruned))[
        "parameters"] for rho in (1.0, 2.0)]
    assert counts[0] != counts[1]


def test_what_has_no_gradient_cannot_start_from_it():
    """peft starts convolutions at random without a word."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    calls = [((torch.randn(2, 3, 8, 8, generator=g),), {}) for _ in range(6)]
    t = Training(net, copy.deepcopy(net), calls[:-1], calls[-1:],
                 lambda r, a, k: r[0].square().mean())
    with pytest.raises(SpaError, match="cannot be started from gradients") as error:
        Lora(init="lora_ga").run(t)
    assert error.value.where == "0"


@pytest.mark.parametrize("init, words", [("lora-ga", "did you mean 'lora_ga'"),
                                         ("corda", "known:"), ("pissa_niter_x", "known:")])
def test_a_start_that_does_not_exist(init, words):
    with pytest.raises(UsageError, match="cannot be started by") as error:
        Lora(init=init)
    assert words in error.value.fix


def test_no_linear_layer_no_lora(pruned):
    t = task(pruned)
    t.module = nn.Sequential(nn.Embedding(61, 4))
    with pytest.raises(SpaError, match="no linear layer"):
        Lora().run(t)


def test_divergence_and_labels():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 7, generator=g), torch.randn(2, 5, 7, generator=g)
    want = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(divergence(p, q, 1.0), want)
    assert divergence(q, q, 2.0).abs() < 1e-6
    labels = torch.randint(7, (2, 5), generator=g)
    torch.testing.assert_close(
        labelled(p, labels),
        functional.cross_entropy(p[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)))


@pytest.mark.parametrize("options, loss, labels, taught", [
    ({}, default_loss, None, True),
    ({"logits": 0.0}, default_loss, None, False),
    ({}, lambda results, *call: default_loss(results, *call), None, False),
    ({}, "fitting", torch.int64, True),
    ({}, "fitting", torch.float32, False),
    ({"logits": 1.0}, "fitting", torch.float32, True),
])
def test_the_dense_network_teaches_where_results_are_classes(options, loss, labels, taught):
    """Asked for nothing: of a loss that is somebody's own, and where labels are values, not."""
    torch.manual_seed(0)
    net, dense = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(5, 4)
    kwargs = {} if labels is None else {"labels": torch.ones(
        (5, 3) if labels.is_floating_point else 5, dtype=labels)}
    loss = fitting(dense, (x,)) if loss == "fitting" else loss
    own, apart = loss([net(x)], (x,), kwargs), divergence(net(x), dense(x), 1.0)
    seen: list[int] = []
    dense.register_forward_hook(lambda *args: seen.append(1))
    value = Objective(net, dense, loss, Schedule(**options))(((x,), kwargs))
    torch.testing.assert_close(value.total, own + taught * apart)
    assert bool(seen) is taught, "the dense network ran for nothing"
    assert Objective(net, None, loss, Schedule())(((x,), kwargs)).total == own


def test_blocks_whose_stream_was_pruned_cannot_be_paired(pruned):
    module, inputs = load("llama-gqa").build()
    narrow = spacompiler.compile(module, inputs, target="params=70%", roles=("hidden",),
                                 prove=False, **FAST).module
    with pytest.raises(SpaError, match="one by one") as error:
        Objective(narrow, module, default_loss, Schedule(blocks=1.0))(((), texts(1)[0]))
    assert "logits" in error.value.fix


def test_compile_recovers_and_the_artifact_holds_what_was_trained(tmp_path):
    module, inputs = load("llama-gqa").build()
    dense = {k: v.clone() for k, v in module.state_dict().items()}
    out = tmp_path / "out"
    result = spacompiler.compile(
        module, inputs, target="body=60%", out=out, calibration="none",
        recovery=Lora(lr=1e-2), recover_data=texts(), name="zoo:llama-gqa", **FAST)
    done = result.report["recovery"]
    assert done["after"]["loss"] < done["before"]["loss"] and result.report["reload"]
    assert all(c["max_rel"] < 1e-4 for c in result.report["onnx"])
    again = loading.load(out)
    ids = texts(1, seed=5)[0]
    assert torch.equal(again(**ids).logits, result.module(**ids).logits)
    assert all(torch.equal(v, dense[k]) for k, v in module.state_dict().items())
    assert "before training" in " ".join((out / "report.md").read_text().split())
    checks = {c.name: c.passed for c in verify(out)}
    assert checks == {"hashes": True, "reload": True, "plan identity": True, "onnx": True}


@pytest.mark.parametrize("emission, recipe", [
    ("module", Lora(lr=1e-2, epochs=3)), ("program", Full(lr=1e-2, epochs=3))])
def test_a_convolutional_network_with_its_own_labels(emission, recipe, tmp_path, monkeypatch):
    from spacompiler.torch_backend import backend as torch_backend

    if emission == "program":
        monkeypatch.setattr(torch_backend, "EMITTERS", torch_backend.EMITTERS[-1:])
    module, inputs = load("resnet").build()
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(8, *inputs[0].shape[1:], generator=g) for _ in range(20)]
    labels = [x.mean((2, 3)).argmax(-1) for x in images]
    batches = [((x,), {"labels": y}) for x, y in zip(images, labels, strict=True)]
    out = tmp_path / "out"
    result = spacompiler.compile(module, inputs, target="macs=60%", out=out, recovery=recipe,
                                 recover_data=batches, name="zoo:resnet", **FAST)
    done = result.report["recovery"]
    assert result.job.emission == emission and done["unit"] == "examples"
    assert done["after"]["loss"] < 0.9 * done["before"]["loss"]
    assert all(c["max_rel"] < 1e-4 for c in result.report["onnx"])
    assert result.report["reload"]


def test_steps_that_bfloat16_would_lose_add_up():
    """Each step is an eighth of the spacing of bfloat16 at 1."""
    net = nn.Linear(4, 1, bias=False).bfloat16()
    with torch.no_grad():
        net.weight.fill_(1.0)
    calls = [((torch.ones(2, 4).bfloat16(),), {}) for _ in range(49)]
    facts = Full(lr=1e-3, accumulate=1, warmup=0.0, evaluations=2).run(Training(
        net, None, calls[:-1], calls[-1:], lambda results, *call: results[0].float().mean()))
    assert facts["masters"] == "float32"
    assert net.weight.dtype == torch.bfloat16
    assert net.weight.float().mean() < 0.98


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}])
def test_lean_adapters_compute_what_peft_does(options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    tuned = peft.get_peft_model(net, peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=False, **options))
    net[0].base_layer.bias.requires_grad_(True)  # as a recovery trains it beside
    x = torch.randn(4, 5, 6, requires_grad=True)

    def seen():
        torch.manual_seed(1)
        made = tuned(x)
        made.square().sum().backward()
        grads = [p.grad.clone() for p in (x, *tuned.parameters()) if p.grad is not None]
        tuned.zero_grad()
        x.grad = None
        return made, grads

    want = seen()
    with lean(tuned):
        got = seen()
        assert ("forward" in vars(net[0])) is ("use_dora" not in options)
    assert "forward" not in vars(net[0])
    for a, b in zip([want[0], *want[1]], [got[0], *got[1]], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_looking_at_held_out_data_costs_a_share_of_training(pruned, monkeypatch):
    t = task(pruned)
    seen = []
    plain = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lambda self, batch: seen.append(
        torch.is_grad_enabled()) or plain(self, batch))
    facts = Norms(epochs=8, evaluations=16, patience=99).run(t)
    assert sum(seen) == 8 * 20
    assert seen.count(False) <= 0.1 * sum(seen) + len(facts["history"])
