"""What a compile needs is computed first: too little is one error that says what would fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError
from spacompiler.pipeline import estimate
from spacompiler.pipeline.estimate import Job
from spacompiler.system import available

LLAMA = tuple(32 * [(4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)])
JOB = Job(dense=16_000_000_000, values=8_000_000_000, share=0.5, layers=LLAMA, large=True)


@pytest.mark.parametrize("job, memory, disk, scratch", [
    (JOB, 0, 16e9, 0),  # weights, and as many bytes while they wait to be written
    (replace(JOB, onnx=True, latency=True), 24e9, 24e9, 16e9),
    (replace(JOB, covariance=True), 8 * 14336**2, 16e9, 0),
    (Job(0, 0, 0.5, LLAMA, covariance=True, held=True), 1 << 30, 0,
     32 * 8 * (3 * 4096**2 + 14336**2) - (1 << 30)),
    (Job(1000, 250, 0.5, trains=True), 1000, 500, 0),
    (Job(1000, 250, 0.5, writes=False), 500, 0, 0),
    # layers as products of two: weights and directions; x x' of all that they read, with data
    (Job(1000, 250, 0.5, products=((9, 4), (2, 6))), 8 * (9 * 8 + 2 * 8), 500, 0),
    (Job(1000, 250, 0.5, products=((1, 40), (1, 40)), tokens=(2, 8)), 2 * 4 * 40**2, 500, 0),
])
def test_needs_follow_from_shapes(job, memory, disk, scratch):
    assert (job.memory(), job.disk(), job.scratch()) == (memory, disk, scratch)


def cgroup(folder: Path, limit: str) -> Path:
    """A control group's files, 3 GB in use, of which 1 GB are files."""
    folder.mkdir(exist_ok=True)
    for name, text in (("memory.max", limit), ("memory.current", "3000000000"),
                       ("memory.stat", "anon 5\ninactive_file 600000000\nactive_file 400000000\n")):
        (folder / name).write_text(text)
    return folder


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 9000000 kB\nMemAvailable:    5000000 kB\n")
    assert available.memory(cgroup(tmp_path / "a", "4000000000"), info) == 2_000_000_000
    assert available.memory(cgroup(tmp_path / "b", "max"), info) == 5_000_000 * 1024
    assert available.memory(tmp_path / "c", tmp_path / "nothing") is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available.memory(tmp_path / "c", info) == 5_000_000 * 512


def test_too_little_is_one_error_with_what_would_fit(tmp_path, monkeypatch):
    net = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64))
    told = []

    def compile(**more):
        spacompiler.compile(net, (torch.randn(4, 64),), target="params=60%",
                            out=tmp_path / f"out{len(told)}",
                            progress=lambda stage, *_: told.append(stage), **more)

    monkeypatch.setattr(available, "memory", lambda: 3_000_000)
    with pytest.raises(SpaError, match="needs more than there is") as problem:
        compile(importance="magnitude")
    assert "memory: about 5 MB are needed, 3 MB are there" in problem.value.why
    assert "--no-latency" in problem.value.fix and not told
    monkeypatch.setattr(available, "memory", lambda: 9_000_000)
    with pytest.raises(SpaError, match="needs more than there is") as problem:
        compile(importance="magnitude", repair="none", onnx=False, latency=False, layout="any",
                low_rank=("*=50%",))
    assert "no --low-rank" in problem.value.fix
    monkeypatch.setattr(available, "memory", lambda: None)
    monkeypatch.setattr(available, "disk", lambda place: 100_000)
    with pytest.raises(SpaError, match="needs more than there is") as problem:
        compile(importance="magnitude", onnx=False)
    assert "disk at --out" in problem.value.why and "a larger machine" in problem.value.fix
    monkeypatch.undo()
    compile(importance="magnitude", onnx=False, latency=False, align=1)
    assert told and not any(line.startswith(("needs about", "merging")) for line in told)
    monkeypatch.setattr(estimate, "SMALL", 1e6)
    compile(importance="magnitude", onnx=False, latency=False, align=1, prove=False)
    assert any(line.startswith("needs about 1 MB of memory") for line in told)
