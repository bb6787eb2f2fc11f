"""A recipe: everything a user may ask of a compile, as plain data that is saved beside the result.

>>> Recipe("params=70%").floor
0.1
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ..errors import UsageError, did_you_mean
from . import recipe_file
from .amounts import parse_size
from .blocks import check_blocks
from .combinations import check_combination
from .devices import check_device
from .low_rank import check_low_rank, check_low_rank_beside
from .needs import check_needs, unexported
from .options import (
    ADAPTERS,
    CHECKS,
    DANGEROUS,
    DATA,
    EXPORTS,
    GOES,
    MAIN,
    QUALITY,
    RECOVERY,
    Options,
    at_least,
    known,
    one_of,
    option,
    required,
    spoken,
)
from .profiles import profile, settled
from .targets import parse_targets
from .wishes import check_wishes

ROLES = ("channel", "head", "head dim", "hidden", "expert")
EFFORTS = ("quick", "default", "best")
LAYOUTS = ("auto", "uniform", "per-layer", "any")
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
PROCESSES = ("auto", "together", "alone")
SEEDS = 1 << 32
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
BLOCK = 32
"""Values that a quantised type of a GGUF file keeps together."""
DECIDING = {"calibration", "effort", "importance", "schedule", "blocks", "low_rank",
            "keep_adapter"}
"""Options that say what suits where others are left open."""


def _check_floor(floor: float) -> None:
    if not 0 <= floor < 1:
        raise UsageError(f"floor must be a share from 0 to below 1, not {floor}")


def _check_lanes(lanes: int | None) -> None:
    if lanes not in (None, 8, 16):
        raise UsageError(f"lanes must be 8 or 16, not {lanes}",
                         fix="16 is for AVX-512, 8 for other processors; align takes any number")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < SEEDS:
        raise UsageError(f"seed must be a whole number from 0 to {SEEDS - 1}, not {seed}")


def _check_bits(bits: int) -> None:
    if bits not in (7, 8):
        raise UsageError(f"int8 weights have 7 or 8 bits, not {bits}",
                         fix="7 is right on every processor, 8 on those with VNNI alone")


def _check_opset(opset: int) -> None:
    if not 17 <= opset <= 24:
        raise UsageError(f"opset must be 17 to 24, not {opset}")


def _check_gguf(kind: str) -> None:
    if kind and kind not in GGUF_TYPES:
        raise UsageError(f"unknown type {kind!r} of a GGUF file",
                         fix=did_you_mean(kind, GGUF_TYPES))


@dataclass(frozen=True)
class Recipe(Options):
    """Options of one compile; an option is one field here, and nothing elsewhere.

    For an ONNX file, which has no gradients, importance auto is `wanda` with calibration data, else
    `magnitude`.
    """

    target: str = required(
        MAIN, "What stays: params=70%, body=75% (all but embeddings and output layer), macs=60%, "
        "bytes, memory (weights and key/value cache, @BATCHxLENGTH), active (of a mixture's "
        "experts) or latency (in ONNX Runtime); params~70%: the nearest that can be reached; "
        "amounts: latency@1x128=12ms, memory=300MB; several, with commas between, are limits.")
    effort: str = option(
        "default", QUALITY, "What is taken where passes are left open: quick (scores of one "
        "forward pass, no trials), default, or best (curvature, moves measured on the pruned "
        "network, a repair of every layer in turn: many times as long).",
        check=one_of(EFFORTS, "effort"))
    importance: str = option(
        "auto", QUALITY, "Pass that scores slices (see `passes`). Default: taylor; for ONNX files "
        "one without gradients.", passes="importance")
    allocation: str = option(
        "auto", QUALITY, "Pass that turns scores into counts. Default: the best of some, tried on "
        "calibration data (see `tried`); uniform where there is none.", passes="allocation")
    schedule: str = option(
        "", QUALITY, "Pass that decides what goes while it trains on the calibration data, e.g. "
        "'lora-prune(steps=200)'. Default: none, one shot.", passes="schedule")
    repair: str = option(
        "auto", QUALITY, "Pass that mends what stays: refit, bias, batch-norm or none; auto: refit "
        "where scoring reads real calibration data anyway.", passes="compensation")
    roles: tuple[str, ...] = option(
        ("channel", "head"), GOES, "What may go: channel, head, 'head dim', hidden, expert. "
        "Repeatable. Default: channel and head.", flag="--role", check=one_of(ROLES, "role"))
    only: tuple[str, ...] = option(
        (), GOES, "Pattern over names that `inspect --full` lists (* is any text, ? a letter, "
        "[0-3] one of these): nothing else goes. Repeatable.")
    ignore: tuple[str, ...] = option(
        (), GOES, "Pattern, as of --only: what it matches stays as it is. Repeatable.")
    keep: tuple[str, ...] = option(
        (), GOES, "What groups keep: '*.layers.0.*=100%', '*mlp*=50%', '*attn*>=30%' (at least), "
        "'*=x8' (multiples of 8). Repeatable.", metavar="PATTERN=SHARE", check=check_wishes)
    modules: tuple[str, ...] = option(
        (), GOES, "Path of a sub-module to compile in place of the whole. Repeatable.",
        flag="--module")
    blocks: str = option(
        "", GOES, "Whole blocks to leave out before widths are cut: how many, auto (as many as are "
        "cheaper than widths), or which (paths, commas between).",
        flag="--drop-blocks", metavar="N|auto|PATHS", check=check_blocks)
    low_rank: tuple[str, ...] = option(
        (), GOES, "Linear layers to write as products of two smaller ones before widths are cut, "
        "and what stays of their parameters: '*mlp*=60%'. Repeatable.", metavar="PATTERN=SHARE",
        check=check_low_rank)
    approximate: bool = option(
        False, GOES, "Let axes go whose norm takes other statistics then.",
        flag="--approximate/--no-approximate")
    align: int | None = option(
        None, GOES, "Widths become multiples of this. Default: what this CPU's kernels want.",
        check=at_least(1, "align must be at least 1, not {value}"))
    lanes: int | None = option(
        None, GOES, "Channels in a block of convolutions' kernels, which widths are multiples of "
        "where align is not given: 8 or 16. Default: this CPU's.", check=_check_lanes)
    floor: float = option(
        0.1, GOES, "Least share of each group that stays.", check=_check_floor)
    layout: str = option(
        "auto", GOES, "How a transformers model is laid out: uniform (all layers alike, stock "
        "transformers), per-layer (each layer as wide as it is, stock transformers with a file "
        "beside), any (ours alone), or auto: what is worth it.",
        check=one_of(LAYOUTS, "layout"))
    inputs: str = option(
        "", DATA, "Example inputs: a .npz of arrays by name, or the one input as .npy. In Python, "
        "tensors are the argument `example_inputs`.", metavar="FILE")
    input_shape: tuple[str, ...] = option(
        (), DATA, "Shape of an example input: NAME=2x3x224x224, or the shape alone where there is "
        "one. Repeatable.", metavar="NAME=SHAPE")
    calibration: str = option(
        "", DATA, "A text file, .npz or .npy arrays (or a folder of them), sampled (what the model "
        "makes up), own (data that the model brings along), python (text that Python carries) or "
        "none (example inputs only). Default: own, else python, else none.")
    continued: bool = option(
        False, DATA, "Let the model write on from each calibration window; repair, and scores by "
        "covariance and curvature, see that text too.")
    samples: int | None = option(None, DATA, "Calibration windows, or examples. Default: 16, of a "
                                 "text 8.", check=at_least(1, "samples must be at least 1"))
    further_samples: int | None = option(
        None, DATA, "Further windows of a text, for repair and scores by covariance. Default: 16, "
        "none beside --samples.", check=at_least(0, "further_samples must be at least 0"))
    length: int = option(128, DATA, "Tokens in a calibration window.",
                         check=at_least(2, "length must be at least 2 tokens"))
    batch: int = option(
        2, DATA, "Windows in a calibration batch.", check=at_least(1, "batch must be at least 1"))
    choice: str = option("random", DATA, "Windows of a text: random, near to or far from k-means "
                         "centres.", check=one_of(("random", "near", "far"), "choice"))
    seed: int = option(0, DATA, "Same seed, same bytes.", check=_check_seed)
    device: str = option(
        "cpu", DATA, "Where calibration, proof and training are computed: cpu, cuda, cuda:1, mps, "
        "or auto (the first accelerator that is there).", check=check_device)
    dtype: str = option(
        "auto", DATA, "Type that calibration is computed in: float32, float64, bfloat16, float16, "
        "or auto (the model's own; float32 where the processor only emulates that).",
        check=one_of(DTYPES, "dtype"))
    prove: bool = option(True, CHECKS, "Prove masked dense = pruned in float64.")
    onnx: bool = option(True, EXPORTS, "Export model.onnx and check it.")
    decoder: bool = option(
        False, EXPORTS, "A key/value cache for writing text: in model.onnx (causal language "
        "models of transformers), or encoder.onnx and decoder.onnx beside it (encoder-decoders).")
    shard_size: str = option(
        "5GB", EXPORTS, "Largest file of weights in the uniform layout: what is more lies in "
        "several, as 500MB or 5GB.", metavar="SIZE", check=parse_size)
    int8: bool = option(
        False, EXPORTS, "Write model.int8.onnx too: int8 weights, the difference measured.")
    int8_bits: int = option(
        7, EXPORTS, "Bits of int8 weights: 7 is right on every processor, 8 on those with VNNI "
        "alone.", check=_check_bits)
    opset: int = option(
        20, EXPORTS, "Version of ONNX's operators in model.onnx, 17 to 24.", check=_check_opset)
    gguf: str = option(
        "", EXPORTS, "Write model.gguf for llama.cpp, weights as f32, f16, bf16, q8_0, q4_0, q4_1, "
        "q5_0 or q5_1: a language model of transformers.", metavar="TYPE", check=_check_gguf)
    runtime: str = option(
        "", EXPORTS, "What the result is to run on: sets widths, layout and files (see "
        "docs/deploy.md).", flag="--for", metavar="NAME")
    latency: bool = option(True, CHECKS, "Time dense against pruned in ONNX Runtime.")
    adapters: tuple[str, ...] = option(
        (), ADAPTERS, "An adapter, merged before pruning: a directory of peft's or a file of "
        "another origin. Repeatable.", flag="--adapter", keyword="adapter",
        metavar="PATH[=WEIGHT]")
    unused: tuple[str, ...] = option(
        (), CHECKS, "Arrays of the checkpoint that the network has no use for, such as a head of "
        "another task. Repeatable.", metavar="PATTERN")
    combine: str = option(
        "cat", ADAPTERS, "How several adapters become one: cat (exact weighted sum), linear, svd, "
        "ties, dare_linear, dare_ties, dare, lego, fair; with options, "
        "dare(density=0.1, q='auto').")
    keep_adapter: bool = option(
        False, ADAPTERS, "Keep the adapter beside the pruned base, cut to its size.")
    recovery: str = option(
        "", RECOVERY, "Train what is left: lora, norms, full, or lora(lr=2e-3, logits=0).",
        flag="--recover", metavar="PASS", passes="recovery")
    recover_data: str = option(
        "", RECOVERY, "Text to train on. Default: where calibration comes from.", metavar="FILE")
    recover_samples: int = option(512, RECOVERY, "Windows to train on.",
                                  check=at_least(1, "recover_samples must be at least 1"))
    recover_batch: int = option(4, RECOVERY, "Windows in a batch to train on.",
                                check=at_least(1, "recover_batch must be at least 1"))
    model: str = option(
        "", MAIN, "The model, as it is named on the command line.", recorded=True)
    automatic: tuple[str, ...] = option(
        (), CHECKS, "Options that were left to the compiler: what is said of them is what it took.",
        recorded=True)
    hashes: tuple[str, ...] = option(
        (), CHECKS, "The sha256 of data that was read, by the option that named it.", recorded=True)

    @classmethod
    def read(cls, path: str | Path, **options: object) -> Self:
        """Read a recipe from a YAML file; `options` replace what it says.

        Raises UsageError, with the line, for what cannot be, and for code that the file names.
        """
        place = Path(path)
        said = recipe_file.values(cls, recipe_file.read(place), place.name, place.parent, options)
        asked = cls.over(said, options, beside=("model",))
        if "model" in options:
            asked["model"] = options["model"]
        if "target" not in asked:
            raise UsageError(f"recipe {place.name} has no target",
                             fix="say what stays: target: params=70%")
        try:
            return cls(**asked)
        except UsageError as problem:
            raise recipe_file.at(problem, place.name) from None

    def write(self, path: str | Path) -> None:
        """Write the recipe to a YAML file, without what is at its default."""
        Path(path).write_text(recipe_file.text(self), encoding="utf-8")

    def but(self, options: Mapping[str, object], beside: Iterable[str] = ()) -> Self:
        """Return the recipe with some keywords replaced; what is known of the old ones goes.

        Raises UsageError for a keyword that is none (nor among `beside`), or an unfit value.
        """
        return type(self)(**self.over({e.name: getattr(self, e.name) for e in known(type(self))},
                                      options, beside))

    @classmethod
    def over(cls, values: Mapping[str, Any], options: Mapping[str, object],
             beside: Iterable[str] = ()) -> dict[str, Any]:
        """Return values by field, some of them replaced by keywords, as `but` does."""
        words = {entry.keyword: entry.name for entry in spoken(cls)}
        for word in sorted(options.keys() - words.keys() - {*beside}):
            raise UsageError(f"there is no option {word!r}",
                             fix=did_you_mean(word, {*words, *beside}))
        given = {words[word]: value for word, value in options.items() if word in words}
        if {"align", "lanes", "runtime"} & given.keys():
            given = {"align": None, "lanes": None, **given}
        values = dict(values)
        if DECIDING & given.keys():  # what was left to the compiler is decided anew
            values |= {name: "auto" for name in values.pop("automatic", ())}
        kept = {"automatic": [n for n in values.get("automatic", ()) if n not in given],
                "hashes": [h for h in values.get("hashes", ())
                           if re.split("[.=]", h)[0] not in given]}
        return {**values, **kept, **given}

    def unexported(self) -> Self:
        """Return the recipe without model.onnx, what acts through it, and who is to run it."""
        return replace(self, **unexported({e.name: e.default for e in known(type(self))}),
                       runtime="", lanes=self.lanes or profile(self.runtime).lanes or None)

    def __post_init__(self) -> None:
        parse_targets(self.target)
        super().__post_init__()
        self._settle()
        check_combination(self.combine, len(self.adapters), self.keep_adapter)
        check_needs(vars(self), {entry.name: entry.default for entry in known(type(self))})
        if self.low_rank:
            check_low_rank_beside(vars(self))
        for name in ("modules", "keep_adapter"):
            if self.blocks and getattr(self, name):
                raise UsageError(f"blocks cannot be dropped with {name}",
                                 fix="drop blocks first, and compile the result again")

    def _settle(self) -> None:
        """Take over what the runtime wants; blocks of a quantised file want whole ones."""
        defaults = {entry.name: entry.default for entry in known(type(self))}
        found = settled(self.runtime, vars(self), defaults)
        align, kind = found.get("align", self.align), found.get("gguf", self.gguf)
        if str(kind).startswith("q") and align is None:
            found["align"] = BLOCK
        elif str(kind).startswith("q") and align % BLOCK:  # type: ignore[operator]
            raise UsageError(f"align {align} is no multiple of {BLOCK}",
                             why=f"{kind} keeps so many values of a row together",
                             fix="leave align out, or give --gguf f16")
        for name, value in found.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Trusting(Options):
    """Whether code that comes with a model may run."""

    trust_remote_code: bool = option(
        False, DANGEROUS, "Dangerous: run code that the checkpoint brings along.")


@dataclass(frozen=True)
class Errand(Trusting):
    """What one run does with a recipe: asked for like its options, but no part of the result."""

    out: Path | None = option(None, MAIN, "Directory to write; must not exist.")
    dry_run: bool = option(False, MAIN, "Stop at the plan.")
    checkpoint: Path | None = option(
        None, RECOVERY, "Save the training here, and continue it if it was stopped.",
        metavar="DIR")
    work: Path | None = option(
        None, MAIN, "Keep finished steps here: a compile that was killed goes on from them, to the "
        "same bytes. Another compile's are refused.", metavar="DIR")
    processes: str = option(
        "auto", MAIN, "Of the processes that a launcher started: together (one compile, its work "
        "shared, one writes) or alone. Default: together on the command line, alone in Python.",
        check=one_of(PROCESSES, "processes"))
