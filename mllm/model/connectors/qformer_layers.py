"""One layer of the Q-Former: BERT's post-norm blocks, with cross-attention and a feed-forward for queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention, then residual and layer norm, as in BERT."""

    def __init__(self, width: int, heads: int, context_dim: int, dropout: float, eps: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_dim, width)
        self.value = nn.Linear(context_dim, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, S, D] reads context [B, N, Dc] where mask (broadcast to [B, heads, S, N]) is True."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, S or N, D / heads]
            for y in (self.query(x), self.key(context), self.value(context))
        )
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2)  # [B, S, D]
        return self.norm(x + self.dropout(self.out(y)))


class FeedForward(nn.Module):
    """Two linear layers with the exact GELU between them, then residual and layer norm: [B, S, D] kept."""

    def __init__(self, width: int, intermediate: int, dropout: float, eps: float):
        super().__init__()
        self.up = nn.Linear(width, intermediate)
        self.down = nn.Linear(intermediate, width)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class QFormerLayer(nn.Module):
    """Self-attention over [queries; text]; cross-attention of the queries; a feed-forward each.

    Args:
        vision_dim: Dv; None for a layer without cross-attention.
    """

    def __init__(
        self, width: int, heads: int, intermediate: int, vision_dim: int | None, dropout: float, eps: float
    ):
        super().__init__()
        self.attention = Attention(width, heads, width, dropout, eps)
        self.cross_attention = (
            None if vision_dim is None else Attention(width, heads, vision_dim, dropout, eps)
        )
        self.query_mlp = FeedForward(width, intermediate, dropout, eps)
        self.text_mlp: FeedForward | None = None  # see QFormer.add_text_branch

    def forward(self, x: Tensor, num_queries: int, features: Tensor | None, mask: Tensor | None) -> Tensor:
        """[B, Q + T, D] -> [B, Q + T, D]; features [B, N, Dv], mask broadcast to [B, heads, Q + T, Q + T]."""
        x = self.attention(x, x, mask)
        queries, text = x[:, :num_queries], x[:, num_queries:]  # [B, Q, D], [B, T, D]
        if num_queries:
            if self.cross_attention is not None:
                queries = self.cross_attention(queries, features)
            queries = self.query_mlp(queries)
        if self.text_mlp is not None:
            text = self.text_mlp(text)
        return torch.cat([queries, text], dim=1)
