"""Convolutions, poolings and softmax in float64 for ONNX's reference, by torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_average_pool import AveragePool_19 as AveragePoolReference
from onnx.reference.ops.op_max_pool import MaxPool as MaxPoolReference
from torch.nn import functional

Ints = Sequence[int]


def _pads(x: np.ndarray | torch.Tensor, window: Ints, strides: Ints, dilations: Ints,
          pads: Ints | None, auto: str) -> list[int]:
    """Return (begin, end) per spatial dimension, from the last, as torch.nn.functional.pad."""
    n = len(window)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        both = []
        for d in range(n):
            size, reach = x.shape[2 + d], (window[d] - 1) * dilations[d] + 1
            total = max((-(-size // strides[d]) - 1) * strides[d] + reach - size, 0)
            small, large = total // 2, total - total // 2
            both.append((small, large) if auto == "SAME_UPPER" else (large, small))
    else:
        given = list(pads or [0] * 2 * n)
        both = [(given[d], given[d + n]) for d in range(n)]
    return [k for pair in reversed(both) for k in pair]


class Conv(OpRun):
    """Conv of any number of spatial dimensions up to three."""

    op_domain = ""

    def _run(self, X: np.ndarray, W: np.ndarray, B: np.ndarray | None = None,
             auto_pad: str | bytes | None = None, dilations: Ints | None = None,
             group: int | None = None, kernel_shape: Ints | None = None,
             pads: Ints | None = None, strides: Ints | None = None) -> tuple[np.ndarray]:
        n = W.ndim - 2
        strides, dilations = strides or [1] * n, dilations or [1] * n
        x, w = torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(
            np.ascontiguousarray(W))
        auto = auto_pad.decode() if isinstance(auto_pad, bytes) else auto_pad or "NOTSET"
        x = functional.pad(x, _pads(x, W.shape[2:], strides, dilations, pads, auto))
        bias = None if B is None else torch.from_numpy(np.array(B))
        run = (functional.conv1d, functional.conv2d, functional.conv3d)[n - 1]
        return (run(x, w, bias, tuple(strides), 0, tuple(dilations), group or 1).numpy(),)


class ConvTranspose(OpRun):
    """ConvTranspose without output_shape."""

    op_domain = ""

    def _run(self, X: np.ndarray, W: np.ndarray, B: np.ndarray | None = None,
             auto_pad: str | bytes | None = None, dilations: Ints | None = None,
             group: int | None = None, kernel_shape: Ints | None = None,
             output_padding: Ints | None = None, output_shape: Ints | None = None,
             pads: Ints | None = None, strides: Ints | None = None) -> tuple[np.ndarray]:
        n = W.ndim - 2
        if output_shape or auto_pad not in (None, "NOTSET", b"NOTSET"):
            raise NotImplementedError("ConvTranspose with implied padding")
        strides, dilations = strides or [1] * n, dilations or [1] * n
        run = (functional.conv_transpose1d, functional.conv_transpose2d,
               functional.conv_transpose3d)[n - 1]
        y = run(torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(
            np.ascontiguousarray(W)), None if B is None else torch.from_numpy(np.array(B)),
            tuple(strides), 0, tuple(output_padding or [0] * n), group or 1, tuple(dilations))
        given = list(pads or [0] * 2 * n)
        for d in range(n):
            y = y.narrow(2 + d, given[d], y.shape[2 + d] - given[d] - given[d + n])
        return (y.contiguous().numpy(),)


class GlobalAveragePool(OpRun):
    """Mean over all spatial dimensions."""

    op_domain = ""

    def _run(self, X: np.ndarray) -> tuple[np.ndarray]:
        return (X.mean(axis=tuple(range(2, X.ndim)), keepdims=True),)


class AveragePool(AveragePoolReference):
    """Mean over windows; rounded up or dilated by ONNX's (slow) reference."""

    op_domain = ""

    def _run(  # type: ignore[override]
            self, x: np.ndarray, *, kernel_shape: Ints, auto_pad: str | None = None,
            ceil_mode: int | None = None, dilations: Ints | None = None,
            pads: Ints | None = None, strides: Ints | None = None,
            count_include_pad: int | None = None) -> tuple[np.ndarray]:
        if ceil_mode or len(kernel_shape) > 3 or max(dilations or [1]) > 1:
            return tuple(super()._run(
                x, auto_pad=auto_pad, ceil_mode=ceil_mode, dilations=dilations,
                kernel_shape=kernel_shape, pads=pads, strides=strides,
                count_include_pad=count_include_pad))
        n = len(kernel_shape)
        strides = strides or [1] * n
        border = _pads(x, kernel_shape, strides, [1] * n, pads, auto_pad or "NOTSET")
        run = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[n - 1]
        data = torch.from_numpy(np.ascontiguousarray(x))
        inside = torch.ones((1, 1, *x.shape[2:]), dtype=data.dtype)
        total, share = (run(functional.pad(a, border), tuple(kernel_shape), tuple(strides))
                        for a in (data, inside))
        return ((total if count_include_pad else total / share).numpy(),)


