"""Check an artifact again, from the files alone: hashes, reload, plan identity, ONNX parity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..errors import SpaError
from ..evidence.calls import Inputs, as_call
from ..plan.plan import Plan
from ..stages.comparison import compare
from ..stages.tolerances import ONNX, RECORDED
from ..store.folder import read_json, read_slices
from ..system.staging import Scratch
from ..torch_backend.kinds import is_encoder_decoder
from ..torch_backend.own_layers import FILE, OwnSizes, modelling_file
from . import recorded
from .check import Check
from .load import check_inputs, dense_source, prepared
from .stock_code import SourceNeeded

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import PreTrainedModel

    from ..deploy.decoder_parity import DecoderParity


def tried(name: str, check: Callable[[], Check]) -> Check:
    """Carry out a check: whatever an artifact makes go wrong in it has failed it."""
    try:
        return check()
    except SourceNeeded as problem:
        return Check(name, None, f"skipped: {problem.what}; {problem.fix}")
    except SpaError as problem:
        return Check(name, False, ": ".join(filter(None, (problem.what, problem.why))))
    except Exception as problem:  # its code, its shapes and its files may raise anything
        reason = str(problem).strip().splitlines()
        return Check(name, False, f"{type(problem).__name__}: {reason[0] if reason else ''}"[:300])


def _run(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    from ..torch_backend.weights import results

    return results(module, *as_call(inputs))


def reloaded(folder: Path, structure: dict[str, Any], module: nn.Module) -> Check:
    """Recorded results against those of the reloaded model."""
    return reproduced(folder, _run(module, check_inputs(folder, structure)))


def reproduced(folder: Path, results: list[torch.Tensor]) -> Check:
    """Recorded results against those given."""
    found = recorded.recorded(folder, results)
    return Check("reload", found.within(RECORDED.value),
                 found.why or f"recorded results reproduced to {found.relative:.1e}")


def modelling(folder: Path, module: nn.Module) -> Check:
    """The file that stock transformers would run is the one that this version writes."""
    name, file = "modelling file", folder / FILE
    if not isinstance(module, OwnSizes):
        return Check(name, not file.exists(), f"there is a {FILE} that nothing asks for"
                     if file.exists() else "none is needed")
    if file.read_text(encoding="utf-8") == modelling_file(type(module)):
        return Check(name, True, f"{FILE} is the one that this version writes")
    return Check(name, None, f"skipped: {FILE} is not what this version writes; read it before you "
                             "load it with trust_remote_code")


def plan_identity(folder: Path, structure: dict[str, Any], module: nn.Module,
                  model: object) -> Check:
    """Each array is an exact index-select of the recorded dense one, as the plan says."""
    from ..torch_backend.weights import weights_hash

    def solved(dense: nn.Module) -> Iterator[tuple[Mapping[str, Any], Any, Mapping[str, str]]]:
        for quick in (True, False):
            traced, solution = _traced(dense, folder, structure, quick)
            stored = getattr(traced.program, "state_dict", {})
            yield {k: t.detach() for k, t in stored.items()}, solution, traced.tied

    body: Any = getattr(module, "body", module)
    return identity(
        folder, structure, lambda dense: body.state_dict(),
        lambda: prepared(dense_source(structure, model), structure),
        weights_hash, lambda dense: dense.state_dict(), solved)


def _traced(dense: nn.Module, folder: Path, structure: Mapping[str, Any], quick: bool) -> Any:
    from ..sources.backends import backend_of
    from ..torch_backend import parts

    inputs: Any = check_inputs(folder, structure)
    if structure.get("parts"):
        dense, inputs = parts.of(dense, structure["parts"], inputs)
    return backend_of(dense).trace(dense, inputs, quick)


def identity(folder: Path, structure: Mapping[str, Any], have: Callable[[Any], Mapping[str, Any]],
             source: Callable[[], Any], digest: Callable[[Any], str],
             arrays: Callable[[Any], Mapping[str, Any]], solved: Callable[[Any], Iterator[Any]]
             ) -> Check:
    """Hold arrays against the dense network's: cut as slices.json says, and that as the plan says.

    `source` gives the dense network; of it, `have` gives the artifact's arrays that belong to it,
    `digest` its hash, `arrays` its own by name, and `solved`
    (further arrays, solution, tied names), in the ways that a compile may have traced it.
    """
    name = "plan identity"
    plan = Plan.read(folder)
    slices = read_slices(folder)
    wrong = recorded.claims(folder, structure, slices, plan)
    if wrong:
        return Check(name, False, wrong)
    if structure.get("factored"):
        return Check(name, None, f"skipped: {len(structure['factored'])} layers became products of "
                     "two by data that the artifact does not hold")
    dense = source()
    if digest(dense) != slices.get("weights_hash", plan.weights_hash):
        return Check(name, None, _other_weights(folder))
    if structure.get("trained") and "trained" not in slices:
        return Check(name, None, "skipped: the arrays were trained after they were cut")
    for more, solution, tied in solved(dense):
        wrong = recorded.planned(plan, slices, solution, tied)
        if not wrong:
            old = {**more, **arrays(dense)}
            found = dict(recorded.parts(have(dense), old, slices))
            bad = next((f"{key}: {why}" for key, why in found.items() if why), "")
            return Check(name, not bad, bad or _summary(found, slices))
    return Check(name, False, wrong)


def _other_weights(folder: Path) -> str:
    """Why a source is not compared: adapters that were merged into it are asked for."""
    recipe = read_json(folder / "recipe.json")
    text = "skipped: the source's weights are not those that were pruned"
    if not recipe.get("adapters"):
        return text
    if recipe.get("keep_adapter"):
        return f"{text}; the adapter was kept apart: give its base"
    return f"{text}; adapters were merged first: give the merged model"


def _summary(found: Mapping[str, str], slices: Mapping[str, Any]) -> str:
    trained = set(slices.get("trained", ())) & found.keys()
    repaired = (set(slices.get("repaired", ())) & found.keys()) - trained
    text = f"{len(found) - len(repaired | trained)} arrays are exact parts of the dense ones"
    for count, what in ((len(slices["corrected"]), "gains corrected"),
                        (len(repaired), "repaired"), (len(trained), "trained")):
        text += f", {count} {what}" if count else ""
    return text


def exported(folder: Path, structure: dict[str, Any], module: nn.Module) -> Iterator[Check]:
    """ONNX Runtime against the reloaded model, for each ONNX file that is there or should be."""
    from ..runtime.encoder_decoder import DECODER, ENCODER, pair_folder
    from ..runtime.session import model_file

    recipe = read_json(folder / "recipe.json")
    asked = recipe.get("onnx", False) and not structure.get("parts")
    if model_file(folder).exists():
        yield tried("onnx", lambda: _onnx(folder, structure, module))
    elif asked:
        yield Check("onnx", False, "the recipe asks for model.onnx, and there is none")
    place = pair_folder(folder)
    if any((place / name).exists() for name in (ENCODER, DECODER)) or \
            (asked and recipe.get("decoder") and is_encoder_decoder(module)):
        yield tried("encoder and decoder", lambda: _pair(
            place, check_inputs(folder, structure), cast("PreTrainedModel", module)))
    if (folder / "model.gguf").exists() or recipe.get("gguf"):
        yield tried("gguf", lambda: _gguf(
            folder, recipe["gguf"], cast("PreTrainedModel", module)))


def _gguf(folder: Path, kind: str, module: PreTrainedModel) -> Check:
    """The file for llama.cpp against one that is written anew of the reloaded model."""
    from ..deploy.gguf_file import differing, write_gguf

    file = folder / "model.gguf"
    if not file.exists():
        return Check("gguf", False, f"the recipe asks for {file.name}, and there is none")
    if find_spec("gguf") is None:
        return Check("gguf", None, "skipped: the gguf package is not installed")
    with Scratch() as place:
        write_gguf(module, place / file.name, kind, folder=folder)
        odd = differing(file, place / file.name)
    return Check("gguf", not odd, f"{odd} is not what the reloaded model has" if odd else
                 f"{file.name} holds the reloaded model as {kind}, bit by bit")


def _onnx(folder: Path, structure: dict[str, Any], module: nn.Module) -> Check:
    """ONNX Runtime against the reloaded model, at two sizes other than the recorded one."""
    from ..runtime.decoder import cache_names
    from ..runtime.session import model_file, open_session, run_session

    path = model_file(folder)
    session = open_session(path)
    names = [i.name for i in session.get_inputs()]
    if cache_names(names):
        return _decoder(path, module)
    worst, shapes = 0.0, []
    for inputs in _resized(session, check_inputs(folder, structure)):
        given = inputs.values() if isinstance(inputs, dict) else inputs
        values = [v.numpy() for v in given if isinstance(v, torch.Tensor)]
        got = run_session(session, dict(zip(names, values, strict=True)))
        found = compare(got, _run(module, inputs))
        if found.why:
            return Check("onnx", False, found.why)
        worst = max(worst, min(found.absolute, found.relative))
        shapes.append(str([list(v.shape) for v in values]))
    return Check("onnx", worst <= ONNX.value,
                 f"ONNX Runtime = torch to {worst:.1e} at {' and '.join(shapes)}")


def _decoder(path: Path, module: nn.Module) -> Check:
    """A decoder's file against the reloaded model, token by token with its cache."""
    from ..deploy.decoder_parity import decoder_parity

    return _agreeing("onnx", decoder_parity(module, path))


