"""Two processes on one compile: equal bytes, one that writes, and failures that end both; and a
training of two that is pruned by one plan.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import UsageError
from spacompiler.live import agreed

CHILD = '''
import copy, os, sys, traceback, torch, spacompiler
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from spacompiler.errors import SpaError
from spacompiler.store import tensors_file, work as work_files
from spacompiler.torch_backend.gather import gradients

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Dropout(0.3), nn.Linear(40, 24), nn.ReLU(),
                    nn.Linear(24, 3))
batches = [(torch.randn(4, 12),) for _ in range(5)]
spacompiler.compile(net, batches[0], target="params=60%", importance="magnitude", align=1,
                    latency=False, onnx=False)  # what is imported now, is in all forks
place, children = sys.argv[1], []
for rank, size in ((0, 1), (0, 2), (1, 2)):
    children.append(os.fork())
    if children[-1] == 0:
        break
else:
    sys.exit([os.waitpid(child, 0)[1] for child in children] != [0, 0, 9])  # the last is killed
def failed(*problem):
    traceback.print_exception(*problem)
    os._exit(1)

sys.excepthook = failed  # handlers of ONNX Runtime at exit wait for threads that no fork has
os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
place, together = f"{place}/{size}", "together" if size > 1 else "alone"
sys.stdout = open(f"{place}-{rank}.txt", "w")
asked = dict(target="params=60%", align=1, latency=False, onnx=False, calibration=batches,
             processes=together, quiet=True)

def compile(name, **more):
    return spacompiler.compile(net, batches[0], **{**asked, **more}, out=f"{place}/{name}")

made = [compile("gradients", repair="refit")]
made.append(compile("covariances", importance="obs", repair="refit"))
gradients.LARGE = 0  # batches go through the program side by side
made.append(compile("in order", importance="curvature", repair="none"))
assert made[0].path.is_dir()
if rank == 0:  # bits that decide nothing are in no file
    with open(f"{place}/scores", "w") as file:
        for each in made:
            print([[x.hex() for x in found.ravel().tolist()]
                   for found in each.job.scored.scores.values()], file=file)
quick = dict(importance="magnitude", repair="none", recover_data=batches)
compile("trained", **quick, recovery="full(accumulate=3, epochs=2)")
made = spacompiler.compile(net, batches[0], **{**asked, **quick}, recovery="norms(accumulate=1)")
assert any("not split" in note for note in made.job.ask.notes) == (together == "together")
work, calls = f"{place}-work", 0

def killing(results, args, kwargs):
    global calls
    calls += torch.is_grad_enabled()
    if (rank, calls) == (1, 2):  # after a checkpoint
        sys.stdout.flush()
        os.kill(os.getpid(), 9)
    return results[0].square().mean()

killed = dict(**quick, recovery="full(accumulate=3, epochs=2, evaluations=2)", loss=killing)
if together == "alone":
    compile("gone on with", **killed)
if together == "together":
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    saving = work_files.save_file, tensors_file._head
    if rank == 0:
        work_files.save_file = tensors_file._head = full
    for name, more in (("no room", {}), ("no room to work", {"work": f"{place}-full"})):
        try:
            compile(name, importance="magnitude", repair="none", **more)
        except SpaError as problem:
            print(type(problem).__name__, problem.what)
    work_files.save_file, tensors_file._head = saving

    def loss(results, args, kwargs):
        if rank == 1:
            raise SpaError("the disk of this process is full")
        return results[0].square().mean()
    try:
        compile("failed", loss=loss, repair="none")
    except SpaError as problem:
        print(type(problem).__name__, problem.what)
    whole = copy.deepcopy(net)
    dist.init_process_group("gloo")
    optimizer = torch.optim.Adam(net.parameters())
    pruner = spacompiler.Pruner(net, batches[0], optimizer, target="params=60%", align=1,
                                schedule="once(at=9)")

    def trained(ddp):
        torch.manual_seed(rank)
        for _ in range(2):
            optimizer.zero_grad()
            (ddp(torch.randn(4, 12)) * torch.randn(3)).sum().backward()
            optimizer.step()
        return ddp

    ddp = trained(DistributedDataParallel(net))
    try:
        pruner.shrink()
    except SpaError as problem:
        print(problem.what)
    del ddp
    pruner.shrink()
    print(pruner.kept, [g.tolist() for g in pruner.live.kept.tables.values()])
    trained(DistributedDataParallel(net))
    print("trained on", sum(p.numel() for p in net.parameters()), [p.sum().item() for p in
                                                                   net.parameters()])
    dist.destroy_process_group()
    net = whole
    try:
        compile("gone on with", **killed, work=work)
    except SpaError as problem:
        print(type(problem).__name__, problem.what)
    assert os.path.exists(f"{work}/training/training.safetensors")
    asked["processes"] = "alone"
    compile("gone on with", **killed, work=work)
sys.stdout.flush()
os._exit(0)
'''


def test_two_processes_write_the_bytes_of_one_and_end_together(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    subprocess.run([sys.executable, "-c", CHILD, tmp_path], check=True, timeout=240, env={
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    first, second = ((tmp_path / f"2-{rank}.txt").read_text() for rank in (0, 1))
    first, second = (said.splitlines() for said in (first, second))
    for here, there in zip(first[:2], second, strict=False):
        assert here.startswith("SpaError") and "cannot be written" in here
        assert there == f"ElsewhereError process 0 of 2 failed: {here.removeprefix('SpaError ')}"
    assert not list((tmp_path / "2").glob("*room*"))
    assert second[2] == "SpaError the disk of this process is full"
    assert first[2] == "ElsewhereError process 1 of 2 failed: the disk of this process is full"
    wrapped, kept, trained, gone = first[3:]
    assert first[3:6] == second[3:] and "cannot shrink in place" in wrapped
    assert gone == "ElsewhereError another process of this run is gone"
    assert "False" in kept and trained.startswith("trained on")
    files = {p.relative_to(tmp_path / "1"): p.read_bytes()
             for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert len(files) > 10
    assert files == {p.relative_to(tmp_path / "2"): p.read_bytes()
                     for p in (tmp_path / "2").rglob("*") if p.is_file()}


def test_a_module_of_which_each_process_has_a_part_is_refused(monkeypatch):
    """Without processes: a kind of layer stands for torch's kind of sharded arrays."""
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 4))
    inputs = (torch.randn(2, 6),)
    asked = {"target": "params=60%", "importance": "magnitude", "align": 1}
    pruner = spacompiler.Pruner(net, inputs, **asked)
    monkeypatch.setattr(agreed, "SHARDED", (("torch.nn", "ReLU"), ("not.imported", "Part")))
    for fails in (lambda: spacompiler.Pruner(net, inputs, **asked), pruner.shrink):
        with pytest.raises(UsageError, match="sharded module cannot shrink") as problem:
            fails()
        assert "before fully_shard" in problem.value.fix
    assert net[0].out_features == 40
