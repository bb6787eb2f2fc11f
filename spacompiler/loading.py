"""Load an artifact: stock transformers for the uniform layout, else plan + safetensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import artifact
from .biases import with_biases
from .blocks import without
from .emit.module import resize
from .errors import SpaError
from .frontends.torch_export import Inputs


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the pruned module of an artifact, in eval mode.

    In layout `any` the dense network's code is needed: it comes from the recorded source
    (`zoo:NAME`, `module:factory`, a transformers class with its config), or as `model`, whose
    weights do not matter.

    Raises:
        SpaError: no artifact there, damaged files, or no way to build the network.
    """
    place = Path(folder)
    wrong = artifact.check_manifest(place)
    if wrong:
        raise SpaError("the artifact is damaged", where=str(place), why="; ".join(wrong[:3]))
    return load_folder(place, model=model)


def load_folder(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """Load without looking at the manifest."""
    structure = artifact.read_json(folder / "structure.json")
    if structure["layout"] == "onnx":
        return _onnx(folder)
    if structure["layout"] == "uniform":
        return _stock(folder, structure["class"])
    arrays = artifact.load_weights(folder / "model.safetensors")
    if structure["emission"] == "program":
        return _program(folder, structure, arrays, model)
    dense = _dense(folder, structure, model)
    return resize(dense, structure["attributes"], arrays).eval()


def _onnx(folder: Path) -> nn.Module:
    from .emit.onnx_module import OnnxModule

    return OnnxModule(folder / "model.onnx")


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _stock(folder: Path, path: str) -> nn.Module:
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = _class(path).from_pretrained(folder, dtype="auto").eval()
    finally:
        if was:
            logging.enable_progress_bar()
    return model


def dense_module(folder: Path, structure: dict[str, Any]) -> nn.Module:
    """Build the dense network (its weights do not matter) from what the artifact recorded."""
    if (folder / "dense_config.json").exists():
        cls = _class(structure["class"])
        config = cls.config_class.from_dict(artifact.read_json(folder / "dense_config.json"))
        with torch.device("cpu"):
            return cls(config).eval()
    return _source(structure).module


def _dense(folder: Path, structure: dict[str, Any], model: nn.Module | None) -> nn.Module:
    """Return the dense network, the user's or a new one, with the biases that were added to it."""
    dense = model if model is not None else dense_module(folder, structure)
    return prepared(dense, structure, owned=model is None)


def prepared(dense: nn.Module, structure: dict[str, Any], owned: bool = False) -> nn.Module:
    """Return a dense network as it was when widths were cut: blocks dropped, biases added."""
    gone = structure.get("dropped", ())
    return with_biases(without(dense, gone), structure.get("biased", ()), owned=owned)


def _source(structure: dict[str, Any]) -> Any:
    from .source import load as load_source

    try:
        return load_source(structure["model"])
    except SpaError as problem:
        raise SpaError(f"the network {structure['model']!r} cannot be built",
                       why=problem.what, fix="pass the dense module: load(dir, model=module)"
                       ) from problem


def _program(folder: Path, structure: dict[str, Any], arrays: dict[str, torch.Tensor],
             model: nn.Module | None) -> nn.Module:
    """Trace the dense network again and re-write its program by the plan."""
    from .emit.program import Rewritten, rewrite
    from .frontends.aten import TABLE
    from .frontends.torch_export import trace
    from .groups import solve
    from .plan import Plan

    dense = _dense(folder, structure, model)
    traced = trace(dense, check_inputs(folder, structure))
    solution = solve(traced.graph, TABLE, rewire=True)
    plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    program = rewrite(traced, solution, plan.choices(solution), arrays)
    made = Rewritten(program)
    made.body.load_state_dict(arrays, strict=True, assign=True)
    return made


def check_inputs(folder: Path, structure: dict[str, Any]) -> Inputs:
    """Return the example inputs that an artifact recorded."""
    stored = artifact.load_weights(folder / "check.safetensors")
    if structure["inputs"]["args"]:
        return tuple(stored[f"arg.{i}"] for i in range(structure["inputs"]["args"]))
    return {k: stored.get(f"kwarg.{k}", structure["inputs"]["constants"].get(k))
            for k in structure["inputs"]["kwargs"]}
