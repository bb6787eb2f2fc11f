"""Judge pruned models by their values alone: no plan, no axis algebra, no index list.

    python benchmarks/judge.py [--models resnet,vit] [--seeds 3]

Every array of a dense model is drawn anew, so that values tell places. The pruned model's arrays
are then searched in the dense ones: each must be an exact sub-selection. A copy of the dense model
with everything else set to zero must compute what the pruned model does, on inputs and batch sizes
that the compile never saw.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import spacompiler
from spacompiler import models_zoo

NEAR = 1e-4
SEEN = 100 * NEAR
ROLES = (("channel", "head"), ("channel",), ("head",), ("head dim",))
CRITERIA = ("magnitude", "taylor", "wanda", "geometric-median")
DTYPES = (torch.float32, torch.bfloat16)
BIG = ("smollm2-135m", "gemma3-270m", "efficientnet-lite0")


class Wrong(Exception):
    """What the judge holds against a pruned model."""


# --- the dense model ----------------------------------------------------------------------------


def drawn(module: nn.Module, seed: int) -> nn.Module:
    """Give every floating array of a module values that tell its places apart; returns it."""
    draws = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for array in itertools.chain(module.parameters(), module.buffers()):
        if not array.is_floating_point() or array.data_ptr() in seen or not array.numel():
            continue
        seen.add(array.data_ptr())
        fan = array[0].numel() if array.dim() > 1 else 0
        values = torch.randn(array.shape, generator=draws) / fan**0.5 if fan else \
            _apart(array.shape, draws)
        array.data.copy_(values)
    return module


def _apart(shape: torch.Size, draws: torch.Generator) -> torch.Tensor:
    """Positive numbers of which no two are equal, in bfloat16 either where there are up to 384."""
    count = shape.numel()
    grid = torch.cat([2.0**e * (1 + torch.arange(128) / 128) for e in (-1, 0, -2)])
    if count > len(grid):
        return torch.rand(shape, generator=draws) + 0.5
    return grid[torch.randperm(max(count, 256), generator=draws)[:count]].reshape(shape)


# --- the search ---------------------------------------------------------------------------------


def find(dense: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Return which entries of a dense array a pruned one consists of.

    Raises Wrong if it is no sub-selection: along whole dimensions, or along those inside of each
    slice of the first dimension.
    """
    if dense.ndim != small.ndim or any(s > d for s, d in zip(small.shape, dense.shape,
                                                              strict=True)):
        raise Wrong(f"shape {small.shape} is not part of {dense.shape}")
    stays = np.zeros(dense.shape, bool)
    if not dense.ndim:
        if dense != small:
            raise Wrong("a number changed")
        return np.ones((), bool)
    places = _places(dense, small)
    if _equal(dense, small, places):
        stays[np.ix_(*places)] = True
        return stays
    for row, whole in zip(small, places[0], strict=True):
        stays[whole] |= find(dense[whole], row)
    return stays


def _places(dense: np.ndarray, small: np.ndarray) -> list[np.ndarray]:
    """For each dimension, the dense slices that share most values with the pruned slices."""
    order = np.argsort(dense, axis=None, kind="stable")
    values = dense.ravel()[order]
    first = np.searchsorted(values, small.ravel(), "left")
    count = np.searchsorted(values, small.ravel(), "right") - first
    mine = np.repeat(np.arange(small.size), count)
    theirs = order[np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())]
    weight = 1 / count[mine]
    at, of = np.unravel_index(mine, small.shape), np.unravel_index(theirs, dense.shape)
    found = []
    for dim, (have, wanted) in enumerate(zip(dense.shape, small.shape, strict=True)):
        votes = np.zeros((wanted, have))
        np.add.at(votes, (at[dim], of[dim]), weight)
        found.append(np.arange(have) if have == wanted else votes.argmax(1))
    return found


def _equal(dense: np.ndarray, small: np.ndarray, places: list[np.ndarray]) -> bool:
    once = all(len(set(p.tolist())) == len(p) for p in places)
    return once and bool((dense[np.ix_(*places)] == small).all())


# --- the verdict --------------------------------------------------------------------------------


