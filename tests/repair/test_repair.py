"""Repair: the closed form, what each part of it is worth, and the proof over repaired weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.artifact.verify import verify
from spacompiler.errors import SpaError
from spacompiler.models_zoo import load
from spacompiler.passes.refit import Bias, Refit
from spacompiler.repair.evidence import Evidence
from spacompiler.torch_backend.gather.sampling import continued


def correlated(n: int, size: int) -> torch.Tensor:
    """Return n samples of `size` features that predict each other, with a mean."""
    torch.manual_seed(0)
    return torch.randn(n, size // 2) @ torch.randn(size // 2, size) + 0.3 * torch.randn(n, size) + 1


def evidence(x: torch.Tensor, y: torch.Tensor) -> Evidence:
    return Evidence(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, float(y.square().sum()))


def test_refit_is_the_least_squares_solution() -> None:
    x, w = correlated(400, 12).double(), torch.randn(5, 12).double()
    kept = torch.arange(12) % 3 > 0
    y = x @ w.T
    made, shift = Refit(damping=0).solve(w, evidence(x, y), kept, has_bias=True)
    with_one = torch.cat([x[:, kept], torch.ones(400, 1).double()], 1)
    want = torch.linalg.lstsq(with_one, y).solution
    torch.testing.assert_close(made[:, kept], want[:-1].T)
    torch.testing.assert_close(shift, want[-1])
    assert torch.equal(made[:, ~kept], w[:, ~kept])


def test_ridge_leads_back_to_the_old_weights() -> None:
    x, w = correlated(400, 12).double(), torch.randn(5, 12).double()
    kept = torch.arange(12) < 8
    ev = evidence(x, x @ w.T)
    gaps = [(Refit(damping=d).solve(w, ev, kept, has_bias=False)[0] - w).norm()
            for d in (0.0, 0.1, 10.0, 1e9)]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 1 and gaps[-1] < 1e-6


def test_refit_and_bias_beats_refit_beats_nothing() -> None:
    x, w = correlated(400, 12).double(), torch.randn(5, 12).double()
    kept = torch.arange(12) % 3 > 0
    y, ev = x @ w.T, evidence(x, x @ w.T)

    def error(made: torch.Tensor, shift: torch.Tensor) -> float:
        return float((y - x[:, kept] @ made[:, kept].T - shift).square().mean())

    passes = (Refit(damping=0), Refit(damping=0, bias=False), Bias())
    both, refit, bias = (error(*p.solve(w, ev, kept, has_bias=True)) for p in passes)
    nothing = error(w, torch.zeros(5).double())
    assert both < refit < nothing and both < bias < nothing


@pytest.mark.parametrize(("samples", "of_fixed", "of_nothing"), [
    (4, 1.0, 1.001), (15, 0.75, 1.001), (40, 0.5, 1.001), (200, 1.05, 0.8), (5000, 1.01, 0.65)])
def test_the_ridge_is_chosen_by_what_the_samples_say(
        samples: int, of_fixed: float, of_nothing: float) -> None:
    torch.manual_seed(1)
    mix, w = torch.randn(12, 48).double(), torch.randn(6, 48).double()
    x = torch.randn(10_000, 12).double() @ mix + 3 * torch.randn(10_000, 48).double()
    seen, held_out, kept = x[:samples], x[5000:], torch.arange(48) < 36
    ev = evidence(seen, seen @ w.T)

    def error(made: torch.Tensor) -> float:
        missed = held_out @ w.T - held_out[:, kept] @ made[:, kept].T
        return float(missed.square().mean())

    chosen, fixed, nothing = (error(p.solve(w, ev, kept, has_bias=False)[0]) for p in (
        Refit(), Refit(damping=0.01), Refit(damping=1e9)))
    assert chosen < of_fixed * fixed
    assert chosen < of_nothing * nothing


class Tokenizer:
    """All that sampling asks of one."""

    bos_token_id, eos_token_id = 1, 2

class Block(nn.Module):
    """A residual block: the second product is added into the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def convolutions(groups: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(),
                         nn.Conv2d(48, 48, 3, groups=groups, padding=1), nn.ReLU(),
                         nn.Flatten(2), nn.Linear(36, 5))


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), (8,)),
    "no bias": (lambda: nn.Sequential(Block(), Block(), nn.Linear(8, 4)), (8,)),
    "convolution": (convolutions, (3, 8, 8)),
    "grouped": (lambda: convolutions(4), (3, 8, 8)),
}
REPAIRS = ("bias", "refit(bias=False)", "refit", "refit(create_biases=True)",
           "refit(sequential=True)", "refit(sequential=True, residual=True)",
           "refit(sequential=True, residual=True, every=True)")


