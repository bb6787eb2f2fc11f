"""Options that act through another one: alone they would do nothing, which is an error.

>>> check_needs({"recovery": "", "recover_samples": 8}, {"recover_samples": 512})
Traceback (most recent call last):
...
spacompiler.errors.UsageError: recover_samples has nothing to act on
  why: nothing is trained without recovery
  what to do: give --recover lora, or leave recover_samples out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UsageError


class Need(NamedTuple):
    """The option that others act through, why they do nothing without it, and how to give it."""

    option: str
    why: str
    give: str


_TRAINING = Need("recovery", "nothing is trained without recovery", "--recover lora")
_FILE = Need("onnx", "it is about model.onnx, which --no-onnx leaves out and parts (--module) "
             "have none of", "--onnx, without --module")
NEEDS: Mapping[str, Need] = {
    "recover_data": _TRAINING,
    "recover_samples": _TRAINING,
    "recover_batch": _TRAINING,
    "checkpoint": _TRAINING,
    "decoder": _FILE,
    "int8": _FILE,
    "opset": _FILE,
    "int8_bits": Need("int8", "no int8 weights are written without int8", "--int8"),
    "keep_adapter": Need("adapters", "there is no adapter to keep", "--adapter DIR"),
}


def check_needs(values: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Raise UsageError for an option, of other value than its default, that has no effect.

    `values` hold the options that are needed too; what they lack is not looked at.
    """
    if values.get("modules"):
        values = {**values, "onnx": False}
    for name, need in NEEDS.items():
        if name not in values or need.option not in values:
            continue
        value, default = values[name], defaults.get(name)
        if value is not default and value != default and not values[need.option]:
            raise UsageError(f"{name} has nothing to act on", why=need.why,
                             fix=f"give {need.give}, or leave {name} out")


def unexported(names: Mapping[str, object]) -> dict[str, Any]:
    """Return what replaces options so that no model.onnx is asked for, nor what acts through it.

    `names` are options with their defaults.
    """
    about = [name for name, need in NEEDS.items() if need.option in ("onnx", "int8")]
    return {"onnx": False, "latency": False, **{name: names[name] for name in about}}


EXPORTED: Mapping[str, str] = {
    "opset": "the pruned file keeps the operators' versions of the one that was given",
    "device": "ONNX Runtime computes it on the processor",
    "dtype": "it is computed in the types that it says",
    "shard_size": "the weights of an ONNX file lie in it, or in one file beside it",
}
"""Options about a torch module and the files it is exported to, and why an ONNX file has no use
for them."""


def check_exported(values: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Raise UsageError for an option, of other value than its default, that no ONNX file heeds."""
    for name, why in EXPORTED.items():
        if values[name] != defaults[name]:
            raise UsageError(f"{name} has nothing to act on in an ONNX file", why=why,
                             fix=f"leave {name} out")
