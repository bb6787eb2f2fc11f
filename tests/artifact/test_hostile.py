"""Artifacts that somebody changed: one clear word, nothing imported, nobody asked, no traceback.

Each row changes one place of a sound artifact; unless it says otherwise the manifest is written
anew, as somebody who means harm would.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import spacompiler
from spacompiler.cli.main import app
from spacompiler.errors import SpaError
from spacompiler.store import folder as artifact

FAST = {"importance": "magnitude", "latency": False, "align": 1}
TRAP = "spa_trap_module"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Artifacts of a module of the user's own, of a language model, and of an ONNX file."""
    root = tmp_path_factory.mktemp("sound")
    net = Net()
    spacompiler.compile(net, (torch.randn(4, 8),), target="params=60%", out=root / "any",
                        onnx=False, **FAST)
    spacompiler.compile("zoo:llama-gqa", target="body=60%", out=root / "uniform", onnx=False,
                        **FAST)
    torch.onnx.export(net, (torch.randn(4, 8),), str(root / "net.onnx"), dynamo=False)
    spacompiler.compile(str(root / "net.onnx"), target="params=60%", out=root / "onnx", **FAST)
    return root


SOURCES = {"any": lambda root: Net(), "uniform": lambda root: None,
           "onnx": lambda root: str(root / "net.onnx")}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_sound_artifact_passes_and_says_nothing_of_where_it_was_made(sound, kind):
    found = spacompiler.verify(sound / kind, SOURCES[kind](sound))
    assert all(c.passed for c in found), found
    for file in (sound / kind).rglob("*"):
        assert str(sound).encode() not in file.read_bytes(), file


# --- mutations ------------------------------------------------------------------------------------


def edit(file, change):
    """Change the data of a JSON file."""
    def apply(folder):
        data = json.loads((folder / file).read_text())
        found = change(data)
        (folder / file).write_text(json.dumps(data if found is None else found))
    return apply


def put(*path, value):
    """Set an entry, by its keys."""
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value
    return change


def gone(*path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]
    return change


def first_list(change):
    """Change the first list of kept positions."""
    def apply(data):
        key = next(iter(data["indices"]))
        data["indices"][key] = change(data["indices"][key])
    return apply


def plan_list(change):
    def apply(data):
        key = next(iter(data["kept"]))
        data["kept"][key] = change(data["kept"][key])
    return apply


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def arrays(file, change):
    """Change the arrays of a safetensors file."""
    def apply(folder):
        with safe_open(folder / file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata=metadata)
    return apply


def every(value):
    def change(tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = torch.full_like(tensor, value)
    return change


def swap(data):
    """Keep another position, consistently with nothing else."""
    return sorted({*data[1:], next(i for i in range(99) if i not in data)})


def only(prefix):
    return lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(prefix)]


