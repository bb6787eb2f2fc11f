"""`spacompiler lift`: an adapter trained on the pruned model, for the dense one (LoRAM's way back).

Zhang et al., "Train small, infer large" (ICLR 2025): train where it is cheap, run where it is good.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import SpaError
from ..store.folder import check_hashes, read_slices, whole
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
        UsageError: `out` exists, or `plan` is no artifact.
        SpaError: the adapter is of another base, or of a type that cannot be lifted.
    """
    target = check_out(Path(out))
    check_artifact(Path(plan))
    check_hashes(Path(plan))
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
