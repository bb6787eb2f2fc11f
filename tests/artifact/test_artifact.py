"""The artifact: whole or not at all, byte-identical, loadable, and `verify` sees what is wrong."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.artifact import torch_files
from spacompiler.errors import ProofError, SpaError, UsageError
from spacompiler.models_zoo import load
from spacompiler.stages import proof as judged
from spacompiler.stages.tolerances import CONTROL, ONNX
from spacompiler.store import folder as artifact

FAST = {"importance": "magnitude", "latency": False}


def compiled(name, out, target="macs=65%", **options):
    return spacompiler.compile(f"zoo:{name}", target=target, out=out, align=1,
                               **{**FAST, **options})


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    out = tmp_path_factory.mktemp("llama") / "out"
    return compiled("llama-gqa", out, "body=60%"), out


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    out = tmp_path_factory.mktemp("resnet") / "out"
    return compiled("resnet", out), out


def test_uniform_layout_loads_with_stock_transformers_alone(llama):
    """A process in which spacompiler cannot be imported: bit-equal logits, generation."""
    result, out = llama
    assert result.job.layout == "uniform"
    code = f"""
import sys
sys.modules["spacompiler"] = None
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
model = AutoModelForCausalLM.from_pretrained({str(out)!r}).eval()
ids = load_file({str(out / "check.safetensors")!r})["kwarg.input_ids"]
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits
    cached = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=True,
                            attention_mask=torch.ones_like(ids), pad_token_id=0)
    plain = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False,
                           attention_mask=torch.ones_like(ids), pad_token_id=0)
assert torch.equal(cached, plain) and cached.shape[1] == ids.shape[1] + 6
sys.stdout.buffer.write(logits.numpy().tobytes())
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env,
                          cwd=out.parent)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    with torch.no_grad():
        want = result.module(**result.job.trace.kwargs).logits
    assert done.stdout == want.numpy().tobytes()


def test_config_says_the_new_sizes(llama):
    result, out = llama
    config = json.loads((out / "config.json").read_text())
    dense = result.job.module.config
    assert config["intermediate_size"] < dense.intermediate_size
    assert config["hidden_size"] == dense.hidden_size
    assert config["head_dim"] == dense.head_dim


@pytest.mark.parametrize("name, emission", [
    ("resnet", "module"), ("fused-qkv", "program"), ("gpt2", "module"), ("convnext", "module"),
    ("gated-mlp-shared", "module")])
def test_any_layout_loads_again(tmp_path, name, emission):
    result = compiled(name, tmp_path / "out", "body=60%", onnx=False)
    assert (result.job.layout, result.job.emission) == ("any", emission)
    again = spacompiler.load(tmp_path / "out")
    args, kwargs = result.job.trace.args, result.job.trace.kwargs
    with torch.no_grad():
        got, want = again(*args, **kwargs), result.module(*args, **kwargs)
    got, want = (x if isinstance(x, torch.Tensor) else x[0] for x in (got, want))
    assert torch.equal(got, want)
    dense = sum(p.numel() for p in result.job.module.parameters())
    assert sum(p.numel() for p in again.parameters()) < 0.9 * dense


def test_a_sliced_buffer_that_no_state_dict_holds_is_saved(tmp_path):
    class Tabled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 3)
            self.register_buffer("table", torch.linspace(1, 2, 20), persistent=False)

        def forward(self, x):
            return self.down((self.up(x) * self.table).relu())

    result = spacompiler.compile(Tabled(), (torch.randn(4, 6),), target="params=50%",
                                 out=tmp_path / "o", align=1, **FAST)
    again = spacompiler.load(tmp_path / "o", model=Tabled())
    assert again.table.shape == (again.up.out_features,) != (20,)
    assert torch.equal(again.table, result.module.table)


def test_a_module_of_the_users_own_loads_into_a_fresh_one(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))

    spacompiler.compile(make(), (torch.randn(4, 6),), target="params=50%", out=tmp_path / "o",
                        align=1, **FAST)
    again = spacompiler.load(tmp_path / "o", model=make())
    assert again[0].out_features == again[2].in_features < 20
    with pytest.raises(SpaError, match="cannot be built"):
        spacompiler.load(tmp_path / "o")
    with pytest.raises(SpaError, match="has no array"):
        spacompiler.load(tmp_path / "o", model=nn.Linear(2, 2))


