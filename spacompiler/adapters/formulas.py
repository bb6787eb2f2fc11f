"""What adapters of other origins add to a weight, as factors B A: one small function an origin.

A formula takes a `Layer` and returns (a, b): a (r, i) and b (o, r), all scales within, so that
W' = W + b a. Low-rank ones keep their rank; what has none is the change itself and a unit matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SpaError, UsageError
from .combining import Pair, full, scaling


@dataclass(frozen=True)
class Layer:
    """One layer's arrays by what they are, its weight (o, i, *k), and what is said of them.

    `lists` hold arrays that were stored as a numbered list. `unit` is true for writers that mean
    alpha = rank where they say none.
    """

    path: str
    arrays: Mapping[str, torch.Tensor]
    lists: Mapping[str, list[torch.Tensor]]
    weight: torch.Tensor
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    unit: bool

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name].double()

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as (o, i)."""
        return self.weight.flatten(1).double()

    def said(self, key: str, default: object = None) -> Any:
        """Return what the adapter's configuration says; raises SpaError without a default."""
        value = self.config.get(key, default)
        if value is None:
            raise self.unsaid(key)
        return value

    def unsaid(self, key: str) -> SpaError:
        """An error: the files do not say something that the formula needs."""
        return SpaError(f"the adapter does not say its {key}", where=self.path,
                        why="what it adds depends on it",
                        fix=f"write it in adapter_config.json as {key!r}")

    def scale(self, rank: int) -> float:
        """alpha / r: of the layer, of the options, or of the configuration."""
        if "alpha" in self.options:
            return float(self.options["alpha"]) / rank
        if "alpha" in self.arrays:
            return float(self.arrays["alpha"]) / rank
        if "lora_alpha" in self.config:
            return scaling(self.config, self.path, rank)
        if self.unit:
            return 1.0
        raise SpaError("the adapter does not say its alpha", where=self.path,
                       why="what it adds is scaled by alpha / rank",
                       fix="give PATH(alpha=16), with the one that it was trained with")


def _pair(layer: Layer, a: torch.Tensor, b: torch.Tensor) -> Pair:
    """The factors as matrices, the first rows of them if a rank is asked for, scaled."""
    a, b = a.flatten(1), b.flatten(1)
    rank = int(layer.options.get("rank", len(a)))
    if not 0 < rank <= len(a):
        raise UsageError(f"rank={rank} of an adapter of rank {len(a)}", where=layer.path,
                         fix=f"give a rank from 1 to {len(a)}")
    return a[:rank], layer.scale(rank) * b[:, :rank]


def lora(layer: Layer) -> Pair:
    """alpha/r B A; any first b ranks of a DyLoRA with alpha/b. With magnitudes m: DoRA.

    m is (o, 1...) or (1, i, 1...): W' = m (W + B A) / its norm over all other dimensions.
    """
    pair = _pair(layer, layer["A"], layer["B"])
    return _with_magnitude(layer, pair) if "magnitude" in layer else pair


def _with_magnitude(layer: Layer, pair: Pair) -> Pair:
    whole = layer.weight.double() + (pair[1] @ pair[0]).reshape(layer.weight.shape)
    m = layer["magnitude"]
    axis = 0 if m.shape[0] == whole.shape[0] else 1
    norm = whole.movedim(axis, 0).flatten(1).norm(dim=1)
    made = whole * (m.flatten() / norm).reshape(-1, *(1,) * (whole.ndim - axis - 1))
    return full(made.flatten(1) - layer.matrix)


def tucker(layer: Layer) -> Pair:
    """alpha/r of U (mid) D on a convolution: (o, r) (r, r, *k) (r, i)."""
    a, b, mid = layer["A"].flatten(1), layer["B"].flatten(1), layer["mid"]
    inner = torch.einsum("rs...,si->ri...", mid, a)
    return inner.flatten(1), layer.scale(len(mid)) * b


