"""One pooled vector an image becomes a prefix (Frozen, arXiv 2106.13884; ClipCap, arXiv 2111.09734)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mllm.errors import ConfigError
from mllm.model.connectors.base import Connector, Text, check_positive


class MappingNetworkConnector(Connector):
    """A pooled image vector -> `prefix_length` soft tokens.

    Args:
        vision_dim: Dv.
        text_dim: Dt.
        kind: `linear` (Frozen), `mlp` (ClipCap with a finetuned language model: half the output's width
            inside, tanh) or `transformer` (ClipCap with a frozen one).
        prefix_length: M; Frozen has 2.
        clip_length: transformer: tokens made of the image vector, which the prefix reads.
        layers: transformer: number of layers.
        heads: transformer: attention heads; must divide Dt.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        kind: Literal["linear", "mlp", "transformer"] = "mlp",
        prefix_length: int = 10,
        clip_length: int = 10,
        layers: int = 8,
        heads: int = 8,
    ):
        super().__init__()
        check_positive(prefix_length=prefix_length, clip_length=clip_length, layers=layers, heads=heads)
        self.out_dim = text_dim
        self.prefix_length = prefix_length
        width = prefix_length * text_dim
        self.network: nn.Module
        if kind == "linear":
            self.network = nn.Linear(vision_dim, width)
        elif kind == "mlp":
            self.network = nn.Sequential(
                nn.Linear(vision_dim, width // 2), nn.Tanh(), nn.Linear(width // 2, width)
            )
        elif kind == "transformer":
            self.network = _Transformer(vision_dim, text_dim, prefix_length, clip_length, layers, heads)
        else:
            raise ConfigError(f"mapping_network: unknown kind {kind!r}; use linear, mlp or transformer")

    def num_tokens(self, num_patches: int) -> int:
        """`prefix_length`; the image must be one vector."""
        if num_patches != 1:
            raise ConfigError(
                f"mapping_network: reads one pooled vector an image, found {num_patches}; "
                "use an encoder's pooled output, or another connector for patches"
            )
        return self.prefix_length

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, 1, Dv] -> [I, M, Dt]."""
        tokens = self.num_tokens(features.shape[1])
        return self.network(features.squeeze(1)).reshape(-1, tokens, self.out_dim)


class _Transformer(nn.Module):
    """Learned prefix tokens attend to tokens made of the image vector, and to each other."""

    def __init__(
        self, vision_dim: int, text_dim: int, prefix_length: int, clip_length: int, layers: int, heads: int
    ):
        super().__init__()
        if text_dim % heads:
            raise ConfigError(f"mapping_network: {heads} heads do not divide text width {text_dim}")
        self.expand = nn.Linear(vision_dim, clip_length * text_dim)
        self.prefix = nn.Parameter(torch.randn(prefix_length, text_dim))  # [M, Dt]
        self.layers = nn.Sequential(*(_Layer(text_dim, heads) for _ in range(layers)))

    def forward(self, vector: Tensor) -> Tensor:
        """[I, Dv] -> [I, M, Dt]."""
        prefix = self.prefix.expand(len(vector), -1, -1)  # [I, M, Dt]
        image = self.expand(vector).unflatten(-1, (-1, prefix.shape[-1]))  # [I, clip_length, Dt]
        return self.layers(torch.cat([image, prefix], dim=1))[:, image.shape[1] :]


class _Layer(nn.Module):
    """Self-attention in both directions, then a ReLU feed-forward block; both pre-norm, with residuals."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)  # unbiased, unlike the other projections
        self.out = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[I, S, D] -> [I, S, D]."""
        split = self.query_key_value(self.norm(x)).unflatten(-1, (3, self.heads, -1))  # [I, S, 3, heads, d]
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [I, heads, S, d]
        read = scaled_dot_product_attention(query, key, value)
        x = x + self.out(read.transpose(1, 2).flatten(2))  # [I, S, heads * d] -> [I, S, D]
        return x + self.feed_forward(x)
