"""Pruning in a training loop: in-place surgery, optimiser state, schedules, resuming."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import spacompiler
from spacompiler.errors import ProofError, SpaError, TargetError, UsageError
from spacompiler.groups.solution import solve
from spacompiler.live import ramp, shrinking
from spacompiler.live.surgery import operate_in_place
from spacompiler.models_zoo import load
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.read.export import trace


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 16), nn.ReLU(),
                         nn.Linear(16, 3))


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
                         nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12),
                         nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


EXAMPLES = {mlp: (torch.randn(4, 6),), cnn: (torch.randn(4, 3, 4, 4),)}


def llama(seed=0):
    return load("llama-gqa").build(seed)[0]


def logits(module, x):
    return module(input_ids=x).logits.flatten(0, 1) if hasattr(module, "config") else module(x)


def batch(make, step):
    generator = torch.Generator().manual_seed(step)
    if make is llama:
        x = torch.randint(0, 61, (3, 7), generator=generator)
        return x, torch.randint(0, 61, (21,), generator=generator)
    shape = EXAMPLES[make][0].shape
    return torch.randn(8, *shape[1:], generator=generator), \
        torch.randint(0, 3, (8,), generator=generator)


def train(make, model, optimizer, pruner, steps):
    loss = None  # stays alive over a removal, as in anybody's loop
    for step in steps:
        x, y = batch(make, step)
        loss = functional.cross_entropy(logits(model, x), y)
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    return loss


def inputs(make):
    return {"input_ids": batch(llama, 0)[0]} if make is llama else EXAMPLES[make]


def start(make, optimizer=torch.optim.AdamW, seed=0, **options):
    model = make(seed).train()
    made = optimizer(model.parameters(), lr=1e-2)
    options = {"target": "params=60%", "schedule": "cubic(steps=20, every=3)", "layout": "any",
               **options}
    return model, made, spacompiler.Pruner(model, inputs(make), made, **options)


# --- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step, share", [
    (1, 0.0), (10, 0.0), (30, 1 - (60 / 80) ** 3), (50, 0.875), (89, 1 - (1 / 80) ** 3), (90, 1.0),
])
def test_the_cubic_schedule_is_the_published_one(step, share):
    assert ramp.Cubic(steps=100).share(step) == pytest.approx(share)


def test_a_schedule_ends_with_everything():
    for text in ("cubic(steps=37, every=4)", "linear(steps=50, every=7)", "once(at=5)"):
        schedule = ramp.find(text)
        events = [k for k in range(1, 60) if schedule.due(k)]
        assert schedule.share(events[-1]) == 1.0
        assert all(schedule.share(k) < 1 for k in events[:-1])


@pytest.mark.parametrize("text", ["cubik(steps=3)", "cubic(step=3)", "cubic(steps=9, warmup=2)",
                                  "linear(steps=9, every=0)", "cubic(start=3)"])
def test_impossible_schedules_are_usage_errors(text):
    with pytest.raises(UsageError):
        ramp.find(text)


# --- in-place surgery ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, cnn, llama], ids=lambda m: m.__name__)
def test_a_run_shrinks_in_place_to_the_target(make):
    options = {"roles": ("channel", "head", "hidden")} if make is llama else {}
    model, optimizer, pruner = start(make, **options)
    parameters, modes = dict(model.named_parameters()), [m.training for m in model.modules()]
    before = sum(p.numel() for p in parameters.values())
    train(make, model, optimizer, pruner, range(20))
    pruner.finish()
    assert sum(p.numel() for p in model.parameters()) / before == pytest.approx(0.6, abs=0.011)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert modes == [m.training for m in model.modules()]
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape \
            == p.shape
    assert pruner.live.proof.holds and pruner.live.proof.control > 1e-4
    assert pruner.costs()["params"]["pruned"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("optimizer", [
    torch.optim.AdamW,
    lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True),
    torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.Adagrad,
], ids=["adamw", "sgd", "amsgrad", "adafactor", "rmsprop", "adagrad"])
def test_weights_and_state_are_the_kept_slices(optimizer):
    model, made, pruner = start(mlp, optimizer, schedule="once(at=4)")
    train(mlp, model, made, pruner, range(3))
    old = [p.detach().clone() for p in model.parameters()]
    state = [copy.deepcopy(made.state[p]) for p in model.parameters()]
    assert pruner.shrink()
    first, second = (np.flatnonzero(pruner.live.kept.table(g.name)) for g in pruner.groups)
    assert len(first) < 24 and len(second) < 16
    index = [(first, None), (first,), (second, first), (second,), (None, second), (None,)]

    def sliced(array):
        for axis, kept in enumerate(index[i]):
            if kept is not None and array.shape[axis] > 1:
                array = array.index_select(axis, torch.from_numpy(kept))
        return array

    for i, p in enumerate(model.parameters()):
        assert torch.equal(p.detach(), sliced(old[i]))
        for key, value in state[i].items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert torch.equal(made.state[p][key], sliced(value)), key
            else:
                assert made.state[p][key] == value


def test_slices_that_are_next_to_go_become_small_and_may_come_back():
    model, _, pruner = start(mlp, torch.optim.SGD, importance="magnitude", soft=0.5,
                             schedule="once(at=6)", target="params=50%")
    gone, weight = [], model[0].weight
    for step in range(5):
        before = weight.detach().clone()
        gone.append(~pruner.planned(1.0).table("0.weight:0"))
        pruner.step()
        assert torch.equal(weight[gone[-1]], 0.5 * before[gone[-1]])
        assert torch.equal(weight[~gone[-1]], before[~gone[-1]])
        if step == 1:
            weight.data[int(gone[-1].nonzero()[0][0])] = 9.0  # training wants it back
    assert gone[0].any() and not (gone[4] == gone[0]).all() and len(weight) == 24
    small = model(EXAMPLES[mlp][0])
    assert pruner.step() and len(weight) < 24
    assert (model(EXAMPLES[mlp][0]) - small).abs().max() < 0.05
    with pytest.raises(UsageError, match="soft must be above 0"):
        start(mlp, soft=0.0)


def test_adam_goes_on_as_if_the_model_had_always_been_small():
    model, optimizer, pruner = start(cnn)
    train(cnn, model, optimizer, pruner, range(20))
    small = copy.deepcopy(model)
    fresh = torch.optim.AdamW(small.parameters(), lr=1e-2)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pruner.stop()
    train(cnn, model, optimizer, pruner, range(20, 30))
    for step in range(20, 30):
        x, y = batch(cnn, step)
        functional.cross_entropy(small(x), y).backward()
        fresh.step()
        fresh.zero_grad()
    assert all(map(torch.equal, model.state_dict().values(), small.state_dict().values()))


def test_gradients_of_the_moment_are_sliced_too():
    model, _, pruner = start(mlp, importance="magnitude")
    x, y = batch(mlp, 0)
    functional.cross_entropy(model(x), y).backward()
    old = model[0].weight.grad.clone()
    pruner.shrink()
    kept = torch.from_numpy(np.flatnonzero(pruner.live.kept.table(pruner.groups[0].name)))
    assert torch.equal(model[0].weight.grad, old[kept])


class Tied(nn.Module):
    """Input and output embedding are one array; a part is frozen, a part in eval mode."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.norm, self.out = nn.BatchNorm1d(24), nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight
        self.down.weight.requires_grad_(False)

    def forward(self, ids):
        x = self.table(ids)
        return self.out(x + self.down(torch.relu(self.norm(self.up(x)))))


