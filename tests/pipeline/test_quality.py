"""Allocations that are tried on data, and how dense and pruned are compared on data held out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import spacompiler
from spacompiler.evidence.calibration import from_string
from spacompiler.models_zoo import load
from spacompiler.passes.tried import Tried
from spacompiler.pipeline import finish
from spacompiler.pipeline.request import Windows
from spacompiler.request.recipe import Recipe

QUICK = {"latency": False, "onnx": False, "align": 1}


class Branches(nn.Module):
    """A branch that carries the result and one that hardly adds to it."""

    def __init__(self, scale: float = 1e-3) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 5))
        self.side = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 5))
        with torch.no_grad():
            self.side[2].weight.mul_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * self.main(x) + self.side(x)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Branches().eval()


def batches(seed: int = 0) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 16, generator=generator),) for _ in range(4)]


def compiled(net: nn.Module, **options: object) -> spacompiler.Result:
    given = {"target": "params=60%", "calibration": batches(), "repair": "none", **QUICK}
    return spacompiler.compile(net, batches()[0], **{**given, **options})


def lost(net: nn.Module, result: spacompiler.Result, count: int = 4) -> float:
    with torch.no_grad():
        found = [functional.kl_div(result.module(*b).log_softmax(-1), net(*b).log_softmax(-1),
                                   reduction="batchmean", log_target=True)
                 for b in batches()[:count]]
    return float(sum(found) / len(found))


def test_the_default_allocation_is_the_best_of_those_tried(net):
    found = {how: lost(net, compiled(net, allocation=how)) for how in ("uniform", "global")}
    chosen = compiled(net)
    assert lost(net, chosen) == pytest.approx(min(found.values()), rel=1e-4)
    assert min(found.values()) < 0.9 * max(found.values())
    (note,) = [n for n in chosen.job.notes if n.startswith("allocation tried")]
    best = min(found, key=lambda how: found[how])
    assert f"{best} {lost(net, chosen, 1):.3g}" in note and f"{best} is taken" in note


def test_what_measures_nothing_is_allocated_uniformly(net):
    plain = spacompiler.compile(net, batches()[0], target="params=60%", **QUICK)
    uniform = spacompiler.compile(net, batches()[0], target="params=60%", allocation="uniform",
                                  **QUICK)
    assert plain.plan.kept == uniform.plan.kept and plain.job.allocation.name == "uniform"
    assert Recipe("params=50%").allocation == "auto"


def test_results_that_are_not_finite_are_not_taken(net, monkeypatch):
    from spacompiler.trials.measure import Measure

    values = iter([float("nan"), 3.0, 2.0, 1.0])
    monkeypatch.setattr(Measure, "lost", lambda *args: next(values))
    note = next(n for n in compiled(net, allocation=Tried()).job.notes if "tried" in n)
    assert "uniform inf" in note and "uniform is taken" not in note


def test_a_divergence_that_rounding_makes_negative_is_none(net, monkeypatch):
    from spacompiler.trials.measure import Measure

    monkeypatch.setattr(Measure, "lost", lambda *args: -1e-12)
    note = next(n for n in compiled(net, allocation=Tried()).job.notes if "tried" in n)
    assert "uniform 0" in note and "uniform is taken" in note


class Letters:
    def __call__(self, text, **options):
        return type("Tokens", (), {"input_ids": torch.tensor([[ord(c) - 97 for c in text]])})


def test_windows_held_out_are_no_windows_of_the_calibration():
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(400))
    found = from_string(text, Letters(), samples=6, length=8, batch=2, seed=0, origin="letters")
    read, kept = ([tuple(row.tolist()) for _, b in some for row in b["input_ids"]]
                  for some in (found.batches, found.held_out))
    assert len(read) == 6 and len(kept) == 8 and not set(read) & set(kept)


def test_loss_and_agreement_are_those_of_the_data(net):
    generator = torch.Generator().manual_seed(1)
    data = [((b[0],), {"labels": torch.randint(0, 5, (32,), generator=generator)})
            for b in batches()]

    def loss(outputs, args, kwargs):
        return functional.cross_entropy(outputs[0], kwargs["labels"])

    result = compiled(net, calibration=[(x[0], k["labels"]) for x, k in data], loss=lambda o, a, k:
                      functional.cross_entropy(o[0], k["labels"]))
    x, labels = data[-1][0][0], data[-1][1]["labels"]
    quality = result.report.get("quality") or result.job.quality
    with torch.no_grad():
        dense, pruned = net(x), result.module(x)
    assert quality["loss"]["dense"] == pytest.approx(float(functional.cross_entropy(dense, labels)))
    assert quality["loss"]["pruned"] == pytest.approx(
        float(functional.cross_entropy(pruned, labels)), rel=1e-5)
    assert quality["agreement"] == pytest.approx(
        float((dense.argmax(-1) == pruned.argmax(-1)).float().mean()))
    assert "which was calibrated on" in quality["data"]


def test_much_lost_is_said_and_little_is_not(net):
    def warned(result):
        return [n for n in result.job.notes if n.startswith("much was lost")]

    assert not warned(compiled(net, target="params=80%"))
    poor = compiled(net, target="params=8%", allocation="uniform", importance="random", floor=0.0)
    assert poor.job.quality["agreement"] < 0.5 and "what would help" in warned(poor)[0]


def test_a_comparison_that_fails_is_a_note(net, monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(finish, "judge", broken)
    result = compiled(net)
    assert result.job.quality is None
    assert "dense and pruned could not be compared: RuntimeError: no memory" in result.job.notes
    result.save(tmp_path / "out")


def test_the_report_shows_perplexity_before_and_after(tmp_path):
    module, inputs = load("llama-gqa").build()
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 61, (2, 12), generator=generator)} for _ in range(3)]
    dense = copy.deepcopy(module)
    result = spacompiler.compile(module, inputs, target="body=80%", calibration=data,
                                 out=tmp_path / "out", **QUICK)
    found = result.report["quality"]["perplexity"]
    ids = data[-1]["input_ids"]
    with torch.no_grad():
        want = [float(functional.cross_entropy(m(input_ids=ids).logits[:, :-1].flatten(0, 1),
                                               ids[:, 1:].flatten()).exp())
                for m in (dense, result.module)]
    assert [found["dense"], found["pruned"]] == pytest.approx(want, rel=1e-4)
    assert "perplexity" in (tmp_path / "out" / "report.md").read_text()


def test_further_windows_lie_beside_and_what_is_held_out_comes_first():
    text = "".join(chr(97 + i % 26) for i in range(8 * 40))
    sizes = []
    for further in (0, 24, 100):
        found = from_string(text, Letters(), samples=4, length=8, batch=2, seed=0,
                            origin="letters", further=further)
        parts = [[row for _, k in some for row in k["input_ids"]]
                 for some in (found.batches, found.beside, found.held_out)]
        sizes.append([len(part) for part in parts])
    assert sizes == [[4, 0, 8], [4, 24, 8], [4, 28, 8]]


def test_without_a_number_gradients_see_few_windows_and_repair_more():
    of_text = [Windows(samples, further=further).of_text(8) for samples, further in (
        (None, None), (5, None), (5, 3), (None, 0))]
    assert [(w["samples"], w["further"]) for w in of_text] == [(8, 16), (5, 0), (5, 3), (8, 0)]
    assert Windows().drawn()["samples"] == 16
