"""Language models with real weights that benchmarks of quality and recovery are run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spacompiler.sources import named


@dataclass(frozen=True)
class LanguageModel:
    """A model of the zoo, what tables call it, and how many windows of 512 tokens are run at once.

    Logits of 512 tokens are 100 MB of 49,152 words, and 537 MB of 262,144.
    """

    source: str
    title: str
    batch: int = 2

    def load(self) -> Any:
        """Return the module, example inputs and tokenizer."""
        return named.load(self.source)


MODELS = {"smollm2": LanguageModel("zoo:smollm2-135m", "SmolLM2-135M-Instruct"),
          "gemma3": LanguageModel("zoo:gemma3-270m", "Gemma 3 270M", batch=1)}
