"""`spacompiler lift`: an adapter trained on the pruned model, for the dense one (LoRAM's way back).

Zhang et al., "Train small, infer large" (ICLR 2025): train where it is cheap, run where it is good.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import SpaError, UsageError
from ..store.folder import check_hashes, read_json, read_slices, whole
from ..store.place import check_artifact, check_out
from ..system.process import alone
from . import foreign
from .cutting import Cut, lifted


@alone()
def lift(adapter: str | Path, plan: str | Path, out: str | Path) -> Path:
    """Scatter an adapter of a pruned model to the dense model, and write it in peft's format.

    Args:
        adapter: directory that peft's save_pretrained wrote, trained on the artifact's model.
        plan: the artifact's directory, which holds what was removed.
        out: directory to write; it must not exist.

    Raises:
        UsageError: `out` exists, or the artifact's layers are not those of the dense model.
        SpaError: the adapter is of another base, or of a type that cannot be lifted.
    """
    target = check_out(Path(out))
    check_artifact(Path(plan))
    check_hashes(Path(plan))
    check_layers(Path(plan))
    cuts = recorded(Path(plan))
    found = foreign.read(Path(adapter))
    if found.foreign:
        raise SpaError("this adapter cannot be lifted", where=str(adapter),
                       why="it is not in peft's format, and says its layers in another way",
                       fix="train LoRA of peft on the pruned model")
    made = lifted(found, cuts)
    made.origin["weights_hash"] = read_slices(Path(plan)).get("weights_hash", "")
    with whole(target) as folder:
        made.save(folder)
    return target


OTHER = {
    "factored": "some of its layers are products of two, which the dense model does not have",
    "dropped": "blocks were left out of it, and those that stay are numbered anew",
}
"""Entries of structure.json that say that layers are others than the dense model's, and why."""


def check_layers(folder: Path) -> None:
    """Raise UsageError where paths of layers in an artifact are not paths in the dense model."""
    structure = read_json(folder / "structure.json")
    why = next((text for name, text in OTHER.items() if structure.get(name)), "")
    if structure["layout"] == "onnx":
        why = "it is an ONNX file, which holds no layers to train an adapter on"
    if why:
        raise UsageError("adapters of this model cannot be lifted", where=str(folder), why=why,
                         fix="compile the dense torch module again, by widths alone, and train "
                             "the adapter on that")


def recorded(folder: Path) -> dict[str, Cut]:
    """Read how each array of an artifact was cut."""
    data = read_slices(folder)
    lists = {key: torch.tensor(index) for key, index in data["indices"].items()}
    if "shapes" not in data:
        raise SpaError("slices.json does not say the dense shapes", where=str(folder),
                       fix="compile the model again with this version")
    return {name: Cut(tuple(data["shapes"][name]),
                      tuple(None if i is None else lists[i] for i in per_axis))
            for name, per_axis in data["arrays"].items() if per_axis != "joint"}