def between(layer: Layer) -> Pair:
    """alpha/r B M A, M (r, r): LoRA-XS and LoRA-SB (their R), NLoRA (its N)."""
    a, b = _pair(layer, layer["A"], layer["B"])
    return layer["M"] @ a, b


def gated(layer: Layer) -> Pair:
    """alpha/r B diag(g) A without the ranks whose gate is zero (SoRA)."""
    a, b = _pair(layer, layer["A"], layer["B"])
    gate = layer["gate"].flatten()
    kept = gate != 0
    if not kept.any():
        kept[0] = True
    return (gate[:, None] * a)[kept], b[:, kept]


def triangular(layer: Layer) -> Pair:
    """alpha/r B C A, C of blocks of rows and of columns that grew in turn (TriAdaptLoRA)."""
    rows, columns = layer.lists["rows"], layer.lists["columns"]
    rank = sum(len(x) for x in rows)
    core = torch.zeros(rank, rank, dtype=torch.float64)
    at = 0
    for row, column in zip(rows, columns, strict=True):
        core[at:at + len(row), :row.shape[1]] += row.double()
        core[:column.shape[0], at:at + len(row)] += column.double()
        at += len(row)
    a, b = (torch.cat([x.double() for x in layer.lists[n]], d) for n, d in (("A", 0), ("B", 1)))
    return core @ a, float(layer.said("lora_alpha")) / (rank + 1e-5) * b


def shards(layer: Layer) -> Pair:
    """alpha/r B A, both of shards that are used again, each time scaled (and turned) (MoS).

    A's k-th row holds, one after the other for j = 0, 1, ..., shard k (k + j with rotation) times
    its scale (k, j); B's columns alike.
    """
    turn = bool(layer.said("enable_lora_rotation", False))
    o, i = layer.matrix.shape
    a = _unfolded(layer["A"], layer["A scale"], turn)[:, :i]
    b = _unfolded(layer["B"].T, layer["B scale"], turn)[:, :o].T
    return _pair(layer, a, b)


def _unfolded(shard: torch.Tensor, scale: torch.Tensor, turn: bool) -> torch.Tensor:
    """(r, c) and scales (r, n) to (r, n c)."""
    return torch.cat([scale[:, j:j + 1] * (shard.roll(-j, 0) if turn else shard)
                      for j in range(scale.shape[1])], 1)


def random_bases(layer: Layer) -> Pair:
    """B A, both sums of seeded random matrices (NOLA): A = sum alpha_k A_k, B = sum beta_k B_k.

    The matrices come from the generator as the released code draws them; the first numbers, where
    the file holds them, must be the same here.
    """
    o, i = layer.matrix.shape
    rank = int(layer.said("r"))
    alpha, beta = layer["alpha"], layer["beta"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(layer.said("seed")))
        bases = [torch.empty(len(c), *size) for c, size in ((alpha, (i, rank)), (beta, (rank, o)))]
        for base in bases:
            torch.nn.init.kaiming_uniform_(base, a=5 ** 0.5)
    if "drawn" in layer and not torch.equal(bases[0][0, :10, 0], layer.arrays["drawn"].float()):
        raise SpaError("the random matrices of this adapter are not those drawn here",
                       where=layer.path, why="the first numbers differ from those in the file",
                       fix="merge it where it was trained")
    a = torch.einsum("k,kir->ri", alpha, bases[0].double())
    b = torch.einsum("k,kro->or", beta, bases[1].double())
    return a, b / rank


def triangles(layer: Layer) -> Pair:
    """s P L diag(z) U in place of s0 P L diag(d) U, W = P L diag(d) U (LoLDU); s0 = alpha/r."""
    low, up, z = layer["L"], layer["U"], layer["z"]
    place, _, u = torch.linalg.lu(layer.matrix)
    rank = len(z)
    d = u.diagonal()[:rank]
    first = float(layer.said("lora_alpha")) / rank
    s = float(layer["s"]) if "s" in layer else first
    if "P" in layer:
        place = layer["P"]
    return up, place @ low * (s * z - first * d)


