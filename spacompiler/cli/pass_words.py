"""What is said of passes beside their own docstrings: when to take one, and what it needs.

A pass of yours says it itself: a class attribute `use`, else the first sentence of its docstring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any, NamedTuple

from .pass_tags import tags

USE: Mapping[str, str] = {
    "taylor": "the default: good without repair, any torch model with data",
    "taylor-vector": "to compare with LLM-Pruner's vectors",
    "taylor-element": "to compare with LLM-Pruner's elements",
    "wanda": "there are no gradients: ONNX files, or little memory",
    "fluctuation": "with repair by biases: FLAP",
    "cfsp": "to compare with CFSP",
    "obs": "with refit: the exact error of each layer",
    "curvature": "best quality of language models, with refit and enough text",
    "gblm": "to compare with GBLM-Pruner",
    "relevance": "CNNs with a handful of images",
    "magnitude": "there is no data at all",
    "batch-norm-scale": "it was trained with a penalty on BatchNorm's scales",
    "geometric-median": "CNNs without data",
    "snip": "before training", "grasp": "before training",
    "random": "the control that all must beat",
    "lora-gradient": "only adapters have gradients: LoRAPrune's criterion",
    "lora-prune": "what goes is to be decided while LoRA trains",
    "uniform": "every layer is to keep the same share",
    "tried": "the default: the best of some, tried on data",
    "global": "scores are comparable across layers: one ranking",
    "dynamic": "to compare with dynamic ratios", "measured": "best quality, takes longest",
    "standardised": "scores differ in scale from layer to layer",
    "cfsp-layers": "layers differ much in what they change (CFSP)",
    "adapt-layers": "to compare with Adapt-Pruner's layers",
    "eco-layers": "to compare with ECoFLaP's layers, on files too",
    "threshold": "scores are in one unit as they are: Global MP, FLAP AL-AM",
    "distortion": "what each group does to the results is to be measured; on files too",
    "erk": "to compare with random pruning: by the shapes of layers",
    "pq-index": "few slices hold most of the scores in some layers",
    "search": "several limits at once, or quality beyond one-shot curves",
    "candidates": "networks with batch norms, a few tries on data (FedTiny)",
    "refit": "the default with data: least squares on what layers read",
    "bias": "weights must stay as they are: biases take up the mean",
    "batch-norm": "CNNs: statistics are taken anew",
    "lora": "train what is left with little memory", "norms": "train gains and biases alone",
    "full": "train all of what is left",
    "factors": "after a repair: what stays is scaled, no weight is trained",
    "gates": "language models, with refit: what goes is learned",
    "grasp-gates": "the network stays frozen: gates alone, then factors",
    "ddp": "the network stays frozen: gates without draws",
    "compresso": "gates while adapters on q and v train",
    "lapp": "each layer is to find its own share while all trains",
    "bip": "masks and weights answer to each other",
    "polarise": "gates that see inputs, pushed to one network",
    "tas": "widths are searched while all trains",
    "merge-experts": "mixtures: experts that go leave something behind",
    "once-for-all": "weights are to serve every size that a search may try",
    "pat": "the hidden dimension is to go, operators train beside",
    "progressive": "a little goes, a little is trained, and so on",
    "lisa": "all weights, with memory for a few blocks",
    "owlore": "as lisa, blocks with outliers first",
    "allora": "short training without dropout or alpha",
    "ggpo": "long training on little data",
    "gs-lora": "few layers are to change",
    "sora": "ranks that help little are to vanish",
    "dylora": "the rank is chosen after training",
    "increlora": "ranks are to grow where they help",
    "triadapt": "cores of adapters are to grow where they are used",
    "cfsp-lora": "blocks that change more are to get more ranks",
    "flexora": "only layers that help left-out data are to be adapted",
    "diffora": "only a share of the layers is to be adapted",
    "lora-sb": "the fewest parameters, started along the gradient",
    "nlora": "adapters started from the weights"}
"""When to take a built-in pass."""
GRADIENTS = ("gates", "token_gates", "fisher", "vectors", "elements", "hessian", "weight_squares",
             "weight_gradients", "curvature", "relevance", "relevance_positive", "adapter_steps")
TRAINS = ("schedule", "recovery")


class Words(NamedTuple):
    """What a page says of a pass."""

    kind: str
    name: str
    use: str
    needs: str
    onnx: str
    options: Sequence[str]
    text: str
    tags: tuple[str, ...] = ()


def words(kind: str, entry: EntryPoint) -> Words:
    """Read off a pass what it needs and whether an ONNX file will do."""
    import dataclasses

    try:
        found: Any = entry.load()
    except (ImportError, AttributeError) as problem:
        return Words(kind, entry.name, "", "", "", (), f"cannot be loaded: {problem}")
    fields = {f.name: f.default for f in dataclasses.fields(found) if f.init} \
        if dataclasses.is_dataclass(found) else {}
    options = [f"{option}={default!r}" for option, default in fields.items()]
    needs, onnx = _needs(kind, found)
    text = (found.__doc__ or "").strip()
    use = getattr(found, "use", "") or USE.get(entry.name) or " ".join(
        text.split("\n\n")[0].split()).split(". ")[0]
    return Words(kind, entry.name, use, needs, onnx, options, text,
                 tags(kind, entry.name, found, fields))


def _needs(kind: str, found: Any) -> tuple[str, str]:
    if kind in TRAINS:
        return "training on data", "no"
    if kind != "importance":
        return {"compensation": "calibration data"}.get(kind, ""), "yes"
    try:
        named = tuple(found().needs)
    except TypeError:
        return "", ""
    if not named:
        return "weights alone", "yes"
    backward = any(need in GRADIENTS for need in named)
    return f"calibration data, {'gradients' if backward else 'forward only'} " \
           f"({', '.join(named)})", "no" if backward else "yes"
