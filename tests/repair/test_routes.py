"""Arrays that data chooses (experts) as consumers: what they read, what it says, their repair."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler import models_zoo
from spacompiler.api import Result
from spacompiler.errors import SpaError
from spacompiler.evidence.losses import default_loss
from spacompiler.evidence.origins import Route
from spacompiler.evidence.statistics import Covariance, Fluctuation, Moments
from spacompiler.groups.solution import Solution, solve
from spacompiler.passes.refit import Refit
from spacompiler.repair.evidence import Evidence
from spacompiler.request import registry
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.trace import Trace

WAYS = ("grouped_mm", "batched_mm")
CHANNELS = "model.layers.{}.mlp.experts.gate_up_proj:1"


def moe(way: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    module, inputs = models_zoo.load("moe").build()
    module.set_experts_implementation(way)  # type: ignore[operator]
    return module, inputs


def texts(seed: int = 3) -> list[dict[str, torch.Tensor]]:
    made = torch.randint(60, (64, 9), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids} for ids in made.split(8)]


def compiled(way: str, **options: Any) -> Result:
    given = {"target": "params=80%", "importance": "magnitude", "only": ("*experts*",),
             "repair": "none", "calibration": texts(), "align": 1, "layout": "any", "onnx": False,
             "latency": False, "prove": False, **options}
    return spacompiler.compile(*moe(way), **given)


# --- dealing out ------------------------------------------------------------------------------

ROWS = torch.arange(24.0).reshape(8, 3) + 1
INDEX = torch.tensor([3, 0, 3, 1, 0, 0, 3, 0])  # nothing meets index 2
OWN = [[1, 4, 5, 7], [3], [], [0, 2, 6]]


def test_samples_are_dealt_out_in_order_and_the_rest_is_zero() -> None:
    made, seen = Route("", "", 0, 4).deal(ROWS, INDEX)
    assert made.shape == (4, 4, 3) and seen.tolist() == [4, 1, 0, 3]
    for part, own in zip(made, OWN, strict=True):
        assert torch.equal(part[: len(own)], ROWS[own]) and not part[len(own):].any()
    order, ends = INDEX.argsort(stable=True), torch.tensor([4, 5, 5, 8], dtype=torch.int32)
    again, counts = Route("", "", 0, 4, ends=True).deal(ROWS[order], ends)
    assert torch.equal(again, made) and torch.equal(counts, seen)


def test_a_position_may_stand_for_several_samples() -> None:
    made, seen = Route("", "", 0, 4).deal(ROWS, torch.tensor([[1, -1], [0, 1]]))
    assert seen.tolist() == [2, 4, 0, 2]
    assert torch.equal(made[1], ROWS[[0, 1, 6, 7]]) and torch.equal(made[3, :2], ROWS[2:4])


@pytest.mark.parametrize("kind", [Moments, Covariance, Fluctuation])
def test_a_sample_that_another_index_has_counts_as_zeros(kind: type[Any]) -> None:
    dealt, whole = kind(), kind()
    for scale in (1.0, -2.0):
        made, seen = Route("", "", 0, 4).deal(scale * ROWS, INDEX)
        dealt.add(made, 1, seen)
        chosen = nn.functional.one_hot(INDEX, 4).T.unsqueeze(2)  # (shared, samples, 1)
        whole.add(chosen * scale * ROWS, 1)
    assert dealt.count == whole.count
    for name in ("mean", "variance", "norm", "centred", "second", "value"):
        if hasattr(kind, name) or name in vars(dealt):
            torch.testing.assert_close(getattr(dealt, name), getattr(whole, name))
    if kind is Covariance:
        assert dealt.seen.tolist() == [8, 2, 0, 6] and whole.seen.tolist() == [16] * 4


# --- repair -----------------------------------------------------------------------------------


@cache
def met(way: str) -> tuple[nn.Module, list[list[torch.Tensor]]]:
    """The dense module, and what each expert of each layer reads of the texts."""
    module, _ = moe(way)
    found: list[list[torch.Tensor]] = []
    hooks = []
    for layer in module.model.layers:  # type: ignore[union-attr]
        parts: list[list[torch.Tensor]] = [[] for _ in range(5)]

        def look(part: nn.Module, args: Any, out: Any, parts: Any = parts) -> None:
            for e, own in enumerate(parts):
                own.append(args[0][(args[1] == e).any(1)])

        hooks.append(layer.mlp.experts.register_forward_hook(look))
        found.append(parts)  # type: ignore[arg-type]
    with torch.no_grad():
        for batch in texts():
            module(**batch)
    for hook in hooks:
        hook.remove()
    return module, [[torch.cat(own).double() for own in parts] for parts in found]


def hidden(own: Any, e: int, x: torch.Tensor) -> torch.Tensor:
    """What the last array of an expert reads."""
    gate, up = (x @ own.gate_up_proj[e].detach().double().T).chunk(2, -1)
    return own.act_fn(gate) * up


@pytest.mark.parametrize(("way", "repair"), [
    *((way, "refit(damping=0.01)") for way in WAYS),
    ("grouped_mm", "refit(damping=0.01, sequential=True)")])
def test_each_expert_is_fit_to_the_tokens_that_reach_it(way: str, repair: str) -> None:
    result = compiled(way, repair=repair)
    dense, read = met(way)
    for i, (old, new) in enumerate(zip(dense.model.layers, result.module.model.layers,
                                       strict=True)):
        kept, own = torch.tensor(result.plan.kept[CHANNELS.format(i)]), old.mlp.experts
        for e, x in enumerate(read[i]):
            h, w = hidden(own, e, x), own.down_proj[e].double()
            ridge = (0.01 * h[:, kept].square().sum(0).mean()).sqrt()
            want = torch.linalg.lstsq(
                torch.cat([h[:, kept], ridge * torch.eye(len(kept))]),
                torch.cat([h @ w.T, ridge * w[:, kept].T])).solution.T
            got = new.mlp.experts.down_proj[e].double()
            assert (got - want).norm() < 1e-5 * (want - w[:, kept]).norm()


def test_the_ridge_of_an_expert_is_sought_by_the_number_of_its_own_tokens() -> None:
    result = compiled("grouped_mm", repair="refit")
    dense, read = met("grouped_mm")
    own: Any = dense.model.layers[0].mlp.experts  # type: ignore[union-attr]
    kept = torch.zeros(28, dtype=torch.bool)
    kept[list(result.plan.kept[CHANNELS.format(0)])] = True
    for e, x in enumerate(read[0]):
        h, w = hidden(own, e, x), own.down_proj[e].detach().double()
        y = h @ w.T
        seen = Evidence(len(h), h.sum(0), y.sum(0), h.T @ h, h.T @ y, float(y.square().sum()))
        want = Refit().solve(w, seen, kept, has_bias=False)[0][:, kept]
        got = result.module.model.layers[0].mlp.experts.down_proj[e].double()
        assert (got - want).norm() < 1e-5 * (want - w[:, kept]).norm()


@cache
def narrower(way: str, repair: str) -> tuple[Result, float]:
    """A compile that cuts the stream and channels, and how far its results are from the dense."""
    result = compiled(way, repair=repair, only=(), roles=("hidden", "channel"),
                      prove=repair != "none")
    with torch.no_grad():
        return result, sum(float((result.module(**batch).logits - met(way)[0](**batch).logits)
                                 .square().mean()) for batch in texts(9))


@pytest.mark.parametrize("way", WAYS)
def test_arrays_that_read_the_stream_are_refit_too(way: str) -> None:
    result, error = narrower(way, "refit")
    assert error < 0.9 * narrower("grouped_mm", "none")[1] and result.job.proof.holds
    assert {f"model.layers.{i}.mlp.experts.{name}" for i in range(2)
            for name in ("gate_up_proj", "down_proj")} <= result.job.trace.repaired


def test_experts_that_no_token_reaches_keep_their_weights() -> None:
    """Where all tokens are one, two of five experts read it."""
    same = [{"input_ids": torch.full((8, 9), 7)}]
    result = compiled("grouped_mm", repair="refit(damping=0.01)", calibration=same)
    for i, layer in enumerate(result.module.model.layers):
        kept = list(result.plan.kept[CHANNELS.format(i)])
        old = met("grouped_mm")[0].model.layers[i].mlp.experts.down_proj  # type: ignore
        assert sum(torch.equal(a[:, kept], b) for a, b in zip(
            old, layer.mlp.experts.down_proj, strict=True)) == 3


@cache
def traced(way: str) -> tuple[Trace, Solution]:
    found = trace(*moe(way))
    return found, solve(found.graph, TABLE)


def scored(way: str, importance: str) -> list[torch.Tensor]:
    """Scores of the channels inside the experts of each layer."""
    found, solution = traced(way)
    groups = [solution.groups[CHANNELS.format(i)] for i in range(2)]
    scores, passed = fresh_context(found, solution), registry.find("importance", importance)
    scores.calibrate(passed.needs, [((), batch) for batch in texts()], default_loss,
                     groups=groups)
    return [passed.score(group, scores).double() for group in groups]


@pytest.mark.parametrize("importance", [
    "wanda", "fluctuation", "fluctuation(published=False)", "obs", "curvature", "gblm", "cfsp",
    "taylor", "taylor(per='batch')", "relevance"])
def test_channels_of_experts_score_alike_however_they_are_computed(importance: str) -> None:
    one, two = (scored(way, importance) for way in WAYS)
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.max()))


def test_examples_are_not_told_apart_in_the_order_of_experts() -> None:
    with pytest.raises(SpaError, match="cannot be gathered") as raised:
        scored("grouped_mm", "taylor(per='example')")
    assert "grouped_mm_fallback" in raised.value.why and raised.value.fix
    assert scored("batched_mm", "taylor(per='example')")


def test_an_array_behind_a_view_is_repaired() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x).relu() @ self.down.weight.T

    made = []
    for turned in (True, False):
        torch.manual_seed(0)
        net: Any = Turned()
        if not turned:
            net = nn.Sequential(net.up, nn.ReLU(), net.down)
        result = spacompiler.compile(net, (torch.randn(4, 8),), target="params=69%", align=1,
                                     importance="magnitude", repair="refit", onnx=False,
                                     latency=False, calibration=[torch.randn(64, 8)])
        made.append((result.module.down if turned else result.module[2]).weight)
    torch.testing.assert_close(made[0], made[1])


class Spread(nn.Module):
    """One product of a token with all the arrays that it chose: X lacks one of their letters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.first = nn.Linear(8, 5), nn.Linear(8, 12)
        self.up = nn.Parameter(torch.randn(5, 6, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, index = self.router(x).softmax(-1).topk(2)
        y = torch.einsum("btkoi,bti->btko", self.up[index], self.first(x).relu())
        return (y * value.unsqueeze(-1)).sum(2)


def test_what_is_no_product_of_dealt_out_samples_is_named() -> None:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    with pytest.raises(SpaError, match="finds nothing to repair") as raised:
        spacompiler.compile(Spread(), (x,), target="params=77%", importance="magnitude", align=1,
                            repair="refit", calibration=[x], onnx=False, latency=False)
    assert "only aten.einsum" in raised.value.why