def compiled(case: str, repair: Any, **more: Any) -> tuple[Any, torch.Tensor, nn.Module]:
    torch.manual_seed(0)
    make, shape = CASES[case]
    net = make()
    x = torch.randn(64, *shape)
    target = "params=68%" if case == "grouped" else "params=70%"
    result = spacompiler.compile(net, (x[:4],), target=target, importance="magnitude",
                                 repair=repair, calibration=[(p,) for p in x.split(16)], align=1,
                                 layout="any", onnx=False, latency=False, **more)
    return result, x, net


@pytest.mark.parametrize("case", CASES)
def test_repairs_lower_the_error_and_are_proved(case: str) -> None:
    plain, x, net = compiled(case, "none")
    before = copy.deepcopy(net.state_dict())
    want = net(x)
    worst = (plain.module(x) - want).square().mean()
    for repair in REPAIRS:
        result, _, net = compiled(case, repair)
        assert (result.module(x) - want).square().mean() < worst, repair
        assert result.job.proof.error < 1e-10 < result.job.proof.control
        assert result.plan.kept == plain.plan.kept
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_repaired_artifact_verifies(tmp_path: Any) -> None:
    result, x, net = compiled("linear", "refit")
    result.save(tmp_path / "out")
    found = {c.name: c for c in verify(tmp_path / "out", model=net)}
    assert found["plan identity"].passed and "2 repaired" in found["plan identity"].detail
    torch.testing.assert_close(spacompiler.load(tmp_path / "out", model=net)(x), result.module(x))


@pytest.mark.parametrize(("importance", "real", "repairs"), [
    ("taylor", True, True), ("magnitude", True, False), ("taylor", False, False)])
def test_repair_is_automatic_where_scoring_reads_data(importance: str, real: bool,
                                                      repairs: bool) -> None:
    torch.manual_seed(0)
    net, x = CASES["linear"][0](), torch.randn(64, 8)
    job = spacompiler.compile(
        net, (x[:4],), target="params=70%", importance=importance, align=1, onnx=False,
        latency=False, calibration=[(p,) for p in x.split(16)] if real else "none").job
    assert bool(job.trace.repaired) == repairs == (job.compensation is not None)


def test_what_cannot_be_repaired_is_no_error_unasked() -> None:
    """Tied arrays are read twice: an automatic repair leaves them, another one says so."""
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.down(torch.relu(self.up(x)))
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    net, x = Tied(), torch.randn(16, 8)
    options: dict[str, Any] = {"target": "params=70%", "align": 1, "onnx": False,
                               "latency": False, "calibration": [(x,)]}
    assert not spacompiler.compile(net, (x[:4],), **options).job.trace.repaired
    with pytest.raises(spacompiler.SpaError, match="finds nothing to repair"):
        spacompiler.compile(net, (x[:4],), repair="refit", **options)


@pytest.mark.parametrize("importance", ["magnitude", "curvature"])
def test_biases_that_repair_created_load_again(importance: str, tmp_path: Any) -> None:
    """From the recorded source, whose layers have none, and with the user's own dense module."""
    result = spacompiler.compile(
        "zoo:llama-gqa", target="body=60%", importance=importance, align=1, onnx=False,
        latency=False, repair="refit(create_biases=True)", out=tmp_path / "out",
        calibration=[{"input_ids": ids} for ids in torch.randint(0, 60, (8, 4, 16))])
    ids = {"input_ids": torch.arange(8).reshape(2, 4)}
    want = result.module(**ids).logits
    dense = load("llama-gqa").build()[0]
    for module in (spacompiler.load(tmp_path / "out"),
                   spacompiler.load(tmp_path / "out", model=dense)):
        assert torch.equal(module(**ids).logits, want)
    assert not any(name.endswith("down_proj.bias") for name in dense.state_dict())
    found = {c.name: c for c in verify(tmp_path / "out")}
    assert all(c.passed in (True, None) for c in found.values())
    assert "repaired" in found["plan identity"].detail


