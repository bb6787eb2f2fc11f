"""Load an artifact: transformers' classes for its own layouts, else plan + safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SpaError, WeightsError
from ..evidence.calls import Inputs
from ..store import completeness, weight_files
from ..store.arrays import load_weights
from ..store.folder import check_hashes, load_check, read_json, read_slices
from ..store.weight_files import WEIGHTS
from ..system.process import alone
from ..torch_backend import pretrained
from ..torch_backend.emit.biases import with_biases
from ..torch_backend.emit.factored import factored
from ..torch_backend.emit.module import resize
from ..torch_backend.emit.unsaved import refusing
from ..torch_backend.own_layers import names_file, stock_of
from ..torch_backend.registered import class_for
from ..torch_backend.weights import named_arrays
from ..trials.blocks import without
from . import stock_code as stock
from .stock_code import SourceNeeded


@alone()
def load(folder: str | Path, model: nn.Module | str | None = None) -> nn.Module:
    """Return the pruned module of an artifact, in eval mode.

    In layout `any` the dense network's code is needed: it comes from the recorded source where that
    is `zoo:NAME` or a class of transformers, else as `model` (itself, or its name as for
    `compile`), whose weights do not matter. Nothing else that an artifact names is run.

    Raises:
        SpaError: no artifact there, damaged files, or no way to build the network.
    """
    place = Path(folder)
    check_hashes(place)
    return load_folder(place, model=model)


def load_folder(folder: Path, model: nn.Module | str | None = None) -> nn.Module:
    """Load without looking at the manifest.

    Raises SpaError, whatever the files make go wrong.
    """
    structure = read_json(folder / "structure.json")
    try:
        return _load(folder, structure, model)
    except SpaError:
        raise
    except Exception as problem:  # files of another make fail in as many ways as there are layers
        reason = str(problem).strip().splitlines()
        raise SpaError("the artifact cannot be loaded", where=str(folder),
                       why=f"{type(problem).__name__}: {reason[0] if reason else ''}"[:400],
                       fix="its files do not belong together; compile the model again"
                       ) from problem


def _load(folder: Path, structure: dict[str, Any], model: nn.Module | str | None) -> nn.Module:
    if structure["layout"] == "onnx":
        return _onnx(folder)
    if structure["layout"] in ("uniform", "per-layer"):
        return _stock(folder, structure["class"], model)
    arrays = load_weights(folder / WEIGHTS)
    dense = _dense(folder, structure, model)
    if structure["emission"] == "program":
        made = _program(folder, structure, arrays, dense)
    else:
        _check_whole(folder, _shapes(folder, dense, arrays), arrays)
        made = resize(dense, structure["attributes"], arrays)
    return refusing(_finite(folder, made.eval()))


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
    slices = read_slices(folder)
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
    from ..onnx_backend.module import OnnxModule
    from ..onnx_backend.read.file import check_finite, open_model

    check_finite(open_model(folder / "model.onnx"), str(folder))
    return OnnxModule(folder / "model.onnx")


def _stock(folder: Path, path: str, model: object) -> nn.Module:
    own = stock_of(type(model)) or type(model)
    given = isinstance(model, nn.Module) and path == f"{own.__module__}.{own.__qualname__}"
    cls: Any = own if given else stock.class_of(path)
    weight_files.check(str(folder))
    entries = stock.check(folder / weight_files.CONFIG, cls)
    weight_files.check_layers(entries, len(weight_files.headers(folder)), str(folder))
    config = cls.config_class.from_pretrained(str(folder), local_files_only=True)
    if names_file(config):
        cls = class_for(cls, config)
    return pretrained.load(folder, cls, config)[0]


def dense_module(folder: Path, structure: dict[str, Any]) -> nn.Module:
    """Build the dense network (its weights do not matter) from what the artifact recorded."""
    if (folder / "dense_config.json").exists():
        cls, entries = stock.class_of(structure["class"]), stock.check(folder / "dense_config.json")
        arrays = weight_files.header(folder / WEIGHTS)
        weight_files.check_layers(entries, len(arrays), str(folder))
        config = cls.config_class.from_dict(entries)
        with torch.device("cpu"):
            return cls(config).eval()
    return dense_source(structure)


def dense_source(structure: Mapping[str, Any], model: object = None) -> Any:
    """Return the dense network: as given (itself, or its name), or from the zoo by its record.

    Raises SourceNeeded where the record names anything else.
    """
    from ..sources.named import load as load_source

    if model is not None:
        return load_source(model).module if isinstance(model, str) else model
    if not structure["model"].startswith("zoo:"):
        raise SourceNeeded(structure["model"])
    unused = structure.get("source", {}).get("unused", ())
    return load_source(structure["model"], kind="zoo", local=True, unused=unused).module


def _dense(folder: Path, structure: dict[str, Any], model: nn.Module | str | None) -> nn.Module:
    """Return the dense network, the user's or a new one, with the biases that were added to it."""
    dense = dense_module(folder, structure) if model is None else dense_source(structure, model)
    return prepared(dense, structure, owned=not isinstance(model, nn.Module))


def prepared(dense: nn.Module, structure: dict[str, Any], owned: bool = False) -> nn.Module:
    """Return a dense network as it was when widths were cut: blocks dropped, layers as
    products of two, biases added."""
    biased = structure.get("biased", ())
    short = without(dense, structure.get("dropped", ()))
    made = with_biases(factored(short, structure.get("factored", {})), biased, owned=owned)
    missing = {f"{path}.bias" for path in biased} - made.state_dict().keys()
    if missing:
        raise SpaError("the artifact belongs to another network",
                       why=f"there is no {min(missing)}, which it says was added",
                       fix="pass the dense module that it was made from")
    return made


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
    plan = Plan.read(folder)
    made = Rewritten(rewrite(traced, solution, plan.choices(solution)))
    _check_whole(folder, {n: tuple(t.shape) for n, t in made.body.state_dict().items()}, arrays)
    made.body.load_state_dict(arrays, strict=True, assign=True)
    return made


def check_inputs(folder: Path, structure: Mapping[str, Any]) -> Inputs:
    """Return the example inputs that an artifact recorded; raises SpaError if they are missing."""
    stored, _ = load_check(folder)
    recorded = structure["inputs"]
    names = [f"arg.{i}" for i in range(recorded["args"])] or [
        f"kwarg.{k}" for k in recorded["kwargs"] if k not in recorded["constants"]]
    missing = [name for name in names if name not in stored]
    if missing or not (names or recorded["kwargs"]):
        raise SpaError("check.safetensors lacks the example inputs", where=str(folder),
                       why=f"{missing[0]} is not in it" if missing else "there are none",
                       fix="give a directory written by `spacompiler compile`")
    if recorded["args"]:
        return tuple(stored[name] for name in names)
    return {k: stored.get(f"kwarg.{k}", recorded["constants"].get(k)) for k in recorded["kwargs"]}