def judge(dense: nn.Module, small: nn.Module, inputs: Any, seed: int = 0) -> tuple[float, float]:
    """Return (share of values that stay, worst relative difference).

    Raises Wrong where the pruned model is not the dense one without slices.
    """
    zeroed, kept, total = copy.deepcopy(dense), 0, 0
    arrays, have = zeroed.state_dict(keep_vars=True), _named(small)
    if missing := sorted(arrays.keys() - have.keys()):
        raise Wrong(f"{missing[0]} is missing")
    masks = {}
    for name, array in arrays.items():
        try:
            masks[name] = find(_numbers(array), _numbers(have[name]))
        except Wrong as problem:
            raise Wrong(f"{name}: {problem}") from problem
        kept, total = kept + int(masks[name].sum()), total + array.numel()
    for name, mask in masks.items():
        arrays[name].data[torch.from_numpy(np.asarray(~mask))] = 0
    whole, zeroed, made = (copy.deepcopy(m).float() for m in (dense, zeroed, small))
    given = list(calls(inputs, seed))
    worst = max(_gap(zeroed, made, call) for call in given)
    if not worst <= NEAR:
        raise Wrong(f"results differ by {worst:.1e}")
    if kept < total and min(_gap(whole, made, call) for call in given) < SEEN:
        raise Wrong("what is gone has no effect on results, so that nothing was judged")
    return kept / total, worst


def _named(small: nn.Module) -> dict[str, torch.Tensor]:
    """Arrays by their names in the dense model: a re-written program holds them in `body`."""
    return {name.removeprefix("body."): array for name, array in
            small.state_dict(keep_vars=True).items()}


def _numbers(array: torch.Tensor) -> np.ndarray:
    array = array.detach()
    return (array.float() if array.is_floating_point() else array).numpy()


def calls(inputs: Any, seed: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls of other values, with other batch sizes."""
    draws = torch.Generator().manual_seed(seed)
    for rows in (2, 3, 5):
        def fresh(x: Any, rows: int = rows) -> Any:
            if not isinstance(x, torch.Tensor) or not x.ndim:
                return x
            shape = (rows, *x.shape[1:])
            if x.is_floating_point():
                return torch.randn(shape, generator=draws)
            high = int(x.max()) + 1
            return torch.randint(0, high, shape, generator=draws).to(x.dtype) if high > 2 \
                else x[:1].expand(shape).clone()
        made = pytree.tree_map(fresh, inputs)
        yield ((), made) if isinstance(made, Mapping) else (tuple(made), {})


def _gap(one: nn.Module, other: nn.Module, call: Any) -> float:
    """The largest difference of floating results, relative to their largest values."""
    with torch.no_grad():
        want, got = ([t for t in pytree.tree_leaves(m.eval()(*call[0], **call[1]))
                      if isinstance(t, torch.Tensor) and t.is_floating_point()]
                     for m in (one, other))
    if not want or [t.shape for t in want] != [t.shape for t in got]:
        return float("inf")
    gaps = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
            for a, b in zip(got, want, strict=True) if b.numel()]
    return float("inf") if any(g != g for g in gaps) else max(gaps)


# --- the cases ----------------------------------------------------------------------------------


def one(name: str, roles: tuple[str, ...], criterion: str, dtype: torch.dtype,
        seed: int) -> tuple[float, float]:
    """Compile a zoo model whose values tell places, and judge the result."""
    module, inputs = models_zoo.load(name).build()
    module = drawn(module.to(dtype), seed).eval()
    given = inputs if dtype is torch.float32 else pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
        inputs)
    torch.manual_seed(seed)
    made = spacompiler.compile(
        copy.deepcopy(module), given, target="params~80%", importance=criterion, roles=roles,
        repair="none", align=1, seed=seed, latency=False, onnx=False)
    return judge(module, made.module, inputs, seed)


def main() -> None:
    """Print a line for every case: what stays, how far results are apart, or what is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(n for n in models_zoo.names()
                                                     if n not in BIG))
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for name, roles, criterion, dtype, seed in itertools.product(
            asked.models.split(","), ROLES, CRITERIA, DTYPES, range(asked.seeds)):
        began, case = time.perf_counter(), f"{name} {'+'.join(roles)} {criterion} {dtype} {seed}"
        try:
            stays, gap = one(name, roles, criterion, dtype, seed)
            said = f"{stays:.1%} stays, {gap:.1e}"
        except Wrong as problem:
            wrong, said = wrong + 1, f"WRONG {problem}"
        except spacompiler.SpaError as problem:
            said = f"refused: {problem.what}"
        print(f"{case}: {said} ({time.perf_counter() - began:.1f} s)", flush=True)
    print(f"{wrong} wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
