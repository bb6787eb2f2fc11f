"""Every bound that a result is judged by, in one table, each with the reason for its value.

What a plan may miss its target by stands with the problem that it solves (`plan.problem.MISS`):
that is a share of a cost, not an error.

>>> PROOF.value, PROOF.bounds
(1e-10, 'pruned program against masked dense program, both in float64')
>>> max(row.value for row in TABLE.values()) < 1e-1 < min(row.value for row in FACTORS.values())
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A bound: its value (a relative error, see `comparison`), what it bounds, and why so much."""

    value: float
    bounds: str
    why: str


@dataclass(frozen=True, slots=True)
class Factor:
    """A multiple of a measured or known error, what it allows, and why so much."""

    value: float
    bounds: str
    why: str


PROOF = Tolerance(
    1e-10, "pruned program against masked dense program, both in float64",
    "other orders of summation differ by some 1e-14 a layer; a wrong slice by 1e-4 and more")
CONTROL = Tolerance(
    1e-4, "the least by which one wrong slice, or one more block bypassed, must show",
    "a check that a wrong network passes shows nothing; this lies far above every rounding")
CONTROL_FACTOR = Factor(
    10.0, "how far above what rounding may do a control must lie",
    "where rounding is not negligible, an error just above it could not be told from it")
ONNX_NOISE = Tolerance(
    1e-2, "the most that rounding may be granted where a proof must be made in float32",
    "more would let a wrong slice of a wide layer pass")
NOISE_FACTOR = Factor(
    64.0, "what rounding may do, in multiples of what a last bit in every weight does",
    "kernels round at every step of a sum, one perturbation samples that once")
LOCATED = Tolerance(
    1e-4, "the first operator that is named wrong, where a proof was made in float32",
    "inner values round as results do, and their largest may be small")

BYPASS = Tolerance(
    1e-5, "a network without blocks against the whole one that bypasses them, as stored",
    "the same kernels run on the same shapes: float32 rounds alike but for where arrays lie")
SAME_RESULTS = Tolerance(
    1e-4, "a module's own code against its traced or pruned program, in its own type",
    "float32 kernels chosen for other shapes and fused ones differ by some 1e-6 a layer")
WHOLE = Tolerance(
    1e-4, "a network with pruned parts against the dense one that calls them",
    "code between parts runs in float32, as their kernels do")
LIVE_FLOAT64 = Tolerance(
    1e-9, "a live float64 module after it shrank against its masked program",
    "its code may sum in another order than its program does")
LIVE_FLOAT32 = Tolerance(
    1e-4, "a live float32 module after it shrank against its masked program",
    "as a pruned module's own code (SAME_RESULTS)")
LIVE_FLOAT16 = Tolerance(
    2e-2, "a live float16 module after it shrank against its masked program",
    "a last bit is 1e-3 there, and layers add them up")
LIVE_BFLOAT16 = Tolerance(
    5e-2, "a live bfloat16 module after it shrank against its masked program",
    "a last bit is 8e-3 there, and layers add them up")

RELOAD_MODULE = Tolerance(
    1e-6, "a reloaded module against the one in memory, whose arrays are bit-equal",
    "kernels may round differently where an array lies elsewhere in memory")
RELOAD_FILE = Tolerance(
    1e-4, "a written ONNX file in ONNX Runtime against the model in memory",
    "a session optimises a file and a model in memory differently, in float32")
RECORDED = Tolerance(
    1e-4, "recorded results of an artifact against those of its reloaded model",
    "another machine or version runs other float32 kernels")
ONNX = Tolerance(
    1e-3, "ONNX Runtime against torch, of an exported file or decoder",
    "two runtimes fuse and sum differently in float32; a wrong file lies far above")

MERGED = Tolerance(
    1e-4, "a network with an adapter beside it against the one with it merged, in float32",
    "x(W + BA) is summed otherwise than xW + xBA")
MERGED_ROUNDING = Tolerance(
    1e-5, "differences of merged results that are rounding, however little an adapter changes",
    "below this float32 tells nothing apart")
OF_EFFECT = Tolerance(
    1e-2, "differences of merged results, as a share of what the adapter changes",
    "a merge that loses part of a small adapter would pass a bound on results alone")
MERGED_NOISE = Tolerance(
    1e-2, "the most that rounding may be granted where layers are merged right, one by one",
    "as ONNX_NOISE; more would hide a layer that shares an array with a merged one")
KEPT_ADAPTER = Tolerance(
    1e-4, "a pruned base with its cut adapter against the pruned merged model",
    "as MERGED, in a network that is pruned")
LOW_RANK = Tolerance(
    1e-5, "what a low-rank pair may miss of the difference of weights that it stands for",
    "factors are stored in float32; a rank too few misses a whole singular value")
WEIGHT_ROUNDING = Tolerance(
    3e-7, "what rounding adds to a difference of two float32 weights, as a share of the weight",
    "some bits of 2**-24 in each of the two")
TIED = Tolerance(
    1e-6, "two arrays that were one before adapters changed them alike",
    "the same change merged twice rounds in the last bits of float32")

FIXED_FACTOR = Tolerance(
    1e-5, "a factor that a module computes against the one that a file format fixes",
    "both are roots and powers rounded to float32; another formula differs by a percent and more")
SOLVED = Tolerance(
    1e-4, "a least-squares solution in float32, relative to itself, by one step of refinement",
    "below it the repair's own noise (few samples) is far larger; else it is solved in float64")

SITE = Tolerance(
    1e-3, "a sub-module's input against a value of the program that is taken for it",
    "other values of one shape differ altogether; a fused kernel's by rounding only")
CAUSAL = Tolerance(
    1e-5, "logits before a token that was exchanged, which may not depend on it",
    "a kernel of another shape rounds differently; attention to later tokens shows at once")

TABLE: Mapping[str, Tolerance] = MappingProxyType(
    {name: row for name, row in globals().items() if isinstance(row, Tolerance)})
FACTORS: Mapping[str, Factor] = MappingProxyType(
    {name: row for name, row in globals().items() if isinstance(row, Factor)})
