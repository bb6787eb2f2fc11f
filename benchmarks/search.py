"""Allocations beside each other, by what the pruned and repaired network does on unseen data.

    python benchmarks/search.py                                # both models, 50% stays
    python benchmarks/search.py --model resnet --share 65

Prints, for each model, what each allocation makes of it on data that none has seen: the perplexity
of a small language model of bytes, trained on the text that Python carries, or the accuracy of an
image classifier, trained on scikit-learn's digits, and the divergence from the dense network; then
`search` beside the best one-shot allocation, and plans under two limits at once. All take the same
scores, repair and data.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import small_images
import small_text
import torch
from torch import nn

import spacompiler
from spacompiler.evidence.losses import distance, first_floating, perplexity
from spacompiler.passes.search import Search
from spacompiler.torch_backend.weights import results

ONE_SHOT = ("uniform", "global", "dynamic", "standardised", "tried")
Batches = list[tuple[tuple[Any, ...], dict[str, Any]]]


class Trained(NamedTuple):
    """A network, what it is calibrated on, what it is judged by, and the metrics of its limits."""

    module: nn.Module
    batches: Batches
    unseen: Batches
    quality: Callable[[Any], float]
    said: str
    metrics: tuple[str, str]


def text(seed: int) -> Trained:
    """The language model of bytes."""
    module = small_text.trained(seed=seed)
    some = torch.randperm(len(small_text.windows()), generator=torch.Generator().manual_seed(seed))
    held = small_text.windows("held-out")[:64]

    def batches(ids: torch.Tensor) -> Batches:
        return [((), {"input_ids": part, "use_cache": False}) for part in ids.split(8)]

    return Trained(module, batches(small_text.windows()[some[:48]]), batches(held),
                   lambda made: perplexity(made, held), "perplexity", ("body", "macs"))


def images(name: str, seed: int) -> Trained:
    """A classifier of digits."""
    x, _, test_x, test_y = small_images.digits(seed)
    return Trained(small_images.trained(name, seed=seed), [((p,), {}) for p in x[:384].split(64)],
                   [((p,), {}) for p in test_x.split(128)],
                   lambda made: 100 * small_images.accuracy(made, test_x, test_y), "accuracy, %",
                   ("params", "macs"))


def compiled(model: Trained, target: str, allocation: Any) -> tuple[Any, float]:
    """Return a compile's result, and the CPU seconds that it took."""
    start = time.process_time()
    made = spacompiler.compile(
        model.module, model.batches[0][0] or model.batches[0][1], target=target,
        allocation=allocation, importance="curvature", calibration=model.batches, repair="refit",
        align=1, layout="any", floor=0.05, onnx=False, latency=False, prove=False, quiet=True)
    return made, time.process_time() - start


def apart(made: Any, model: Trained) -> float:
    """Return the mean KL divergence of a pruned network's results from the dense one's."""
    lost = [distance(*(first_floating(results(m, args, kwargs)) for m in (made, model.module)))
            for args, kwargs in model.unseen]
    return float(sum(lost)) / len(lost)


def shown(name: str, made: Any, model: Trained, spent: float) -> tuple[float, float]:
    """Print a row; returns quality and divergence."""
    found = model.quality(made.module), apart(made.module, model)
    left = ", ".join(f"{m} {c['pruned'] / c['dense']:.1%}" for m, c in made.plan.costs.items()
                     if m in model.metrics)
    print(f"  {name:24} {model.said} {found[0]:8.3f}  divergence {found[1]:8.5f}  {left}  "
          f"{spent:6.1f} s", flush=True)
    return found


def table(name: str, share: int, seed: int, allocations: Sequence[str], search: Any) -> None:
    """Print each allocation, and search beside the best one of one shot; then two limits."""
    model = text(seed) if name == "text" else images(name, seed)
    print(f"\n{name}, seed {seed}, dense: {model.said} {model.quality(model.module):.3f}")
    one = f"{model.metrics[0]}={share}%"
    print(one)
    found = {how: shown(how, *_pair(model, one, how)) for how in allocations}
    last = shown("search", *_pair(model, one, search))
    for i, what in enumerate((model.said, "divergence")):
        best = (max if what.startswith("acc") else min)(found, key=lambda how: found[how][i])
        print(f"  {what}: search {last[i]:.4g}, best one-shot ({best}) {found[best][i]:.4g}, "
              f"ratio {last[i] / found[best][i]:.3f}")
    both = ",".join(f"{m}={share}%" for m in model.metrics)
    print(both)
    for how in ("global", search):
        try:
            shown(getattr(how, "name", how), *_pair(model, both, how))
        except spacompiler.SpaError as problem:
            print(f"  {getattr(how, 'name', how):24} {problem.why}")


def _pair(model: Trained, target: str, allocation: Any) -> tuple[Any, Trained, float]:
    made, spent = compiled(model, target, allocation)
    return made, model, spent


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="text, or resnet, mobilenet-v2, vit")
    parser.add_argument("--share", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generations", type=int, default=6)
    options = parser.parse_args()
    for name in options.model or ("text", "resnet"):
        table(name, options.share, options.seed, ONE_SHOT, Search(generations=options.generations))


if __name__ == "__main__":
    main()
