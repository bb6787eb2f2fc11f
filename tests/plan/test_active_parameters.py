"""Whole experts of a mixture go: opt-in, proven, and never fewer than the router takes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import spacompiler
from spacompiler import models_zoo
from spacompiler.api import Result
from spacompiler.artifact.report import facts
from spacompiler.axes.choices import Choice
from spacompiler.axes.expressions import reasons
from spacompiler.errors import SpaError, TargetError
from spacompiler.groups.cost import cost
from spacompiler.groups.solution import Group, Solution, solve
from spacompiler.passes.merge_experts import MergeExperts, nearest
from spacompiler.passes.taylor import Taylor
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.prove import prove
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.trace import Trace

TWO_OF_FIVE = "params=56.5%"
ROUTER = "model.layers.{}.mlp.gate.weight:0"


def built() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    module, inputs = models_zoo.load("moe").build()
    return module, inputs


def compiled(target: str = TWO_OF_FIVE, **options: Any) -> Result:
    given = {"importance": "magnitude", "repair": "none", "roles": ("expert",), "onnx": False,
             "layout": "uniform", "align": 1, "latency": False, **options}
    return spacompiler.compile("zoo:moe", target=target, **given)


@cache
def traced() -> tuple[Trace, Solution]:
    found = trace(*built())
    return found, solve(found.graph, TABLE)


def experts(solution: Solution) -> list[Group]:
    return [g for g in solution.groups.values() if g.role == "expert"]


# --- what comes out ---------------------------------------------------------------------------


@pytest.mark.parametrize(("roles", "target", "count"), [
    (("expert",), "params=71%", 3), (("expert",), TWO_OF_FIVE, 2),
    (("expert", "channel", "head"), "params=50%", 3)])
def test_stock_transformers_loads_what_stays(tmp_path: Path, roles: tuple[str, ...], target: str,
                                             count: int) -> None:
    result = compiled(target, roles=roles, out=tmp_path / "out")
    ids = built()[1]["input_ids"]
    module = result.module.eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.num_local_experts == count
    assert {layer.mlp.experts.down_proj.shape[0] for layer in loaded.model.layers} == {count}
    assert {len(layer.mlp.gate.weight) for layer in loaded.model.layers} == {count}
    with torch.no_grad():
        for x in (ids, ids[:1, :5]):
            assert torch.equal(loaded(input_ids=x).logits, module(input_ids=x).logits)
    assert loaded.generate(ids[:1, :4], max_new_tokens=8, do_sample=False).shape == (1, 12)
    checks = {check.name: check.passed for check in spacompiler.verify(tmp_path / "out")}
    assert list(checks) == ["hashes", "reload", "plan identity"] and all(checks.values())


def test_what_stays_is_the_dense_model_with_scores_of_minus_infinity(tmp_path: Path) -> None:
    """Said again by hand, in the dense module: a router that never takes what is gone."""
    result = compiled()
    dense, inputs = built()

    def gone(kept: list[int]) -> Any:
        def hook(router: Any, args: tuple[torch.Tensor, ...], made: Any) -> Any:
            logits = nn.functional.linear(args[0].reshape(-1, router.hidden_dim), router.weight)
            masked = torch.full_like(logits, -torch.inf)
            masked[:, kept] = logits[:, kept]
            value, index = torch.topk(masked.softmax(-1), router.top_k)
            return logits, value / value.sum(-1, keepdim=True), index

        return hook

    for i, layer in enumerate(dense.model.layers):  # type: ignore[union-attr]
        layer.mlp.gate.register_forward_hook(gone(list(result.plan.kept[ROUTER.format(i)])))
    with torch.no_grad():
        want = dense.eval()(**inputs).logits
        got = result.module.eval()(**inputs).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_where_only_experts_go_no_repair_is_reported() -> None:
    """What scores read is data, so that a repair is tried unasked: no feature goes."""
    data = [{"input_ids": torch.randint(60, (4, 9), generator=torch.Generator().manual_seed(3))}]
    result = compiled(importance="taylor", repair="auto", calibration=data)
    said = facts(result.job)
    assert said["repair"] == "none" and not result.job.trace.repaired
    assert any("refit repaired nothing" in note for note in said["notes"])
    with pytest.raises(SpaError, match="finds nothing to repair"):
        compiled(repair="refit", calibration=data)


def test_without_being_asked_no_expert_goes() -> None:
    result = compiled("params=70%", roles=("channel", "head", "head dim", "hidden"))
    assert not any(result.solution.groups[name].role == "expert" for name in result.plan.kept
                   if len(result.plan.kept[name]) < result.solution.groups[name].size)
    assert {len(layer.mlp.gate.weight) for layer in result.module.model.layers} == {5}


def test_a_router_finds_as_many_as_it_takes() -> None:
    with pytest.raises(TargetError, match="cannot be met") as raised:
        compiled("params=35%", floor=0.0)
    assert "a router takes 2 of model.layers.*.mlp.gate.weight:0, so that" in raised.value.why


def test_experts_that_go_are_merged_into_the_nearest_and_the_best_are_left_alone() -> None:
    dense, inputs = built()
    experts_of = [layer.mlp.experts for layer in dense.model.layers]  # type: ignore[union-attr]
    with torch.no_grad():
        for own in experts_of:
            for array in (own.gate_up_proj, own.down_proj):
                array.mul_(torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0]).reshape(5, 1, 1))
                array[1] = array[3] / 3 + 0.01 * array[1]  # near the third
                array[4] = array[2] / 2 + 0.01 * array[4]  # near one that is left alone
    was = {n: p.clone() for n, p in dense.named_parameters()}
    result = spacompiler.compile(
        dense, inputs, target="params=71%", roles=("expert",), repair="none", onnx=False,
        layout="uniform", align=1, latency=False, calibration="none",
        schedule=MergeExperts(criterion="magnitude"))
    assert all(torch.equal(p, was[n]) for n, p in dense.named_parameters())
    for i, own in enumerate(layer.mlp.experts for layer in result.module.model.layers):
        assert list(result.plan.kept[ROUTER.format(i)]) == [0, 2, 3]
        score = result.job.scores[ROUTER.format(i)]
        share = torch.tensor(score[[3, 1, 4]] / score[[3, 1, 4]].sum()).reshape(3, 1, 1)
        for name in ("gate_up_proj", "down_proj"):
            old = was[f"model.layers.{i}.mlp.experts.{name}"]
            new = getattr(own, name)
            assert torch.equal(new[0], old[0]) and torch.equal(new[1], old[2])
            torch.testing.assert_close(new[2], (share * old[[3, 1, 4]]).sum(0).float())
    rows = torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    kept = np.array([1, 0, 1, 0], dtype=bool)
    assert nearest([rows], kept, np.arange(4.0)[::-1], 0.0) == {1: 0, 3: 2}
    assert nearest([rows], kept, np.arange(4.0)[::-1], 0.5) == {1: 2, 3: 2}  # 0 is left alone
    with pytest.raises(TargetError, match="no experts to merge"):
        spacompiler.compile(dense, inputs, target="params~90%", schedule=MergeExperts(),
                            calibration="none", onnx=False, latency=False)


# --- which axes are experts' ------------------------------------------------------------------


class Mixed(nn.Module):
    """Attention to learnt latents, then the two best of five experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.latents = nn.Parameter(torch.randn(7, 8))
        self.router = nn.Linear(8, 5)
        self.up = nn.Parameter(torch.randn(5, 6, 8))
        self.down = nn.Parameter(torch.randn(5, 8, 6))
        self.offset = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x @ self.latents.T).softmax(-1) @ self.latents
        value, index = self.router(x).softmax(-1).topk(2)
        y = torch.einsum("btkoi,bti->btko", self.up[index], x).relu()
        y = torch.einsum("btkoi,btki->btko", self.down[index], y) + self.offset[index]
        return (y * value.unsqueeze(-1)).sum(2)