class Head(nn.Module):
    """A head that is tied to an embedding, behind a norm; `norm` makes it of a width."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.table, self.block, self.norm = nn.Embedding(40, 8), Block(), norm(8)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.block.down.weight *= 4

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.block(self.table(ids)))[:, 0:]
        return hidden @ self.table.weight.T


class Scaled(nn.Module):
    """RMSNorm in operators."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("norm", [Scaled, nn.RMSNorm, nn.LayerNorm], ids=lambda n: n.__name__)
def test_before_a_head_that_must_stay_the_gain_is_refit(norm: Any) -> None:
    """By least squares, channel by channel, toward what the dense norm gives."""
    torch.manual_seed(0)
    net, ids = Head(norm), torch.randint(0, 40, (16, 4, 6))
    before = copy.deepcopy(net.state_dict())
    result = spacompiler.compile(
        net, (ids[0],), target="params=60%", importance="magnitude", align=1, latency=False,
        only=("block.up.weight:0",), calibration=[(batch,) for batch in ids], onnx=False,
        repair="refit(damping=0, sequential=True, residual=True, every=True)")
    made, job = result.module, result.job
    assert job.proof.error < 1e-10 < job.proof.control
    assert torch.equal(made.table.weight, before["table.weight"])
    assert "norm.weight" in job.trace.repaired
    flat = ids.flatten(0, 1)
    with torch.no_grad():
        want = net.norm(net.block(net.table(flat))).double().flatten(0, 1)
        plain = norm(8)
        x = plain(made.block(made.table(flat))).double().flatten(0, 1)
    if norm is nn.LayerNorm:
        x, want = x - x.mean(0), want - want.mean(0)
        assert "norm.bias" in job.trace.repaired
    torch.testing.assert_close(made.norm.weight.double(), (x * want).sum(0) / x.square().sum(0),
                               rtol=1e-4, atol=0)
    assert not torch.allclose(made.norm.weight, before["norm.weight"], rtol=1e-2)


def test_repair_without_data_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(spacompiler.UsageError, match="needs calibration data"):
        spacompiler.compile(net, (torch.randn(4, 8),), target="params=70%", repair="refit",
                            calibration="none", importance="magnitude")


class Buffered(Scaled):
    """Its gain is no parameter."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        del self.weight
        self.register_buffer("weight", torch.ones(size), persistent=False)


def test_a_gain_that_is_no_parameter_stays() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (16, 4, 6))
    job = spacompiler.compile(
        Head(Buffered), (ids[0],), target="params=60%", importance="magnitude", align=1,
        only=("block.up.weight:0",), calibration=[(batch,) for batch in ids], onnx=False,
        latency=False, repair="refit(sequential=True, residual=True, every=True)").job
    assert job.trace.repaired == {"block.down.weight"}


class Fixed(nn.Module):
    """Serves four rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)).reshape(4, 16))


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "taylor"])
def test_batches_that_the_network_does_not_take_are_named(importance: str) -> None:
    options: dict[str, Any] = {"target": "params=70%", "importance": importance, "align": 1,
                               "repair": "refit", "onnx": False, "latency": False}
    with pytest.raises(SpaError, match="do not fit the example inputs") as caught:
        spacompiler.compile(Fixed(), (torch.randn(4, 6),), calibration=[(torch.randn(5, 6),)],
                            **options)
    assert "(5, 6) for (4, 6)" in caught.value.why
    assert spacompiler.compile(Fixed(), (torch.randn(4, 6),), calibration=[
        (torch.randn(4, 6),) for _ in range(3)], **options).job.proof.holds


