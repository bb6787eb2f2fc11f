"""The table of ATen operators: one line says how an operator relates axes.

A key is an operator's name without its overload; `aten.` is implied unless the name has a dot.
To teach the compiler an operator, add a line, a case in tests/help/ops_*.py (does slicing
commute?) and a call in tests/golden/rows/aten.txt (what does the row say?).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from . import chosen as c
from . import cuts as cut
from . import pairs, recurrent
from . import primitives as p
from . import reductions as r
from . import shapes as s
from . import writes as w
from .solver import Row

_POINTWISE = """
add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum fmax fmin atan2
neg abs sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sin cos tan asin
acos atan sinh cosh tanh asinh acosh atanh erf erfc erfinv sigmoid logit relu relu6 leaky_relu
elu selu celu gelu silu mish softplus hardtanh hardswish hardsigmoid hardshrink softshrink
threshold log_sigmoid clamp clamp_min clamp_max clip floor ceil round trunc frac
nan_to_num lerp addcmul addcdiv where masked_fill eq ne lt le gt ge logical_and logical_or
logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__ __xor__
multiply divide subtract copy
complex polar logaddexp sinc lgamma digamma signbit
isnan isinf isfinite xlogy heaviside copysign hypot sgn bitwise_left_shift bitwise_right_shift
""".split()

_SAME = """
clone contiguous alias detach dropout feature_dropout alpha_dropout to _to_copy type_as
lift_fresh_copy lift_fresh lift zeros_like ones_like full_like empty_like rand_like randn_like
bernoulli fill positive native_dropout _conj resolve_conj
real imag angle conj_physical resolve_neg
""".split()

# what only moves or copies the values of its first operand: chosen positions stay such
_CARRY = """
clone contiguous alias detach to _to_copy type_as lift_fresh_copy sort index gather index_select
view _unsafe_view reshape view_copy flatten unflatten permute transpose t squeeze unsqueeze expand
select slice
""".split()

_POOLING = {
    1: "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d "
       "upsample_linear1d reflection_pad1d replication_pad1d",
    2: "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d _adaptive_avg_pool2d "
       "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
       "reflection_pad2d replication_pad2d _upsample_nearest_exact2d _upsample_bilinear2d_aa",
    3: "avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d upsample_nearest3d "
       "upsample_trilinear3d replication_pad3d",
}

_ALONG: dict[str, Row] = {
    **{op: c.scores()
       for op in "softmax _softmax log_softmax _log_softmax _safe_softmax".split()},
    **{op: r.along() for op in "cumprod logcumsumexp cummax cummin".split()},
    "topk": c.best, "cumsum": c.cumsum, "histc": c.histc, "sort": r.along(1), "argsort": r.along(1),
    "diff": r.along(2),
    **{op: r.along(2) for op in "fft_fft fft_ifft fft_rfft fft_irfft".split()},
    **{op: r.along(2, "dim", [-2, -1])
       for op in "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2".split()},
    **{op: r.along(2, "dim", None)
       for op in "fft_fftn fft_ifftn fft_rfftn fft_irfftn".split()},
    "tril": r.triangle, "triu": r.triangle,
}

_REDUCE: dict[str, Row] = {
    **dict.fromkeys("sum any count_nonzero".split(), r.reduce("sum")), "mean": r.reduce("mean"),
    **dict.fromkeys("norm linalg_vector_norm linalg_norm".split(), r.vector_norm),
    **dict.fromkeys("max min".split(), r.extremum),
    **{op: r.reduce("other") for op in "amax amin prod var std all logsumexp argmax argmin "
       "var_mean std_mean median".split()},
}

_PATTERNS: dict[str, Row] = {
    "linear": p.contract("... i, o i, o -> ... o"),
    "mm": p.contract("n i, i m -> n m"),
    "bmm": p.contract("b n i, b i m -> b n m"),
    "mv": p.contract("n i, i -> n"),
    "dot": p.contract("i, i -> "),
    "baddbmm": p.plus("b n i, b i m -> b n m"), "addbmm": p.plus("b n i, b i m -> n m"),
    "outer": p.contract("n, m -> n m"),
    "bilinear": p.contract("... i, ... j, o i j, o -> ... o"),
    **dict.fromkeys("grid_sampler grid_sampler_2d grid_sampler_3d".split(),
                    p.contract("b c !*, b !* -> b c !*")),
    "_native_batch_norm_legit_no_training": p.contract("b c ..., c, c, c, c -> b c ..."),
    "instance_norm": p.contract("b c !*, c, c, c, c -> b c !*"),
    "pixel_shuffle": p.contract("... (c r r) h w -> ... c (h r) (w r)", r=(1, "r")),
    "pixel_unshuffle": p.contract("... c (h r) (w r) -> ... (c r r) h w", r=(1, "r")),
    "channel_shuffle": p.contract("b (g c) ... -> b (c g) ...", g=(1, "groups")),
}

_FUNCTIONS: dict[str, Row] = {
    "embedding": p.embedding, "matmul": p.matmul, "einsum": p.einsum,
    "transformers.grouped_mm_fallback": c.grouped_mm,
    "addmm": p.addmm,
    "batch_norm": p.batch_norm,
    "prelu": p.prelu,
    **dict.fromkeys("conv1d conv2d conv3d".split(), p.convolution),
    **dict.fromkeys("conv_transpose1d conv_transpose2d conv_transpose3d".split(),
                    p.transposed_convolution),
    "convolution": p.aten_convolution,
    "scaled_dot_product_attention": p.attention,
    **dict.fromkeys("view _unsafe_view reshape view_copy".split(), s.reshape),
    "reshape_as": s.reshape_as, "view_as": s.reshape_as, "glu": s.glu,
    "im2col": s.im2col, "col2im": s.col2im, "unfold": s.windows,
    "slice_scatter": w.slice_scatter, "select_scatter": w.select_scatter,
    **dict.fromkeys("scatter scatter_add scatter_reduce".split(), w.scatter),
    **dict.fromkeys("index_add index_copy index_fill".split(), w.index_write),
    "index_put": w.index_put, "_unsafe_index_put": w.index_put,
    "view_as_real": pairs.view_as_real, "view_as_complex": pairs.view_as_complex,
    "flatten": s.flatten, "unflatten": s.unflatten,
    **dict.fromkeys("permute numpy_T".split(), s.permute),
    **dict.fromkeys("transpose t mT swapaxes swapdims".split(), s.transpose),
    **dict.fromkeys("movedim moveaxis".split(), s.movedim),
    "unsqueeze": s.unsqueeze, "squeeze": s.squeeze,
    "expand": s.expand, "expand_as": p.pointwise,
    "repeat": s.tile, "tile": s.tile, "repeat_interleave": s.repeat_interleave,
    "cat": cut.cat, "concat": cut.cat, "concatenate": cut.cat, "stack": cut.stack,
    **dict.fromkeys("split split_with_sizes chunk unsafe_split unsafe_chunk".split(), cut.split),
    "unbind": cut.unbind, "select": cut.select, "slice": cut.slice_, "narrow": cut.narrow,
    "as_strided": cut.as_strided,
    "flip": cut.flip, "roll": cut.roll,
    "constant_pad_nd": cut.pad, "pad": cut.pad,
    "layer_norm": r.layer_norm, "rms_norm": r.rms_norm, "group_norm": r.group_norm,
    "_weight_norm": r.weight_norm,
    "index": r.index, "_unsafe_index": r.index, "index_select": r.index_select, "gather": r.gather,
    **dict.fromkeys("zeros ones full".split(), r.create(0)),
    **dict.fromkeys("new_zeros new_ones new_full new_empty".split(), r.create(1)),
}


_FROZEN: dict[str, Row] = {
    **dict.fromkeys("cond while_loop scan map_impl associative_scan".split(),
                    p.frozen("decides by data, and its branches are not entered")),
    **dict.fromkeys("stft istft".split(), p.frozen("mixes positions in windows")),
}

_RECURRENT: dict[str, Row] = {
    "lstm": recurrent.layers(4), "lstm_cell": recurrent.cell(4),
    "gru": recurrent.layers(3), "gru_cell": recurrent.cell(3),
    **{f"rnn_{act}": recurrent.layers(1) for act in ("tanh", "relu")},
    **{f"rnn_{act}_cell": recurrent.cell(1) for act in ("tanh", "relu")},
}


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = dict.fromkeys(_POINTWISE, p.pointwise)
    rows |= dict.fromkeys(_SAME, p.same)
    for spatial, names in _POOLING.items():
        rows |= dict.fromkeys(names.split(), r.last_frozen(spatial))
    rows |= _ALONG | _REDUCE | _PATTERNS | _FUNCTIONS | _RECURRENT | _FROZEN
    return rows | {name: c.carried(rows[name]) for name in _CARRY}


class _ByPacket(dict[str, Row]):
    """Rows by `aten.name.overload`, falling back to `name`."""

    def get(self, op: str, default: Row | None = None) -> Row:  # type: ignore[override]
        return dict.get(self, op) or dict.get(self, _packet(op), default)  # type: ignore[return-value]


@cache
def _packet(op: str) -> str:
    return op.removeprefix("aten.").rsplit(".", 1)[0]


TABLE: Mapping[str, Row] = _ByPacket(_rows())
