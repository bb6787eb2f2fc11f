"""The step that writes linear layers as products of two smaller ones, before widths are cut.

What a layer gives, y = W x, is projected on the r directions in which it varies most on the
calibration data: W becomes B A with A = Bᵀ W, B the first r left singular vectors of W C^(1/2),
C = E[x xᵀ] (LoRD, 2023: the eigenvectors of the covariance of y). That is the product of rank r
with the least squared error of the layer's results, the sum of the squares of what is left out.
Ranks share one budget: each goes where it takes away the largest share of a layer's error for its
parameters. A layer that would not become smaller, o i <= r (o + i), stays whole.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..errors import ControlError, ProofError, SpaError, UsageError
from ..evidence.calls import Batch, as_call
from ..evidence.labels import inputs_only
from ..request.low_rank import parse_low_rank
from ..stages.proof import needed, relative_error
from ..stages.records import Factored, Request, Subject
from ..stages.tolerances import SAME_RESULTS
from ..torch_backend.emit.factored import Factors, factored
from ..torch_backend.untouched import untouched
from ..torch_backend.weights import results

RIDGE = 1e-6
"""Of the mean variance, added to each input: directions that the data does not show count little.
"""


def factorise(ask: Request, subject: Subject) -> tuple[Request, Subject]:
    """Put the network with factorised layers in the dense one's place, checked against it.

    Raises UsageError for patterns that match no layer, SpaError where none would become smaller,
    ProofError where the network computes something else than the products say.
    """
    from ..plan.plan import costs, pruned_bytes
    from ..torch_backend.backend import TORCH

    if subject.backend is not TORCH:
        raise UsageError("layers of a torch module alone become products", where=ask.name,
                         fix="give the module itself, or leave low_rank out")
    whole = dict(subject.whole)
    if not whole:
        _, solution = subject.backend.trace(subject.model, subject.inputs, True)
        whole = {metric: pair["dense"] for metric, pair in costs(solution, {}).items()}
        whole["bytes"] = pruned_bytes(solution, {})["dense"]
    spectra = _spectra(subject.model, ask, _chosen(subject.model, ask))
    factors = _factors(ask, spectra)
    if not factors:
        raise SpaError("no layer becomes smaller as a product of two", where=ask.name,
                       why="the ranks that the shares allow take as many parameters",
                       fix="let less stay: --low-rank '*=40%'")
    made, found = _proved(subject, factors)
    ask.notes.append(
        f"{len(factors)} of {len(spectra)} layers are products of two now (ranks "
        f"{min(found.ranks.values())} to {max(found.ranks.values())}): they compute what the "
        f"products say to {found.error:.1e}, a wrong direction gives {found.control:.1e}")
    return ask, replace(subject, dense=subject.reference, model=made, factored=found, whole=whole,
                        arrays=frozenset(made.state_dict()))


def _factors(ask: Request, spectra: Mapping[str, Spectrum]) -> dict[str, Factors]:
    """The products of all layers, each by the first pattern that names it."""
    factors: dict[str, Factors] = {}
    for pattern, share in map(parse_low_rank, ask.recipe.low_rank):
        own = {p: s for p, s in spectra.items()
               if p not in factors and fnmatch.fnmatchcase(p, pattern)}
        bought = ranks(own, share)
        if not bought:
            ask.notes.append(f"low rank {pattern!r} changes nothing: no layer of it becomes "
                             f"smaller as a product of two at {share:.0%}")
        for path, rank in bought.items():
            b = own[path].directions[:, :rank]
            factors[path] = b.T @ own[path].weight, b
    return factors


def _chosen(module: nn.Module, ask: Request) -> list[str]:
    """Paths of linear layers that patterns name; what is tied or reached twice stays whole."""
    count: dict[int, int] = {}
    for _, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, nn.Linear | nn.Embedding):
            count[id(part.weight)] = count.get(id(part.weight), 0) + 1
    found: list[str] = []
    for text in ask.recipe.low_rank:
        pattern, _ = parse_low_rank(text)
        own = [path for path, part in module.named_modules() if path and type(part) is nn.Linear
               and fnmatch.fnmatchcase(path, pattern) and count[id(part.weight)] == 1]
        if not own:
            names = [p for p, part in module.named_modules() if type(part) is nn.Linear][:4]
            raise UsageError(f"pattern {pattern!r} matches no linear layer of its own weights",
                             where=ask.name, fix=f"layers are named like {', '.join(names)}")
        if set(own) <= set(found):
            raise UsageError(f"low rank {text!r} has nothing to act on", where=ask.name,
                             why="patterns before it name all of its layers, and the first holds",
                             fix="put the narrower pattern first")
        found.extend(own)
    return list(dict.fromkeys(found))


@dataclass
class Spectrum:
    """One layer: its weight, the directions that its results vary in, most first, and by how much.

    `weight` (out, in), `directions` (out, min(out, in)) and `energy` of each, in float64.
    """

    weight: torch.Tensor
    directions: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    energy: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def size(self) -> int:
        """Parameters of the layer as it is."""
        return self.weight.numel()

    @property
    def price(self) -> int:
        """Parameters of each rank."""
        return sum(self.weight.shape)


@torch.no_grad()
def _spectra(module: nn.Module, ask: Request, paths: Sequence[str]) -> dict[str, Spectrum]:
    """Directions of all layers, by the covariance of what they read (without data: as if white)."""
    layers: dict[str, nn.Linear] = {p: module.get_submodule(p) for p in paths}  # type: ignore
    seen: dict[str, torch.Tensor] = {}
    if ask.calibration.real:
        with untouched(module), _watching(layers, seen):
            for args, kwargs in ask.calibration.for_repair:
                module(*args, **inputs_only(module, kwargs))
    found = {}
    for path, layer in layers.items():
        weight = layer.weight.detach().double()
        spread = weight
        if path in seen:
            values, vectors = torch.linalg.eigh(seen.pop(path).double())
            values = values.clamp(min=0) + RIDGE * values.clamp(min=0).mean()
            spread = weight @ (vectors * values.sqrt())
        u, s, _ = torch.linalg.svd(spread, full_matrices=False)
        found[path] = Spectrum(weight, u, s.square())
    return found


@contextmanager
def _watching(layers: Mapping[str, nn.Linear], seen: dict[str, torch.Tensor]) -> Iterator[None]:
    """Sum x xᵀ of what layers read while the network runs, in evaluation mode."""
    def look(path: str) -> object:
        def hook(part: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            seen[path] = seen[path] + x.T @ x if path in seen else x.T @ x
        return hook

    handles = [part.register_forward_pre_hook(look(path))  # type: ignore[arg-type]
               for path, part in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ranks(spectra: Mapping[str, Spectrum], share: float) -> dict[str, int]:
    """Return the rank of each layer that becomes a product, under a share of their parameters.

    Ranks are bought one after the other, the largest share of a layer's energy for its price
    first; energies fall within a layer, so that this is the best sum. Layers that come out no
    smaller than they are stay whole, and what they take is taken off the rest.
    """
    budget, left = share * sum(s.size for s in spectra.values()), dict(spectra)
    while left:
        bought = _bought(left, budget)
        whole = [p for p, r in bought.items() if r * left[p].price >= left[p].size]
        if not whole:
            return bought
        for path in whole:
            budget -= left.pop(path).size
    return {}


def _bought(spectra: Mapping[str, Spectrum], budget: float) -> dict[str, int]:
    offers = sorted(((float(e / s.energy.sum().clamp(min=1e-300)) / s.price, path)
                     for path, s in spectra.items() for e in s.energy[1:]), reverse=True)
    found = dict.fromkeys(spectra, 1)
    spent = sum(s.price for s in spectra.values())
    if spent > budget:
        raise SpaError("too little stays of layers for one rank each", where=next(iter(spectra)),
                       why=f"{len(spectra)} layers of one rank take {spent:,} parameters, "
                           f"{int(budget):,} may stay", fix="let more stay: --low-rank '*=20%'")
    for _, path in offers:
        if spent + spectra[path].price <= budget:
            found[path] += 1
            spent += spectra[path].price
    return found


# --- the check -----------------------------------------------------------------------------------


def _proved(subject: Subject, factors: Mapping[str, Factors]) -> tuple[nn.Module, Factored]:
    """The factorised network, held against the dense one with each weight at its product.

    The control has two directions of one layer exchanged on one side.
    """
    module, (args, kwargs) = subject.model, as_call(subject.inputs)
    sizes = {path: a.shape[0] for path, (a, _) in factors.items()}
    made = factored(module, sizes, factors)
    run: Batch = (args, inputs_only(module, kwargs))
    try:
        got = results(made, *run)
    except Exception as problem:  # any code may run here
        raise SpaError("the network with products in place of layers does not run",
                       where=type(module).__name__,
                       why=f"{type(problem).__name__}: {problem}".splitlines()[0],
                       fix="its code may read a layer's weight; name other layers") from problem
    error = relative_error(got, _as_products(module, factors, run))
    if not error <= SAME_RESULTS.value:
        raise ProofError("the factorised network is not the one that its products say",
                         why=f"results differ by {error:.1e}", fix="please report it")
    path, control = "", 0.0
    for path in list(factors)[-8:]:
        a, b = factors[path]
        wrong = {**factors, path: (a, b.roll(1, 1) if b.shape[1] > 1 else -b)}
        control = max(control, relative_error(got, _as_products(module, wrong, run)))
        if control >= needed(SAME_RESULTS.value):
            break
    else:
        raise ControlError("a wrong direction is not seen", where=path,
                           why=f"it changes results by {control:.1e} only",
                           fix="the example inputs may not reach these layers; pass other ones")
    return made, Factored(sizes, error, control, path)


def _as_products(module: nn.Module, factors: Mapping[str, Factors], run: Batch) -> list[object]:
    """Results of the dense network with the weight of each layer at B A."""
    layers = {path: module.get_submodule(path) for path in factors}
    stored = {path: layer.weight for path, layer in layers.items()}
    try:
        for path, (a, b) in factors.items():
            old: torch.Tensor = stored[path]  # type: ignore[assignment]
            layers[path].weight = nn.Parameter((b @ a).to(old), requires_grad=False)
        return list(results(module, *run))
    finally:
        for path, weight in stored.items():
            layers[path].weight = weight
