"""Attention from the text's hidden states to image tokens, shared by the fusions that have it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class CrossAttention(nn.Module):
    """Multi-head attention of [B, S, D] to [B, K, Dm], without biases.

    Keys and values are projected outside, with `key_value`, so that this happens once an image, and not
    once a generated token.
    """

    def __init__(self, dim: int, media_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(media_dim, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, key_value: Tensor, mask: Tensor) -> Tensor:
        """Read the image tokens.

        Args:
            x: [B, S, D].
            key_value: [B, K, 2 * heads * head_dim].
            mask: [B, S or 1, K], true where a position may read.

        Returns:
            [B, S, D], zero at positions that may read nothing.
        """
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, S, d]
        key, value = key_value.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, K, d]
        blind = ~mask.any(-1, keepdim=True)  # [B, S or 1, 1]
        # A softmax over nothing is NaN: who may read nothing reads everything, and is zeroed below.
        read = scaled_dot_product_attention(query, key, value, attn_mask=(mask | blind).unsqueeze(1))
        return self.out(read.transpose(1, 2).flatten(2)).masked_fill(blind, 0)  # [B, S, D]