def test_ties_frozen_parameters_and_modes_stay():
    torch.manual_seed(0)
    model = Tied().train()
    model.norm.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pruner = spacompiler.Pruner(model, (torch.arange(6),), optimizer, target="params=60%",
                                schedule="once(at=2)", roles=("channel", "hidden"))
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.arange(6)), torch.arange(6)).backward()
        optimizer.step()
        pruner.step()
    pruner.finish()
    assert model.out.weight is model.table.weight and model.table.weight.shape[1] < 8
    assert not model.down.weight.requires_grad and model.training and not model.norm.training
    assert model.norm.num_features == model.up.out_features == len(model.norm.running_mean) < 24


class OwnSizes(nn.Module):
    """Its code goes by numbers that no attribute says."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 64), nn.Linear(64, 3)

    def forward(self, x):
        return self.down(self.up(x).reshape(x.shape[0], 64))


def test_a_wrong_shrink_is_undone_and_refused():
    torch.manual_seed(0)
    model = OwnSizes()
    optimizer = torch.optim.Adam(model.parameters())
    pruner = spacompiler.Pruner(model, (torch.randn(4, 6),), optimizer, target="params=60%",
                                importance="magnitude", schedule="once(at=1)")
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    state = copy.deepcopy([*model.state_dict().values(), *(
        v for p in model.parameters() for v in optimizer.state[p].values())])
    with pytest.raises(ProofError, match="restored"):
        pruner.step()
    assert all(map(torch.equal, state, [*model.state_dict().values(), *(
        v for p in model.parameters() for v in optimizer.state[p].values())]))
    assert model.up.out_features == 64


def test_a_wrong_slice_is_caught(monkeypatch):
    """The check can fail: slices taken from the wrong place are no masked model."""
    model, _, pruner = start(mlp, importance="magnitude")
    right = operate_in_place

    def wrong(*args):
        undo = right(*args)
        model[0].weight.data = model[0].weight.data.flip(0)
        return undo

    monkeypatch.setattr(shrinking, "operate_in_place", wrong)
    with pytest.raises(ProofError):
        pruner.shrink()


def test_sizes_of_a_modules_own_code_are_found():
    model, example = load("opt").build()
    pruner = spacompiler.Pruner(model, example, target="params=60%", importance="magnitude",
                                layout="any")
    pruner.shrink()
    heads = {layer.self_attn.num_heads for layer in model.model.decoder.layers}
    assert max(heads) < 6 and {layer.self_attn.head_dim
                               for layer in model.model.decoder.layers} == {8}


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_what_trained_loads_with_stock_transformers(name, tmp_path):
    model, example = load(name).build()
    config = model.config
    pruner = spacompiler.Pruner(model, example, target="body=65%", importance="magnitude")
    pruner.finish()
    assert "save_pretrained" not in vars(model)
    assert model.config is config and not any("config stays" in note for note in pruner.notes)
    assert model.config.to_dict() != load(name).build()[0].config.to_dict()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**example).logits, model.eval()(**example).logits)


class Wrapped(nn.Module):
    """A model of transformers inside of a user's module, and one that nothing is cut of."""

    def __init__(self):
        super().__init__()
        self.inner, self.whole = llama(), llama()

    def forward(self, input_ids):
        return self.inner(input_ids).logits + self.whole(input_ids).logits