NAN = float("nan")
DEEP = "[" * 5000 + "]" * 5000
JSON = ("MANIFEST.json", "structure.json", "plan.json", "slices.json", "recipe.json")
MUTATIONS = {
    **{f"{file} deep": (text(file, DEEP), False) for file in JSON},
    **{f"{file} of another type": (text(file, "[1]"), False) for file in JSON},
    **{f"{file} cut off": (text(file, '{"files": {'), False) for file in JSON},
    **{f"{file} missing": ((lambda f: lambda d: (d / f).unlink())(file), False) for file in JSON},
    "manifest without files": (text("MANIFEST.json", "{}"), False),
    "manifest entry of another type": (edit("MANIFEST.json", put("files", "plan.json", value=3)),
                                       False),
    "NaN in JSON": (text("plan.json", '{"kept": {}, "sizes": {"a": NaN}}'), True),
    "a key twice": (text("plan.json", '{"kept": {}, "kept": {}, "sizes": {}}'), True),
    "a number of many digits": (text("plan.json", '{"kept": {}, "sizes": {"a": ' + "9" * 5000 +
                                     "}}"), True),
    "no text": (lambda d: (d / "plan.json").write_bytes(b"\xff\xfe\x00"), True),
    "layout unknown": (edit("structure.json", put("layout", value="x")), True),
    "layout of another kind": (edit("structure.json", put("layout", value="uniform")), True),
    "layout onnx without a file": (edit("structure.json", put("layout", value="onnx")), True),
    "emission unknown": (edit("structure.json", put("emission", value="x")), True),
    "attributes of another type": (edit("structure.json", put("attributes", value=[1])), True),
    "an attribute of a path that is not there": (
        edit("structure.json", put("attributes", value=[["zz", "x", 1]])), True),
    "a dunder attribute": (
        edit("structure.json", put("attributes", value=[["a", "__class__", 1]])), True),
    "forward is a number": (
        edit("structure.json", put("attributes", value=[["a", "forward", 1]])), True),
    "inputs missing": (edit("structure.json", gone("inputs")), True),
    "inputs that are not recorded": (edit("structure.json", put("inputs", "args", value=3)), True),
    "no inputs": (edit("structure.json", put("inputs", value={"args": 0, "kwargs": [],
                                                              "constants": {}})), True),
    "trained is claimed": (edit("structure.json", put("trained", value=True)), True),
    "a block is dropped": (edit("structure.json", put("dropped", value=["a"])), True),
    "a bias is added to nothing": (edit("structure.json", put("biased", value=["zz"])), True),
    "parts are claimed": (edit("structure.json", put("parts", value=["zz"])), True),
    "repaired is claimed": (edit("slices.json", put("repaired", value=["a.weight"])), True),
    "trained arrays are claimed": (edit("slices.json", put("trained", value=["a.weight"])), True),
    "slices without arrays": (edit("slices.json", gone("arrays")), True),
    "no array is cut": (edit("slices.json", put("arrays", value={})), True),
    "positions reversed": (edit("slices.json", first_list(lambda x: x[::-1])), True),
    "positions out of range": (edit("slices.json", first_list(lambda x: [*x[:-1], 10**6])), True),
    "negative positions": (edit("slices.json", first_list(lambda x: [-1, *x[1:]])), True),
    "other positions": (edit("slices.json", first_list(swap)), True),
    "positions missing": (edit("slices.json", put("indices", value={})), True),
    "a gain is corrected": (edit("slices.json", put("corrected", "a.bias", value={
        "factor": 2.0, "offset": 0.0})), True),
    "another plan": (edit("plan.json", plan_list(swap)), True),
    "a plan of nothing": (edit("plan.json", put("kept", value={})), True),
    "a plan out of range": (edit("plan.json", plan_list(lambda x: [*x[:-1], 10**6])), True),
    "a plan without sizes": (edit("plan.json", put("sizes", value={})), True),
    "a plan of other weights": (edit("plan.json", put("weights_hash", value="0" * 64)), True),
    "a plan with more": (edit("plan.json", put("more", value=1)), True),
    "weights NaN": (arrays("model.safetensors", every(NAN)), True),
    "weights zero": (arrays("model.safetensors", every(0.0)), True),
    "weights and results NaN": (lambda d: (arrays("model.safetensors", every(NAN))(d),
                                           arrays("check.safetensors", every(NAN))(d)), True),
    "a weight missing": (arrays("model.safetensors", lambda t: t.pop("a.weight")), True),
    "a weight more": (arrays("model.safetensors", lambda t: t.update(z=torch.zeros(1))), True),
    "a weight of another shape": (arrays("model.safetensors", lambda t: t.update(
        {"a.weight": t["a.weight"].T.contiguous()})), True),
    "tied to nothing": (lambda d: save_file(load_file(d / "model.safetensors"),
                                            d / "model.safetensors",
                                            metadata={"tied": '{"a.weight": "zz"}'}), True),
    "weights are no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99),
                                   True),
    "results missing": (arrays("check.safetensors", only("result")), True),
    "inputs not there": (arrays("check.safetensors", only("arg")), True),
    "results NaN": (arrays("check.safetensors", every(NAN)), True),
    "a result of another shape": (arrays("check.safetensors", lambda t: t.update(
        {"result.0": t["result.0"][:2]})), True),
    "a pipe": (lambda d: os.mkfifo(d / "pipe"), False),
    "a dangling link": (lambda d: (d / "link").symlink_to("nowhere"), False),
    "a link outside": (lambda d: (d / "link").symlink_to("/etc/hostname"), False),
    "a file that is a link": (lambda d: ((d / "plan.json").rename(d.parent / "p.json"),
                                         (d / "plan.json").symlink_to(d.parent / "p.json")),
                              False),
    "an empty directory": (lambda d: (d / "empty").mkdir(), False),
    "a linked directory": (lambda d: (d / "linked").symlink_to("/etc"), False),
    "a file more": (text("more.txt", "x"), False),
    "a name in another coding": (lambda d: Path(os.fsdecode(os.fsencode(d) + b"/\xff")).touch(),
                                 False),
}


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No connection may be made, and a module that lies in the current folder not be imported."""
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    here = tmp_path / "here"
    here.mkdir()
    (here / f"{TRAP}.py").write_text("raise SystemExit('foreign code ran')\n")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))  # worse than any shell makes it
    yield here
    assert TRAP not in sys.modules


def mutated(sound, kind, tmp_path, change, remanifest):
    copy = tmp_path / "artifact"
    shutil.copytree(sound / kind, copy)
    change(copy)
    if remanifest:
        artifact.write_manifest(copy)
    return copy


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_artifact_is_never_ok(sound, tmp_path, alone, name):
    change, remanifest = MUTATIONS[name]
    copy = mutated(sound, "any", tmp_path, change, remanifest)
    try:
        found = spacompiler.verify(copy, Net())
    except SpaError as problem:
        assert problem.what and problem.why and problem.fix
    else:
        assert any(c.passed is not True for c in found), found
        assert all(c.detail and "Traceback" not in c.detail for c in found)
    try:  # a model that loads may be another one, if it was made to be; nothing else may happen
        spacompiler.load(copy, Net())
    except SpaError as problem:
        assert problem.what


NAMES = [f"{TRAP}:factory", f"{TRAP}.py:factory", "os:getcwd", "someone/model", "/etc",
         "http://localhost:1/x", "./here", "zoo:../x", "spacompiler.demo:main"]


@pytest.mark.parametrize("name", NAMES)
def test_what_an_artifact_names_is_not_run(sound, tmp_path, alone, name):
    copy = mutated(sound, "any", tmp_path, edit("structure.json", put("model", value=name)), True)
    edit("recipe.json", put("model", value=name))(copy)
    artifact.write_manifest(copy)
    assert any(c.passed is not True for c in spacompiler.verify(copy))
    with pytest.raises(SpaError):
        spacompiler.load(copy)
    from spacompiler.cli import bench

    with pytest.raises(SpaError):
        bench.run(copy)


@pytest.mark.parametrize("name", [f"{TRAP}.Model", "transformers_modules.x.Model", "os.system",
                                  "transformers.models.llama.modeling_llama.LlamaConfig",
                                  "transformers.models.nothing.Model",
                                  "transformers.utils.logging.os", "torch.nn.Linear"])
def test_only_models_of_transformers_are_built(sound, tmp_path, alone, name):
    copy = mutated(sound, "uniform", tmp_path,
                   edit("structure.json", put("class", value=name)), True)
    assert any(c.passed is not True for c in spacompiler.verify(copy))
    with pytest.raises(SpaError):
        spacompiler.load(copy)


CONFIGS = {
    "code elsewhere": put("auto_map", value={"AutoModel": f"{TRAP}.Model"}),
    "kernels of the hub": put("_attn_implementation", value="someone/kernels"),
    "layers without end": put("num_hidden_layers", value=10**6),
    "wider than the weights": put("intermediate_size", value=64),
    "a size of another type": put("hidden_size", value="x"),
    "no size": put("hidden_size", value=0),
    "no vocabulary": put("vocab_size", value=None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_configuration_is_one_clear_error(sound, tmp_path, alone, name):
    copy = mutated(sound, "uniform", tmp_path, edit("config.json", CONFIGS[name]), True)
    assert any(c.passed is False for c in spacompiler.verify(copy))
    with pytest.raises(SpaError):
        spacompiler.load(copy)


ONNX = {
    "no ONNX": lambda d: (d / "model.onnx").write_bytes(b"x" * 100),
    "weights changed": lambda d: (d / "model.onnx").write_bytes(
        (d / "model.onnx").read_bytes().replace(b"\x3d", b"\x3c")),
    "results missing": arrays("check.safetensors", only("result")),
    "results NaN": arrays("check.safetensors", every(NAN)),
    "other positions": edit("slices.json", first_list(swap)),
    "another plan": edit("plan.json", plan_list(swap)),
    "another source": edit("structure.json", put("source_sha256", value="0" * 63 + "g")),
}


@pytest.mark.parametrize("name", ONNX)
def test_a_changed_onnx_artifact_is_never_ok(sound, tmp_path, alone, name):
    copy = mutated(sound, "onnx", tmp_path, ONNX[name], True)
    try:
        found = spacompiler.verify(copy, str(sound / "net.onnx"))
    except SpaError as problem:
        assert problem.why and problem.fix
    else:
        assert any(c.passed is False for c in found), found


def test_lift_reads_no_changed_artifact(sound, tmp_path):
    from spacompiler.adapters.lifting import lift

    copy = mutated(sound, "any", tmp_path, edit("slices.json", first_list(lambda x: x[::-1])),
                   False)
    with pytest.raises(SpaError, match="damaged"):
        lift(tmp_path, copy, tmp_path / "lifted")
    artifact.write_manifest(copy)
    with pytest.raises(SpaError, match=r"slices.json cannot be read"):
        lift(tmp_path, copy, tmp_path / "lifted")


def test_timing_reads_no_changed_artifact(sound, tmp_path):
    from spacompiler.cli import bench

    copy = mutated(sound, "onnx", tmp_path, text("report.md", "x"), False)
    for given in ((copy,), (sound / "net.onnx", copy), (copy, sound / "net.onnx")):
        with pytest.raises(SpaError, match="damaged"):
            bench.run(*given)


def test_a_child_imports_nothing_from_the_current_folder(sound, tmp_path, monkeypatch):
    from spacompiler.runtime.latency import compare_latency

    for name in ("json", "numpy", "onnxruntime", "statistics"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('foreign code ran')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.{os.pathsep}")
    times = compare_latency({"m": sound / "onnx" / "model.onnx"},
                            {"x": torch.zeros(4, 8).numpy()}
                            if False else feeds(sound / "onnx" / "model.onnx"), repeats=1)
    assert times["m"].repeats == 1


def feeds(path):
    from spacompiler.deploy.cases import Sizes, synthetic

    return synthetic(path, Sizes(4, 8))


def command(*words, cwd):
    env = {**os.environ, "PYTHONPATH": str(Path(spacompiler.__file__).parents[1])}
    return subprocess.run([sys.executable, "-P", "-m", "spacompiler.cli", *map(str, words)],
                          capture_output=True, text=True, env=env, cwd=cwd)


def test_what_was_not_checked_is_not_ok(sound, tmp_path):
    """Exit codes: all is ok, something was left out, that counts as failed, something failed."""
    def verify(*words):
        return CliRunner().invoke(app, ["verify", *map(str, words)])

    found = verify(sound / "onnx", "--source", sound / "net.onnx")
    assert found.exit_code == 0, found.output
    found = command("verify", sound / "onnx", cwd=tmp_path)  # as a process of its own
    assert found.returncode == 3 and "--source" in found.stdout
    assert verify(sound / "onnx", "--strict").exit_code == 1
    copy = mutated(sound, "onnx", tmp_path, text("report.md", "x"), False)
    assert verify(copy).exit_code == 1
