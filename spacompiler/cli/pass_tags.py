"""Tags of passes, by the axes of a survey of pruning (Cheng, Zhang and Shi, 2023).

When it prunes, how it decides, what it decides on, and what it is fused with. They follow from what
a pass needs and from its options; a pass of yours says its own as a class attribute `tags`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..evidence.statistics import forward_only

AXES: Mapping[str, Mapping[str, str]] = {
    "when": {"before": "before training", "during": "while the network trains",
             "after": "after training"},
    "how": {"weights": "by weights alone", "activations": "by what layers read",
            "gradients": "by slopes of a loss", "curvature": "by its second order",
            "learned": "by training", "measured": "by what happens to the results",
            "curves": "by sums of scores", "drawn": "at random"},
    "what": {"slices": "which slices go", "widths": "how many", "values": "weights that stay"},
    "fused with": {"adapters": "low-rank adapters", "distillation": "distillation",
                   "search": "a search of architectures"}}
"""Every tag by its axis, and what it means."""
KINDS: Mapping[str, tuple[str, str, str]] = {
    "importance": ("after", "", "slices"), "allocation": ("after", "curves", "widths"),
    "schedule": ("during", "learned", "slices"), "compensation": ("after", "activations", "values"),
    "recovery": ("after", "learned", "values")}
"""When, how and on what passes of a kind decide; a criterion's how follows from its needs."""
OWN: Mapping[str, tuple[str, ...]] = {
    "snip": ("before",), "grasp": ("before",), "random": ("drawn",), "tas": ("widths", "search"),
    "search": ("measured", "search"), "once-for-all": ("widths", "search"),
    "factors": ("after", "values"),
    **dict.fromkeys(("tried", "measured", "adapt-layers", "eco-layers", "cfsp-layers"),
                    ("measured",))}
"""What does not follow: in place of what would."""
SECOND = {"curvature", "hessian", "fisher", "element_squares"}
"""Statistics of the second order."""


def known() -> dict[str, str]:
    """Return every tag, and its axis with what it means."""
    return {tag: f"{axis}: {means}" for axis, own in AXES.items() for tag, means in own.items()}


def tags(kind: str, name: str, found: Callable[[], object],
         fields: Mapping[str, object]) -> tuple[str, ...]:
    """Return the tags of a pass, in the order of the axes; `fields` are its options' defaults."""
    said = getattr(found, "tags", None)
    if said is not None:
        return tuple(said)
    own = OWN.get(name, ())
    needs = _needs(found)
    made = {axis: tag or _how(needs) for axis, tag in zip(AXES, KINDS[kind], strict=False)}
    for axis, among in AXES.items():
        for tag in own:
            if tag in among and axis in made:
                made[axis] = tag
    return (*made.values(), *(t for t in own if t in AXES["fused with"]), *_fused(needs, fields))


def _needs(found: Callable[[], object]) -> set[str]:
    """The statistics that a pass needs with its options' defaults; gradients where it needs more
    than them to be made."""
    try:
        return set(getattr(found(), "needs", ()))
    except TypeError:
        return {"gates"}


def _how(needs: set[str]) -> str:
    """By what a criterion scores, from what it needs."""
    if not needs:
        return "weights"
    if needs & SECOND:
        return "curvature"
    return "activations" if forward_only(needs) else "gradients"


def _fused(needs: set[str], fields: Mapping[str, object]) -> Iterator[str]:
    if "rank" in fields or str(fields.get("beside", "")).startswith("adapters") \
            or "adapter_steps" in needs:
        yield "adapters"
    if {"logits", "blocks"} & fields.keys():
        yield "distillation"
