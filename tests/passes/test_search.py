"""Search: several limits at once, better than what it starts from, sizes that share weights."""

from __future__ import annotations

import re
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError
from spacompiler.gates.budgets import budget
from spacompiler.groups.cost import cost
from spacompiler.passes.once_for_all import OnceForAll
from spacompiler.passes.search import Search
from spacompiler.plan import legal
from spacompiler.plan.fitting import fitted, mixes, priced
from spacompiler.plan.problem import Limit, Problem
from spacompiler.torch_backend.backend import TORCH
from spacompiler.trials import sensitivity

QUICK = Search(generations=3, offspring=6, batches=2)
OPTIONS: dict[str, Any] = {"align": 1, "importance": "magnitude", "onnx": False, "latency": False,
                           "prove": False}


class Net(nn.Module):
    """Early convolutions hold the multiplications, late layers the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 20, 3, stride=4)
        self.up, self.more, self.out = nn.Linear(80, 90), nn.Linear(90, 70), nn.Linear(70, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.two(self.one(x).relu()).relu().flatten(1)
        return self.out(self.more(self.up(y).relu()).relu())


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Net()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
    return made


IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))
DATA: Any = [(x,) for x in IMAGES.split(16)]


def compiled(net: Any, target: str, allocation: Any, **more: Any) -> Any:
    return spacompiler.compile(net, (DATA[0][0][:4],), target=target, allocation=allocation,
                               **{**OPTIONS, "calibration": DATA, **more})


def shares(result: Any) -> dict[str, float]:
    return {m: c["pruned"] / c["dense"] for m, c in result.plan.costs.items()}


def found(result: Any) -> list[float]:
    """The divergence of the best start, and the one at the end."""
    note = next(n for n in result.job.notes if n.startswith("search: "))
    return [float(x) for x in re.findall(r"divergence (\S+) .*, (\S+) after", note)[0]]


# --- counts under several limits ------------------------------------------------------------------


@pytest.fixture
def problem(net: nn.Module) -> Problem:
    """Half of the parameters and 40% of the multiplications may stay."""
    _, solution = TORCH.trace(net, (DATA[0][0][:4],))
    groups = legal.candidates(solution, roles=("channel",))
    draws = torch.Generator().manual_seed(1)
    scores = {g.name: torch.rand(g.shape, generator=draws).double().numpy() for g in groups}
    made = legal.units(solution, groups, scores, uniform=False, align=1, lanes=8, floor=0.05)
    price, other = cost(solution, "params"), cost(solution, "macs")
    return Problem(made, price, 0.5 * price.total, price.total,
                   limits=(Limit("macs", other, 0.4 * other.total, other.total),))


def test_counts_are_brought_under_all_limits_and_filled_up(problem: Problem) -> None:
    for kept in (problem.full(), problem.least()):
        made = fitted(problem, kept)
        left = [problem.target - problem.price(made), *(
            limit.amount - limit.price(problem, made) for limit in problem.limits)]
        assert min(left) >= 0
        for unit in problem.units:  # no step up fits
            more = {**made, unit.name: unit.legal[min(unit.legal.index(made[unit.name]) + 1,
                                                      len(unit.legal) - 1)]}
            assert more == made or problem.price(more) > problem.target or any(
                limit.price(problem, more) > limit.amount for limit in problem.limits)
        assert problem.met(made)
    assert not problem.met(problem.least())  # no limit binds
    assert not problem.met({**problem.full(), "more.weight:0": 4, "up.weight:0": 4})  # macs: over


def test_prices_find_the_least_loss_under_their_mix(problem: Problem) -> None:
    assert [len(m) for m in mixes(problem)] == [2] * 5
    for mix in mixes(problem):
        kept = priced(problem, mix)
        lost = sum(float(u.losses[kept[u.name]]) for u in problem.units)
        assert problem.price(kept) <= problem.target and problem.holds(kept)

        def spent(counts: dict[str, int], mix: Any = mix) -> float:
            sizes = [problem.price(counts) / problem.dense, *(
                limit.price(problem, counts) / limit.dense for limit in problem.limits)]
            return sum(w * s for w, s in zip(mix, sizes, strict=True))

        for unit in problem.units:  # no other count of one unit costs and loses less
            for k in unit.legal:
                other = {**kept, unit.name: k}
                loss = lost + float(unit.losses[k] - unit.losses[kept[unit.name]])
                assert loss >= lost or spent(other) >= spent(kept)


# --- the search -----------------------------------------------------------------------------------


def test_two_limits_are_met_at_once_by_less_divergence_than_any_start(net: nn.Module) -> None:
    result = compiled(net, "params=50%,macs=50%", QUICK, repair="refit(damping=0.2)")
    left = shares(result)
    assert max(left["params"], left["macs"]) <= 0.51
    assert max(left["params"], left["macs"]) >= 0.49
    first, last = found(result)
    assert last < 0.9 * first
    assert any(re.search("of the limits .* binds?", note) for note in result.job.notes)


@pytest.mark.parametrize("led", [True, False])
def test_what_is_found_is_better_than_what_it_started_from(net: nn.Module, led: bool) -> None:
    result = compiled(net, "params=50%", Search(3, 6, batches=2, led=led), repair="none")
    first, last = found(result)
    assert last < 0.9 * first and abs(shares(result)["params"] - 0.5) < 0.01


def test_solutions_that_are_kept_change_nothing(net: nn.Module,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    once = Search(generations=1, offspring=4, batches=1)
    kept = compiled(net, "params=50%", once, repair="refit").plan.kept
    monkeypatch.setattr(sensitivity, "HELD", -1)
    assert compiled(net, "params=50%", once, repair="refit").plan.kept == kept


def test_limits_that_no_plan_holds_are_an_error_that_names_them(net: nn.Module) -> None:
    with pytest.raises(SpaError, match="cannot be met") as problem:
        compiled(net, "params=99%,macs=3%", QUICK, floor=0.5)
    assert "params: " in problem.value.why and "macs: " in problem.value.why


def test_what_is_searched_without_data_says_so(net: nn.Module, problem: Problem) -> None:
    with pytest.raises(SpaError, match="calibration"):
        QUICK.allocate(problem)
    made = compiled(net, "params=50%", Search(1, 2, batches=1), calibration=None)
    assert any("example inputs" in note for note in made.job.notes)


def test_a_file_is_searched_too(tmp_path: Any) -> None:
    draws = torch.Generator().manual_seed(0)
    arrays, nodes, x = [], [], "x"
    for i, (into, out) in enumerate([(6, 24), (24, 20), (20, 3)]):
        w = torch.randn(out, into, generator=draws) * (i + 1)
        arrays.append(onnx.numpy_helper.from_array(w.numpy(), f"w{i}"))
        nodes.append(onnx.helper.make_node("Gemm", [x, f"w{i}"], [f"y{i}"], transB=1))
        if i < 2:
            nodes.append(onnx.helper.make_node("Relu", [f"y{i}"], [f"z{i}"]))
        x = f"z{i}"
    graph = onnx.helper.make_graph(
        nodes, "net", [onnx.helper.make_tensor_value_info("x", 1, ["n", 6])],
        [onnx.helper.make_tensor_value_info("y2", 1, ["n", 3])], arrays)
    path = str(tmp_path / "net.onnx")
    onnx.save(onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    data = [{"x": torch.randn(16, 6, generator=draws)} for _ in range(2)]
    result = spacompiler.compile(path, data[0], target="params=50%,macs=60%", calibration=data,
                                 allocation=Search(1, 4, batches=2), repair="none", **OPTIONS)
    assert shares(result)["params"] <= 0.51 and found(result)[1] <= found(result)[0]


# --- sizes that share weights ---------------------------------------------------------------------


def test_a_sandwich_is_of_the_whole_the_target_and_sizes_between() -> None:
    rule = budget("sandwich(seed=3)")
    sizes = [rule.now(0.5, 0.0) for _ in range(8)]
    assert sizes[0::4] == [1.0, 1.0] and sizes[1::4] == [0.5, 0.5]
    assert len(set(sizes)) == 6 and all(0.5 <= s <= 1 for s in sizes)


def test_training_for_all_sizes_comes_before_a_search(net: nn.Module) -> None:
    """The counts are found on the whole network as it was trained; the user's stays as it was."""
    y = torch.arange(16) % 6
    data = [((x,), {"labels": y}) for x, in DATA]
    before = {n: p.clone() for n, p in net.state_dict().items()}
    result = compiled(net, "params=60%,macs=60%", Search(1, 4, batches=2), repair="none",
                      calibration=data, schedule=OnceForAll(steps=12, beside_lr=3e-3))
    assert all(torch.equal(before[n], p) for n, p in net.state_dict().items())
    assert all(shares(result)[m] <= 0.61 for m in ("params", "macs"))
    with torch.no_grad():
        cut, whole = result.module.out.weight, net.out.weight
        assert not torch.isin(cut, whole).any() and bool((cut != 0).all())