def test_widths_that_no_configuration_says_are_not_saved_as_if_one_did(tmp_path):
    ids = {"input_ids": batch(llama, 0)[0]}
    model = llama()
    pruner = spacompiler.Pruner(model, ids, target="body=80%", importance="magnitude",
                                layout="any", only=("*layers.0.mlp*",), floor=0.01)
    pruner.shrink(0.5)
    with pytest.warns(UserWarning, match="is being pruned"):
        model.save_pretrained(tmp_path / "unfinished")
    assert copy.deepcopy(model).save_pretrained.args[0] is not model
    pruner.finish()
    for part in (model, model.model):
        with pytest.raises(SpaError, match="cannot load"):
            part.save_pretrained(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert any("save_pretrained refuses" in note for note in pruner.notes)


def test_models_inside_of_a_module_are_saved_only_as_they_are(tmp_path):
    ids = {"input_ids": batch(llama, 0)[0]}
    model = Wrapped()
    asked = {"target": "params~95%", "importance": "magnitude", "only": ("inner*layers.0.mlp*",),
             "align": 1}
    made = spacompiler.compile(model, ids, latency=False, onnx=False, repair="none", prove=False,
                               **asked).module
    spacompiler.Pruner(model, ids, **asked).finish()
    for module in (model, made):
        module.whole.save_pretrained(tmp_path / "whole")
        with pytest.raises(SpaError, match="cannot load"):
            module.inner.save_pretrained(tmp_path / "wrong")


# --- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cnn, llama], ids=lambda m: m.__name__)
def test_gates_are_those_of_calibration(make):
    """Hooks in the user's backward see what the traced program with gates computes."""
    model, _, pruner = start(make)
    model.eval()  # batch statistics would differ from those of the traced program
    pruner._watch.stop()
    pruner.importance = type("Both", (), {"needs": ("gates", "token_gates")})()
    pruner._look()
    x, y = batch(make, 0)
    functional.cross_entropy(logits(model, x), y).backward()
    traced = trace(model, inputs(make))
    context = fresh_context(traced, solve(traced.graph, TABLE))
    call = ((), {"input_ids": x}) if make is llama else ((x,), {})
    groups = [context.solution.groups[g.name] for g in pruner.groups]
    context.calibrate(("gates", "token_gates"), [call], lambda found, *_: functional.cross_entropy(
        found[0].flatten(0, 1) if make is llama else found[0], y), groups=groups)
    for group in groups:
        for kind in ("gates", "token_gates"):
            got = getattr(pruner._watch, kind)(pruner.live.solution.groups[group.name])
            want = getattr(context, kind)(group)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("importance", ["taylor-element", "taylor-element(per='batch')"])
def test_scores_are_moving_averages_of_the_measured(importance):
    model, optimizer, pruner = start(mlp, importance=importance, schedule="once(at=9)")
    want = 0.0
    for step in range(3):
        x, y = batch(mlp, step)
        functional.cross_entropy(model(x), y).backward()
        product = [(p * p.grad).abs() for p in model.parameters()]
        score = product[0].sum(1) + product[1] + product[2].sum(0)
        want = 0.9 * want + 0.1 * score.detach()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    got = torch.from_numpy(pruner._scores["0.weight:0"])
    torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=1e-7)


