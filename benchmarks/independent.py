"""Check a saved artifact without the axis algebra: the indices that it keeps, and the dense model.

What a plan removes is set to zero in every array of a copy of the dense model, by the index lists
in slices.json alone; that copy must compute what the artifact does after a reload, and what its
ONNX file does, on inputs that nothing was traced or measured on.

A weight that torch computes from two others (weight norm) is made a plain one first: it is cut as
the one of its shape is. Where several lists serve one array, its place is found by its values. An
array that the model's code computes cannot be set to zero in it: zeros in all others mostly do,
and where results differ then, nothing is said. A
copy may divide by what was set to zero: where it gives no numbers and the dense model does, zeros
in parameters alone say the same, as what reads a removed slice is itself zero there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import judge
import onnxruntime as ort
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

NEAR = 1e-3


class Unchecked(Exception):
    """The index lists do not say enough for a check as simple as this one."""


def masked(dense: nn.Module, folder: Path, small: nn.Module | None = None, *,
           buffers: bool = True) -> tuple[nn.Module, list[str]]:
    """Return a copy of the dense model with all that is gone set to zero, and what could not be.

    That are arrays that the model's code computes. Raises Unchecked where what stays of one that
    is not cut along whole dimensions is not found by value in the pruned model.
    """
    told = json.loads((folder / "slices.json").read_text())
    made = copy.deepcopy(dense)
    plain = _without_norms(made)
    floats = dict(made.named_parameters(remove_duplicate=False))
    arrays = floats | dict(made.named_buffers(remove_duplicate=False))
    cut = {plain.get(name, name): dims for name, dims in told["arrays"].items()
           if plain.get(name, name)}
    computed = sorted(cut.keys() - arrays.keys())
    for name in computed:
        del cut[name]
    for name, dims in cut.items():
        if not buffers and name not in floats:
            continue
        array = arrays[name].data
        if dims == "joint":
            array[~_place(name, array, small)] = 0
            continue
        for dim, key in enumerate(dims):
            if key is not None:
                stays = set(told["indices"][key])
                gone = [i for i in range(array.shape[dim]) if i not in stays]
                array.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)
    return made, computed


def _place(name: str, array: torch.Tensor, small: nn.Module | None) -> torch.Tensor:
    """Which entries of an array stay, by the values that the pruned model holds."""
    held = {} if small is None else {
        n.removeprefix("body."): a for n, a in small.state_dict().items()}
    try:
        return torch.from_numpy(judge.find(array.numpy(), held[name].numpy()))
    except (KeyError, judge.Wrong) as problem:
        raise Unchecked(f"{name} is cut jointly, and not found by value") from problem


def _without_norms(module: nn.Module) -> dict[str, str]:
    """Make weights that weight norm computes plain ones, in place.

    Returns by the names of what they were computed from: that of the weight for the array of its
    shape, "" for the other.
    """
    found = {}
    for path, part in list(module.named_modules()):
        at = f"{path}." if path else ""
        for name in list(getattr(part, "parametrizations", ())):
            inner = f"{at}parametrizations.{name}."
            if hasattr(part.parametrizations[name], "original1"):
                found |= {f"{inner}original0": "", f"{inner}original1": f"{inner}original"}
                plain = nn.Parameter(getattr(part, name).detach().clone())  # copies share classes
                part.parametrizations[name] = parametrize.ParametrizationList(
                    [nn.Identity()], plain)
        for name in [n.removesuffix("_g") for n, _ in part.named_parameters(recurse=False)
                     if n.endswith("_g") and hasattr(part, n.removesuffix("_g") + "_v")]:
            found |= {f"{at}{name}_g": "", f"{at}{name}_v": at + name}
            nn.utils.remove_weight_norm(part, name)
    return found


def results(module: nn.Module, call: Any) -> list[torch.Tensor]:
    """The floating results of a call, in float64 where the module runs in it."""
    args, kwargs = call
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = pytree.tree_leaves(module.eval()(*args, **kwargs))
    return [t.detach().double() for t in found if isinstance(t, torch.Tensor)]


def gap(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest difference, relative to each result's largest entry; inf if none compare."""
    if len(got) != len(want) or any(a.shape != b.shape for a, b in zip(got, want, strict=True)):
        return float("inf")
    gaps = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))
            for a, b in zip(got, want, strict=True) if b.numel()]
    return max(gaps, key=lambda x: (x != x, x), default=float("inf"))


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional ones and keywords."""
    return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})


def in_onnx(path: Path, call: Any) -> list[torch.Tensor]:
    """What ONNX Runtime makes of a file with the tensors of a call, in order."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
    names = [i.name for i in session.get_inputs()]
    if len(names) != len(tensors):
        raise Unchecked(f"the file takes {len(names)} inputs of {len(tensors)}")
    feed = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
    return [torch.from_numpy(x).double() for x in session.run(None, feed)]


def check(dense: nn.Module, small: nn.Module, folder: Path,
          draw: Callable[[int], Any]) -> dict[str, str]:
    """Compare; returns a word for each of: torch, batch (another one), onnx.

    `draw(more)` makes inputs with so many more examples than were traced.
    """
    want, computed = masked(dense, folder, small)
    call = as_call(draw(0))
    if not _are_numbers(want, call) and _are_numbers(dense, call):
        want, computed = masked(dense, folder, small, buffers=False)
    told: dict[str, str] = {}
    for which, more in (("torch", 0), ("batch", 1)):
        torch.manual_seed(7 + more)
        call = as_call(draw(more))
        told[which] = _tried(partial(results, small), want, call)
        if (folder / "model.onnx").exists():
            told[f"onnx, {which}" if more else "onnx"] = _tried(
                partial(in_onnx, folder / "model.onnx"), want, call)
    if computed and any("off by" in word for word in told.values()):
        raise Unchecked(f"{computed[0]} is computed")
    return told


def _are_numbers(module: nn.Module, call: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in results(module, call))


def _tried(run: Callable[[Any], list[torch.Tensor]], want: nn.Module, call: Any) -> str:
    try:
        return _word(want, run(call), call)
    except Exception as problem:  # a program that is fixed at its batch, say
        return f"{type(problem).__name__}: {str(problem).splitlines()[0][:80]}"


def _word(want: nn.Module, got: list[torch.Tensor], call: Any) -> str:
    error = gap(got, results(want, call))
    return "ok" if error <= NEAR else f"off by {error:.1e}"