def test_same_seed_same_bytes(tmp_path):
    """Two processes, other hash seeds: every file of each artifact is identical."""
    code = """
import sys, spacompiler
for name in ("llama-gqa", "grouped-conv"):
    spacompiler.compile(f"zoo:{name}", target="body=70%", importance="taylor", align=1,
                        latency=False, out=f"{sys.argv[1]}/{name}")
"""
    for i in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code, i], capture_output=True, text=True,
                              env={**os.environ, "PYTHONHASHSEED": i}, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = digests(tmp_path / "1"), digests(tmp_path / "2")
    assert one == two
    for name in ("llama-gqa", "grouped-conv"):
        assert f"{name}/MANIFEST.json" in one and f"{name}/model.onnx" in one


def test_another_seed_other_bytes(tmp_path):
    plans = [compiled("mlp", tmp_path / str(s), importance="random", seed=s, onnx=False).plan.kept
             for s in (0, 1)]
    assert plans[0] != plans[1]


def test_verify_passes_on_what_compile_wrote(llama, resnet):
    for _, out in (llama, resnet):
        found = {c.name: c for c in spacompiler.verify(out)}
        assert list(found) == ["hashes", "reload", "plan identity", "onnx"]
        assert all(c.passed is True for c in found.values()), found


def spoil_weight(folder, remanifest):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if tensors[n].ndim > 1)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata={"tied": "{}"})
    if remanifest:
        artifact.write_manifest(folder)


@pytest.mark.parametrize("remanifest, failing", [(False, {"hashes"}),
                                                 (True, {"reload", "plan identity", "onnx"})])
def test_verify_sees_changed_weights(resnet, tmp_path, remanifest, failing):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(resnet[1], copy)
    spoil_weight(copy, remanifest)
    found = spacompiler.verify(copy)
    assert {c.name for c in found if c.passed is False} == failing


@pytest.mark.parametrize("change, says", [
    (lambda d: (d / "plan.json").unlink(), "plan.json is missing"),
    (lambda d: (d / "extra.txt").write_text("x"), "extra.txt is not listed"),
    (lambda d: (d / "report.md").write_text("x"), "report.md was changed"),
])
def test_manifest_covers_every_file(resnet, tmp_path, change, says):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(resnet[1], copy)
    change(copy)
    (check,) = spacompiler.verify(copy)
    assert check.passed is False and says in check.detail


def test_only_safe_formats_are_written(llama, resnet):
    for _, out in (llama, resnet):
        assert not [p for p in out.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]


@pytest.mark.parametrize("stage", ["export_onnx", "save_check", "write_manifest", "rename"])
def test_failure_leaves_nothing_behind(tmp_path, monkeypatch, stage):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    homes = {"export_onnx": "spacompiler.deploy.export.export_onnx",
             "save_check": "spacompiler.artifact.torch_files.save_check",
             "write_manifest": "spacompiler.artifact.write.write_manifest",
             "rename": "pathlib.Path.rename"}
    monkeypatch.setattr(homes[stage], fail)
    with pytest.raises(SpaError, match="cannot be written") as caught:
        compiled("mlp", tmp_path / "deep" / "out")
    assert caught.value.why == "disk full"
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        compiled("mlp", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_wrong_onnx_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "ONNX", replace(ONNX, value=-1.0))
    with pytest.raises(ProofError, match="ONNX Runtime differs"):
        compiled("mlp", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_control_that_is_not_caught_stops_the_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "CONTROL", replace(CONTROL, value=1e9))
    with pytest.raises(ProofError, match="negative control"):
        compiled("mlp", tmp_path / "out")


def test_the_report_says_that_the_proof_was_skipped(tmp_path):
    compiled("mlp", tmp_path / "out", prove=False, onnx=False)
    assert "Skipped on request" in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["proof"] is None


def test_the_users_model_is_left_alone(tmp_path):
    module, inputs = load("resnet").build()
    module.train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    spacompiler.compile(module, inputs, target="macs=60%", **{**FAST, "onnx": False})
    assert module.training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_latency_is_reported(tmp_path):
    result = compiled("vgg", tmp_path / "out", latency=True)
    times = result.report["latency"]
    assert times["dense"]["median_ms"] > 0 and times["pruned"]["median_ms"] > 0
    assert "latency in ONNX Runtime" in (tmp_path / "out" / "report.md").read_text()
