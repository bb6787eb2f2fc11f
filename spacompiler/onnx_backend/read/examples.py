"""Example inputs of an ONNX file: sizes for what varies, and values that the model can take.

Equal symbols have equal sizes, `past + sequence` is their sum, and what an operator asks of its
caches (the size of a head) is read off the operator.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from ...errors import SpaError
from .file import OnnxFile
from .shapes import Shape, sizes_of

INPUT_LIMIT = 2**27
GUESSES = 8
_SIDES = (64, 224, 32, 320, 299)
_LENGTHS = (8, 16, 64, 128)
_CACHES = {"GroupQueryAttention": (3, 4), "MultiHeadAttention": (6, 7), "Attention": (4, 5)}
"""Where operators of attention are given past keys and values, (batch, heads, past, head size)."""
Pick = Callable[[ir.Value, int], int]


def guess(file: OnnxFile, attempt: int) -> dict[str, Shape]:
    """Return concrete input sizes: what is fixed, and guesses for what varies."""
    batch, which = 2 if attempt < GUESSES // 2 else 1, attempt % (GUESSES // 2)

    def pick(value: ir.Value, d: int) -> int:
        image = value.shape is not None and len(value.shape) >= 4 and _cache(value) is None
        sides = _SIDES if image else _LENGTHS
        return batch if d == 0 else sides[which % len(sides)]

    return sizes(file, pick)


def sizes(file: OnnxFile, pick: Pick) -> dict[str, Shape]:
    """Return input sizes: `pick(value, dimension)` gives those that nothing else decides."""
    known: dict[str, int] = {}
    found: dict[str, dict[int, int]] = {}
    places = [(v, d, n) for v in file.inputs() for d, n in enumerate(v.shape or ())]
    for late in (False, True):  # sums come after what they add
        for value, d, n in places:
            symbol = getattr(n, "value", None) or ""
            if _is_sum(symbol) != late:
                continue
            size = n if isinstance(n, int) and n > 0 else known.get(symbol)
            if size is None:
                size = (_sum(symbol, known) if late else _asked(value, d)) or pick(value, d)
            found.setdefault(value.name or "", {})[d] = size
            if symbol:
                known.setdefault(symbol, size)
    return {v.name or "": tuple(n for _, n in sorted(found.get(v.name or "", {}).items()))
            for v in file.inputs()}


def _is_sum(symbol: str) -> bool:
    return any(sign in symbol for sign in "+-*") or symbol.startswith("total")


def _sum(symbol: str, known: Mapping[str, int]) -> int | None:
    """The size that a symbol such as `past + sequence` or `total_length` stands for."""
    if symbol.startswith("total"):
        parts = [next((n for s, n in known.items() if s.startswith(word)), 0)
                 for word in ("past", "seq")]
        return sum(parts) if all(parts) else None
    try:
        return _evaluated(ast.parse(symbol, mode="eval").body, known)
    except (SyntaxError, KeyError, ValueError, RecursionError):
        return None


def _evaluated(e: ast.expr, known: Mapping[str, int]) -> int:
    if isinstance(e, ast.Name):
        return known[e.id]
    if isinstance(e, ast.Constant) and isinstance(e.value, int):
        return e.value
    if isinstance(e, ast.BinOp):
        one, other = _evaluated(e.left, known), _evaluated(e.right, known)
        for kind, made in ((ast.Add, one + other), (ast.Sub, one - other),
                           (ast.Mult, one * other)):
            if isinstance(e.op, kind):
                return made
    raise ValueError("no sum of sizes")


def _cache(value: ir.Value) -> ir.Node | None:
    """The operator that an input is the cache of."""
    return next((n for n, i in value.uses() if i in _CACHES.get(n.op_type, ())), None)


def _asked(value: ir.Value, d: int) -> int | None:
    """The size of a head, where it is asked for by the operator that reads a cache."""
    node = _cache(value) if d == 3 else None
    if node is None:
        return None
    heads, kv = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    heads = heads or node.attributes.get_int("q_num_heads", 0)
    keys = node.inputs[1] if len(node.inputs) > 1 else None
    width = _width(node.inputs[0])
    if width is None or not heads:
        return None
    return width // (heads if keys is not None and keys.name else heads + 2 * (kv or heads))


def _width(value: ir.Value | None) -> int | None:
    """The last dimension of a product with stored weights, or of what is added to one."""
    maker = value.producer() if value is not None else None
    if maker is None:
        return None
    if "N" in maker.attributes:
        return maker.attributes["N"].as_int()
    for other in maker.inputs:
        if other is not None and other.const_value is not None and \
                maker.op_type in ("MatMul", "Add") and sizes_of(other.const_value):
            return sizes_of(other.const_value)[-1]
    return _width(maker.inputs[0]) if maker.op_type in ("Add", "Cast", "Identity") else None


def example(file: OnnxFile, sizes: Mapping[str, Shape], seed: int = 0) -> dict[str, np.ndarray]:
    """Return seeded inputs of these sizes; integers are valid indices where tables are looked up.
    """
    rng = np.random.default_rng(seed)
    for name, shape in sizes.items():
        if np.prod(shape, dtype=float) > INPUT_LIMIT:
            raise SpaError(f"input {name!r} has the absurd shape {list(shape)}",
                           fix="the file is damaged, or its inputs need other sizes "
                               "(example inputs from Python)")
    return {v.name or "": _values(v, sizes[v.name or ""], rng) for v in file.inputs()}


def _values(value: ir.Value, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    if np.issubdtype(dtype, np.integer):
        rows = _rows_looked_up(value, set())
        high = min(rows) if rows else 0
        return (rng.integers(0, high, shape) if high else np.ones(shape)).astype(dtype)
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    if dtype.kind not in "fV" and dtype.name not in ("bfloat16", "float16"):
        raise SpaError(f"no example is known for input {value.name!r} of type {dtype}",
                       fix="give example inputs (--calibration inputs.npz)")
    return rng.standard_normal(shape).astype(dtype)


def _rows_looked_up(value: ir.Value, seen: set[str]) -> list[int]:
    """Sizes of the tables that an integer input is an index of."""
    found: list[int] = []
    if value.name in seen or len(seen) > 50:
        return found
    seen.add(value.name or "")
    for node, place in value.uses():
        table = node.inputs[0] if node.inputs else None
        if node.op_type == "Gather" and place == 1 and table is not None \
                and table.const_value is not None:
            found.append(sizes_of(table.const_value)[node.attributes.get_int("axis", 0)])
        elif node.op_type == "EmbedLayerNormalization" and place < 2:
            stored = node.inputs[2 + 2 * place]
            if stored is not None and stored.const_value is not None:
                found.append(sizes_of(stored.const_value)[0])
        elif node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Expand",
                              "Slice", "Transpose"):
            found += _rows_looked_up(node.outputs[0], seen)
    return found
