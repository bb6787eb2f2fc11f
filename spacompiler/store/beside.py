"""The files beside a model's weights: which of them go along into an artifact.

They are copied as they lie, by name: `CARRIED` say which, `NEVER` what is not copied whatever its
name (code and pickles), and all others stay behind. A model card is about the dense model, so it
gets another name. The modules of a sentence-transformers directory go along while the width that
they read is the one that the pruned network gives.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .weight_files import read

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "*.tiktoken", "tokenizer.model",
    "tokenizer.model.v*", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "spm.model", "source.spm", "target.spm", "dict.txt",
    "sentencepiece*.model", "normalizer.json")
PIPELINE = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
            "[0-9]_*/*.json", "[0-9]_*/*.safetensors", "[0-9]_*/*.txt")
POOLING, POOLED = ("[0-9]_*/config.json",), "word_embedding_dimension"
CARRIED = (
    *TOKENIZER, *PIPELINE,
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json", "generation_config.json",
    "LICENSE*", "LICENCE*", "License*", "license*", "NOTICE*", "COPYING*", "USE_POLICY*",
    "README.md", "README.dense.md")
NEVER = ("*.py", "*.pyc", "*.so", "*.dll", "*.sh", "*.bat", "*.exe", "*.ipynb", "*.bin", "*.pt",
         "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.h5", "*.msgpack", "*.npy", "*.npz")
SIZED = ("config.json", "genai_config.json")
"""What lies beside ONNX files and says sizes of layers, which nothing there is built from."""
RENAMED = {"README.md": "README.dense.md"}
WRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json", "report.*", "plan.json",
           "recipe.*", "slices.json", "structure.json", "dense_config.json", "MANIFEST.json",
           "model*.onnx", "model*.onnx.data", ".*", ".*/*")
"""What an artifact has its own of, and what lies hidden: not worth a word."""


@dataclass
class Beside:
    """What became of the files beside a model: names carried, adapted, and left (name: why)."""

    carried: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the lists as the report holds them."""
        return {"carried": self.carried, "adapted": self.adapted, "left": self.left}


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds files of a tokenizer."""
    return any(_matches(path.name, TOKENIZER) for path in folder.iterdir() if path.is_file())


def carry(source: Path, out: Path, widths: dict[int, int]) -> Beside:
    """Copy the files beside a model into an artifact's folder; those that are there stay.

    `widths` says which width of the network's hidden state became which.
    """
    found = Beside()
    unfit = _unfit_pipeline(source, widths)
    for name in _files(source):
        why = unfit if _matches(name, PIPELINE) else ""
        if not why and (out / RENAMED.get(name, name)).exists():
            found.adapted.append(name)
        elif why or not _matches(name, CARRIED) or _runs(name):
            if not _matches(name, WRITTEN) or _matches(name, PIPELINE):
                found.left[name] = why or _why_left(name)
        elif not _stays_inside(source, source / name):
            found.left[name] = "it is a link that leaves the directory"
        else:
            changed = _copy(source / name, out / RENAMED.get(name, name), widths)
            (found.adapted if changed else found.carried).append(name)
    return found


def carry_known(source: Path, out: Path) -> Beside:
    """Copy what is known to belong to a model out of a folder that may hold anything else."""
    found = Beside()
    for name in _files(source):
        if _matches(name, (*CARRIED, *SIZED)) and not _runs(name):
            if _stays_inside(source, source / name):
                _copy(source / name, out / RENAMED.get(name, name), {})
                found.carried.append(name)
            else:
                found.left[name] = "it is a link that leaves the directory"
    return found


def _why_left(name: str) -> str:
    return "code and pickles are not carried" if _runs(name) else \
        "nothing is known of it"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) and name.count("/") <= p.count("/") for p in patterns)


def _runs(name: str) -> bool:
    """True for code and pickles, wherever they lie."""
    return _matches(name.rpartition("/")[2].lower(), NEVER)


def _files(source: Path) -> Iterator[str]:
    """Names of files at most one folder deep, in order."""
    places = [*source.iterdir(), *(inner for folder in source.iterdir() if folder.is_dir()
                                   and not folder.is_symlink() for inner in folder.iterdir())]
    yield from sorted(p.relative_to(source).as_posix() for p in places if p.is_file())


def _stays_inside(source: Path, file: Path) -> bool:
    """True for what lies in the directory, or in the blobs of the hub's cache that it is of."""
    root = source.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    return file.resolve().is_relative_to(root)


def _copy(file: Path, place: Path, widths: dict[int, int]) -> bool:
    """Copy a file; return True if it is one that says a width, and now says another."""
    place.parent.mkdir(exist_ok=True)
    if _matches(f"{file.parent.name}/{file.name}", POOLING):
        entries = read(file)
        width: Any = entries.get(POOLED)
        if widths.get(width, width) != width:
            text = json.dumps({**entries, POOLED: widths[width]}, indent=2)
            place.write_text(text + "\n", encoding="utf-8")
            return True
    shutil.copyfile(file, place)
    return False


def _unfit_pipeline(source: Path, widths: dict[int, int]) -> str:
    """Why the modules behind the network do not fit it any more, or ""."""
    for file in sorted(source.glob("[0-9]_*/config.json")):
        entries = read(file)
        for key in ("in_features", "dimension"):
            width: Any = entries.get(key)
            if widths.get(width, width) != width:
                return f"{file.parent.name} reads {width} numbers, and the pruned network gives " \
                       f"{widths[width]}"
    return ""
