"""Keep an adapter beside the pruned base: the plan is made for the merged model, both are cut."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..axes.choices import indices
from ..errors import ProofError, SpaError
from ..stages.proof import relative_error
from ..stages.records import Decided, Emitted, Request
from ..stages.tolerances import KEPT_ADAPTER
from ..torch_backend.emit.slicer import Slicer
from . import files, foreign, merging
from .cutting import Cut, check_sliceable, sliced


def keep(ask: Request, emitted: Emitted) -> Emitted:
    """Take the adapter out of the pruned model again, cut to its size, and check both together.

    Raises:
        SpaError: a type that must be merged first.
        ProofError: pruned base + cut adapter is not the pruned merged model.
    """
    from ..torch_backend.weights import weights_hash

    if emitted.emission == "program":
        raise SpaError("the adapter cannot be kept", where=ask.name,
                       why="the pruned network is a re-written program, without its layers",
                       fix="merge it: leave out --keep-adapter")
    decided, subject, pruned = emitted.decided, emitted.subject, emitted.model
    adapter, trace = subject.adapters[0], decided.trace
    inputs = (trace.args, trace.kwargs)
    want = merging.results(pruned, inputs)
    slicer, whole = Slicer(trace, decided.solution, decided.choices), subject.model.state_dict()
    merged = {n: slicer.sliced(n, whole[n]) for n in whole if n in trace.tied}
    base = {n: slicer.sliced(n, tensor) for n, tensor in subject.base.items()}
    made = sliced(adapter, cuts(decided), merged, base)
    own = _base_arrays(pruned, base, merged)
    _put(pruned, own)
    made.origin["weights_hash"] = weights_hash(pruned)
    cut = files.Adapter(adapter.path, 1.0, made.config, made.tensors, {})
    tuned = merging.attach(pruned, [cut])
    error = relative_error(merging.results(tuned, inputs), want)
    pruned = tuned.unload().eval()
    _put(pruned, own)  # unloading leaves whole modules of the adapter in place
    for p in pruned.parameters():
        p.requires_grad_(p.is_floating_point())
    if error > KEPT_ADAPTER.value:
        raise ProofError("the pruned base with the cut adapter is not the pruned merged model",
                         where=str(adapter.path), why=f"results differ by {error:.1e}",
                         fix="merge it: leave out --keep-adapter, or use --repair none (only "
                             "what is added to a weight survives its repair)")
    ask.notes.append(f"{adapter.path}: kept in adapter/, cut as the base was; pruned base + "
                     f"adapter = pruned merged model to {error:.1e}")
    return replace(emitted, model=pruned, kept=made)


def cuts(decided: Decided) -> dict[str, Cut]:
    """Return how each array was cut; arrays cut jointly are left out."""
    found = {}
    for name, dims in decided.solution.weights().items():
        per_axis = indices(dims, decided.choices)
        if per_axis is not None:
            found[name] = Cut(tuple(e.size for e in dims), tuple(
                None if i is None else torch.from_numpy(i) for i in per_axis))
    return {name: found[first] for name, first in decided.trace.tied.items() if first in found}


def _base_arrays(pruned: torch.nn.Module, base: dict[str, torch.Tensor],
                 merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pruned base's arrays; what a repair did to the merged ones is carried over."""
    have = pruned.state_dict()
    return {name: tensor.clone() if torch.equal(have[name], merged[name])
            else tensor + (have[name] - merged[name]) for name, tensor in base.items()}


def _put(pruned: torch.nn.Module, own: dict[str, torch.Tensor]) -> None:
    """Give a module other arrays, tied ones together; what it shared with the trace stays there."""
    made: dict[int, torch.Tensor] = {}
    for name, tensor in own.items():
        path, _, leaf = name.rpartition(".")
        part = pruned.get_submodule(path)
        holder = part._parameters if leaf in part._parameters else part._buffers
        old = holder[leaf]
        assert old is not None
        new = torch.nn.Parameter(tensor, requires_grad=old.requires_grad) \
            if isinstance(old, torch.nn.Parameter) else tensor
        holder[leaf] = made.setdefault(id(old), new)  # type: ignore[assignment]


def check(ask: Request) -> None:
    """Refuse what a kept adapter does not go with, before anything is computed."""
    if len(ask.recipe.adapters) != 1 or files.parse(ask.recipe.adapters[0])[1] != 1.0:
        raise SpaError("only one adapter, without a weight, can be kept", where=ask.name,
                       fix="merge them: leave out --keep-adapter")
    check_sliceable(foreign.read(*files.parse(ask.recipe.adapters[0])))
    if ask.recovery is not None:
        raise SpaError("recovery trains the merged model, so its adapter cannot be kept",
                       where=ask.name, fix="leave out --keep-adapter, or --recover")


