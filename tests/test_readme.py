"""Every code block of the README and of docs/ runs, in order, in an empty directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm import Warm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "docs/tasks").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Interpreters that have imported torch already: most of a page's time is imports."""
    found = Warm(tmp_path_factory.mktemp("warm"))
    yield found
    found.stop()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_code_blocks_run(page, tmp_path, warm):
    """The first two of the README in processes of their own, the others in forks of a warm one."""
    ran = 0
    for kind, text in blocks(page):
        if kind == "text":  # output, shown
            continue
        assert kind in ("bash", "python"), f"a block of kind {kind!r} would not be run"
        cold = page is PAGES[0] and ran < 2
        folders = [*([] if cold else [warm.path]), Path(sys.executable).parent, os.environ["PATH"]]
        env = {**os.environ, "PATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1"}
        python = [sys.executable, "-c"] if cold else [str(warm.path / "warm-python")]
        command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else \
            [*python, text]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran or "```" not in page.read_text(encoding="utf-8")


def test_the_readme_has_blocks():
    kinds = [kind for kind, _ in blocks(PAGES[0])]
    assert kinds.count("bash") >= 4 and kinds.count("python") >= 2


def test_every_promise_names_tests_that_there_are():
    """A row of SECURITY.md names files, and functions of the file that was named last."""
    files = {path.name: path for path in (*ROOT.glob("tests/**/test_*.py"),
                                          *ROOT.glob("benchmarks/*.py"))}
    found = 0
    for row in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) != 4 or cells[1] in ("promise", "---"):
            continue
        named, text = re.findall(r"(?:[\w/]*/)?(\w+\.py)|\b(test_\w+)\b(?!\.py)", cells[2]), ""
        assert named, f"no test is named for: {cells[1]}"
        for file, function in named:
            text = files[file].read_text(encoding="utf-8") if file else text
            assert not function or re.search(rf"^def {function}\(", text, re.M), function
        for path in re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", cells[2]):
            assert (ROOT / path).is_file(), path
        found += 1
    assert found > 12
