"""What is written appears whole or not at all, whatever ends the process, and nothing is left."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import spacompiler
from spacompiler.errors import SpaError
from spacompiler.store import folder as artifact
from spacompiler.system import staging
from spacompiler.system.staging import Scratch, orderly

ROOT = Path(spacompiler.__file__).parents[1]
WRITE = """
import os, sys, time
from pathlib import Path
from spacompiler.store import folder as artifact
with artifact.whole(Path(sys.argv[1])) as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.bin").write_bytes(b"x" * 1000)
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "b.bin").write_bytes(b"y")
"""


def writer(out, seconds=60.0):
    """A process that stands in the middle of writing."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", WRITE, str(out), str(seconds)], env=env,
                             stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "half\n"
    return child


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    out = tmp_path / "deep" / "out"
    child = writer(out)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (left,) = out.parent.iterdir()
    assert left.name.startswith(f".out.{child.pid}-")
    with artifact.whole(out) as folder:
        (folder / "x").write_text("x")
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_living_process_is_left_alone_and_so_is_what_is_not_ours(tmp_path):
    child = writer(tmp_path / "one", 4.0)
    other = tmp_path / ".one.12-x-0.part"
    other.mkdir()
    link = tmp_path / ".one.1-1-0.part"
    link.symlink_to(other)
    with artifact.whole(tmp_path / "two"):
        pass
    assert child.wait() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [link.name, other.name, "one", "two"]


def test_a_number_that_another_process_has_now_is_dead(tmp_path):
    left = tmp_path / f".out.{os.getpid()}-1-0.part"
    left.mkdir()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    time.sleep(1)  # it ended, and nobody asked for its result
    unreaped = tmp_path / f".out.{zombie.pid}-{1}-0.part"
    unreaped.mkdir()
    staging.sweep(tmp_path)
    zombie.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_writing_leaves_nothing_and_ends_the_process(tmp_path, number):
    child = writer(tmp_path / "deep" / "out")
    child.send_signal(number)
    assert child.wait(timeout=30) == -number
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_handles_signals_itself_is_left_alone():
    seen = []
    old = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with orderly():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, old)


@pytest.mark.parametrize("umask, file, folder", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700),
                                                 (0o002, 0o664, 0o775)])
def test_modes_are_those_of_the_umask(tmp_path, umask, file, folder):
    from safetensors.numpy import save_file

    old = os.umask(umask)
    try:
        with artifact.whole(tmp_path / "out") as place:
            (place / "sub").mkdir()
            save_file({}, place / "sub" / "w.safetensors")
    finally:
        os.umask(old)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*")}
    assert modes == {"sub": folder, "w.safetensors": file}
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(opened):
        synced.append((Path(os.readlink(f"/proc/self/fd/{opened}")).name,
                       (tmp_path / "out").exists()))
        real(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    with artifact.whole(tmp_path / "out") as place:
        (place / "a").write_text("a")
        (place / "sub").mkdir()
        (place / "sub" / "b").write_text("b")
    before = {name for name, there in synced if not there}
    assert {"a", "b", "sub"} < before and synced[-1] == (tmp_path.name, True)


def test_scratch_for_oneself_is_closed_to_others_and_ends_with_its_owner(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch = Scratch()
    assert scratch.path.parent == tmp_path and scratch.path.stat().st_mode & 0o777 == 0o700
    if os.fork() == 0:
        scratch.cleanup()
        os._exit(0)
    os.wait()
    assert scratch.path.exists()
    del scratch
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("problem", [
    OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os e.)"),
    RuntimeError("write failed: No space left on device")])
def test_a_full_disk_is_one_clear_error(tmp_path, problem):
    with pytest.raises(SpaError, match="cannot be written") as caught, \
            artifact.whole(tmp_path / "deep" / "out"):
        raise problem
    assert "make room" in caught.value.fix and not list(tmp_path.iterdir())


def test_another_failure_stays_what_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError), artifact.whole(tmp_path / "out"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def limited(size, action):
    """Run with files that cannot grow beyond some bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def compiled():
    result = spacompiler.compile("zoo:mlp", target="macs=65%", importance="magnitude", align=1,
                                 latency=False)
    return result


def test_wherever_the_disk_is_full_nothing_is_half_made(tmp_path, compiled):
    whole = compiled.save(tmp_path / "whole")
    sizes = {p.stat().st_size for p in whole.iterdir()}
    for size in sorted({0, 1, *(s - 1 for s in sizes)}):
        with pytest.raises(SpaError, match="cannot be written") as caught:
            limited(size, lambda: compiled.save(tmp_path / "out"))
        assert caught.value.fix
        assert [p.name for p in tmp_path.iterdir()] == ["whole"], size
