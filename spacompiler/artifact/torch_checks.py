"""Check an artifact again, from the files alone: hashes, reload, plan identity, ONNX parity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import SpaError
from ..store import folder as artifact
from ..store.arrays import load_weights, sample
from .check import TOLERANCE, Check
from .load import check_inputs

ONNX_TOLERANCE = 1e-3


def _run(module: nn.Module, inputs: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    from ..evidence.calls import as_call

    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(module(*args, **kwargs))
                if isinstance(x, torch.Tensor)]


def _reload(folder: Path, structure: dict[str, Any], module: nn.Module) -> Check:
    """Recorded results against those of the reloaded model."""
    stored = load_weights(folder / "check.safetensors")
    got = _run(module, check_inputs(folder, structure))
    worst = 0.0
    for name, want in stored.items():
        if name.startswith("result."):
            have = sample(got[int(name.removeprefix("result."))])
            if have.shape != want.shape:
                return Check("reload", False, f"{name}: {have.shape} for {want.shape}")
            scale = max(want.abs().max().item(), 1e-30)
            worst = max(worst, ((have - want).abs().max() / scale).item())
    return Check("reload", worst <= TOLERANCE, f"recorded results reproduced to {worst:.1e}")


def _identity(folder: Path, structure: dict[str, Any], module: nn.Module,
              model: nn.Module | None) -> Check:
    """Each array is an exact index-select of the recorded dense one."""
    from ..torch_backend.weights import weights_hash
    from .load import _source, prepared

    name = "plan identity"
    if structure.get("trained"):
        return Check(name, None, "skipped: the arrays were trained after they were cut")
    try:
        dense = model if model is not None else _source(structure).module
    except SpaError as problem:
        return Check(name, None, f"skipped: {problem.why or problem.what}")
    dense = prepared(dense, structure)
    plan = artifact.read_json(folder / "plan.json")
    if weights_hash(dense) != plan["weights_hash"]:
        return Check(name, None, "skipped: the source's weights are not those that were pruned")
    slices = artifact.read_json(folder / "slices.json")
    body = getattr(module, "body", module)
    have, old = body.state_dict(), dense.state_dict()
    corrected, repaired = slices["corrected"], set(slices.get("repaired", ()))
    for key, tensor in have.items():
        if slices["arrays"].get(key) == "joint":
            continue
        if key in repaired:
            continue
        want = _selected(old[key], slices, key)
        if key in corrected:
            factor, offset = corrected[key]["factor"], corrected[key]["offset"]
            want = ((want.double() + offset) * factor - offset).to(want.dtype)
        if not torch.equal(tensor, want):
            return Check(name, False, f"{key} is not the recorded part of the dense array")
    extra = f", {len(corrected)} gains corrected" if corrected else ""
    extra += f", {len(repaired)} repaired" if repaired else ""
    exact = len(have) - len(repaired & have.keys())
    return Check(name, True, f"{exact} arrays are exact parts of the dense ones{extra}")


def _selected(tensor: torch.Tensor, slices: dict[str, Any], key: str) -> torch.Tensor:
    for dim, index in enumerate(slices["arrays"].get(key, ())):
        if index is not None:
            tensor = tensor.index_select(dim, torch.tensor(slices["indices"][index]))
    return tensor


def _onnx(folder: Path, structure: dict[str, Any], module: nn.Module) -> Check:
    """ONNX Runtime against the reloaded model, at two sizes other than the recorded one."""
    from ..runtime.decoder import cache_names
    from ..runtime.session import open_session, run_session

    path = folder / "model.onnx"
    if not path.exists():
        return Check("onnx", None, "skipped: the artifact has no model.onnx")
    session = open_session(path)
    if cache_names([i.name for i in session.get_inputs()]):
        return _decoder(path, module)
    worst, shapes = 0.0, []
    for inputs in _resized(session, check_inputs(folder, structure)):
        tensors = inputs.values() if isinstance(inputs, dict) else inputs
        values = [v.numpy() for v in tensors if isinstance(v, torch.Tensor)]
        names = [i.name for i in session.get_inputs()]
        got = run_session(session, dict(zip(names, values, strict=True)))
        for a, b in zip(got, _run(module, inputs), strict=True):
            scale = max(1.0, float(b.abs().max())) if b.is_floating_point() else 1.0
            worst = max(worst, float(np.abs(a - b.numpy()).max()) / scale)
        shapes.append(str([list(v.shape) for v in values]))
    return Check("onnx", worst <= ONNX_TOLERANCE,
                 f"ONNX Runtime = torch to {worst:.1e} at {' and '.join(shapes)}")


def _decoder(path: Path, module: nn.Module) -> Check:
    """A decoder's file against the reloaded model, token by token with its cache."""
    from ..deploy.decoder_parity import decoder_parity

    found = decoder_parity(module, path)
    worst = max(check.max_rel for check in found)
    same, tokens = (sum(getattr(c, key) for c in found) for key in ("same", "tokens"))
    return Check("onnx", worst <= ONNX_TOLERANCE,
                 f"ONNX Runtime with its cache = torch to {worst:.1e}; {same} of {tokens} "
                 "likeliest tokens agree")


def _resized(session: Any, inputs: Any) -> Iterator[Any]:
    """Recorded inputs at two other sizes: every symbolic axis of the ONNX inputs changes."""
    symbols = {i.name: i.shape for i in session.get_inputs()}
    for change in (lambda n: n + 1, lambda n: max(1, n // 2)):
        made: dict[Any, Any] = {}
        items = inputs.items() if isinstance(inputs, dict) else enumerate(inputs)
        order = iter(symbols.values())
        for key, value in items:
            if isinstance(value, torch.Tensor):
                for d, symbol in enumerate(next(order)):
                    if isinstance(symbol, str):
                        size = value.shape[d]
                        value = value.index_select(d, torch.arange(change(size)) % size)
            made[key] = value
        yield made if isinstance(inputs, dict) else tuple(made.values())
