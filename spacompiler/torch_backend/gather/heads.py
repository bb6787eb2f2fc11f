"""Which loss fits a network's results: read off a table of heads, in place of their shapes.

What kind of head `logits` come from is said by the families in which transformers itself lists a
class (its auto mappings), what other results are by the names of their fields. Of a network that
neither says anything about, the first result is taken for logits of classes, or of next tokens if
no result depends on a later token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from ...errors import SpaError
from ...evidence.calls import Batch, Inputs, as_call
from ...evidence.losses import IGNORED, cross_entropy, first_floating, next_token
from ...evidence.where import HERE, Where
from ...stages.tolerances import CAUSAL
from ..kinds import is_encoder_decoder, is_hf
from ..weights import called
from .families import family

Call = Mapping[str, Any]
# field of the results -> (kind, keyword of its labels); other fields: see `_other`
FIELDS: Mapping[str, tuple[str, str]] = {
    "start_logits": ("classes", "start_positions"), "end_logits": ("classes", "end_positions"),
    "seq_relationship_logits": ("classes", "next_sentence_label"),
    "sop_logits": ("classes", "sentence_order_label"), "mc_logits": ("classes", "mc_labels"),
    "prediction_logits": ("masked", "labels"),
}
# states on the way: no results where there are others
BODY = ("last_hidden_state", "pooler_output", "embeddings")
_WAY = ("hidden_states", "attentions", "past_key_values", "router_logits", "logits_per_")


@dataclass(frozen=True)
class Part:
    """One result: its place among the tensors, its field, its kind, the keyword of its labels."""

    at: int
    field: str
    kind: str
    label: str = "labels"


@dataclass(frozen=True)
class Head:
    """The loss of a network: the sum of those of its parts (flat results, args, kwargs).

    `names` are the arguments of `forward`; `decoder` says that tokens are those of a decoder;
    `blank` is the class of no symbol in frames of sound. `first` is the place of the first result
    in floating point.
    """

    parts: tuple[Part, ...]
    names: tuple[str, ...] = ()
    decoder: bool = False
    blank: int = 0
    first: int = 0

    def __call__(self, outputs: Sequence[Any], args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> torch.Tensor:
        found = [x for x in outputs if isinstance(x, torch.Tensor)]
        call = self._call(args, kwargs)
        for part in self.parts:
            _check_labels(part, call)
        losses = [KINDS[p.kind](self, p, found[p.at], call) for p in self.parts]
        return sum(losses[1:], start=losses[0])

    def facts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
        """Return what the loss of a batch is called, and where its labels come from."""
        call = self._call(args, kwargs)
        said: dict[str, list[str]] = {}
        origins = []
        for part in self.parts:
            labelled = call.get(part.label) is not None
            name, origin = NAMES[part.kind][not labelled]
            if part.kind == "next" and not labelled and self.tokens(call) is None:
                name, origin = NAMES["classes"][1]
            said.setdefault(name, []).append(part.field)
            origins.append(origin)
        return {"name": "; ".join(f"{what} ({', '.join(filter(None, fields)) or 'the results'})"
                                  for what, fields in said.items()),
                "labels": "; ".join(dict.fromkeys(origins))}

    def _call(self, args: tuple[Any, ...], kwargs: Call) -> Call:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def tokens(self, call: Call) -> torch.Tensor | None:
        """Return the tokens that logits are about: (batch, time), masked ones ignored."""
        prefix = "decoder_" if self.decoder else ""
        ids, mask = call.get(f"{prefix}input_ids"), call.get(f"{prefix}attention_mask")
        if ids is None and not is_named(self.names):
            ids = next((v for v in call.values() if _are_tokens(v)), None)
        if ids is not None and isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
            ids = ids.masked_fill(mask == 0, IGNORED)
        return ids


@dataclass
class Fitting:
    """The loss that fits a network, found when it is first asked for.

    `used` are its names, and where labels came from, over the batches that it saw.
    """

    module: nn.Module
    call: tuple[tuple[Any, ...], dict[str, Any]]
    parts_only: bool = False
    used: list[dict[str, str]] = field(default_factory=list)

    @cached_property
    def head(self) -> Head:
        """The head that was found."""
        held = next(self.module.parameters(), None)
        there = HERE if held is None else Where(held.device)  # it may be on a device meanwhile
        return head_of(self.module, *there.of(self.call), parts_only=self.parts_only)

    @property
    def classes(self) -> bool:
        """True if the first floating-point result is compared with classes by cross-entropy."""
        return any(p.at == self.head.first and p.kind != "values" for p in self.head.parts)

    def following(self, args: tuple[Any, ...], kwargs: Call) -> torch.Tensor | None:
        """Return the tokens whose next one the first logits are compared with, if they are."""
        head = self.head
        if head.decoder or not any(p.at == head.first and p.kind == "next" for p in head.parts):
            return None
        call = {**dict(zip(head.names, args, strict=False)), **kwargs}
        given = call.get("labels")
        return head.tokens(call) if given is None else given

    def __call__(self, outputs: Sequence[Any], args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> torch.Tensor:
        self.saw(args, kwargs)
        return self.head(outputs, args, kwargs)

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what it is, and where labels came from, of a batch."""
        facts = self.head.facts(args, kwargs)
        if facts not in self.used:
            self.used.append(facts)

    def teaches(self, batches: Iterable[Batch]) -> bool:
        """True if what it minimises says something of what is right."""
        labelled = all(p.label in kwargs for _, kwargs in batches for p in self.head.parts)
        return labelled or not all(p.kind == "values" for p in self.head.parts)

    def __deepcopy__(self, memo: object) -> Fitting:
        return self

    def facts(self) -> dict[str, str] | None:
        """Return its name and where labels came from, once it has been used."""
        return {key: " / ".join(dict.fromkeys(u[key] for u in self.used))
                for key in ("name", "labels")} if self.used else None


