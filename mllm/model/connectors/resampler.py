"""Learned latents read the patches by cross-attention (Flamingo, arXiv 2204.14198 section 3.1.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.activations import ACT2FN

from mllm.errors import ConfigError
from mllm.model.connectors.base import Connector, Text, check_positive


class ResamplerConnector(Connector):
    """Perceiver resampler; the defaults are OpenFlamingo's. Any number of patches gives `num_latents` tokens.

    Args:
        vision_dim: Dv, also the width inside.
        text_dim: Dt.
        num_latents: M.
        depth: number of blocks.
        heads: attention heads of a block.
        head_dim: width of a head; `heads * head_dim` need not be Dv.
        ff_mult: width inside the feed-forward block, in multiples of Dv.
        activation: transformers' name: `gelu` (OpenFlamingo), `relu` (Idefics), `relu2` (Flamingo).
        qk_norm: layer norm on the queries and keys of each head (Idefics).
        project: end with Linear(Dv, Dt). False leaves the tokens Dv wide, for gated cross-attention.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        num_latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 4,
        activation: str = "gelu",
        qk_norm: bool = False,
        project: bool = True,
    ):
        super().__init__()
        check_positive(num_latents=num_latents, depth=depth, heads=heads, head_dim=head_dim, ff_mult=ff_mult)
        if activation not in ACT2FN:
            raise ConfigError(f"resampler: unknown activation {activation!r}; use gelu, relu or relu2")
        self.out_dim = text_dim if project else vision_dim
        self.num_latents = num_latents
        self.latents = nn.Parameter(torch.randn(num_latents, vision_dim))  # [M, Dv]
        self.blocks = nn.ModuleList(
            _Block(vision_dim, heads, head_dim, ff_mult * vision_dim, activation, qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(vision_dim)
        self.proj = nn.Linear(vision_dim, text_dim) if project else nn.Identity()

    def num_tokens(self, num_patches: int) -> int:
        """One soft token a latent."""
        return self.num_latents

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] -> [I, M, out_dim]."""
        latents = self.latents.expand(len(features), -1, -1)  # [I, M, Dv]
        for block in self.blocks:
            latents = block(features, latents)
        return self.proj(self.norm(latents))


class _Block(nn.Module):
    """Cross-attention, then a feed-forward block; both pre-norm, with residuals and without biases."""

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, activation: str, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.norm_features, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.norm_query = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.norm_key = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden, bias=False),
            ACT2FN[activation],
            nn.Linear(hidden, dim, bias=False),
        )

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """[I, N, D], [I, M, D] -> [I, M, D]."""
        own = self.norm_latents(latents)
        # The latents are among the keys too: they read the patches and each other at once.
        source = torch.cat([self.norm_features(features), own], dim=1)  # [I, N + M, D]
        query = self.query(own).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [I, heads, M, d]
        key, value = self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = scaled_dot_product_attention(self.norm_query(query), self.norm_key(key), value)
        latents = latents + self.out(read.transpose(1, 2).flatten(2))  # [I, M, heads * d] -> [I, M, D]
        return latents + self.feed_forward(latents)
