"""LoRAPrune: the criterion and the loop against a direct re-derivation; adapters of other types."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import spacompiler
from spacompiler.axes.choices import Choice
from spacompiler.errors import SpaError, TargetError, UsageError
from spacompiler.groups.solution import solve
from spacompiler.live.adapter_step import adapted, layer_of, merged
from spacompiler.live.attached import Attached
from spacompiler.live.sites import Masks, sites
from spacompiler.live.watch import Watch
from spacompiler.models_zoo import load
from spacompiler.passes import lora_prune
from spacompiler.passes.lora_gradient import LoraGradient
from spacompiler.passes.lora_prune import LoraPrune
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.proof import relative_error
from spacompiler.torch_backend.prove import masked_dense
from spacompiler.torch_backend.read.export import trace


def lines(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16, bias=False), nn.GELU(), nn.Linear(16, 8, bias=False))


def images(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2),
                         nn.Flatten(), nn.Linear(64, 5))


INPUT = {lines: torch.randn(4, 6), images: torch.randn(4, 3, 9, 9)}


def with_gradients(make, paths, adapter, **options):
    """Adapters with random parameters and gradients; W.grad by hand from the merged model."""
    model = make()
    attached = Attached(model, paths, adapter=adapter, **options)
    for p in attached.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    model(INPUT[make]).square().sum().backward()
    return model


# --- one step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make, path", [(lines, "0"), (images, "0"), (images, "2")],
                         ids=["linear", "conv", "conv-stride"])
@pytest.mark.parametrize("eta", [1.0, 0.1])
def test_the_closed_form_of_lora_is_the_step_of_the_merged_weight(make, path, eta):
    model = with_gradients(make, [path], "lora", r=2, lora_alpha=6)
    got = adapted(model, f"{path}.weight", eta=eta)
    layer = layer_of(model, f"{path}.weight")
    here = merged(layer)
    want = (here - merged(layer, eta)) / eta
    torch.testing.assert_close(got.step.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.weight.double(), here, rtol=1e-5, atol=1e-6)
    plain = adapted(model, f"{path}.weight", eta=eta, scaled=False)
    torch.testing.assert_close(plain.step * 3, got.step)


@pytest.mark.parametrize("adapter, options", [
    ("lora", {"r": 2, "use_rslora": True}), ("loha", {"r": 2}), ("lokr", {"r": 2}), ("ia3", {
        "feedforward_modules": []}), ("hra", {"r": 2}), ("vera", {"r": 2}), ("boft", {
            "boft_block_size": 2}), ("fourierft", {"n_frequency": 10})])
def test_the_step_of_any_adapter_that_merges(adapter, options):
    """For small eta, <step, dL/dW'> = |dL/dtheta|^2, whatever the type."""
    model = with_gradients(lines, ["0", "2"], adapter, **options)
    layer = layer_of(model, "0.weight")
    grads = [p.grad for n, p in layer.named_parameters() if not n.startswith("base_layer.")]
    norm = sum(g.double().square().sum() for g in grads if g is not None)
    plain = lines()
    plain[0].weight.data = adapted(model, "0.weight").weight.float()
    plain[2].weight.data = adapted(model, "2.weight").weight.float()
    plain(INPUT[lines]).square().sum().backward()
    small = adapted(model, "0.weight", eta=1e-4 if adapter != "fourierft" else 1e-2)
    product = (small.step.double() * plain[0].weight.grad.double()).sum()
    assert product == pytest.approx(float(norm), rel=0.05)
    assert torch.equal(model[0].get_base_layer().weight, lines()[0].weight), "the layer changed"


def test_without_adapters_or_gradients_there_is_no_step():
    model = with_gradients(lines, ["0"], "lora", r=2)
    assert adapted(model, "2.weight") is None and adapted(model, "0.bias") is None
    for p in model.parameters():
        p.grad = None
    assert adapted(model, "0.weight") is None


# --- the criterion ------------------------------------------------------------------------------


def llama():
    return load("llama-gqa").build()[0]


def tokens(seed, rows=2):
    return torch.randint(0, 61, (rows, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, 61), ids[:, 1:].reshape(-1))


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KV, HEAD = 2, 8