def fitting(module: nn.Module, inputs: Inputs, *, parts_only: bool = False) -> Fitting:
    """Return the loss that fits a network; inputs are those that it is traced with."""
    return Fitting(module, as_call(inputs), parts_only)


def is_named(names: Sequence[str]) -> bool:
    """True for a network whose arguments bear the names of transformers."""
    return "input_ids" in names or "decoder_input_ids" in names


def _are_tokens(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.dtype == torch.int64


# --- the losses -------------------------------------------------------------------------------


def _next(head: Head, part: Part, x: torch.Tensor, call: Call) -> torch.Tensor:
    """Each token but the first, from those before it; a decoder's labels stand one earlier."""
    given, tokens = call.get(part.label), head.tokens(call)
    if given is not None and head.decoder:
        return cross_entropy(x, _fitting(given, x.shape[:-1], x))
    known = tokens if given is None else _fitting(given, x.shape[:-1], x)
    if known is None or known.shape != x.shape[:-1] or int(known.max()) >= x.shape[-1]:
        return _classes(head, part, x, {})
    return next_token(x, known)


def _classes(head: Head, part: Part, x: torch.Tensor, call: Call) -> torch.Tensor:
    """The labelled class, or the likeliest one; of values with labels their squared error."""
    y = call.get(part.label)
    if y is not None and (x.shape[-1] == 1 or y.is_floating_point()):
        return _values(head, part, x, call)
    if x.ndim == 4 and part.field in ("", "logits"):  # a map of classes (b, c, h, w)
        if y is not None and y.shape[-2:] != x.shape[-2:]:
            x = functional.interpolate(x, y.shape[-2:], mode="bilinear", align_corners=False)
        x = x.movedim(1, -1)
    if x.shape[-1] == 1:
        return _values(head, part, x, call)
    if y is None:
        return cross_entropy(x, x.detach().argmax(-1))
    return cross_entropy(x, _fitting(y.argmax(-1) if y.shape == x.shape else y, x.shape[:-1], x))


def _frames(head: Head, part: Part, x: torch.Tensor, call: Call) -> torch.Tensor:
    """Symbols along frames, aligned by CTC; without labels the likeliest symbol of each frame."""
    y = call.get(part.label)
    if y is None:
        return _classes(head, part, x, call)
    lengths = torch.full((len(x),), x.shape[1])
    return functional.ctc_loss(
        x.float().log_softmax(-1).transpose(0, 1), y.clamp(min=0), lengths, (y >= 0).sum(-1),
        blank=head.blank, zero_infinity=True)


def _values(head: Head, part: Part, x: torch.Tensor, call: Call) -> torch.Tensor:
    """The squared error; without labels the mean of x · e, e normal and fixed.

    Its gradient is a draw from those of the log-likelihood of values around x (Fisher).
    """
    y = call.get(part.label)
    if y is None:
        generator = torch.Generator().manual_seed(0)
        return (x * torch.randn(x.shape[1:], generator=generator).to(x)).mean()
    if y.is_floating_point() and y.shape == x.shape and part.kind == "classes" and x.shape[-1] > 1:
        return functional.binary_cross_entropy_with_logits(x, y.to(x))
    if x.shape[-1:] == (1,) and y.shape == x.shape[:-1]:
        x = x.squeeze(-1)
    return functional.mse_loss(x, _fitting(y.to(x), x.shape, None))


KINDS: Mapping[str, Callable[[Head, Part, torch.Tensor, Call], torch.Tensor]] = {
    "next": _next, "masked": _classes, "classes": _classes, "frames": _frames, "values": _values}
_GIVEN, OWN = "given with the batches", "the network's own prediction"
# kind -> (name, where labels come from), with labels in the batches and without
NAMES: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "next": (("next-token cross-entropy", _GIVEN),
             ("next-token cross-entropy", "the tokens of the input")),
    "masked": (("masked-token cross-entropy", _GIVEN), ("token cross-entropy", OWN)),
    "classes": (("class cross-entropy", _GIVEN), ("class cross-entropy", OWN)),
    "frames": (("CTC", _GIVEN), ("frame cross-entropy", OWN)),
    "values": (("squared error", _GIVEN), ("projection on a fixed random direction", "none")),
}


