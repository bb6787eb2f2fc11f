"""The command line: what it prints, exit codes, and one clear error for every kind of bad input."""

import json
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spacompiler.cli.main import app

RUN = CliRunner()
QUICK = ["--target", "macs=60%", "--importance", "magnitude", "--align", "1", "--no-onnx"]


def spa(*args):
    return RUN.invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny saved transformers model, without a tokenizer."""
    from spacompiler.models_zoo import load

    folder = tmp_path_factory.mktemp("hf") / "model"
    load("llama-gqa").build()[0].save_pretrained(folder)
    return folder


def test_help_is_quick_and_imports_no_torch():
    code = ("import sys, spacompiler.cli as c; "
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "spacompiler.cli.main", "--help"],
                              capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and "compile" in done.stdout
    assert min(times) < 0.3


def test_compile_prints_a_table_on_stdout_and_progress_on_stderr(tmp_path):
    done = spa("compile", "zoo:mlp", *QUICK, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "parameters" in done.stdout and "proof: relative error" in done.stdout
    assert "tracing" in done.stderr and "tracing" not in done.stdout
    assert not any(step in done.stderr for step in ("recovering", "keeping", "repairing",
                                                    "merging", "needs about"))
    load = " ".join(done.stdout.split()[-20:])
    assert "layout any; to load it:" in load and f'spacompiler.load("{tmp_path}/out")' in load


def test_a_quiet_compile_says_nothing_and_a_log_says_when(tmp_path):
    done = spa("compile", "zoo:mlp", *QUICK, "--dry-run", "--quiet", "--log-file", tmp_path / "log")
    assert done.exit_code == 0 and not done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert any(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d scoring", line) for line in lines)
    done = spa("compile", "zoo:mlp", *QUICK, "--dry-run", "--log-file", tmp_path / "no" / "log")
    assert done.exit_code == 1 and "cannot be used" in done.stderr


def test_a_shell_completes_models_and_passes():
    words = {"_SPACOMPILER_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    done = RUN.invoke(app, [], env={**words, "COMP_WORDS": "spacompiler compile zoo:ml"},
                      prog_name="spacompiler")
    assert done.stdout.split() == ["zoo:mlp"]
    done = RUN.invoke(app, [], env={**words, "COMP_CWORD": "3", "COMP_WORDS":
                                    "spacompiler compile --importance tayl"},
                      prog_name="spacompiler")
    assert {"taylor", "taylor-element"} <= set(done.stdout.split())


def test_compile_json_is_one_document(tmp_path):
    done = spa("compile", "zoo:mlp", *QUICK, "--out", tmp_path / "out", "--json")
    data = json.loads(done.stdout)
    assert data["proof"]["relative_error"] <= 1e-10 and data["out"] == str(tmp_path / "out")


def test_dry_run_stops_at_the_plan(tmp_path):
    done = spa("compile", "zoo:mlp", *QUICK, "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and "nothing written" in done.stdout
    assert not (tmp_path / "out").exists()


def test_compile_a_saved_checkpoint_and_a_factory(tmp_path, checkpoint, monkeypatch):
    done = spa("compile", checkpoint, *QUICK, "--out", tmp_path / "a", "--target", "body=60%")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "a" / "config.json").exists()
    (tmp_path / "mynet.py").write_text(
        "import torch\ndef make():\n    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(5, 30), "
        "torch.nn.ReLU(), torch.nn.Linear(30, 2))\n    return net, (torch.randn(3, 5),)\n")
    monkeypatch.chdir(tmp_path)
    done = spa("compile", "mynet:make", *QUICK, "--out", tmp_path / "b")
    assert done.exit_code == 0, done.stderr
    for words, code in (((), 3), (("--strict",), 1), (("--source", "mynet:make"), 0)):
        assert spa("verify", tmp_path / "b", *words).exit_code == code
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "net.py").write_text("from beside import make\n")
    (tmp_path / "code" / "beside.py").write_text("from mynet import make\n")
    done = spa("compile", "code/net.py:make", *QUICK, "--dry-run")
    assert done.exit_code == 0, done.stderr
    done = spa("compile", "code/no.py:make", *QUICK, "--dry-run")
    assert done.exit_code == 2 and "there is no file 'code/no.py'" in done.stderr


def test_inspect_lists_groups():
    done = spa("inspect", "zoo:llama-gqa")
    assert done.exit_code == 0 and "10 groups" in done.stdout and "may go" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    data = json.loads(spa("inspect", "zoo:llama-gqa", "--json").stdout)
    assert len(data["groups"]) == 10 and data["unknown_operators"] == []
    full = spa("inspect", "zoo:llama-gqa", "--full").stdout
    assert "frozen" in full and "2*3*(4+4)" in full


def test_inspect_why_prints_the_chain():
    done = spa("inspect", "zoo:llama-gqa", "--why", "model.layers.0.mlp.gate_proj.weight:0",
               "model.layers.0.mlp.down_proj.weight:1")
    lines = done.stdout.splitlines()
    assert "gate_proj.weight" in lines[0] and "down_proj.weight" in lines[-1]
    assert any("aten.silu" in line for line in lines)


@pytest.mark.parametrize("ending", ["dot", "graphml", "html"])
def test_inspect_writes_graphs(tmp_path, ending):
    path = tmp_path / f"groups.{ending}"
    assert spa("inspect", "zoo:resnet", "--graph", path).exit_code == 0
    text = path.read_text()
    assert "0.weight:0" in text
    if ending == "graphml":
        import networkx as nx

        graph = nx.read_graphml(path)
        assert any(d.get("kind") == "group" for _, d in graph.nodes(data=True))


def test_passes_lists_what_is_installed():
    data = json.loads(spa("passes", "--json").stdout)
    names = {(row["kind"], row["name"]) for row in data}
    assert {("importance", "taylor"), ("importance", "magnitude"), ("importance", "random"),
            ("allocation", "uniform"), ("allocation", "global")} <= names
    assert all(row["what"] for row in data)


def nan_checkpoint(folder, checkpoint):
    import shutil

    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[1]
    tensors[name][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def text_weights(folder, checkpoint):
    import shutil

    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").write_text("these are no weights")
    return folder


BAD = [
    (["compile", "zoo:resnt", *QUICK, "--out", "OUT"], 2, "did you mean 'resnet'"),
    (["compile", "./nowhere", *QUICK, "--out", "OUT"], 1, "there is no model"),
    (["compile", "no.such.module:make", *QUICK, "--out", "OUT"], 2, "cannot load model"),
    (["compile", "json:dumps", *QUICK, "--out", "OUT"], 1, "json:dumps"),
    (["compile", "FILE", *QUICK, "--out", "OUT"], 1, "is a file, not a model directory"),
    (["compile", "TEXTWEIGHTS", *QUICK, "--out", "OUT"], 1, "cannot be read"),
    (["compile", "NAN", *QUICK, "--out", "OUT"], 1, "holds NaN"),
    (["compile", "EMPTYDIR", *QUICK, "--out", "OUT"], 1, "no config.json"),
    (["compile", "zoo:mlp", "--target", "params=0%", "--out", "OUT"], 2, "out of range"),
    (["compile", "zoo:mlp", "--target", "params=120%", "--out", "OUT"], 2, "out of range"),
    (["compile", "zoo:mlp", "--target", "parms=50%", "--out", "OUT"], 2, "did you mean 'params'"),
    (["compile", "zoo:mlp", "--target", "half", "--out", "OUT"], 2, "cannot read target"),
    (["compile", "zoo:mlp", *QUICK, "--importance", "taylr", "--out", "OUT"], 2,
     "did you mean 'taylor'"),
    (["compile", "zoo:mlp", *QUICK, "--allocation", "unifrm", "--out", "OUT"], 2,
     "did you mean 'uniform'"),
    (["compile", "zoo:mlp", *QUICK, "--role", "haed", "--out", "OUT"], 2, "did you mean 'head'"),
    (["compile", "zoo:mlp", *QUICK, "--only", "nothing*", "--out", "OUT"], 2, "matches no group"),
    (["compile", "zoo:mlp", *QUICK, "--out", "EXISTS"], 2, "exists already"),
    (["compile", "zoo:mlp", *QUICK, "--out", "/proc/nowhere/out"], 2, "cannot be made"),
    (["compile", "zoo:mlp", *QUICK], 2, "no output directory"),
    (["compile", "zoo:mlp", *QUICK, "--calibration", "EMPTY", "--out", "OUT"], 2,
     "does not fit this network"),
    (["compile", "zoo:mlp", *QUICK, "--floor", "0.95", "--out", "OUT"], 1, "cannot be met"),
    (["compile", "zoo:llama-gqa", *QUICK, "--target", "body=96%", "--role", "head", "--out",
      "OUT"], 1, "what to do: take what is nearest"),
    (["compile", "zoo:mlp", *QUICK, "--align", "0", "--out", "OUT"], 2, "align"),
    (["inspect", "zoo:mlp", "--graph", "g.png"], 2, "cannot write a graph"),
    (["inspect", "zoo:mlp", "--why", "0.weigt:0", "3.weight:1"], 2, "there is no array"),
    (["inspect", "zoo:mlp", "--why", "0.weight:7", "3.weight:1"], 2, "dimension"),
    (["inspect", "zoo:mlp", "--why", "0.weight:1", "3.weight:0"], 1, "not coupled"),
    (["verify", "./nowhere"], 1, "there is no artifact"),
    (["verify", "EMPTYDIR"], 1, "is no artifact"),
    (["compile", "zoo:mlp", "--tarqet", "macs=60%"], 2, "No such option"),
]


@pytest.mark.parametrize("command, code, says", BAD, ids=[" ".join(b[0])[:60] for b in BAD])
def test_bad_input_is_one_clear_error(tmp_path, checkpoint, command, code, says):
    """No traceback, nothing written, the exit code says whose mistake it was."""
    (tmp_path / "exists").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    stand = {"OUT": tmp_path / "out", "EXISTS": tmp_path / "exists",
             "FILE": tmp_path / "file.safetensors", "EMPTYDIR": tmp_path / "empty",
             "EMPTY": tmp_path / "empty.txt"}
    if "NAN" in command:
        stand["NAN"] = nan_checkpoint(tmp_path / "nan", checkpoint)
    if "TEXTWEIGHTS" in command:
        stand["TEXTWEIGHTS"] = text_weights(tmp_path / "text", checkpoint)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = spa(*[stand.get(word, word) for word in command])
    assert done.exit_code == code, (done.stdout, done.stderr)
    assert says.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr and not isinstance(done.exception, RuntimeError)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("content, says", [
    ("", "is empty"), ("too short", "shorter than one window"), (None, "no calibration file"),
    (b"\xff\xfe\x00\x9f", "cannot be read as text")])
def test_bad_calibration_text(tmp_path, content, says):
    from spacompiler.errors import SpaError
    from spacompiler.evidence.calibration import from_text

    class Words:
        def __call__(self, text, **_):
            ids = torch.arange(len(text.split()))[None]
            return type("Encoded", (), {"input_ids": ids})()

    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpaError, match=says):
        from_text(str(path), Words(), samples=2, length=16, batch=1, seed=0)


def test_read_only_directory(tmp_path):
    import os

    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; /proc stands in for it above")
    tmp_path.chmod(0o555)
    done = spa("compile", "zoo:mlp", *QUICK, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "not writable" in done.stderr
