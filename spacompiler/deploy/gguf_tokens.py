"""A tokenizer's entries in a GGUF file, by the gguf package: BPE of bytes and of SentencePiece.

llama.cpp knows a way to split text before byte-level BPE by a name; which one a tokenizer is
follows from what its own file says. SentencePiece's merges two tokens by the score of what they
make, where tokenizer.json has a list of merges: equal where that list has every way to make each
token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
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
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return _pieces(writer, file.parent, said, vocabulary)
    if model["type"] != "BPE" or said.get("normalizer"):
        return _none(writer, "it is no byte-level BPE, and none of SentencePiece's")
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

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    _list(writer, said, vocabulary)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)


def _list(writer: GGUFWriter, said: Mapping[str, Any], vocabulary: int) -> list[str]:
    """Write all tokens with their types, and return their texts."""
    from gguf import TokenType as Kind

    texts: dict[int, str] = {number: text for text, number in said["model"]["vocab"].items()}
    kinds = {n: Kind.NORMAL for n in texts}
    if said["model"].get("byte_fallback"):
        kinds |= {n: Kind.BYTE for n, text in texts.items() if _BYTE.fullmatch(text)}
    for token in said.get("added_tokens") or ():
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = Kind.UNKNOWN if token["content"] == said["model"].get("unk_token") \
            else Kind.CONTROL if token["special"] else Kind.USER_DEFINED
    made = [texts.get(n, f"[PAD{n}]") for n in range(vocabulary)]
    writer.add_token_list(made)
    writer.add_token_types([int(kinds.get(n, Kind.UNUSED)) for n in range(vocabulary)])
    return made


# --- SentencePiece --------------------------------------------------------------------------------

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


def _pieces(writer: GGUFWriter, folder: Path, said: Mapping[str, Any], vocabulary: int) -> str:
    """Write a BPE of SentencePiece's: a token's score is the place of the merges that make it."""
    import gguf

    prefix, model = _prefix(said), said["model"]
    if prefix is None:
        return _none(writer, "it treats spaces as SentencePiece does not")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    turns: dict[str, int] = {}
    for left, right in merges:
        turns.setdefault(left + right, len(turns))
    plain = model["vocab"].keys() - {t["content"] for t in said.get("added_tokens") or ()}
    if not _every_way(merges, plain, turns):
        return _none(writer, "its merges are not those of SentencePiece, which takes every way to "
                             "make a token")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    texts = _list(writer, said, vocabulary)
    writer.add_token_scores([float(-turns.get(text, len(turns))) for text in texts])
    writer.add_add_space_prefix(prefix)
    gguf.SpecialVocab(folder, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)
    return f"SentencePiece's BPE, {'with' if prefix else 'without'} a space before the text"


def _every_way(merges: Sequence[tuple[str, ...]], vocabulary: Collection[str],
               turns: Mapping[str, int]) -> bool:
    """Whether each token has all pairs of tokens that make it, one after the other."""
    order = [turns[left + right] for left, right in merges]
    every = sum(text[:i] in vocabulary and text[i:] in vocabulary
                for text in vocabulary for i in range(1, len(text)))
    return order == sorted(order) and every == len(set(merges))


def _prefix(said: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before the text; None if spaces become no U+2581."""
    normal, split = said.get("normalizer") or {}, said.get("pre_tokenizer") or {}
    steps = normal.get("normalizers", [normal] if normal else [])
    if [s["type"] for s in steps] in (["Replace"], ["Prepend", "Replace"]) and \
            steps[-1]["content"] == _SPACE and steps[-1]["pattern"] == {"String": " "}:
        plain = not split or split.get("pattern") == {"String": " "}  # none is left to split at
        return len(steps) == 2 if plain and steps[0].get("prepend", _SPACE) == _SPACE else None
    if not steps and split.get("type") == "Metaspace" and split["replacement"] == _SPACE:
        whole = not split.get("split", True)
        return {"first": True, "always": True, "never": False}.get(split["prepend_scheme"]) \
            if whole else None
    return None
