"""Ordinary requests that cannot be carried out: one clear error each, before the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import spacompiler
from spacompiler.cli.main import app
from spacompiler.errors import ProofError, SpaError, TargetError, UsageError
from spacompiler.store.arrays import load_weights, save_weights

Q: dict[str, Any] = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False}
X = (torch.randn(4, 16, generator=torch.Generator().manual_seed(0)),)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def compiled(module: nn.Module, inputs: Any = X, **options: Any) -> Any:
    return spacompiler.compile(module, inputs, **{"target": "params=60%", **Q, **options})


# --- arrays -------------------------------------------------------------------------------------


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(4))


def meta() -> nn.Module:
    net = mlp()
    net[2].to("meta")
    return net


def inference() -> nn.Module:
    with torch.inference_mode():
        return mlp()


@pytest.mark.parametrize("make, words", [
    (lazy, "weight 0.weight has no values yet"), (meta, "2.weight .*meta device"),
    (inference, "0.weight was made in inference mode")])
def test_arrays_without_usable_values_are_named(make: Any, words: str) -> None:
    for call in (compiled, lambda m: spacompiler.Pruner(m, X, target="params=60%")):
        with pytest.raises(SpaError, match=words):
            call(make())


class Shadowed(nn.Module):
    """Registers a part as `parameters`, which every module has a method of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self._modules["parameters"] = nn.ParameterList(self.net[0].parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def packed() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})


@pytest.mark.parametrize("make, words", [
    (Shadowed, r"the part 'parameters' cannot be reached[\s\S]*_modules.pop\('parameters'\)"),
    (packed, r"layer 0 is quantised[\s\S]*compile the module in floating point")])
def test_parts_that_cannot_be_read_are_named(make: Any, words: str) -> None:
    with pytest.raises(SpaError, match=words):
        compiled(make())


@torch.library.custom_op("spatest::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@halved.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Halving(nn.Module):
    """An operator of the user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return halved(x)


def test_nothing_to_prune_names_the_operators_that_no_row_knows() -> None:
    with pytest.raises(TargetError, match=r"unknown operators keep what they touch: "
                                          r"spatest\.halved\.default in 1 \(.*test_refusals.py:"):
        compiled(nn.Sequential(nn.Linear(16, 64), Halving(), nn.Linear(64, 4)))


class Fused(nn.Module):
    """Computes its weight from two others at every call, as blocks that are re-parametrised do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fused = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(16, 64)
        self.out = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fused.weight.data = self.one.weight.data.detach() + self.two.weight.data.detach()
        return self.out(self.fused(x).relu())


def test_weights_that_each_call_computes_anew_are_named() -> None:
    with pytest.raises(ProofError, match=r"in fused.weight|fused\.weight") as problem:
        compiled(Fused(), target="params~90%")
    assert "each call computes 1 of its arrays anew" in problem.value.why


def test_groups_of_a_model_without_values_can_be_looked_at() -> None:
    with torch.device("meta"):
        assert spacompiler.inspect(mlp(), X).groups
    with pytest.raises(SpaError, match="has no values yet"):
        spacompiler.inspect(lazy(), X)


def test_a_call_in_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(UsageError, match="inference mode"):
        compiled(mlp())


def test_a_statistic_that_is_not_finite_is_named() -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    net[1].running_mean[3] = float("nan")
    with pytest.raises(SpaError, match=r"1\.running_mean holds NaN"):
        compiled(net)


def test_inputs_that_onnx_runtime_cannot_be_fed_are_refused_before_the_work(tmp_path: Any) -> None:
    net, inputs = mlp().bfloat16(), (X[0].bfloat16(),)
    with pytest.raises(UsageError, match="bfloat16 inputs"):
        compiled(net, inputs, out=tmp_path / "a", onnx=True)
    result = compiled(net, inputs, onnx=True)
    with pytest.raises(UsageError, match="bfloat16 inputs"):
        result.save(tmp_path / "b")
    assert not list(tmp_path.iterdir())
    compiled(net, inputs, out=tmp_path / "c")


def test_a_square_array_and_its_transpose_are_two_arrays(tmp_path: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = mlp(), nn.Linear(4, 4, bias=False)
            self.turned = nn.Linear(4, 4, bias=False)
            self.turned.weight = nn.Parameter(self.last.weight.data.T)

        def forward(self, x: torch.Tensor) -> Any:
            return self.turned(self.last(self.first(x)))

    net = Tied()
    compiled(net, out=tmp_path / "out", only=("first.*",))
    save_weights(tmp_path / "w", net)
    held = load_weights(tmp_path / "w")
    assert torch.equal(held["turned.weight"], net.last.weight.T)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    ({"seed": 2**64}, "seed must be"), ({"seed": -1}, "seed must be"), ({"seed": 1.5}, "seed must"),
    ({"importance": ":"}, "cannot load"), ({"importance": ":x"}, "no module's name"),
    ({"importance": ".a:x"}, "no module's name"), ({"importance": "a" * 5000}, "5002 characters"),
    ({"importance": "a" * 5000 + ".py:x"}, "cannot load"),
    ({"layout": "uniform"}, "uniform layout is for transformers models")])
def test_options_that_mean_nothing_are_usage_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        compiled(mlp(), **options)
    assert words in str(caught.value) and len(str(caught.value)) < 900, str(caught.value)[:1000]


@pytest.mark.parametrize("option", ["--calibration", "--adapter", "--importance", "--out"])
def test_very_long_options_end_in_a_short_error(option: str, tmp_path: Any) -> None:
    out = [] if option == "--out" else ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [
        "compile", "zoo:mlp", "--target", "macs=60%", "--no-onnx", *out, option, "a" * 5000])
    assert done.exit_code in (1, 2) and not isinstance(done.exception, OSError)
    assert "error: " in done.stderr and len(done.stderr) < 2000


def test_a_graph_in_a_missing_directory_is_refused_at_once(tmp_path: Any) -> None:
    done = CliRunner().invoke(app, ["inspect", "zoo:mlp", "--graph", str(tmp_path / "no/g.html")])
    assert done.exit_code == 2 and "there is no directory" in done.stderr
    assert "tracing" not in done.stderr


# --- networks -----------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Adds noise in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


def test_a_network_that_draws_in_eval_mode_is_named_as_such() -> None:
    with pytest.raises(ProofError, match="draws random numbers") as caught:
        compiled(Noisy())
    assert "randn_like" in caught.value.where


class Auxiliary(nn.Module):
    """A second head that only training asks for."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 64), nn.Linear(64, 4)
        self.aux = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.relu(self.body(x))
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


def test_a_head_that_was_not_reached_is_named_with_what_no_longer_fits() -> None:
    with pytest.warns(UserWarning, match="aux is not reached"):
        result = compiled(Auxiliary(), target="params=75%")
    width = result.module.body.out_features
    assert any(f"64 to {width}" in note for note in result.job.notes)


def test_a_target_out_of_reach_says_what_lies_in_unreached_parts() -> None:
    with pytest.raises(TargetError, match="cannot be met") as caught:
        compiled(Auxiliary(200), target="params=20%")
    assert "lie in aux, which the example inputs do not reach" in str(caught.value)


def test_further_windows_of_what_is_no_text_are_refused() -> None:
    with pytest.raises(UsageError, match="further_samples has nothing to act on"):
        spacompiler.compile(mlp(), (torch.zeros(2, 8),), target="params=50%", further_samples=3,
                            importance="wanda", calibration=[(torch.randn(2, 8),)])
