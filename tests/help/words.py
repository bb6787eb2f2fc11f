"""The words of random networks: a function of arrays, values and options, and how to draw options.

A word reads its arrays from the network, which makes them when they are first asked for. Beside it
stands a function that draws options that fit the values' shapes, or gives None. The first
dimension is the batch, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Fit = Callable[..., "dict[str, Any] | None"]
WIDTHS = (4, 6, 8, 12, 5, 9)


class Dice(Random):
    """What options are drawn with; `widths` are the sizes of layers."""

    widths: Sequence[int] = WIDTHS


class Net(Protocol):
    """What holds the arrays."""

    def array(self, *shape: int, positive: bool = False,
              index: Sequence[int] | None = None) -> Tensor:
        """The next array of the word that is being computed."""
        ...


@dataclass(frozen=True)
class Word:
    """What a line does, how many values it reads, and how its options are drawn."""

    run: Callable[..., Tensor]
    reads: int
    fit: Fit


WORDS: dict[str, Word] = {}


def word(fit: Fit, reads: int = 1) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add a function to the language."""

    def add(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        WORDS[run.__name__.strip("_")] = Word(run, reads, fit)
        return run

    return add


def shuffled(rng: Dice, items: Iterable[Any]) -> list[Any]:
    made = list(items)
    rng.shuffle(made)
    return made


def chosen(**options: Sequence[Any]) -> Fit:
    """Options that any value allows."""
    return lambda rng, *values: {
        k: rng.choice(rng.widths if v is WIDTHS else v) for k, v in options.items()}


def ranked(low: int, high: int = 9, **options: Sequence[Any]) -> Fit:
    """Options for values of some ranks."""
    return lambda rng, x: (chosen(**options)(rng) if low <= x.ndim <= high else None)


def dims(rng: Dice, x: Tensor, first: int = 1) -> int | None:
    return rng.randint(first, x.ndim - 1) if x.ndim > first else None


def divisors(n: int) -> list[int]:
    return [k for k in range(2, n) if n % k == 0]


def along(*, least: int = 2, even: bool = False, **more: Sequence[Any]) -> Fit:
    """A dimension of at least so many positions, and more options."""

    def fit(rng: Dice, x: Tensor) -> dict[str, Any] | None:
        dim = dims(rng, x)
        if dim is None or x.shape[dim] < least or (even and x.shape[dim] % 2):
            return None
        return {"dim": dim, **chosen(**more)(rng)}

    return fit


# --- layers -------------------------------------------------------------------------------------


@word(chosen(out=WIDTHS))
def linear(net: Net, x: Tensor, out: int) -> Tensor:
    return F.linear(x, net.array(out, x.shape[-1]), net.array(out))


@word(chosen(out=WIDTHS))
def there_and_back(net: Net, x: Tensor, out: int) -> Tensor:
    """A layer and its transpose: one array read both ways."""
    w = net.array(out, x.shape[-1])
    return F.linear(F.linear(x, w).relu(), w.t())


@word(chosen(kind=["relu", "tanh", "sigmoid", "square"]))
def act(net: Net, x: Tensor, kind: str) -> Tensor:
    return getattr(torch, kind)(x)


@word(chosen())
def affine(net: Net, x: Tensor) -> Tensor:
    return x * net.array(x.shape[-1]) + net.array(x.shape[-1])


def _fit_conv(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    if not 3 <= x.ndim <= 5:
        return None
    c, out = x.shape[1], rng.choice(rng.widths)
    groups = rng.choice([1, *(g for g in (2, 3, 4) if c % g == 0 == out % g)])
    return {"out": out, "kernel": rng.choice([1, 2, 3]), "groups": groups}


@word(_fit_conv)
def conv(net: Net, x: Tensor, out: int, kernel: int, groups: int) -> Tensor:
    d = x.ndim - 2
    weight = net.array(out, x.shape[1] // groups, *[kernel] * d)
    run = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
    return run(x, weight, net.array(out), padding=kernel // 2, groups=groups)


@word(_fit_conv)
def deconv(net: Net, x: Tensor, out: int, kernel: int, groups: int) -> Tensor:
    d = x.ndim - 2
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d - 1]
    return run(x, net.array(x.shape[1], out // groups, *[kernel] * d), net.array(out),
               padding=kernel // 2, groups=groups)


@word(ranked(3, 5, times=[1, 2]))
def depthwise(net: Net, x: Tensor, times: int) -> Tensor:
    return conv(net, x, x.shape[1] * times, 3, x.shape[1])


@word(ranked(2))
def batch_norm(net: Net, x: Tensor) -> Tensor:
    c = x.shape[1]
    mean, var = net.array(c, positive=True), net.array(c, positive=True)
    return F.batch_norm(x, mean, var, net.array(c), net.array(c))


@word(chosen())
def layer_norm(net: Net, x: Tensor) -> Tensor:
    c = x.shape[-1]
    return F.layer_norm(x, (c,), net.array(c), net.array(c))


@word(chosen(offset=[0, 1], cast=[False, True]))
def rms_norm(net: Net, x: Tensor, offset: int, cast: bool) -> Tensor:
    """As models write it; `cast` computes in single precision, as they do in half."""
    z = x.float() if cast else x
    y = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5)
    y = y.to(x.dtype) if cast else y
    return y * (net.array(x.shape[-1]) + offset if offset else net.array(x.shape[-1]))


@word(ranked(3, 4, how=["mul", "addcmul"]))
def response_norm(net: Net, x: Tensor, how: str) -> Tensor:
    """Each channel's response over all places, divided by the mean of all channels'."""
    over = tuple(range(1, x.ndim - 1))
    response = torch.linalg.vector_norm(x, dim=over, keepdim=True)
    y = x * (response / (response.mean(-1, keepdim=True) + 1e-5))
    gain, bias = net.array(x.shape[-1]), net.array(x.shape[-1])
    if how == "addcmul":
        return x + torch.addcmul(bias.view(1, -1), gain.view(1, -1), y)
    return gain * y + bias + x


def _fit_groups(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    groups = divisors(x.shape[1]) if x.ndim > 2 else []
    return {"groups": rng.choice(groups)} if groups else None


@word(_fit_groups)
def group_norm(net: Net, x: Tensor, groups: int) -> Tensor:
    return F.group_norm(x, groups, net.array(x.shape[1]), net.array(x.shape[1]))


@word(ranked(3, 5))
def instance_norm(net: Net, x: Tensor) -> Tensor:
    if x.shape[2:].numel() < 2:
        raise ValueError("one position has no variance")
    return F.instance_norm(x, weight=net.array(x.shape[1]), bias=net.array(x.shape[1]))


@word(ranked(3, 5))
def squeeze_excite(net: Net, x: Tensor) -> Tensor:
    """A gate for each channel from the mean over positions."""
    c = x.shape[1]
    y = F.linear(x.flatten(2).mean(-1), net.array(4, c), net.array(4)).relu()
    gate = F.linear(y, net.array(c, 4), net.array(c)).sigmoid()
    return x * gate.reshape(*gate.shape, *[1] * (x.ndim - 2))


@word(ranked(3, 3, out=[4, 6]))
def mix_tokens(net: Net, x: Tensor, out: int) -> Tensor:
    return torch.einsum("btc,ts->bsc", x, net.array(x.shape[1], out))


@word(ranked(3, 3, experts=[2, 3], inner=[4, 6]))
def experts(net: Net, x: Tensor, experts: int, inner: int) -> Tensor:
    """Every token through every expert, weighed by a router."""
    c = x.shape[-1]
    weight = F.linear(x, net.array(experts, c)).softmax(-1)
    y = torch.einsum("btc,eci->beti", x, net.array(experts, c, inner)).relu()
    return torch.einsum("beti,eic,bte->btc", y, net.array(experts, inner, c), weight)


@word(ranked(3, 3, kind=["lstm", "gru", "rnn_tanh"], hidden=[4, 6], ways=[1, 2]))
def recurrent(net: Net, x: Tensor, kind: str, hidden: int, ways: int) -> Tensor:
    """One layer that remembers, along the second dimension."""
    rows = {"lstm": 4, "gru": 3, "rnn_tanh": 1}[kind] * hidden
    state = x.new_zeros(ways, x.shape[0], hidden)
    arrays = [net.array(*shape) for _ in range(ways)
              for shape in ((rows, x.shape[-1]), (rows, hidden), (rows,), (rows,))]
    return getattr(torch, kind)(x, [state, state] if kind == "lstm" else state, arrays, True, 1,
                                0.0, False, ways == 2, True)[0]


# --- attention ----------------------------------------------------------------------------------


def rotary(x: Tensor) -> Tensor:
    """Halves turned against each other by an angle for each pair."""
    half = x.shape[-1] // 2
    angle = torch.arange(half, dtype=x.dtype).repeat(2)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angle.cos() + turned * angle.sin()


def expand_heads(x: Tensor, times: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, times, t, d).reshape(b, h * times, t, d)


@word(ranked(3, 3, kv=[1, 2, 3], times=[1, 2, 3], dim=[2, 4], turn=[False, True],
             how=["plain", "fused", "matmul", "gqa", "bmm"]))
def attention(net: Net, x: Tensor, kv: int, times: int, dim: int, turn: bool, how: str) -> Tensor:
    b, t, c = x.shape
    sizes = [kv * times * dim, kv * dim, kv * dim]
    if how == "fused":
        parts = F.linear(x, net.array(sum(sizes), c), net.array(sum(sizes))).split(sizes, -1)
    else:
        parts = tuple(F.linear(x, net.array(n, c), net.array(n)) for n in sizes)
    q, k, v = (p.view(b, t, -1, dim).transpose(1, 2) for p in parts)
    if turn:
        q, k = rotary(q), rotary(k)
    if times > 1 and how != "gqa":
        k, v = expand_heads(k, times), expand_heads(v, times)
    if how == "matmul":
        y = (q @ k.transpose(-1, -2) / dim**0.5).softmax(-1) @ v
    elif how == "bmm":
        q, k, v = (z.reshape(-1, t, dim) for z in (q, k, v))
        y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(b, -1, t, dim)
    else:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=how == "gqa" and times > 1)
    y = y.transpose(1, 2).reshape(b, t, -1)
    return F.linear(y, net.array(c, y.shape[-1]))


@word(ranked(3, 3))
def gram(net: Net, x: Tensor) -> Tensor:
    return x @ x.transpose(1, 2)


# --- positions moved ----------------------------------------------------------------------------


def _fit_factor(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    dim = dims(rng, x)
    inner = divisors(x.shape[dim]) if dim else []
    return {"dim": dim, "inner": rng.choice(inner)} if inner and x.ndim < 6 else None


@word(_fit_factor)
def factor(net: Net, x: Tensor, dim: int, inner: int) -> Tensor:
    return x.unflatten(dim, (x.shape[dim] // inner, inner))


@word(lambda rng, x: {"dim": rng.randint(1, x.ndim - 2)} if x.ndim > 2 else None)
def flatten(net: Net, x: Tensor, dim: int) -> Tensor:
    return x.flatten(dim, dim + 1)


@word(lambda rng, x: {"order": tuple(shuffled(rng, range(1, x.ndim)))}
      if x.ndim > 2 else None)
def permute(net: Net, x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x.permute(0, *order)


@word(lambda rng, x: {"order": tuple(shuffled(rng, range(1, x.ndim)))}
      if x.ndim > 2 else None)
def permute_flatten(net: Net, x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x.permute(0, *order).reshape(x.shape[0], -1)


def _fit_shuffle(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    dim = dims(rng, x)
    groups = divisors(x.shape[dim]) if dim else []
    return {"dim": dim, "groups": rng.choice(groups)} if groups else None


@word(_fit_shuffle)
def shuffle(net: Net, x: Tensor, dim: int, groups: int) -> Tensor:
    """Deal the positions of each group out in turn."""
    size = x.shape[dim]
    return x.unflatten(dim, (groups, size // groups)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _fit_view(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    total = x[0].numel()
    inner = divisors(total)
    return {"inner": rng.choice(inner)} if inner and total < 200 else None


@word(_fit_view)
def view(net: Net, x: Tensor, inner: int) -> Tensor:
    """Everything but the batch in two new dimensions, whatever they were."""
    return x.reshape(x.shape[0], -1, inner)


@word(along())
def flip(net: Net, x: Tensor, dim: int) -> Tensor:
    return x.flip(dim)


@word(along(shift=[1, -1, 2]))
def roll(net: Net, x: Tensor, dim: int, shift: int) -> Tensor:
    return x.roll(shift, dim)


def _fit_narrow(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    dim = dims(rng, x)
    if dim is None or x.shape[dim] < 3:
        return None
    start = rng.randint(0, x.shape[dim] - 2)
    return {"dim": dim, "start": start, "length": rng.randint(1, x.shape[dim] - start)}


@word(_fit_narrow)
def narrow(net: Net, x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x.narrow(dim, start, length)


@word(along(least=3, start=[0, 1], step=[2, 3]))
def strided(net: Net, x: Tensor, dim: int, start: int, step: int) -> Tensor:
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, None, step)
    return x[tuple(index)]


@word(along(at=[0, 1, -1]))
def select(net: Net, x: Tensor, dim: int, at: int) -> Tensor:
    if x.ndim < 3:
        raise ValueError("nothing would be left")
    return x.select(dim, at)


def _fit_split(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    dim = dims(rng, x)
    if dim is None or x.shape[dim] < 3:
        return None
    first = rng.randint(1, x.shape[dim] - 1)
    return {"dim": dim, "sizes": (first, x.shape[dim] - first), "swap": rng.random() < 0.5}


@word(_fit_narrow, reads=1)
def write(net: Net, x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A slice is replaced by what a layer makes of it."""
    part = x.narrow(dim, start, length)
    made = F.linear(part, net.array(part.shape[-1], part.shape[-1]))
    return x.slice_scatter(made, dim, start, start + length)


@word(_fit_split)
def split(net: Net, x: Tensor, dim: int, sizes: tuple[int, ...], swap: bool) -> Tensor:
    a, b = x.split(list(sizes), dim)
    return torch.cat([b, a.tanh()] if swap else [a.tanh(), b], dim)


@word(along(even=True, how=["add", "rotate", "gate", "first", "glu"]))
def halves(net: Net, x: Tensor, dim: int, how: str) -> Tensor:
    if how == "glu":
        return F.glu(x, dim)
    a, b = x.chunk(2, dim)
    if how == "rotate":
        return torch.cat([-b, a], dim)
    return a if how == "first" else a + 2 * b if how == "add" else a * b.sigmoid()


@word(lambda rng, x: {"dim": 1, "order": tuple(shuffled(rng, range(x.shape[1])))}
      if x.ndim > 2 and x.shape[1] < 7 else None)
def restack(net: Net, x: Tensor, dim: int, order: tuple[int, ...]) -> Tensor:
    rows = x.unbind(dim)
    return torch.stack([rows[i] for i in order], -1)


def _fit_take(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    dim = dims(rng, x)
    if dim is None or not 3 <= x.shape[dim] <= 8:
        return None
    order = shuffled(rng, range(x.shape[dim]))
    return {"dim": dim, "index": tuple(order[: rng.randint(2, len(order))])}


@word(_fit_take)
def take(net: Net, x: Tensor, dim: int, index: tuple[int, ...]) -> Tensor:
    """Positions by a stored index."""
    return x.index_select(dim, net.array(index=index))


@word(along(count=[2, 3], how=["repeat", "interleave", "expand"]))
def repeat(net: Net, x: Tensor, dim: int, count: int, how: str) -> Tensor:
    if how == "interleave":
        return x.repeat_interleave(count, dim)
    if how == "expand":
        sizes = [-1] * (x.ndim + 1)
        sizes[dim] = count
        return x.unsqueeze(dim).expand(sizes).flatten(dim, dim + 1)
    return x.repeat(*(count if d == dim else 1 for d in range(x.ndim)))


@word(along(before=[0, 1], after=[1, 2]))
def pad(net: Net, x: Tensor, dim: int, before: int, after: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [before, after], value=0.5)


@word(ranked(3, 4, mode=["reflect", "replicate"]))
def pad_copies(net: Net, x: Tensor, mode: str) -> Tensor:
    return F.pad(x, [1, 1] * (x.ndim - 2), mode)


def _fit_pixels(rng: Dice, x: Tensor) -> dict[str, Any] | None:
    if x.ndim != 4:
        return None
    up = rng.random() < 0.5
    fits = x.shape[1] % 4 == 0 if up else not (x.shape[2] % 2 or x.shape[3] % 2)
    return {"up": up} if fits else None


@word(_fit_pixels)
def pixels(net: Net, x: Tensor, up: bool) -> Tensor:
    return F.pixel_shuffle(x, 2) if up else F.pixel_unshuffle(x, 2)


# --- positions mixed ----------------------------------------------------------------------------


@word(ranked(3, 4, kind=["max", "avg", "adaptive"]))
def pool(net: Net, x: Tensor, kind: str) -> Tensor:
    d = x.ndim - 2
    run = {"max": (F.max_pool1d, F.max_pool2d), "avg": (F.avg_pool1d, F.avg_pool2d),
           "adaptive": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)}[kind][d - 1]
    return run(x, 2)


@word(ranked(3, 4))
def upsample(net: Net, x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


@word(along(how=["sum", "mean", "amax"], keep=[True, False]))
def reduce(net: Net, x: Tensor, dim: int, how: str, keep: bool) -> Tensor:
    if x.ndim < 3:
        raise ValueError("nothing would be left")
    return getattr(torch, how)(x, dim, keepdim=keep)


@word(along())
def softmax(net: Net, x: Tensor, dim: int) -> Tensor:
    return x.softmax(dim)


@word(along())
def cumsum(net: Net, x: Tensor, dim: int) -> Tensor:
    return x.cumsum(dim)


# --- two values ---------------------------------------------------------------------------------


def _fit_pair(rng: Dice, x: Tensor, y: Tensor) -> dict[str, Any] | None:
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        return None
    return {"how": rng.choice(["add", "mul", "maximum"])}


@word(_fit_pair, reads=2)
def join(net: Net, x: Tensor, y: Tensor, how: str) -> Tensor:
    return getattr(torch, how)(x, y)


def _fit_cat(rng: Dice, x: Tensor, y: Tensor) -> dict[str, Any] | None:
    if x.ndim != y.ndim:
        return None
    differ = [d for d in range(x.ndim) if x.shape[d] != y.shape[d]]
    free = differ or list(range(1, x.ndim))
    return {"dim": rng.choice(free)} if len(differ) < 2 and 0 not in differ else None


@word(_fit_cat, reads=2)
def cat(net: Net, x: Tensor, y: Tensor, dim: int) -> Tensor:
    return torch.cat([x, y], dim)


@word(lambda rng, x, y: {} if x.ndim == y.ndim else None, reads=2)
def residual(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """x + a layer of y that has x's width."""
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError("positions differ")
    return x + F.linear(y, net.array(x.shape[-1], y.shape[-1]))


# How often a word is drawn: what freezes its dimension rarely, layers and joins often.
_SELDOM = "cumsum softmax pad_copies select reduce strided take gram instance_norm".split()
_LAYERS = "linear conv deconv depthwise batch_norm rms_norm attention experts".split()
_JOINS = "join cat residual squeeze_excite factor flatten shuffle view halves".split()
OFTEN = [w for w in WORDS for _ in range(1 if w in _SELDOM else 6 if w in (*_LAYERS, *_JOINS)
                                         else 3)]