def by_hand(layer, form, scale=2.0):
    """LoRAPrune's scores of one block, from its definition: {heads: (KV,), channels: (n,)}."""
    parts = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    vectors = {}
    for name in PROJECTIONS:
        a, b = parts[name].lora_A["default"].weight, parts[name].lora_B["default"].weight
        s = scale if form.scaled else 1.0
        step = s * (b.grad @ a + b @ a.grad - form.eta * b.grad @ a.grad)
        weight = parts[name].get_base_layer().weight + scale * b @ a
        score = (step * weight).abs() ** form.power
        score = score.sum(0 if name in ("o_proj", "down_proj") else 1)
        score = score.reshape(KV, -1).sum(1) if "mlp" not in name and name[0] in "qkvo" else score
        vectors[name] = (score / (score.norm() + 1e-8) if form.normalise else score).detach()
    return {"heads": sum(vectors[n] for n in PROJECTIONS[:4]),
            "channels": sum(vectors[n] for n in PROJECTIONS[4:])}


NAMES = {"heads": "model.layers.{}.self_attn.q_proj.weight:0.0",
         "channels": "model.layers.{}.mlp.gate_proj.weight:0"}


@pytest.fixture(scope="module")
def analysed():
    model = llama()
    traced = trace(model, {"input_ids": tokens(0), "use_cache": False})
    return model, traced, solve(traced.graph, TABLE)


@pytest.mark.parametrize("form", [
    LoraGradient(), LoraGradient(power=2, normalise=False, scaled=True, eta=0.5),
], ids=["code", "paper"])
def test_the_score_is_that_of_its_definition(analysed, form):
    model, traced, solution = copy.deepcopy(analysed[0]), *analysed[1:]
    paths = [path for path, _ in model.named_modules() if path.endswith(PROJECTIONS)]
    attached = Attached(model, paths, r=4, lora_alpha=8)
    for p in attached.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    loss_of(model, tokens(1)).backward()
    watch = Watch(model, traced, solution, (), form.needs)
    for i, layer in enumerate(model.model.layers):
        for kind, want in by_hand(layer, form).items():
            got = form.score(solution.groups[NAMES[kind].format(i)], watch)
            torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=0)


def test_in_a_compile_it_leaves_no_trace():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    result = spacompiler.compile(
        model, {"input_ids": tokens(0), "use_cache": False}, target="body=70%", align=1,
        importance=LoraGradient(), calibration=[{"input_ids": tokens(k)} for k in range(3)])
    assert result.job.proof.holds
    assert model.state_dict().keys() == before.keys()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_comes_after_it_looks_at_the_plain_module():
    """An allocation that measures, and the repair, gather covariances when adapters are off."""
    model = llama()
    before = copy.deepcopy(model.state_dict())
    result = spacompiler.compile(
        model, {"input_ids": tokens(0), "use_cache": False}, target="body=70%", align=1,
        importance=LoraGradient(), allocation="measured(rounds=1)", repair="refit",
        continued=True, calibration=[{"input_ids": tokens(k)} for k in range(3)])
    assert result.job.proof.holds
    assert model.state_dict().keys() == before.keys()


def test_nothing_else_is_gathered_with_adapters_on():
    class Both(LoraGradient):
        needs = ("adapter_steps", "covariance")

    with pytest.raises(UsageError, match="'covariance' cannot be had beside adapter_steps"):
        spacompiler.compile(
            llama(), {"input_ids": tokens(0), "use_cache": False}, target="body=70%", align=1,
            importance=Both(), calibration=[{"input_ids": tokens(0)}])


def test_exact_taylor_of_frozen_weights_is_streamed(analysed):
    """Reduced layer by layer in the user's backward: the same numbers, no gradient held."""
    model, traced, solution = analysed
    groups = [solution.groups[name.format(i)] for i in range(2) for name in NAMES.values()]
    model.requires_grad_(False)
    watch = Watch(model, traced, solution, (), ("elements", "vectors"), stream=groups)
    loss_of(model, tokens(1)).backward()
    assert all(p.grad is None for p in model.parameters())
    got = {(kind, g.name): sum(watch.sums(kind, m, g) for m in g.members)
           for kind in ("elements", "vectors") for g in groups}
    watch.stop()
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    loss_of(model, tokens(1)).backward()
    for i, layer in enumerate(model.model.layers):
        gate, up, down = (p * p.grad for p in layer.mlp.parameters())
        name = NAMES["channels"].format(i)
        for kind, want in {
                "elements": gate.abs().sum(1) + up.abs().sum(1) + down.abs().sum(0),
                "vectors": gate.sum(1).abs() + up.sum(1).abs() + down.sum(0).abs()}.items():
            torch.testing.assert_close(got[kind, name], want.detach().double(), rtol=1e-4,
                                       atol=1e-8)
    model.zero_grad()


