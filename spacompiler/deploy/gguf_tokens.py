"""A tokenizer's entries in a GGUF file: byte-level BPE, by the gguf package.

llama.cpp knows a way to split text before BPE by a name; which one a tokenizer is follows from
what its own file says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
          r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN = _LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: Mapping[tuple[str, ...], str] = {
    ("ByteLevel True",): "gpt-2",
    ("Digits True", "ByteLevel True"): "smollm",
    (f"Split {_LLAMA} Isolated", "ByteLevel False"): "llama-bpe",
    (f"Split {_QWEN} Isolated", "ByteLevel False"): "qwen2",
}
"""llama.cpp's name for steps of splitting, as `_steps` writes them."""


def tokens(writer: GGUFWriter, folder: Path | None, vocabulary: int) -> str:
    """Write the entries of the tokenizer in a folder, and return what became of it.

    A file without one is run by token numbers; what llama.cpp has no name for is left out, and the
    text that is returned says why.
    """
    file = None if folder is None else folder / "tokenizer.json"
    if file is None or not file.exists():
        return _none(writer, "there is no tokenizer.json")
    said = json.loads(file.read_text(encoding="utf-8"))
    model, split = said["model"], SPLITS.get(_steps(said.get("pre_tokenizer")))
    if model["type"] != "BPE" or model.get("byte_fallback") or said.get("normalizer"):
        return _none(writer, "it is no byte-level BPE")
    if split is None:
        return _none(writer, "llama.cpp has no name that is known for its way to split text")
    _put(writer, file.parent, said, vocabulary, split)
    return f"byte-level BPE, split as {split}"


def _none(writer: GGUFWriter, why: str) -> str:
    writer.add_tokenizer_model("no_vocab")
    return f"none: {why}"


def _steps(splitter: Mapping[str, Any] | None) -> tuple[str, ...]:
    """How a tokenizer splits text, one line a step."""
    if splitter is None:
        return ()
    steps = splitter.get("pretokenizers", [splitter])
    words = {"ByteLevel": lambda s: s.get("use_regex", True),
             "Digits": lambda s: s["individual_digits"],
             "Split": lambda s: f"{s['pattern'].get('Regex')} {s['behavior']}"}
    return tuple(f"{s['type']} {words.get(s['type'], lambda s: '')(s)}" for s in steps)


def _put(writer: GGUFWriter, folder: Path, said: Mapping[str, Any], vocabulary: int,
         split: str) -> None:
    import gguf

    texts: dict[int, str] = {number: text for text, number in said["model"]["vocab"].items()}
    kinds: dict[int, int] = {}
    for token in said.get("added_tokens") or ():
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] \
            else gguf.TokenType.USER_DEFINED
    numbers = range(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([texts.get(n, f"[PAD{n}]") for n in numbers])
    writer.add_token_types([int(kinds.get(
        n, gguf.TokenType.NORMAL if n in texts else gguf.TokenType.UNUSED)) for n in numbers])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)
