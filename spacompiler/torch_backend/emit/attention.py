"""nn.MultiheadAttention with fewer heads than its class can say.

The stock class takes the width of its heads together for the width of its input. Where a plan
removes heads, the module stays what it is, but its forward goes by the arrays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class NarrowAttention(nn.MultiheadAttention):
    """MultiheadAttention whose heads together are narrower than its input."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor,
                key_padding_mask: Tensor | None = None, need_weights: bool = True,
                attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return (result, weights or None), as the stock class does."""
        batched = query.ndim == 3
        inputs = [x if batched else x.unsqueeze(0 if self.batch_first else 1)
                  for x in (query, key, value)]
        q, k, v = self._heads([x if self.batch_first else x.transpose(0, 1) for x in inputs])
        mask = _mask(q, attn_mask, key_padding_mask)
        k, v, mask = self._with_own(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = functional.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = y if self.batch_first else y.transpose(0, 1)
        if batched:
            return y, weights
        return y.squeeze(0 if self.batch_first else 1), None if weights is None else weights[0]

    def _heads(self, inputs: list[Tensor]) -> list[Tensor]:
        """Project query, key and value: (batch, heads, positions, head_dim) each."""
        matrices = self.in_proj_weight.chunk(3) if self.in_proj_weight is not None else \
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [functional.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for x, w, b in zip(inputs, matrices, biases, strict=True)]


    def _with_own(self, k: Tensor, v: Tensor,
                  mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the key and value that the module holds, and those of zeros, if it has such."""
        held = [b for b in (self.bias_k, self.bias_v) if b is not None]
        own = [[b.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for b in held]] \
            if held else []
        if self.add_zero_attn:
            own.append([torch.zeros_like(x[:1, :, :1]) for x in (k, v)])
        for one in own:
            k, v = (torch.cat([x, b.expand(x.shape[0], -1, -1, -1)], 2)
                    for x, b in zip((k, v), one, strict=True))
        return k, v, mask if mask is None else functional.pad(mask, (0, len(own)))


def _mask(q: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """One mask to add, from those that the stock class takes (True: not attended to)."""
    masks = []
    if attention is not None:
        masks.append(attention if attention.ndim == 2 else
                     attention.unflatten(0, (q.shape[0], q.shape[1])))
    if padding is not None:
        masks.append(padding[..., None, None, :] if padding.ndim == 2 else padding)
    added = [torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -torch.inf)
             if m.dtype == torch.bool else m for m in masks]
    return sum(added[1:], added[0]) if added else None


def narrow(module: nn.Module) -> None:
    """Let every MultiheadAttention whose arrays lost heads go by its arrays."""
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention) and \
                type(part) in (nn.MultiheadAttention, NarrowAttention):
            inner = part.out_proj.weight.shape[1]
            first = part.q_proj_weight if part.in_proj_weight is None else part.in_proj_weight
            if inner != first.shape[1] and inner % part.head_dim == 0:
                part.__class__ = NarrowAttention
                part.num_heads = inner // part.head_dim
                part._qkv_same_embed_dim = False  # no fused kernel that takes widths as equal
