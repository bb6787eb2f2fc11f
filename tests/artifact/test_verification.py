"""`verify` on right artifacts of odd networks, and what files say of passes and of this machine."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import spacompiler
from spacompiler.store.said import nameless, said

FAST = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False}


def normed(norm):
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Conv1d(8, 24, 5, padding=2)), nn.ReLU(),
                         norm(nn.Conv1d(24, 4, 3))).eval()


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, parametrizations.weight_norm,
                                  parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_folded_are_verified(tmp_path, norm):
    net = normed(norm)
    spacompiler.compile(net, (torch.randn(2, 8, 16),), target="params=58%", out=tmp_path / "o",
                        **FAST)
    found = spacompiler.verify(tmp_path / "o", net)
    assert all(c.passed for c in found), found
    spoil(tmp_path / "o")
    assert any(c.passed is False for c in spacompiler.verify(tmp_path / "o", net))


def spoil(out):
    """Change a stored array a little, and the manifest with it."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from spacompiler.store import folder as artifact

    file = out / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = max(tensors, key=lambda n: tensors[n].numel() * tensors[n].is_floating_point())
    tensors[name] = tensors[name] * (1 + 2.0**-20)
    save_file(tensors, file, metadata=metadata)
    artifact.write_manifest(out)


class Shared(nn.Module):
    """One layer under several names, as TabNet's shared blocks are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 20)
        shared = nn.Linear(20, 20)
        self.steps = nn.ModuleList([nn.ModuleList([shared]) for _ in range(3)])
        self.last = nn.Linear(20, 3)

    def forward(self, x):
        x = self.first(x).relu()
        for (step,) in self.steps:
            x = step(x).relu()
        return self.last(x)


def test_modules_under_several_names_are_verified(tmp_path):
    spacompiler.compile(Shared(), (torch.randn(4, 6),), target="params=50%", out=tmp_path / "o",
                        **FAST)
    found = spacompiler.verify(tmp_path / "o", Shared())
    assert all(c.passed for c in found), found
    arrays = json.loads((tmp_path / "o" / "slices.json").read_text())["arrays"]
    assert arrays["steps.0.0.weight"] == arrays["steps.2.0.weight"]
    spoil(tmp_path / "o")
    found = {c.name: c for c in spacompiler.verify(tmp_path / "o", Shared())}
    assert found["plan identity"].passed is False


class Empty(nn.Module):
    """Returns a tensor without elements beside its result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, x):
        return self.net(x), x[:, :0], x.argmax(1)


def test_an_empty_result_is_verified(tmp_path):
    spacompiler.compile(Empty(), (torch.randn(4, 6),), target="params=50%", out=tmp_path / "o",
                        **FAST)
    found = spacompiler.verify(tmp_path / "o", Empty())
    assert all(c.passed for c in found), found


def test_trained_arrays_are_named_and_the_others_checked(tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3, bias=False))

    data = [(torch.randn(8, 6),) for _ in range(6)]
    spacompiler.compile(made(), (torch.randn(4, 6),), target="params=60%", out=tmp_path / "o",
                        repair="none", recovery="full(lr=1e-2)", recover_data=data,
                        loss=lambda results, args, kwargs: results[0].pow(2).mean(), **FAST)
    found = {c.name: c for c in spacompiler.verify(tmp_path / "o", made())}
    assert found["plan identity"].passed is True and "trained" in found["plan identity"].detail
    slices = tmp_path / "o" / "slices.json"
    data = json.loads(slices.read_text())
    assert data["trained"]
    slices.write_text(json.dumps({**data, "trained": []}))
    from spacompiler.store import folder as artifact

    artifact.write_manifest(tmp_path / "o")
    found = {c.name: c for c in spacompiler.verify(tmp_path / "o", made())}
    assert found["plan identity"].passed is False


# --- names ----------------------------------------------------------------------------------------


class Bare:
    """An importance pass without a repr."""

    name = "bare"
    needs = frozenset()

    def score(self, group, context):
        return torch.arange(group.size * 1.0).expand(group.shape)


@dataclass
class Called:
    how: Any


def test_no_address_stands_in_a_name():
    assert said(Bare()) == "Bare()"
    assert said(Called(said)) == "Called(how=<function said>)"
    assert "0x" not in said(Called([Bare(), lambda: 0]))


def test_a_pass_without_a_repr_gives_the_same_bytes(tmp_path):
    manifests = []
    for i in (1, 2):
        keep = [Bare() for _ in range(i)]  # another address
        spacompiler.compile(Empty(), (torch.ones(4, 6),), target="params=50%",
                            out=tmp_path / str(i), **{**FAST, "importance": keep[-1]})
        manifests.append((tmp_path / str(i) / "MANIFEST.json").read_bytes())
    assert manifests[0] == manifests[1]
    assert json.loads((tmp_path / "1" / "recipe.json").read_text())["importance"] == "Bare()"


def test_places_of_this_machine_are_left_out(tmp_path):
    (tmp_path / "data.npz").write_bytes(b"")
    data = {"a": f"{tmp_path}/nets/net.onnx", "b": [f"from {tmp_path}/nets/x"], "c": "/layer/Conv"}
    assert nameless(data, [f"{tmp_path}/nets/net.onnx"]) == {
        "a": "net.onnx", "b": ["from x"], "c": "/layer/Conv"}