@pytest.mark.parametrize("options", [{"power": 3}, {"eta": 0.0}])
def test_impossible_forms_are_refused(options):
    with pytest.raises(TypeError):
        LoraGradient(**options)


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "resnet", "mobilenet", "neox"])
def test_masks_in_the_live_module_are_those_of_the_proof(name):
    model, example = load(name).build()
    traced = trace(model.eval(), example)
    solution = solve(traced.graph, TABLE)
    groups = [g for g in solution.groups.values() if g.role in ("channel", "head")]
    places = sites(model, traced, solution, groups)
    seen = {n for site in places for n, _ in site.reads}
    groups = [g for g in groups if g.name in seen]
    assert groups
    masks = Masks(model, solution, places)
    generator = np.random.default_rng(0)
    choices = {g.atom: Choice(generator.permuted(
        np.arange(g.size) < (g.size + 1) // 2 + np.zeros(g.shape, dtype=int), axis=-1), g.outers)
        for g in groups}
    want = masked_dense(traced, solution, choices)
    with torch.no_grad():
        def run():
            found = model(*traced.args, **traced.kwargs)
            return [found.logits if hasattr(found, "logits") else found]

        assert relative_error(run(), want) > 1e-3, "the masks change nothing"
        masks.set(choices)
        assert relative_error(run(), want) < 1e-5
        masks.remove()
        assert relative_error(run(), want) > 1e-3


class Reference:
    """The released loop, by hand: masks on producers' outputs, its own LoRA, GQA by KV groups."""

    def __init__(self, model, first, steps, every, final, lr):
        self.layers, self.model = model.model.layers, model
        self.first, self.final = first, final
        self.masks = [{"heads": torch.ones(KV), "channels": torch.ones(40)} for _ in self.layers]
        self.scores = [{"heads": torch.zeros(KV), "channels": torch.zeros(40)}
                       for _ in self.layers]
        self.steps, self.every = steps, every
        self._hook()
        lora = [p for n, p in model.named_parameters() if "lora_" in n]
        self.lora, self.optimizer = lora, torch.optim.AdamW(lora, lr=lr, weight_decay=0)
        self.lr = lr

    def _hook(self):
        for i, layer in enumerate(self.layers):
            for name in PROJECTIONS[:3]:
                width = getattr(layer.self_attn, name).get_base_layer().out_features // KV
                getattr(layer.self_attn, name).register_forward_hook(
                    lambda m, a, y, i=i, w=width:
                    y * self.masks[i]["heads"].repeat_interleave(w))
            for name in PROJECTIONS[4:6]:
                getattr(layer.mlp, name).register_forward_hook(
                    lambda m, a, y, i=i: y * self.masks[i]["channels"])

    def ratio(self, step):
        low, high = 0.1 * self.steps, 0.9 * self.steps
        if step <= low:
            return 0.0
        return 1.0 if step >= high else 1 - (1 - (step - low) / (high - low)) ** 3

    def run(self, batches):
        done = False
        for step in range(1, self.steps + 1):
            rate = step / (self.steps // 10) if step <= self.steps // 10 else \
                (self.steps - step + 1) / (self.steps - self.steps // 10)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate
            loss_of(self.model, batches[step - 1]).backward()
            nn.utils.clip_grad_norm_(self.lora, 1.0)
            for i, layer in enumerate(self.layers):
                for kind, score in by_hand(layer, LoraGradient()).items():
                    self.scores[i][kind] = 0.9 * self.scores[i][kind] + 0.1 * score
            self.optimizer.step()
            self.optimizer.zero_grad()
            share = self.ratio(step)
            if (0 < share < 1 and step % self.every == 0) or (share == 1 and not done):
                done = share == 1
                self._mask(share)

    def _mask(self, share):
        for masks, scores in zip(self.masks, self.scores, strict=True):
            for kind, mask in masks.items():
                gone = int(len(mask) * self.final[kind] * share + 1e-9)
                worst = torch.argsort(scores[kind] * mask - (1 - mask), stable=True)[:gone]
                mask[worst] = 0


def test_the_loop_is_the_released_one(monkeypatch):
    """Scores, masks and merged weights equal those of the loop written out by hand."""
    model, steps, every, lr = llama().train(), 40, 3, 5e-3
    first = {}

    class Seen(Attached):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            first["model"] = copy.deepcopy(self.module)

    monkeypatch.setattr(lora_prune, "Attached", Seen)
    batches = [{"input_ids": tokens(k)} for k in range(6)]
    result = spacompiler.compile(
        model, {"input_ids": tokens(0), "use_cache": False}, target="body=65%", align=1,
        calibration=batches, schedule=LoraPrune(steps=steps, every=every, lr=lr, dropout=0.0))
    job = result.job
    copied = first["model"]
    for part in copied.modules():
        part._forward_pre_hooks.clear()
    final = {kind: 1 - job.counts[NAMES[kind].format(0)] / n
             for kind, n in (("heads", KV), ("channels", 40))}
    assert final["channels"] > 0 and final["heads"] > 0
    order = lora_prune._endless(job.calibration.batches, job.recipe.seed)
    reference = Reference(copied, first, steps, every, final, lr)
    reference.run([next(order)[1]["input_ids"] for _ in range(steps)])
    for i in range(2):
        for kind, name in NAMES.items():
            kept = reference.masks[i][kind].bool()
            got = torch.from_numpy(job.scores[name.format(i)])
            assert torch.equal(got >= 0, kept), (i, kind)
            torch.testing.assert_close(got[kept], reference.scores[i][kind][kept].double(),
                                       rtol=1e-3, atol=1e-6)
    gate = reference.layers[0].mlp.gate_proj
    want = gate.get_base_layer().weight + 2 * gate.lora_B["default"].weight @ \
        gate.lora_A["default"].weight
    kept = reference.masks[0]["channels"].bool()
    torch.testing.assert_close(result.module.model.layers[0].mlp.gate_proj.weight, want[kept],
                               rtol=1e-3, atol=1e-5)
    assert job.proof.holds


@pytest.mark.parametrize("options", [
    {}, {"criterion": "taylor"}, {"criterion": "taylor-vector"}, {"adapter": "loha", "rank": 2},
    {"dtype": "bfloat16"},
], ids=["lora-gradient", "taylor", "vector", "loha", "bfloat16"])
def test_on_a_convolutional_network(options):
    model, example = load("resnet").build()
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(4, *example[0].shape[1:]),) for _ in range(4)]
    result = spacompiler.compile(
        model, example, target="macs=75%", align=1, calibration=batches,
        schedule=LoraPrune(steps=12, every=2, lr=1e-2, **options))
    job = result.job
    assert job.proof.holds and job.plan.costs["macs"]["pruned"] < 0.77 * job.plan.costs["macs"][
        "dense"]
    assert all(map(torch.equal, before.values(), model.state_dict().values())), "not a copy"
    dense = dict(job.module.named_parameters())
    assert dense.keys() == dict(model.named_parameters()).keys(), "adapters are left over"
    assert not torch.equal(dense["0.0.weight"], before["0.0.weight"]), "nothing was learned"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in dense.values())
    assert job.counts == {n: int((s >= 0).sum(-1).max()) for n, s in job.scores.items()}


def test_first_and_last_layers_stay_whole():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8))
    ids = torch.randint(0, 31, (2, 7))
    result = spacompiler.compile(
        model, {"input_ids": ids, "use_cache": False}, target="body=75%", align=1,
        schedule=LoraPrune(steps=10, every=2, protect_first=0.25), calibration=[
            {"input_ids": ids}])
    widths = [layer.mlp.gate_proj.out_features for layer in result.module.model.layers]
    assert widths[0] == widths[3] == 24 and max(widths[1:3]) < 24
    assert any("stay whole" in note for note in result.job.notes)