def mixed(change: Any = None) -> tuple[Trace, Solution]:
    module = Mixed()
    with torch.no_grad():
        if change is not None:
            change(module)
    found = trace(module, (torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)),))
    return found, solve(found.graph, TABLE)


def keeping(group: Group, kept: list[int]) -> dict[Any, Choice]:
    return {group.atom: Choice(np.isin(np.arange(group.size), kept), group.outers)}


def test_only_what_is_chosen_from_is_an_expert_axis() -> None:
    _, solution = traced()
    assert [g.name for g in experts(solution)] == [ROUTER.format(i) for i in range(2)]
    found, solution = mixed()
    (group,) = experts(solution)
    assert {m.weight for m in group.members} == {
        "router.weight", "router.bias", "up", "down", "offset"}
    assert any("softmax" in why for why in reasons(solution.dims("latents")[0]))
    assert prove(found, solution, keeping(group, [0, 2, 3])).holds


def test_a_wrong_index_is_one_that_tokens_reach() -> None:
    """The largest expert is never chosen, and the one that goes is its neighbour in the arrays."""
    def change(module: Any) -> None:
        module.router.bias[0] = -100.0
        module.up[0] *= 10
        module.down[0] *= 10

    found, solution = mixed(change)
    (group,) = experts(solution)
    assert prove(found, solution, keeping(group, [0, 2, 3, 4])).holds