def _check_labels(part: Part, call: Call) -> None:
    y = call.get(part.label)
    if y is not None and not isinstance(y, torch.Tensor):
        raise SpaError(f"{part.label} of a batch are no tensor", why=f"a {type(y).__name__}",
                       fix="leave them out, or give a loss of your own")


def _fitting(y: torch.Tensor, shape: Sequence[int], x: torch.Tensor | None) -> torch.Tensor:
    """Return labels that fit; raises SpaError for other shapes, or classes that there are not."""
    why = ""
    if tuple(y.shape) != tuple(shape):
        why = f"they have shape {tuple(y.shape)}, where {tuple(shape)} is needed"
    elif x is not None and y.numel() and int(y.max()) >= x.shape[-1]:
        why = f"class {int(y.max())} of {x.shape[-1]}"
    if why:
        raise SpaError("the labels of a batch do not fit the network's results", why=why,
                       fix="give the labels of this head, none, or a loss of your own")
    return y


# --- which one --------------------------------------------------------------------------------


def head_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *,
            parts_only: bool = False) -> Head:
    """Return the loss that fits a network's results; `parts_only`: it is but parts of one."""
    results = called(module, args, kwargs)
    fields = list(_fields(results))
    first_at = _first(_tensors(results))
    names = () if parts_only else tuple(inspect.signature(module.forward).parameters)
    made = partial(Head, names=names, decoder=is_encoder_decoder(module),
                   blank=getattr(getattr(module, "config", None), "pad_token_id", None) or 0,
                   first=first_at)
    if parts_only:
        return made(tuple(Part(at, "", "values") for at, _ in fields))
    kind, named = family(module), [(at, f) for at, f in fields if f]
    found = tuple(p for at, f in named if (p := _part(at, f, kind)))
    found = tuple(p for p in found if p.field not in BODY) or found
    if not found and is_hf(module):
        return made(tuple(Part(at, f, "values") for at, f in fields))
    if found and all(p.kind for p in found):
        return made(found)
    at = next((p.at for p in found if not p.kind), first_at)
    unsure = made((Part(at, "logits" if found else "", "next"),))
    if _looks_back(module, args, kwargs, unsure):
        return unsure
    rest = tuple(p for p in found if p.kind)
    one = _tensors(results)[at].shape[-1:] in ((), (1,))  # one class is no choice
    return made((Part(at, unsure.parts[0].field, "values" if one else "classes"), *rest))


def _part(at: int, field: str, kind: str) -> Part | None:
    if any(word in field for word in _WAY) or field.startswith(("encoder_", "loss")):
        return None
    if field == "logits":
        return Part(at, field, kind)
    if field in FIELDS:
        return Part(at, field, *FIELDS[field])
    other = "classes" if field.endswith("logits") and "mask" not in field else "values"
    return Part(at, field, other)


def _first(results: Sequence[torch.Tensor]) -> int:
    """The place of the first result in floating point. Raises SpaError if there is none."""
    found = first_floating(results)
    return next(i for i, x in enumerate(results) if x is found)


def _tensors(values: object) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def _fields(found: object) -> Iterator[tuple[int, str]]:
    """Yield place and field of each floating-point result; what lies deeper bears no name."""
    at = 0
    for name, value in found.items() if isinstance(found, Mapping) else (("", found),):
        for leaf in _tensors(value):
            if leaf.is_floating_point():
                yield at, str(name) if leaf is value else ""
            at += 1


def _looks_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                head: Head) -> bool:
    """True if results are logits of tokens of which none depends on a later token."""
    ids = next((v for v in (*args, *kwargs.values()) if _are_tokens(v)), None)
    if ids is None or ids.shape[-1] < 2:
        return False
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids[:, -2], ids[:, 0])
    swapped = pytree.tree_map(lambda v: other if v is ids else v, (args, kwargs))
    one, two = (_tensors(called(module, *call))[head.parts[0].at]
                for call in ((args, kwargs), swapped))
    fits = one.ndim == 3 and one.shape[:2] == ids.shape and int(ids.max()) < one.shape[-1]
    return fits and torch.allclose(one[:, :-1], two[:, :-1], atol=CAUSAL.value) \
        and not torch.equal(one[:, -1], two[:, -1])