def rows(depth=3):
    """Blocks of a repeated kind."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(depth)]
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*blocks)))


def grouped():
    return nn.Sequential(nn.Conv1d(2, 8, 3, groups=2), nn.ReLU(), nn.Conv1d(8, 4, 1, groups=2))


@pytest.mark.parametrize("make, options, fix", [
    (rows, {"protect_first": 0, "protect_last": 3}, "lora-prune(protect_last=0)"),
    (rows, {"protect_first": 0, "protect_last": 5}, "lora-prune(protect_last=0)"),
    (rows, {"protect_first": 1.0, "protect_last": 0}, "lora-prune(protect_first=0)"),
    (rows, {"protect_first": 1.0, "protect_last": 3},
     "lora-prune(protect_first=0, protect_last=0)"),
    (rows, {"targets": "nothing"}, "lora-prune(targets='')"),
    (rows, {"targets": "nothing", "criterion": "taylor"}, "lora-prune(targets='')"),
    (rows, {"targets": "nothing", "protect_last": 3}, "lora-prune(protect_last=0, targets='')"),
    (grouped, {}, "score in one shot (no --schedule)"),
    (grouped, {"criterion": "taylor"}, "score in one shot (no --schedule)"),
])
def test_nothing_to_prune_names_the_options_that_help(make, options, fix):
    x, only = (torch.randn(4, 2, 6), "*") if make is grouped else \
        (torch.randn(4, 6), "layers.?.0.weight:0")
    with pytest.raises(TargetError, match="nothing to prune") as caught:
        spacompiler.compile(make(), (x,), target="params=80%", align=1, only=(only,), dry_run=True,
                            schedule=LoraPrune(steps=1, **options), calibration=[(x,)])
    assert caught.value.fix == fix


class Raw(nn.Module):
    """No module is given what `first` gives; those of `others` are."""

    def __init__(self, others):
        super().__init__()
        self.others = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) if others else None
        self.first, self.last = nn.Linear(6, 8), nn.Parameter(torch.randn(2, 8))

    def forward(self, x):
        x = x if self.others is None else self.others(x)
        return torch.nn.functional.linear(self.first(x).relu(), self.last)


@pytest.mark.parametrize("others, fix", [
    (False, "score in one shot (no --schedule)"),
    (True, "let more go with --role or --only, or score in one shot (no --schedule)"),
])
def test_groups_that_no_module_reads_are_named_with_what_helps(others, fix):
    x = torch.randn(4, 6)
    with pytest.raises(TargetError, match="nothing to prune") as caught:
        spacompiler.compile(Raw(others), (x,), target="params=90%", align=1, dry_run=True,
                            only=("last:1",), calibration=[(x,)],
                            schedule=LoraPrune(steps=1, criterion="taylor"))
    assert "no module reads it" in caught.value.why and caught.value.fix == fix


@pytest.mark.parametrize("schedule, error", [
    ("lora-prun", UsageError), ("lora-prune(dtype='int4')", UsageError),
    ("lora-prune(adapter='lorra', steps=1)", UsageError),
    ("lora-prune(targets='nothing', steps=1)", (SpaError, TargetError)),
    ("lora-prune(steps=9)", SpaError),  # the loss is not finite
])
def test_what_cannot_be_done_is_an_error(schedule, error):
    model = lines()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        spacompiler.compile(model, (INPUT[lines],), target="params=56.25%", align=1,
                            schedule=schedule, calibration=[(INPUT[lines] * float("nan"),)])
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


# --- in the user's own loop ---------------------------------------------------------------------


def test_adapters_in_training_shrink_with_their_base():
    """A PeftModel of the user's: lora_A, lora_B and Adam's state of them are sliced in place."""
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pruner = spacompiler.Pruner(
        model, {"input_ids": tokens(0), "use_cache": False}, optimizer, target="body=70%",
        schedule="cubic(steps=12, every=3)", importance="lora-gradient")
    for step in range(12):
        loss_of(model, tokens(step)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    pruner.finish()
    down = model.base_model.model.model.layers[0].mlp.down_proj
    width = down.get_base_layer().in_features
    assert width < 40 and down.lora_A["default"].weight.shape == (4, width)
    assert {tuple(optimizer.state[p]["exp_avg"].shape) == tuple(p.shape)
            for p in model.parameters() if p.requires_grad} == {True}
    with torch.no_grad():
        want = model.eval()(input_ids=tokens(3), use_cache=False).logits
        got = model.merge_and_unload()(input_ids=tokens(3), use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