def test_gradients_made_in_a_closure_are_seen():
    x, y = batch(mlp, 0)
    scores = []
    for closed in (False, True):
        model, optimizer, pruner = start(mlp, schedule="once(at=9)")

        def closure(model=model):
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure) if closed else (closure(), optimizer.step())
        scores.append(pruner._scores)
    assert all(np.array_equal(scores[1][name], scores[0][name]) for name in scores[0])


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cnn, llama], ids=lambda m: m.__name__)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make):
    options = {"roles": ("channel", "head", "hidden")} if make is llama else {}
    model, optimizer, pruner = start(make, **options)
    train(make, model, optimizer, pruner, range(11))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "pruner": pruner.state_dict()}, file)
    assert any(p.shape != q.shape for p, q in zip(
        model.parameters(), make(0).parameters(), strict=True)), "nothing shrank before"
    train(make, model, optimizer, pruner, range(11, 24))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other, resumed = start(make, seed=1, **options)
    resumed.load_state_dict(saved["pruner"])
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(make, again, other, resumed, range(11, 24))
    pruner.finish()
    resumed.finish()
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])
    assert pruner.state_dict() == resumed.state_dict()


def test_states_that_do_not_fit_are_refused(tmp_path):
    _, _, pruner = start(mlp, importance="magnitude")
    pruner.shrink()
    pruner.save(tmp_path / "pruner.json")
    with pytest.raises(UsageError, match="shrunk already"):
        pruner.load(tmp_path / "pruner.json")
    _, _, other = start(cnn, importance="magnitude")
    with pytest.raises(SpaError, match="not one of this model"):
        other.load(tmp_path / "pruner.json")
    (tmp_path / "pruner.json").write_text("{")
    with pytest.raises(SpaError, match="cannot be read"):
        other.load(tmp_path / "pruner.json")


# --- requests that cannot be met ----------------------------------------------------------------


@pytest.mark.parametrize("options, error", [
    ({"target": "params=2%"}, TargetError), ({"ema": 1.0}, UsageError),
    ({"roles": ("head",)}, TargetError), ({"importance": "tailor"}, UsageError),
    ({"layout": "uniform"}, TargetError),
])
def test_malformed_requests(options, error):
    with pytest.raises(error):
        start(mlp, **options)


def test_a_gradient_criterion_without_gradients_is_an_error():
    model, _, pruner = start(mlp)
    with pytest.raises(SpaError, match="nothing has been measured"):
        pruner.shrink()
    model.requires_grad_(False)
    with pytest.raises(SpaError, match="frozen"):
        start(mlp, importance="taylor-element")[2].watch()
    _, _, endless = start(mlp, schedule="cubic")
    with pytest.raises(UsageError, match="how many steps"):
        endless.step()


def test_state_of_an_unknown_kind_is_refused_before_anything_changes():
    model, optimizer, pruner = start(mlp, importance="magnitude")
    optimizer.state[model[0].weight]["history"] = torch.zeros(7)
    with pytest.raises(SpaError, match="'history'"):
        pruner.shrink()
    assert model[0].weight.shape == (24, 6) and model[2].weight.shape == (16, 24)


# --- trainers -----------------------------------------------------------------------------------


def test_in_the_trainer_of_transformers(tmp_path):
    from transformers import Trainer, TrainingArguments

    from spacompiler.live.callbacks import trainer_callback

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 61, (16, 7))]

    def run(folder, resume=None):
        model = llama().train()
        pruner = spacompiler.Pruner(model, {"input_ids": batch(llama, 0)[0]}, target="params=60%",
                                    schedule="cubic(every=2)", layout="any")
        if resume is not None:
            pruner.load(resume / "pruner.json")
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, save_steps=5,
            report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-3)
        Trainer(model, arguments, train_dataset=rows, callbacks=[trainer_callback(pruner)]).train(
            resume_from_checkpoint=None if resume is None else str(resume))
        return model, pruner

    model, pruner = run(tmp_path)
    dense = sum(p.numel() for p in llama().parameters())
    assert sum(p.numel() for p in model.parameters()) / dense == pytest.approx(0.6, abs=0.011)
    resumed, again = run(tmp_path / "again", tmp_path / "checkpoint-5")
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))
    assert pruner.state_dict() == again.state_dict()


def test_in_the_trainer_of_lightning():
    lightning = pytest.importorskip("lightning.pytorch")

    from spacompiler.live.callbacks import lightning_callback

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, rows, index):
            return functional.cross_entropy(self.net(rows[0]), rows[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    task = Task()
    pruner = spacompiler.Pruner(task.net, EXAMPLES[mlp], target="params=60%", schedule="cubic")
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, callbacks=[lightning_callback(pruner)]).fit(
        task, torch.utils.data.DataLoader(data, batch_size=4))
    assert pruner.done and task.net[0].out_features < 24


def test_without_lightning_the_error_says_so():
    try:
        import lightning  # noqa: F401
    except ImportError:
        from spacompiler.live.callbacks import lightning_callback

        with pytest.raises(UsageError, match="Lightning is not installed"):
            lightning_callback(start(mlp)[2])
