"""Ways to make one adapter of several: by formula, on one layer; and errors where none acts."""

import inspect

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.adapters import combining, files, merging
from spacompiler.adapters.clusters import clustered
from spacompiler.errors import SpaError, UsageError
from spacompiler.request.combinations import COMBINATIONS, parse_combination
from spacompiler.request.recipe import Recipe

pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OUT, IN = 12, 10


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 3))


INPUTS = (torch.randn(40, IN, generator=torch.Generator().manual_seed(1)),)


def adapter(seed, rank=4, weight=1.0, alpha=2.0, kind="LORA", **config):
    """An adapter on the first layer, and what it adds there."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, IN, generator=g) * 0.3, torch.randn(OUT, rank, generator=g) * 0.3
    key = f"{files.PREFIX}0.lora_"
    made = files.Adapter(f"a{seed}", weight, {
        "peft_type": kind, "r": rank, "lora_alpha": alpha, "target_modules": ["0"], **config},
        {f"{key}A.weight": a, f"{key}B.weight": b}, {})
    return made, alpha / rank * b @ a


def change(how, *made):
    """What a combination adds to the first layer."""
    module = base()
    old = module[0].weight.detach().clone()
    merged, _ = merging.merge(module, [m for m, _ in made], INPUTS, combine=how)
    return merged[0].weight.detach() - old


def test_every_way_takes_the_options_that_it_says():
    assert combining.WAYS.keys() == COMBINATIONS.keys()
    for name, row in COMBINATIONS.items():
        taken = inspect.signature(combining.WAYS[name]).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        assert free or set(row.options) == set(taken) - {"parts"}


@pytest.mark.parametrize("how, count", [
    ("ties", 1), ("ties(density=0.3)", 1), ("dare_linear", 1), ("dare_ties(density=0.7)", 1),
    ("dare", 1), ("dare(density=0.2)", 1), ("dare(density=0.2, q=0.5)", 1),
    ("dare(density=0.2, q='auto')", 1), ("svd(rank=2)", 1), ("lego(rank=2)", 1),
    ("linear", 2), ("svd", 2), ("lego", 2), ("lego(rank=3, output=True)", 2), ("fair", 2)])
def test_a_combination_acts(how, count):
    """What comes out is not the plain merge, and combined = adapted was checked on the way."""
    made = [adapter(n) for n in range(count)]
    plain = change("cat", *made)
    assert (change(how, *made) - plain).abs().max() > 1e-3


def test_dare_drops_and_rescales_what_one_adapter_adds():
    made, delta = adapter(1)
    torch.manual_seed(3)
    got = change("dare(density=0.4)", (made, delta))
    kept = got.abs() > 1e-6
    assert 0.2 < kept.float().mean() < 0.6
    torch.testing.assert_close(got, torch.where(kept, delta / 0.4, 0.0), rtol=0, atol=1e-6)


def test_dare_takes_the_rescaling_that_changes_results_least():
    """1/q is the least-squares factor of dropped on whole: no other one is nearer."""
    made, delta = adapter(1)
    torch.manual_seed(3)
    got = change("dare(density=0.1, q='auto')", (made, delta))
    x = INPUTS[0]
    error = (x @ (got - delta).T).norm()
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert (x @ (factor * got - delta).T).norm() > error
    torch.manual_seed(3)
    fixed = change("dare(density=0.1)", (made, delta))
    assert (x @ (fixed - delta).T).norm() > 1.5 * error


def test_units_of_several_adapters_are_clustered():
    """As many clusters as units: the exact sum. Two equal adapters: each unit meets its twin."""
    one, two = adapter(1), adapter(2, rank=3, weight=-0.5)
    torch.testing.assert_close(change("lego(rank=7)", one, two), one[1] - 0.5 * two[1],
                               rtol=0, atol=1e-6)
    torch.testing.assert_close(change("lego", one, one), one[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(change("lego(rank=7, output=True)", one, two),
                               (one[1] - 0.5 * two[1]) * (4 / 7) ** 0.5, rtol=0, atol=1e-6)


def test_a_centroid_is_as_long_as_its_members():
    units = torch.tensor([[3.0, 0], [0, 1.0], [-3.1, 0], [0, 1.2], [2.9, 0.1], [-2.9, -0.1]])
    torch.manual_seed(0)
    found = clustered(units, 3)
    lengths = sorted(found.norm(dim=1).tolist())
    assert lengths == pytest.approx([1.1, 2.951, 3.001], abs=1e-2)


def test_the_corrected_mean_is_nearer_to_the_mean_of_products():
    one, two = adapter(1, alpha=4.0), adapter(2, weight=3.0, alpha=1.0)
    want = 0.25 * one[1] + 0.75 * two[1]
    a = sum(p * s ** 0.5 * m.tensors[f"{files.PREFIX}0.lora_A.weight"]
            for p, s, (m, _) in ((0.25, 1.0, one), (0.75, 0.25, two)))
    b = sum(p * s ** 0.5 * m.tensors[f"{files.PREFIX}0.lora_B.weight"]
            for p, s, (m, _) in ((0.25, 1.0, one), (0.75, 0.25, two)))
    got = change("fair(ridge=1e-6)", one, two)
    assert (got - want).norm() < 0.95 * (b @ a - want).norm()
    best = want @ torch.linalg.pinv(a) @ a  # the nearest that keeps the mean A
    torch.testing.assert_close(got, best, rtol=0, atol=1e-4)


def test_a_weight_of_a_scaling_adapter_scales_what_it_changes():
    """IA3 multiplies: half of an adapter is the way from 1 to its factors, not half the weight."""
    factors = torch.rand(OUT, 1) + 0.5
    made = files.Adapter("a", 0.5, {"peft_type": "IA3", "target_modules": ["0"],
                                    "feedforward_modules": []},
                         {f"{files.PREFIX}0.ia3_l": factors}, {})
    got = change("cat", (made, None))
    weight = base()[0].weight.detach()
    torch.testing.assert_close(got, 0.5 * (factors - 1) * weight, rtol=0, atol=1e-6)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how, words", [
    ("mean", "unknown combination"), ("ties(desity=0.2)", "no option 'desity'"),
    ("cat(density=0.2)", "no option"), ("ties(density=1.5)", "cannot be"),
    ("dare(q='best')", "cannot be"), ("svd(rank=-1)", "cannot be"), ("dare_ties(sign='x')", "be"),
    ("ties(", "cannot read")])
def test_a_malformed_combination(how, words):
    with pytest.raises(UsageError, match=words) as error:
        Recipe(target="params=50%", combine=how)
    assert error.value.fix


@pytest.mark.parametrize("how, count", [
    ("linear", 1), ("svd", 1), ("lego", 1), ("fair", 1), ("ties", 0), ("linear", 0)])
def test_a_combination_that_cannot_act(how, count):
    with pytest.raises(UsageError, match=r"several adapters|nothing to combine"):
        spacompiler.compile(base(), INPUTS, target="params=50%", importance="magnitude",
                            adapter=["nowhere"] * count, combine=how)


@pytest.mark.parametrize("how, second, words", [
    ("linear", {"rank": 6}, "ranks differ"), ("ties", {"rank": 6}, "ranks differ"),
    ("fair", {"weight": -1.0}, "sum to zero"), ("cat", {"use_dora": True}, "do not add")])
def test_adapters_that_do_not_go_together(how, second, words):
    with pytest.raises(SpaError, match="combined") as error:
        change(how, adapter(1), adapter(2, **second))
    assert words in error.value.why and error.value.fix


def test_options_have_defaults():
    assert parse_combination("dare(density=0.1)") == ("dare", {"density": 0.1, "q": 0.0})


@pytest.mark.parametrize("how", ["cat", "svd(rank=8)", "lego(rank=8)"])
def test_factors_of_convolutions_combine_as_matrices(how):
    """Where no rank is lost, each way gives the sum."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3))
    made, want = [], module[0].weight.detach().clone()
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(4, 3, 3, 3, generator=g), torch.randn(6, 4, 1, 1, generator=g)
        made.append(files.Adapter("a", 0.1, {
            "peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["0"]},
            {f"{files.PREFIX}0.lora_A.weight": a, f"{files.PREFIX}0.lora_B.weight": b}, {}))
        want += 0.1 * (b.flatten(1) @ a.flatten(1)).reshape(want.shape)
    merged, _ = merging.merge(module, made, (torch.randn(2, 3, 6, 6),), combine=how)
    torch.testing.assert_close(merged[0].weight.detach(), want, rtol=0, atol=1e-5)


def test_the_rescaling_is_measured_on_linear_layers():
    a, b = torch.ones(1, 3, 3, 3), torch.ones(6, 1, 1, 1)
    made = files.Adapter("a", 1.0, {"peft_type": "LORA", "r": 1, "lora_alpha": 1,
                                    "target_modules": ["0"]},
                         {f"{files.PREFIX}0.lora_A.weight": a,
                          f"{files.PREFIX}0.lora_B.weight": b}, {})
    with pytest.raises(SpaError, match="combined") as error:
        merging.merge(nn.Sequential(nn.Conv2d(3, 6, 3)), [made], (torch.randn(2, 3, 6, 6),),
                      combine="dare(q='auto')")
    assert "linear" in error.value.why