def singular_values(layer: Layer) -> Pair:
    """U diag(s' - s) Vᵀ, the first r singular values of W trained (SVFit)."""
    new = layer["s"].flatten()
    u, s, v = torch.linalg.svd(layer.matrix, full_matrices=False)
    rank = len(new)
    if "U" in layer:
        u, v = layer["U"], layer["V"]
    return v[:rank], u[:, :rank] * (new - s[:rank])


def shifted_values(layer: Layer) -> Pair:
    """W' = U relu(S') Vᵀ: S' is scale * s + shift first, then diag(s) + X Y (SALT)."""
    scale, shift = layer["scale"], layer["shift"]
    u, s, v = layer["U"], layer["S"], layer["V"]
    rank = len(scale)
    core = torch.diag(torch.cat([scale * s[:rank] + shift, s[rank:]]))
    if "X" in layer:
        core[rank:, rank:] += layer["X"] @ layer["Y"]
    return full(u @ core.relu() @ v - layer.matrix)


def kernel(layer: Layer) -> Pair:
    """sum_h c_h dist_p(P_h, Q_h)ᵀ (SNELL without a threshold)."""
    return full(_distances(layer, float(layer.said("norm_p", 2.0))).T)


def thresholded_kernel(layer: Layer) -> Pair:
    """The same, times its absolute value where that is above its quantile t (SNELL)."""
    return full(_above(layer, _distances(layer, float(layer.said("norm_p", 2.0)))).T)


def mixed_kernel(layer: Layer) -> Pair:
    """K + alpha softmax(K / gamma) + beta, K the distances (SNELLA), and then the threshold."""
    k = _distances(layer, 2.0)
    mixed = k + layer["alpha"] * (k / layer["gamma"]).softmax(-1) + layer["beta"]
    return full(_above(layer, mixed).T)


def _distances(layer: Layer, power: float) -> torch.Tensor:
    """(i, o)."""
    far = torch.cdist(layer["P"], layer["Q"], p=power)
    return (layer["c"].reshape(-1, 1, 1) * far).sum(0)


def _above(layer: Layer, change: torch.Tensor) -> torch.Tensor:
    """w |w| where |w| is above its quantile; the share is one number, or one for each layer."""
    said = layer.said("init_thres")
    share = said.get(layer.path) if isinstance(said, dict) else said
    if share is None:
        raise layer.unsaid("init_thres")
    size = change.abs()
    return change * torch.where(size > size.quantile(float(share)), size, 0.0) if share else change


def sparse_plus_low_rank(layer: Layer) -> Pair:
    """W' = alpha/r B A + S, S of values at places of the flat weight (SLTrain)."""
    a, b = layer["A"], layer["B"]
    s = float(layer["scaling"].tanh()) if "scaling" in layer else layer.scale(len(a))
    whole = (s * b @ a).flatten()
    whole[layer.arrays["places"].long()] += layer["values"]
    return full(whole.reshape(layer.matrix.shape) - layer.matrix)


def hadamard(layer: Layer) -> Pair:
    """alpha/r (W1b W1a) * (W2b W2a) (LoHa)."""
    w1, w2 = layer["w1_a"] @ layer["w1_b"], layer["w2_a"] @ layer["w2_b"]
    return full(layer.scale(layer["w1_b"].shape[0]) * w1 * w2)


def kronecker(layer: Layer) -> Pair:
    """alpha/r W1 ⊗ W2, each whole or of factors; whole ones are not scaled (LoKr)."""
    sides, scale = [], 1.0
    for n in ("w1", "w2"):
        if n in layer:
            sides.append(layer[n])
            continue
        a, b = layer[f"{n}_a"], layer[f"{n}_b"]
        sides.append((a @ b.flatten(1)).reshape(len(a), *b.shape[1:]))
        scale = layer.scale(len(b))
    w1, w2 = sides
    made = torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - w1.ndim)), w2)
    return full(scale * made.flatten(1))


def difference(layer: Layer) -> Pair:
    """The whole difference (LyCORIS full)."""
    return full(layer["diff"].flatten(1))