def _pair(place: Path, inputs: Inputs, module: PreTrainedModel) -> Check:
    """Both files of an encoder-decoder against the reloaded model, token by token."""
    from ..deploy.encoder_decoder import pair_parity

    args, kwargs = as_call(inputs)
    example = {**dict(zip((module.main_input_name,), args, strict=False)), **kwargs}
    return _agreeing("encoder and decoder", pair_parity(module, example, place))


def _agreeing(name: str, found: Sequence[DecoderParity]) -> Check:
    same, tokens = (sum(getattr(c, key) for c in found) for key in ("same", "tokens"))
    worst = max(c.max_rel for c in found)
    return Check(name, all(c.max_rel <= ONNX.value for c in found),
                 f"ONNX Runtime with its cache = torch to {worst:.1e}; "
                 f"{same} of {tokens} likeliest tokens agree")


def _resized(session: InferenceSession, inputs: Inputs) -> Iterator[Any]:
    """Recorded inputs at two other sizes: every symbolic axis of the ONNX inputs changes."""
    from ..deploy.inputs import resized

    free = [[d for d, symbol in enumerate(i.shape) if isinstance(symbol, str)]
            for i in session.get_inputs()]
    for size in (lambda d, n: n + 1, lambda d, n: max(1, n // 2)):
        yield resized(inputs, free, size)
