"""The wheel holds the whole package once, and lives beside users' own ``passes/`` folders.

``passes/`` and ``models_zoo/`` stand at the top of the repository but install as
``spacompiler.passes`` and ``spacompiler.models_zoo``. The wheel is built here from a copy of the
sources (by way of the sdist, and directly) and installed in a fresh environment, which borrows the
heavy dependencies from the running one.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"passes": "spacompiler/passes", "models_zoo": "spacompiler/models_zoo"}
# Other xdist workers then leave the one wheel to the worker that builds it (with --dist loadgroup).
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output; fails with all of it if the command does."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env | {"COLUMNS": "100", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout.strip()


def sources() -> list[PurePosixPath]:
    """Every file git tracks or would add, links included, relative to the root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout, which says what belongs to the sources")
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).split("\0")
    return sorted({PurePosixPath(p) for p in listed if p and os.path.lexists(ROOT / p)})


def expected_in_wheel() -> set[str]:
    """Where each source of the three packages must lie in the wheel."""
    expected = set()
    for path in sources():
        if path.parts[0] not in ("spacompiler", *MAPPED) or path.suffix == ".md":
            continue
        if (ROOT / path).is_symlink():
            continue
        top = MAPPED.get(path.parts[0], path.parts[0])
        expected.add(str(PurePosixPath(top, *path.parts[1:])))
    return expected


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that neither a stale build/ nor this build can leak."""
    target = tmp_path_factory.mktemp("checkout")
    for path in sources():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it is released: sources -> sdist -> wheel."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout)
    (built,) = out.glob("spacompiler-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    executable = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(
        *(sys.executable, "-m", "pip", "--python", executable, "install", "-q"),
        *("--no-deps", "--no-index", "--disable-pip-version-check", wheel),
        cwd=home,
    )
    site = Path(run(executable, "-c", "import site; print(site.getsitepackages()[0])", cwd=home))
    # A folder named in a .pth file is searched last and its own .pth files are not read, so an
    # editable install of spacompiler in the borrowed folders stays out of sight.
    borrowed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return executable


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A user's project with packages of its own under our bare names."""
    for name in MAPPED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'the user, {name}'\n")
        (tmp_path / name / "magnitude.py").write_text("raise RuntimeError('not yours')\n")
    return tmp_path


def test_wheel_holds_every_source_once(wheel: Path) -> None:
    names = Counter(zipfile.ZipFile(wheel).namelist())
    held = {name for name in names if ".dist-info/" not in name}
    assert [name for name, count in names.items() if count > 1] == []
    missing = expected_in_wheel() - held
    assert not missing, f"add the package or its data to [tool.setuptools]: {sorted(missing)}"
    assert held - expected_in_wheel() == set()
    assert "spacompiler/py.typed" in held


def test_a_checkout_without_links_gives_the_same_wheel_without_an_sdist_too(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    """Where git cannot make links (Windows), it writes files that name what they would lead to."""
    for name, link in MAPPED.items():
        (checkout / link).unlink()
        (checkout / link).write_text(f"../{name}")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path),
        cwd=checkout,
    )
    (direct,) = tmp_path.glob("spacompiler-*.whl")
    contents = [
        {entry.filename: entry.CRC for entry in zipfile.ZipFile(each).infolist()}
        for each in (direct, wheel)
    ]
    assert contents[0] == contents[1]


def test_wheel_wins_beside_a_users_own_folders(python: Path, user_folder: Path) -> None:
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=user_folder)
    code = (
        "import spacompiler, spacompiler.passes, spacompiler.models_zoo as zoo;"
        "print(spacompiler.__file__, spacompiler.passes.__file__, zoo.__file__, sep='\\n')"
    )
    ours = run(python, "-c", code, cwd=user_folder).splitlines()
    package = Path(site, "spacompiler")
    assert [Path(p).parent for p in ours[-3:]] == [
        package,
        package / "passes",
        package / "models_zoo",
    ]


@pytest.mark.parametrize("name", MAPPED)
def test_users_import_of_the_bare_name_gives_theirs(
    python: Path, user_folder: Path, name: str
) -> None:
    code = f"import spacompiler.{name}, {name}; print({name}.OWNER)"
    assert run(python, "-c", code, cwd=user_folder).endswith(f"the user, {name}")


def test_console_script_runs_in_a_users_folder(python: Path, user_folder: Path) -> None:
    shown = run(python.with_name("spacompiler"), "--help", cwd=user_folder)
    assert "compile" in shown
    assert "verify" in shown


def test_entry_points_of_the_wheel_load(python: Path, user_folder: Path) -> None:
    code = (
        "from importlib.metadata import distribution\n"
        "for e in distribution('spacompiler').entry_points:\n"
        "    print(e.group, e.name, e.load().__name__)"
    )
    shown = run(python, "-c", code, cwd=user_folder).splitlines()
    assert {
        "spacompiler.importance magnitude Magnitude",
        "spacompiler.allocation uniform Uniform",
    } <= set(shown)


@pytest.mark.parametrize("name", MAPPED)
def test_bare_import_from_the_repository_is_refused(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert f"spacompiler.{name}" in done.stderr
