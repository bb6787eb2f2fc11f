"""Six compiles as files and reports, to be compared before and after a change that must not show.

    python benchmarks/recordings.py record before
    python benchmarks/recordings.py record after
    python benchmarks/recordings.py compare before after

Kernels round differently from processor to processor, so recordings are compared on one machine
and not kept. `compare` names every file whose bytes differ and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import spacompiler

CALM = {"latency": False}


class Block(nn.Module):
    """A small residual block of a detector's backbone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.two = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(self.norm(self.one(x)).relu())


class Detector(nn.Module):
    """Keeps what a score is high for, in a loop over data: it cannot be traced whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, stride=2), nn.Sequential(Block(16), Block(16))
        self.score, self.box = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.body(self.stem(x))
        found = []
        for score, box in zip(self.score(x), self.box(x), strict=True):
            keep = (score[0] > 0).nonzero()
            found.append(box[:, keep[:, 0], keep[:, 1]] if len(keep) else box.flatten(1)[:, :1])
        return found


def detector() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The detector with seeded weights, and two pictures."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    return Detector().eval(), (torch.randn(2, 3, 33, 33, generator=generator),)


def _parts(out: Path) -> None:
    module, inputs = detector()
    spacompiler.compile(module, inputs, target="params=70%", modules=("body",), out=out,
                        importance="magnitude", align=1, onnx=False, **CALM)


def _file(out: Path) -> None:
    source = out.with_name("source")
    spacompiler.compile("zoo:resnet", target="params=80%", importance="magnitude", out=source,
                        **CALM)
    here = Path.cwd()
    try:
        os.chdir(source.parent)  # the report names the file as it was given
        spacompiler.compile("source/model.onnx", target="params=70%", importance="magnitude",
                            align=1, out=out, **CALM)
    finally:
        os.chdir(here)


COMPILES: dict[str, Callable[[Path], object]] = {
    "resnet": lambda out: spacompiler.compile("zoo:resnet", target="macs=70%", out=out, **CALM),
    "llama-gqa": lambda out: spacompiler.compile(
        "zoo:llama-gqa", target="body=60%", align=1, out=out, decoder=True, int8=True, **CALM),
    "gpt2": lambda out: spacompiler.compile(
        "zoo:gpt2", target="body=70%", align=1, roles=("channel", "head", "hidden"),
        approximate=True, allocation="global", out=out, **CALM),
    "detector": _parts,
    "file": _file,
    "lora-prune": lambda out: spacompiler.compile(
        "zoo:llama-gqa", target="body=80%", align=1, schedule="lora-prune(steps=4)", out=out,
        **CALM),
}


def record(folder: Path) -> None:
    """Compile each into a folder of its own, and write sha256 of every file and the reports."""
    folder.mkdir(parents=True)
    hashes: dict[str, str] = {}
    for name, make in COMPILES.items():
        place = (folder / name).absolute()
        place.mkdir()
        try:
            make(place / "out")
        except spacompiler.SpaError as problem:
            hashes[f"{name}: error"] = str(problem)
        for file in sorted(p for p in (place / "out").rglob("*") if p.is_file()):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            hashes[f"{name}/{file.relative_to(place / 'out')}"] = digest
        print(name, flush=True)
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")


def compare(one: Path, other: Path) -> list[str]:
    """Names of files that differ, or stand on one side only."""
    a, b = (json.loads((p / "hashes.json").read_text()) for p in (one, other))
    return sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("folders", nargs="+", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.what == "record":
        record(asked.folders[0])
        return 0
    differing = compare(*asked.folders)
    print("\n".join(differing) or "equal, byte for byte")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