def test_batch_norms_see_the_statistics_of_the_pruned_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3),
                        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    net.train()
    for _ in range(20):
        net(torch.randn(32, 3, 8, 8) + 1)
    net.eval()
    x = torch.randn(64, 3, 8, 8) + 1
    result = spacompiler.compile(net, (x[:4],), target="params=70%", importance="magnitude",
                                 repair="batch-norm", calibration=[(p,) for p in x.split(16)],
                                 only=("0.weight:0",), align=1)
    pruned = result.module
    assert result.job.proof.holds and pruned[0].out_channels < 32
    hidden = pruned[3](pruned[2](pruned[1](pruned[0](x))))
    torch.testing.assert_close(pruned[4].running_mean, hidden.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pruned[4].running_var, hidden.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_repair_that_finds_nothing_says_so() -> None:
    with pytest.raises(spacompiler.SpaError, match="finds nothing to repair"):
        compiled("linear", "batch-norm")


def test_noise_is_calibration_for_a_network_without_data() -> None:
    torch.manual_seed(0)
    net, x = convolutions(), torch.randn(64, 3, 8, 8)
    errors = []
    for repair in ("none", "refit"):
        result = spacompiler.compile(net, (x[:4],), target="params=70%", importance="magnitude",
                                     repair=repair, calibration="sampled", samples=32, batch=8,
                                     align=1)
        errors.append(float((result.module(x) - net(x)).square().mean()))
    assert errors[1] < errors[0]


def test_a_language_model_writes_its_own_calibration_text() -> None:
    from spacompiler.torch_backend.gather.sampling import sampled

    pytest.importorskip("transformers")
    module, inputs = load("llama-gqa").build()
    made = sampled(module, inputs, Tokenizer(), samples=4, length=8, batch=2, seed=0)
    assert [kw["input_ids"].shape for _, kw in made] == [(2, 8), (2, 8)]
    again = sampled(module, inputs, Tokenizer(), samples=4, length=8, batch=2, seed=0)
    assert all(torch.equal(a[1]["input_ids"], b[1]["input_ids"])
               for a, b in zip(made, again, strict=True))
    assert len({tuple(row) for _, kw in made for row in kw["input_ids"].tolist()}) > 1


@pytest.fixture(scope="module")
def small_llama() -> Any:
    pytest.importorskip("transformers")
    return load("llama-gqa").build()


def tokens(rows: int, length: int, seed: int = 0) -> Any:
    return torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_language_model_continues_calibration_windows(small_llama: Any) -> None:
    module, _ = small_llama
    given = [((), {"input_ids": tokens(n, 16, n)}) for n in (3, 1)]
    made, again = continued(module, given, seed=1), continued(module, given, seed=1)
    assert [kw["input_ids"].shape for _, kw in made] == [(3, 16), (1, 16)]
    for (_, a), (_, b), (_, c) in zip(given, made, again, strict=True):
        assert torch.equal(b["input_ids"][:, :4], a["input_ids"][:, -4:])
        assert torch.equal(b["input_ids"], c["input_ids"])
    other = continued(module, given, seed=2)
    assert not torch.equal(other[0][1]["input_ids"], made[0][1]["input_ids"])
    for _, kwargs in given:  # a start token
        kwargs["input_ids"][:, 0] = 1
    ids, begun = given[0][1]["input_ids"], continued(module, given, seed=1)[0][1]["input_ids"]
    assert torch.equal(begun[:, :4], torch.cat([ids[:, :1], ids[:, -3:]], 1))


@pytest.mark.parametrize(("importance", "repair"), [
    ("obs", "refit"), ("curvature", "refit"), ("curvature(continued=False)", "refit"),
    ("magnitude", "refit(sequential=True, residual=True)")])
def test_repair_is_fit_to_continued_text_as_to_text_that_is_given(
        small_llama: Any, importance: str, repair: str) -> None:
    """Covariances and curvature over both texts score and repair; other statistics do not."""
    module, inputs = small_llama
    given = [((), {"input_ids": tokens(8, 16)})]
    options: dict[str, Any] = dict(target="body=70%", importance=importance, repair=repair,
                                   align=1, onnx=False, latency=False, prove=False)
    both = spacompiler.compile(module, inputs, calibration=given, continued=True, **options)
    longer = [*given, *continued(module, given, seed=0)]
    assert "continued" in both.job.calibration.origin
    wanted = spacompiler.compile(module, inputs, calibration=longer, **options)
    alone = spacompiler.compile(module, inputs, calibration=given, **options)
    down, name = "model.layers.0.mlp.down_proj.weight", next(iter(both.job.scores))
    arrays = [made.module.state_dict()[down].double() for made in (both, wanted, alone)]
    if "False" not in importance:  # that takes gradients from the given windows alone
        torch.testing.assert_close(arrays[0], arrays[1], rtol=1e-4, atol=1e-6)
    else:
        assert not np.allclose(both.job.scores[name], wanted.job.scores[name], rtol=1e-3)
    assert arrays[0].shape != arrays[2].shape or not torch.allclose(
        arrays[0], arrays[2], rtol=1e-2)


@pytest.mark.parametrize(("calibration", "repair", "says"), [
    ([((), {"input_ids": tokens(4, 16), "attention_mask": torch.ones(4, 16)})], "refit",
     "cannot be continued"),
    ([((), {"input_ids": tokens(4, n)}) for n in (8, 16)], "refit", "cannot be continued"),
    ([((), {"input_ids": tokens(4, 16)})], "none", "nothing is repaired"),
])
def test_what_cannot_be_continued_is_refused(small_llama: Any, calibration: Any, repair: str,
                                             says: str) -> None:
    module, inputs = small_llama
    with pytest.raises(spacompiler.UsageError, match=says):
        spacompiler.compile(module, inputs, target="body=70%", importance="magnitude",
                            repair=repair, calibration=calibration, continued=True)


def test_tokens_without_a_name_are_continued_too(small_llama: Any) -> None:
    module, inputs = small_llama
    named, plain = (spacompiler.compile(
        module, inputs, target="body=70%", importance="magnitude", repair="refit", onnx=False,
        latency=False, calibration=[batch], continued=True).job.calibration.beside
        for batch in (((), {"input_ids": tokens(4, 16)}), ((tokens(4, 16),), {})))
    assert plain and all(torch.equal(a["input_ids"], b["input_ids"])
                         for (_, a), (_, b) in zip(named, plain, strict=True))


def test_an_encoder_and_decoder_cannot_continue() -> None:
    pytest.importorskip("transformers")
    module, _ = load("t5").build()
    with pytest.raises(spacompiler.UsageError, match="causal language model"):
        continued(module, [((), {"input_ids": tokens(2, 16)})], seed=0)


def test_a_network_that_writes_no_text_cannot_continue() -> None:
    with pytest.raises(spacompiler.UsageError, match="causal language model"):
        spacompiler.compile(convolutions(), (torch.randn(4, 3, 8, 8),), target="params=70%",
                            calibration=[(torch.randn(4, 3, 8, 8),)], importance="magnitude",
                            repair="refit", continued=True)


def test_a_sequential_ridge_leads_back_to_the_one_shot_repair() -> None:
    """With a ridge that lets nothing move in the second step, both repairs are the same."""
    made = {}
    for name, repair in (("one-shot", Refit(damping=0.01)),
                         ("both", Refit(damping=0.01, sequential=True, leash=1e12))):
        made[name] = compiled("no bias", repair)[0].module.state_dict()
    for name, want in made["one-shot"].items():
        torch.testing.assert_close(made["both"][name], want, rtol=1e-3, atol=1e-5)


def test_products_of_nothing_are_left_alone() -> None:
    class Twice(nn.Module):
        """Its first layers run again, on no samples."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
            self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.b(self.a(x).relu())
            return self.d(self.c(y).relu()), self.b(self.a(y[:0]).relu())

    torch.manual_seed(0)
    result = spacompiler.compile(
        Twice(), (torch.randn(4, 8),), target="params=57%", importance="magnitude", align=1,
        repair="refit(damping=0.01)", calibration=[torch.randn(64, 8)], onnx=False, latency=False)
    assert "d.weight" in result.job.trace.repaired


def test_a_batch_without_examples_is_an_error() -> None:
    with pytest.raises(SpaError, match="calibration batch 1 has no examples"):
        spacompiler.compile(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
                            (torch.randn(2, 8),), target="params=57%", repair="refit",
                            calibration=[torch.randn(4, 8), torch.randn(0, 8)])