def test_channels_of_experts_are_channels_however_they_are_computed() -> None:
    """Arrays that are looked up are weights: their products are not those of attention."""
    module, inputs = built()
    module.set_experts_implementation("batched_mm")  # type: ignore[operator]
    found = trace(module, inputs)
    looked_up = solve(found.graph, TABLE).groups
    assert {n: g.role for n, g in looked_up.items()} == {
        n: g.role for n, g in traced()[1].groups.items()}
    assert looked_up["model.layers.0.mlp.experts.gate_up_proj:1"].role == "channel"
    assert looked_up["model.layers.0.self_attn.q_proj.weight:0.2"].role == "head dim"


# --- scores -----------------------------------------------------------------------------------


def test_taylor_is_the_derivative_of_a_gate_on_what_an_expert_gives() -> None:
    found, solution = mixed(lambda module: module.router.bias[0].fill_(-100.0))
    (group,) = experts(solution)
    scores, passed = fresh_context(found, solution), Taylor(per="batch")
    square = lambda flat, args, kwargs: flat[0].square().sum()  # noqa: E731
    scores.calibrate(passed.needs, [(found.args, {})], square, groups=[group])
    module, gate = Mixed(), torch.ones(5, requires_grad=True)
    with torch.no_grad():
        module.router.bias[0] = -100.0
    arrays = {"down": module.down.detach() * gate[:, None, None],
              "offset": module.offset.detach() * gate[:, None]}
    torch.func.functional_call(module, arrays, found.args).square().sum().backward()
    want = gate.grad
    assert want is not None and want[0] == 0 and (want[1:] != 0).all()
    assert torch.allclose(passed.score(group, scores).float(), want.abs(), rtol=1e-4)


@pytest.mark.parametrize(("importance", "says"), [
    ("taylor(per='example')", "examples are not told apart"),
    ("relevance", "examples are not told apart"),
    ("grasp", "no second derivatives"),
    ("fluctuation", "no consumer of .* is a product with weights")])
def test_criteria_that_cannot_score_experts_say_so(importance: str, says: str) -> None:
    with pytest.raises(SpaError) as raised:
        compiled(importance=importance, dry_run=True)
    assert re.search(says, str(raised.value)) and raised.value.fix


@pytest.mark.parametrize("importance", [
    "taylor", "taylor(per='batch')", "taylor-vector", "taylor-element", "snip",
    "geometric-median", "random"])
def test_criteria_that_score_experts(importance: str) -> None:
    result = compiled(importance=importance, dry_run=True)
    assert {len(result.plan.kept[ROUTER.format(i)]) for i in range(2)} == {2}


def test_experts_stay_while_training() -> None:
    """Masks would be zeros there: a score that reads zero may be the best of all."""
    module, inputs = built()
    with pytest.raises(TargetError) as raised:
        spacompiler.Pruner(module, inputs, torch.optim.SGD(module.parameters()), roles=("expert",),
                           target=TWO_OF_FIVE)
    assert "minus infinity" in raised.value.why
    with pytest.raises(TargetError) as raised:
        compiled(schedule="lora-prune(steps=2, criterion='taylor')", importance="taylor")
    assert "minus infinity" in raised.value.why and "--role" in raised.value.fix


# --- ONNX -------------------------------------------------------------------------------------


def test_grouped_products_have_no_onnx_operator(tmp_path: Path) -> None:
    with pytest.raises(SpaError, match="cannot be written as ONNX") as raised:
        compiled(onnx=True, out=tmp_path / "out")
    assert "grouped_mm_fallback" in raised.value.why


def test_onnx_equals_torch_at_other_shapes(tmp_path: Path) -> None:
    """With the experts' arrays looked up token by token, everything is an operator of ONNX."""
    module, inputs = built()
    module.set_experts_implementation("batched_mm")  # type: ignore[operator]
    result = spacompiler.compile(
        module, inputs, target=TWO_OF_FIVE, importance="magnitude", repair="none",
        roles=("expert",), layout="uniform", latency=False, out=tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    pruned = result.module.eval()
    for shape in ((2, 9), (3, 5), (1, 14)):
        ids = torch.randint(60, shape, generator=torch.Generator().manual_seed(2))
        (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        with torch.no_grad():
            want = pruned(input_ids=ids).logits
        assert torch.allclose(torch.from_numpy(got), want, atol=1e-4)


def test_active_parameters_are_those_of_the_experts_that_a_router_takes() -> None:
    module, (_, solution) = built()[0], traced()
    held = sum(p.numel() for n, p in module.named_parameters() if "experts." in n)
    config = module.config
    share = config.num_experts_per_tok / config.num_local_experts
    whole, active = cost(solution, "params"), cost(solution, "active")
    assert active.total == whole.total - held + share * held
    one = experts(solution)[0]
    before = active.total
    router = active.set({one.atom: one.size - 1}) - before
    assert router == -module.model.layers[0].mlp.gate.weight.shape[1]
