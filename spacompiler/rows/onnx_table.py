"""The table of ONNX operators: one line says how an operator relates axes.

A line is `row, spec`: the row (most serve torch's operators, too) and where the row's arguments
stand in the ONNX node. In a spec

    0            input 0, a tensor (None where it is absent)
    *            all inputs as one list; `..` all inputs as single arguments
    #1           the numbers in input 1, which must be known (a list, or one number)
    @axis        an attribute; `@axis=0` with its default
    #1|@axes     whichever is there: what newer versions of an operator made an input
    _            nothing;  `=1` a plain number
    :sizes       computed from the node, by name (see `COMPUTED`)

A key is the operator's type; other domains than ONNX's own go before it (`com.microsoft.Gelu`).
To teach the compiler an operator, add a line (and a case in tests/onnx_backend/test_onnx.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from . import cuts as cut
from . import onnx_bodies as b
from . import onnx_caches as c
from . import onnx_integers as i
from . import onnx_rows as o
from . import primitives as p
from . import reductions as r
from . import shapes as s
from . import writes as w
from .solver import Row


class Op(NamedTuple):
    """A row and the spec of its arguments."""

    row: Row
    spec: str = ".."


def _each(names: str, row: Row, spec: str = "..", domain: str = "") -> dict[str, Op]:
    return {domain + name: Op(row, spec) for name in names.split()}


MS = "com.microsoft."

_POINTWISE = """
Add Sub Mul Div Mod Pow Min Max Mean Sum BitShift BitwiseAnd BitwiseOr BitwiseXor BitwiseNot And Or
Xor Not Equal Greater GreaterOrEqual Less LessOrEqual Where Abs Neg Sign Exp Log Sqrt Reciprocal
Sin Cos Tan Asin Acos Atan Sinh Cosh Tanh Asinh Acosh Atanh Erf Sigmoid HardSigmoid Relu LeakyRelu
ThresholdedRelu Elu Selu Celu Gelu Mish HardSwish Swish Softplus Softsign Shrink Clip Ceil Floor
Round IsInf IsNaN SwiGLU
"""
_SAME = """
Identity Cast CastLike Dropout Bernoulli RandomNormalLike RandomUniformLike BitCast
"""
_FIXED = """
Range Constant RandomNormal RandomUniform EyeLike Shape Size HannWindow HammingWindow
BlackmanWindow MelWeightMatrix
"""
_SEQUENCES = """
SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap
SplitToSequence ConcatFromSequence Optional OptionalGetElement OptionalHasElement
"""
_TEXT = "StringConcat StringNormalizer StringSplit RegexFullMatch TfIdfVectorizer ImageDecoder"

STANDARD: dict[str, Op] = {
    **_each(_POINTWISE, p.pointwise), **_each(_SAME, p.same, "0"), "PRelu": Op(p.pointwise),
    # products
    "MatMul": Op(p.matmul, "0 1"),
    "Gemm": Op(o.gemm, "0 1 2 @transA=0 @transB=0 @alpha=1.0 @beta=1.0"),
    "Einsum": Op(p.einsum, "@equation *"),
    "Conv": Op(p.convolution, "0 1 2 :strides :padding :dilations @group=1"),
    "ConvTranspose": Op(p.transposed_convolution, "0 1 2 _ _ _ @group=1"),
    "DeformConv": Op(p.frozen("offsets belong to groups of channels")),
    "Attention": Op(o.attention, "0 1 2 3 4 5 @q_num_heads @kv_num_heads @scale"),
    "RotaryEmbedding": Op(o.rotary, "0 1 2 3 @num_heads=0 @rotary_embedding_dim=0"),
    "LinearAttention": Op(c.linear_attention, "0 1 2 3 4 5 @q_num_heads @kv_num_heads @scale"),
    "CausalConvWithState": Op(c.causal_conv, "0 1 2 3"),
    "TensorScatter": Op(c.tensor_scatter, "0 1 2 @axis=-2"),
    "RNN": Op(o.recurrent(1, 1), "0 1 2 3 4 5 _ _ @hidden_size @layout=0"),
    "GRU": Op(o.recurrent(3, 1), "0 1 2 3 4 5 _ _ @hidden_size @layout=0"),
    "LSTM": Op(o.recurrent(4, 2), "0 1 2 3 4 5 6 7 _ @hidden_size @layout=0"),
    # norms
    "BatchNormalization": Op(p.batch_norm, "0 1 2 3 4 @training_mode=0"),
    "InstanceNormalization": Op(p.contract("b c !*, c, c -> b c !*"), "0 1 2"),
    "GroupNormalization": Op(o.group_norm, "0 @num_groups 1 2"),
    "LayerNormalization": Op(r.layer_norm, "0 :normalised 1 2 @epsilon=1e-5"),
    "RMSNormalization": Op(r.rms_norm, "0 :normalised 1 @epsilon=1e-5"),
    "SimplifiedLayerNormalization": Op(r.rms_norm, "0 :normalised 1 @epsilon=1e-5"),
    "LpNormalization": Op(r.along(), "0 @axis=-1"),
    "MeanVarianceNormalization": Op(r.along(), "0 @axes=[0,2,3]"),
    "LRN": Op(r.along(), "0 =1"),
    # shapes
    "Reshape": Op(s.reshape, "0 #1"), "Flatten": Op(s.flatten, "0"),
    "Transpose": Op(s.permute, "0 @perm"),
    "Squeeze": Op(s.squeeze, "0 #1|@axes"), "Unsqueeze": Op(o.unsqueeze, "0 #1|@axes"),
    "Expand": Op(o.expand, "0 #1"), "Tile": Op(s.tile, "0 #1"),
    "Concat": Op(cut.cat, "* @axis=1"),
    "Split": Op(cut.split, "0 :pieces @axis=0"),
    "Slice": Op(o.slice_, "0 #1|@starts #2|@ends #3|@axes #4"),
    "Pad": Op(cut.pad, "0 :pads @mode='constant'"),
    "DepthToSpace": Op(o.depth_to_space, "0 @blocksize @mode='DCR'"),
    "SpaceToDepth": Op(p.contract("b c (h r) (w r) -> b (r r c) h w", r=(1, "r")),
                       "0 @blocksize"),
    "ConstantOfShape": Op(r.create(0), "#0"),
    "Resize": Op(o.resize, "0 @axes #3 @keep_aspect_ratio_policy "
                           "@coordinate_transformation_mode"),
    "Upsample": Op(o.resize, "0"),
    # lookups
    "Gather": Op(o.gather, "0 @axis=0 :index"),
    "GatherElements": Op(r.gather, "0 @axis=0 1"), "GatherND": Op(o.gather_nd, "0 1 @batch_dims=0"),
    "ScatterND": Op(o.scatter_nd, "0 1 2"),
    **_each("ScatterElements Scatter", w.scatter, "0 @axis=0 1 2"),
    "OneHot": Op(p.frozen("makes an axis of classes")),
    "TopK": Op(r.along(why=r.SCORES), "0 @axis=-1"),
    **_each("CumSum CumProd", r.along(), "0 #1"),
    "ReverseSequence": Op(r.along(), "0 @time_axis=0"), "Trilu": Op(r.triangle, "0"),
    **_each("Softmax LogSoftmax Hardmax", r.along(why=r.SCORES), "0 :softmax"),
    # reductions: those that zeros do not change are read, the others freeze
    **_each("ReduceSum ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum", r.reduce("sum"),
            "0 #1|@axes"),
    "ReduceMean": Op(r.reduce("mean"), "0 #1|@axes"),
    **_each("ReduceMax ReduceMin ReduceProd ReduceLogSumExp", r.reduce("other"), "0 #1|@axes"),
    **_each("ArgMax ArgMin", r.reduce("other"), "0 @axis=0"),
    # windows
    **_each("MaxPool AveragePool LpPool GlobalMaxPool GlobalAveragePool GlobalLpPool",
            r.first_dims(2), "0"),
    **_each("RoiAlign MaxRoiPool", o.region_align),
    "GridSample": Op(o.region_align, "0 1"),
    # numbers of fewer bits
    **_each("QuantizeLinear DequantizeLinear", o.quantize, "0 1 2 @axis=1"),
    "DynamicQuantizeLinear": Op(i.dynamic_quantize, "0"),
    "ConvInteger": Op(i.convolution(0, 1, 7, window=4, per_output=(3,), single=(2,)),
                      "0 1 2 3 :strides :padding :dilations @group=1"),
    "MatMulInteger": Op(i.matmul(0, 1, per_output=(3,), single=(2,)), "0 1 2 3"),
    "QLinearConv": Op(i.convolution(0, 3, 12, window=9, per_output=(4, 5, 8),
                                    single=(1, 2, 6, 7)),
                      "0 1 2 3 4 5 6 7 8 :strides :padding :dilations @group=1"),
    "QLinearMatMul": Op(i.matmul(0, 3, per_output=(4, 5), single=(1, 2, 6, 7)),
                        "0 1 2 3 4 5 6 7"),
    # what nothing passes
    **_each(_FIXED, p.frozen("makes numbers from sizes")),
    **_each(_SEQUENCES, p.frozen("works on sequences")),
    **_each(_TEXT, p.frozen("works on text or bytes")),
    "If": Op(b.branches, "0 :branches"), **_each("Loop Scan", b.repeat, ":body"),
    **_each("NonZero Unique Compress NonMaxSuppression Multinomial", p.frozen("depends on data")),
    **_each("MaxUnpool Col2Im CenterCropPad AffineGrid", p.frozen("writes by place")),
    "Det": Op(p.frozen("mixes rows and columns")),
    **_each("DFT STFT", p.frozen("mixes positions")),
    **_each("SoftmaxCrossEntropyLoss NegativeLogLikelihoodLoss", p.frozen("mixes classes")),
}

CONTRIB: dict[str, Op] = {
    **_each("Gelu FastGelu QuickGelu BiasGelu BiasSplitGelu", p.pointwise, domain=MS),
    MS + "BiasDropout": Op(p.pointwise, "0 1 2"),
    MS + "BiasSoftmax": Op(p.frozen("mixes positions")),
    MS + "BiasAdd": Op(p.pointwise),
    MS + "FusedConv": Op(o.fused_conv, "0 1 2 @group=1 3"),
    MS + "FusedGemm": Op(o.gemm, "0 1 2 @transA=0 @transB=0"),
    **_each("FusedMatMul TransposeMatMul", o.fused_matmul, "0 1 @transA=0 @transB=0", MS),
    MS + "FusedMatMulActivation": Op(o.fused_matmul, "0 1 @transA=0 @transB=0"),
    MS + "SkipLayerNormalization": Op(o.skip_norm(r.layer_norm, 5),
                                      "0 :last 2 3 @epsilon=1e-5 1 4"),
    MS + "SkipSimplifiedLayerNormalization": Op(o.skip_norm(r.rms_norm, 4),
                                                "0 :last 2 @epsilon=1e-5 1 3"),
    MS + "EmbedLayerNormalization": Op(o.embed_layer_norm, "0 1 2 3 4 5 6"),
    MS + "Attention": Op(o.packed_attention, "0 1 2 3 _ _ @num_heads _ @scale @qkv_hidden_sizes"),
    MS + "MultiHeadAttention": Op(o.attention, "0 1 2 4 6 7 @num_heads _ @scale 3"),
    MS + "GroupQueryAttention": Op(o.group_query,
                                    "0 1 2 _ 3 4 @num_heads @kv_num_heads @scale _ @do_rotary=0"),
    MS + "RotaryEmbedding": Op(o.rotary, "0 2 3 1 @num_heads=0 @rotary_embedding_dim=0"),
    MS + "GroupNorm": Op(p.frozen("is a fused norm of channels last")),
    **_each("QuantizeLinear DequantizeLinear", o.quantize, "0 1 2 @axis=1", MS),
    MS + "MatMulNBits": Op(i.matmul_blocks, "0 1 2 3 4 5 @K @N"),
    MS + "MoE": Op(i.experts, "0 1 2 3 4 5 6 7 @swiglu_fusion=0"),
    **_each("QLinearAdd QLinearMul QLinearSigmoid QLinearLeakyRelu QLinearConcat QLinearSoftmax "
            "QLinearGlobalAveragePool QLinearAveragePool QLinearWhere QLinearReduceMean QGemm "
            "QAttention DynamicQuantizeMatMul MatMulIntegerToFloat DynamicQuantizeLSTM "
            "NhwcMaxPool QMoE QLinearConv",
            p.frozen("removed integers are not zero where the zero point is not"), domain=MS),
}

_NCHWC = """
Conv MaxPool AveragePool GlobalMaxPool GlobalAveragePool Upsample ReorderInput ReorderOutput
"""
CONTRIB.update(_each(_NCHWC, p.frozen(
    "is laid out for the vectors of one processor (optimise the file after pruning, or at the "
    "level 'extended')"), domain=MS + "nchwc."))

_STARTS = {name + b.START: Op(b.start) for name in ("Loop", "Scan")}

OPS: Mapping[str, Op] = {**STANDARD, **_STARTS, **CONTRIB}
TABLE: Mapping[str, Row] = {key: op.row for key, op in OPS.items()}