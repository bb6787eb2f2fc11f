"""A small language model of single bytes, trained on the text that every Python carries."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from spacompiler.evidence.calibration import python_text

LENGTH = 128


def windows(part: str = "calibration", length: int = LENGTH) -> torch.Tensor:
    """Return the bytes of a part of Python's language topics as windows (n, length)."""
    ids = torch.frombuffer(bytearray(python_text(part).encode()), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].reshape(-1, length)


def trained(*, steps: int = 300, seed: int = 0) -> Any:
    """Return a Llama of four layers, 128 wide, after so many steps on eight windows each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = windows()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2 * LENGTH))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in range(steps):
            ids = text[torch.randint(len(text), (8,))]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            pace.step()
    return model.eval()
