"""Write text in other runtimes, each in a process of its own: one that aborts takes nobody along.

    echo '[[5, 6, 7]]' | python -m spacompiler.deploy.runners llama.cpp DIRECTORY

reads texts as token numbers and prints the likeliest next token of each.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

Next = Callable[[list[int]], int]
"""The likeliest token after others."""


class Runner(NamedTuple):
    """The package that has to be installed, and what opens a directory there."""

    package: str
    open: Callable[[Path], Next]


def _llama_cpp(folder: Path) -> Next:
    from cyllama.llama import llama_cpp as cpp

    cpp.disable_logging()
    cpp.llama_backend_init()
    model = cpp.LlamaModel(str(folder / "model.gguf"), cpp.LlamaModelParams(), verbose=False)
    options = cpp.LlamaContextParams()
    options.n_ctx = options.n_batch = 512
    options.type_k = options.type_v = options.flash_attn_type = 0  # a cache of float32
    context = cpp.LlamaContext(model, options)
    greedy = cpp.LlamaSampler(cpp.LlamaSamplerChainParams())
    greedy.add_greedy()

    def following(ids: list[int]) -> int:
        context.kv_cache_clear()
        context.decode(cpp.llama_batch_get_one(ids, 0))
        return int(greedy.sample(context, -1))

    return following


def _genai(folder: Path) -> Next:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))

    def following(ids: list[int]) -> int:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + 1, do_sample=False)
        generator = genai.Generator(model, options)
        generator.append_tokens([ids])
        generator.generate_next_token()
        return int(generator.get_next_tokens()[0])

    return following


def _openvino(folder: Path) -> Next:
    import numpy as np
    import openvino

    compiled = openvino.compile_model(folder / "model.onnx", "CPU")

    def following(ids: list[int]) -> int:
        given = {}
        for port in compiled.inputs:
            name, shape = port.any_name, port.partial_shape
            if name.startswith("past"):
                size = (1, shape[1].get_length(), 0, shape[3].get_length())
                given[name] = np.zeros(size, np.float32)
            else:
                row = {"attention_mask": [1] * len(ids), "position_ids": range(len(ids))}
                given[name] = np.array([list(row.get(name, ids))], np.int64)
        return int(compiled(given)[0][0, -1].argmax())

    return following


def _ctranslate2(folder: Path) -> Next:
    import ctranslate2

    with tempfile.TemporaryDirectory() as place:
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        made = converter.convert(str(Path(place) / "made"))
        generator = ctranslate2.Generator(made)
    names = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = {number: name for name, number in names.items()}

    def following(ids: list[int]) -> int:
        return int(generator.generate_batch(
            [[words[i] for i in ids]], max_length=1, sampling_topk=1,
            include_prompt_in_result=False)[0].sequences_ids[0][0])

    return following


RUNNERS: Mapping[str, Runner] = {
    "llama.cpp": Runner("cyllama", _llama_cpp),
    "genai": Runner("onnxruntime_genai", _genai),
    "openvino": Runner("openvino", _openvino),
    "ctranslate2": Runner("ctranslate2", _ctranslate2),
}
"""Runtimes that can be run from Python, by the name that a profile calls them."""


def main(name: str, folder: str, texts: Iterable[list[int]]) -> int:
    """Print the next token of each text as the last line, a list in JSON."""
    following = RUNNERS[name].open(Path(folder))
    print(json.dumps([following(ids) for ids in texts]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], json.load(sys.stdin)))
