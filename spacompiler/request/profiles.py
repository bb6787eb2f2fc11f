"""What runtimes want of a pruned model: one row of values of options for each, asked for by name.

Deciding, writing and checking know options only; a profile gives those that were not given, and
refuses what would not run there.

>>> plain = {"onnx": True, "latency": True, "gguf": "", "align": None}
>>> settled("llama.cpp-q8", plain, plain)
{'onnx': False, 'latency': False, 'gguf': 'q8_0', 'align': 32}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class Profile:
    """A runtime: what it is, values of options, and where it looks for files.

    `lanes` is the channel block of its convolutions (0: this CPU's). `cached` gives language models
    their key/value cache. `file` and `int8_file` are where the ONNX files lie, `data` what a file
    of large weights beside one is called; `check` names the run in `deploy/runs.py`, `section`
    the entry of config.json that says what lies there.
    """

    about: str
    options: Mapping[str, object] = field(default_factory=dict)
    lanes: int = 0
    cached: bool = False
    file: str = "model.onnx"
    int8_file: str = "model.int8.onnx"
    data: str = "{}.data"
    check: str = ""
    section: str = ""


_STOCK = {"layout": "uniform"}
_WEIGHTS = {**_STOCK, "onnx": False, "latency": False}
_GGUF = {"onnx": False, "latency": False, "gguf": "f32"}

ANY = Profile("ONNX Runtime, on the processor that compiles")
PROFILES: Mapping[str, Profile] = {
    "llama.cpp": Profile("llama.cpp, float32", {**_GGUF}, check="llama.cpp"),
    "llama.cpp-q8": Profile(
        "llama.cpp, q8_0 or q4_0: rows are whole blocks of 32",
        {**_GGUF, "gguf": "q8_0", "align": 32}, check="llama.cpp"),
    "llama.cpp-k": Profile(
        "llama.cpp, to be quantised to K-types by llama-quantize: rows are whole blocks of 256",
        {**_GGUF, "gguf": "f16", "align": 256}, check="llama.cpp"),
    "ctranslate2": Profile(
        "CTranslate2: it takes heads × their size for the hidden size, so heads stay",
        {**_WEIGHTS, "roles": ("channel",), "align": 8}, check="ctranslate2"),
    "onnx": ANY,
    "ort-avx512": Profile("ONNX Runtime with AVX-512: channels in blocks of 16", lanes=16),
    "ort-avx2": Profile("ONNX Runtime with AVX2: channels in blocks of 8", lanes=8),
    "onnx-web": Profile("onnxruntime-web: blocks of 4 lanes, weights in the file's own data",
                        {"align": 4}, data="{}_data"),
    "transformers.js": Profile(
        "transformers.js: onnx/model.onnx and a stock configuration", _STOCK, cached=True,
        file="onnx/model.onnx", int8_file="onnx/model_quantized.onnx", data="{}_data",
        section="transformers.js_config"),
    "openvino": Profile("OpenVINO, which reads model.onnx itself", lanes=16, check="openvino"),
    "torchao-int4": Profile(
        "torchao, int4 weights in groups of 32", {**_WEIGHTS, "align": 32}),
    "vllm": Profile("vLLM: a stock configuration, rows of 64 for its quantised kernels",
                    {**_WEIGHTS, "align": 64}),
    "genai": Profile("onnxruntime-genai: a decoder, equal heads in all layers",
                     {**_STOCK, "decoder": True}, check="genai"),
    "optimum": Profile("optimum: model.onnx beside a stock configuration", _STOCK, cached=True),
}
"""Rows by name."""

Rule = Callable[[object, object], bool]
RULES: Mapping[str, Rule] = {
    "align": lambda given, wanted: given % wanted == 0,  # type: ignore[operator]
    "roles": lambda given, wanted: set(given) <= set(wanted),  # type: ignore[call-overload]
    "gguf": lambda given, wanted: given == wanted or (given, wanted) == ("q4_0", "q8_0") or
    (wanted in ("f32", "f16") and given in ("f32", "f16", "bf16")),
}
"""Whether a given value will do where a profile wants another; without a rule none does."""


def profile(name: str) -> Profile:
    """Return a row; that of ONNX Runtime where none is asked for.

    Raises UsageError if there is none of that name.
    """
    if not name:
        return ANY
    if name not in PROFILES:
        raise UsageError(f"there is no profile {name!r}", where="--for",
                         fix=did_you_mean(name, PROFILES))
    return PROFILES[name]


def settled(name: str, values: Mapping[str, object],
            defaults: Mapping[str, object]) -> dict[str, object]:
    """Return what a profile sets of options, given their values and their defaults.

    Raises UsageError for a value that was given and would not do there.
    """
    row = profile(name)
    found: dict[str, object] = {}
    for option, wanted in row.options.items():
        given = values[option]
        if given == wanted:
            continue
        if given == defaults[option]:
            found[option] = wanted
        elif option not in RULES or not RULES[option](given, wanted):
            raise UsageError(f"--for {name} and {option}={_said(given)} cannot go together",
                             why=f"{row.about}; it needs {option}={_said(wanted)}",
                             fix=f"leave {option} out, or compile without --for")
    return found


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
