"""Which layer of a module an adapter of another origin means by a name.

Writers put a component before a layer's path (`unet.`, `lora_te_`), write underscores for its
dots, or name what they put beside the layer. A name that fits no layer, or two, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..errors import SpaError

PREFIXES: Mapping[str, str] = {
    "base_model.model.": "", "module.": "", "lycoris_": "", "diffusion_model.": "",
    "lora_unet_": "unet", "unet.": "unet",
    "lora_transformer_": "transformer", "transformer.": "transformer",
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2", "text_encoder_3.": "text_encoder_3"}
"""What a name may begin with, and the component of a pipeline that it says ("" if none)."""

RENAMED: Sequence[tuple[str, str]] = (
    (r"\.processor\.to_out_lora$", ".to_out.0"),
    (r"\.processor\.(to_[qkv])_lora$", r".\1"),
    (r"(^|\.)additional_(\w+)$", r"\1\2"))
"""Modules beside a layer, and the layer."""


def component(name: str) -> str:
    """Return the component of a pipeline that a name says, or "".

    >>> component("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    'text_encoder'
    """
    return next((what for prefix, what in PREFIXES.items() if what and name.startswith(prefix)),
                "")


def spellings(name: str) -> Iterator[str]:
    """Yield a name as it stands and without what may stand before it."""
    for pattern, layer in RENAMED:
        name = re.sub(pattern, layer, name)
    yield name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            yield from spellings(name.removeprefix(prefix))


def matched(names: Iterable[str], paths: Iterable[str], where: str
            ) -> tuple[dict[str, str], list[str]]:
    """Return the path that each name means, and the components that are of another network.

    Raises SpaError if a name fits no path (unless its whole component fits none, and another
    does), or if it fits two.
    """
    flat: dict[str, list[str]] = {}
    known = set(paths)
    for path in known:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    found, lost = {}, list[str]()
    for name in names:
        path = _match(name, known, flat, where)
        if path:
            found[name] = path
        else:
            lost.append(name)
    inside = {component(name) for name in found}
    others = sorted({component(name) for name in lost} - inside - {""})
    left = [name for name in lost if component(name) not in others]
    if left or not found:
        raise SpaError("the adapter does not fit this model", where=where,
                       why=f"{len(left or lost)} of its layers are not there, e.g. "
                           f"{(left or lost)[0]}",
                       fix="give the network that it was trained on (of a pipeline: the component)")
    return found, others


def _match(name: str, known: set[str], flat: Mapping[str, list[str]], where: str) -> str:
    for spelled in spellings(name):
        if spelled in known:
            return spelled
    fits = {path for spelled in spellings(name) for path in flat.get(spelled, ())}
    if len(fits) > 1:
        raise SpaError("the adapter does not say which layer it means", where=where,
                       why=f"{name} may be {' or '.join(sorted(fits))}",
                       fix="rename its arrays with dots")
    return next(iter(fits), "")
