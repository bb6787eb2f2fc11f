"""Load an artifact: stock transformers for the uniform layout, else plan + safetensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SpaError, WeightsError
from ..evidence.calls import Inputs
from ..process import alone
from ..store import completeness, weight_files
from ..store import folder as artifact
from ..store.arrays import load_weights
from ..store.weight_files import WEIGHTS
from ..torch_backend import pretrained
from ..torch_backend.emit.biases import with_biases
from ..torch_backend.emit.module import resize
from ..torch_backend.weights import named_arrays
from ..trials.blocks import without


@alone()
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
    arrays = load_weights(folder / WEIGHTS)
    dense = _dense(folder, structure, model)
    if structure["emission"] == "program":
        made = _program(folder, structure, arrays, dense)
    else:
        _check_whole(folder, _shapes(folder, dense, arrays), arrays)
        made = resize(dense, structure["attributes"], arrays)
    return _finite(folder, made.eval())


def _check_whole(folder: Path, network: dict[str, tuple[int, ...] | None],
                 arrays: dict[str, torch.Tensor]) -> None:
    """Raise WeightsError unless the stored arrays are the network's, all of them."""
    completeness.of_arrays(network, arrays).check(
        f"{WEIGHTS} does not hold this network", str(folder),
        fix="pass the dense module that the artifact was made from, or compile it again")


def _finite(folder: Path, module: nn.Module) -> nn.Module:
    if name := completeness.unsound(module):
        raise WeightsError(f"{WEIGHTS} holds NaN or infinity", where=str(folder), why=f"in {name}",
                       fix="compile the model again")
    return module


def _shapes(folder: Path, dense: nn.Module,
            arrays: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of each array that the pruned network has, by what the slices say of it.

    They name the arrays that changed by the first of their names; None where an array is cut along
    several dimensions at once. Buffers that a state dict leaves out are stored where they changed.
    """
    slices = artifact.read_json(folder / "slices.json")
    saved, first = dense.state_dict().keys(), dict[int, str]()
    found: dict[str, tuple[int, ...] | None] = {}
    for name, tensor in named_arrays(dense):
        cut = slices["arrays"].get(first.setdefault(id(tensor), name))
        if name in saved or name in arrays:
            found[name] = tuple(tensor.shape) if cut is None else None if cut == "joint" else \
                tuple(n if i is None else len(slices["indices"][i])
                      for n, i in zip(tensor.shape, cut, strict=True))
    return found


def _onnx(folder: Path) -> nn.Module:
    from ..onnx_backend.read.file import check_finite, open_model
    from .onnx_module import OnnxModule

    check_finite(open_model(folder / "model.onnx"), str(folder))
    return OnnxModule(folder / "model.onnx")


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _stock(folder: Path, path: str) -> nn.Module:
    cls = _class(path)
    weight_files.check(str(folder))
    config = cls.config_class.from_pretrained(str(folder), local_files_only=True)
    return pretrained.load(folder, cls, config)[0]


def dense_module(folder: Path, structure: dict[str, Any]) -> nn.Module:
    """Build the dense network (its weights do not matter) from what the artifact recorded."""
    if (folder / "dense_config.json").exists():
        cls, entries = _class(structure["class"]), artifact.read_json(folder / "dense_config.json")
        arrays = weight_files.header(folder / WEIGHTS)
        weight_files.check_layers(entries, len(arrays), str(folder))
        config = cls.config_class.from_dict(entries)
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
    """Build the network that an artifact names; nothing is asked of the hub."""
    from ..sources.named import kind_of
    from ..sources.named import load as load_source

    name, recorded = structure["model"], structure.get("source") or {}
    kind = recorded.get("kind") or kind_of(name)
    try:
        return load_source(name, kind=kind, local=True, unused=recorded.get("unused", ()))
    except SpaError as problem:
        raise SpaError(f"the network {name!r} cannot be built",
                       why=problem.what, fix="pass the dense module: load(dir, model=module)"
                       ) from problem


def _program(folder: Path, structure: dict[str, Any], arrays: dict[str, torch.Tensor],
             dense: nn.Module) -> nn.Module:
    """Trace the dense network again and re-write its program by the plan."""
    from ..groups.solution import solve
    from ..plan.plan import Plan
    from ..rows.aten_table import TABLE
    from ..torch_backend.emit.program import Rewritten, rewrite
    from ..torch_backend.read.export import trace

    traced = trace(dense, check_inputs(folder, structure))
    solution = solve(traced.graph, TABLE, rewire=True)
    plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    made = Rewritten(rewrite(traced, solution, plan.choices(solution)))
    _check_whole(folder, {n: tuple(t.shape) for n, t in made.body.state_dict().items()}, arrays)
    made.body.load_state_dict(arrays, strict=True, assign=True)
    return made


def check_inputs(folder: Path, structure: dict[str, Any]) -> Inputs:
    """Return the example inputs that an artifact recorded."""
    stored = load_weights(folder / "check.safetensors")
    if structure["inputs"]["args"]:
        return tuple(stored[f"arg.{i}"] for i in range(structure["inputs"]["args"]))
    return {k: stored.get(f"kwarg.{k}", structure["inputs"]["constants"].get(k))
            for k in structure["inputs"]["kwargs"]}