class MaxPool(MaxPoolReference):
    """Maximum over windows; rounded up, dilated or with indices by ONNX's (slow) reference."""

    op_domain = ""

    def _run(  # type: ignore[override]
            self, x: np.ndarray, *, kernel_shape: Ints, auto_pad: str | None = None,
            ceil_mode: int | None = None, dilations: Ints | None = None,
            pads: Ints | None = None, storage_order: int | None = None,
            strides: Ints | None = None) -> tuple[np.ndarray, ...]:
        n = len(kernel_shape)
        if ceil_mode or n > 3 or max(dilations or [1]) > 1 or x.dtype.kind != "f" or \
                len(self.onnx_node.output) > 1:
            return tuple(super()._run(
                x, auto_pad=auto_pad, ceil_mode=ceil_mode, dilations=dilations,
                kernel_shape=kernel_shape, pads=pads, storage_order=storage_order,
                strides=strides))
        strides = strides or [1] * n
        border = _pads(x, kernel_shape, strides, [1] * n, pads, auto_pad or "NOTSET")
        run = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[n - 1]
        data = functional.pad(torch.from_numpy(np.ascontiguousarray(x)), border,
                              value=-torch.inf)
        return (run(data, tuple(kernel_shape), tuple(strides)).numpy(),)


class LogSoftmax(OpRun):
    """Over one axis; before opset 13 over all from `axis` on, which the reference leaves out."""

    op_domain = ""

    def _run(self, X: np.ndarray, axis: int = -1) -> tuple[np.ndarray]:
        old = self.run_params["opsets"].get("", 13) < 13
        if not any(a.name == "axis" for a in self.onnx_node.attribute):
            axis = 1 if old else -1
        x = torch.from_numpy(np.ascontiguousarray(X))
        x = x.flatten(axis % X.ndim) if old else x
        return (self._of(x, axis % X.ndim).reshape(X.shape).numpy(),)

    def _of(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return functional.log_softmax(x, axis)


class Softmax(LogSoftmax):
    """As LogSoftmax."""

    def _of(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return functional.softmax(x, axis)


def _by_head(array: np.ndarray, heads: int) -> torch.Tensor:
    """(b, t, heads dims) as (b, t, heads, dims)."""
    return torch.from_numpy(np.array(array)).unflatten(2, (heads, -1))


class LinearAttention(OpRun):
    """A state of outer products, read by queries token by token; ONNX's reference rounds it to
    float32.

    q: (b, t, heads k), k: (b, t, kv k), v: (b, t, kv v), state: (b, kv, k, v).
    """

    op_domain = ""

    def _run(self, query: np.ndarray, key: np.ndarray, value: np.ndarray,
             past_state: np.ndarray | None = None, decay: np.ndarray | None = None,
             beta: np.ndarray | None = None, *, kv_num_heads: int, q_num_heads: int,
             chunk_size: int | None = None, scale: float | None = None,
             update_rule: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = (_by_head(a, n) for a, n in (
            (query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads)))
        g = None if decay is None else _by_head(decay, kv_num_heads)
        rate = None if beta is None else _by_head(beta, beta.shape[2])
        state = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[3], dtype=q.dtype) \
            if past_state is None else torch.from_numpy(np.array(past_state))
        made = []
        for t in range(q.shape[1]):
            written = v[:, t]
            if g is not None:
                state = state * g[:, t].exp().unsqueeze(-1)
            if rate is not None:
                written = rate[:, t] * (written - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state = state + k[:, t].unsqueeze(-1) * written.unsqueeze(-2)
            each = state.repeat_interleave(q_num_heads // kv_num_heads, 1)
            made.append(torch.einsum("bhk,bhkv->bhv", q[:, t], each))
        result = torch.stack(made, 1).flatten(2) * (scale or 1 / np.sqrt(q.shape[3]))
        return result.numpy(), state.numpy()


KERNELS = (Conv, ConvTranspose, GlobalAveragePool, AveragePool, MaxPool, LogSoftmax, Softmax,
           LinearAttention)
