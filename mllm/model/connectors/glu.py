"""A gated MLP on every patch, between two learned border tokens (CogVLM, arXiv 2311.03079)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mllm.errors import ConfigError
from mllm.model.connectors.base import Connector, Text, check_positive


class GluConnector(Connector):
    """Unbiased Linear, LayerNorm, GELU, gated MLP on every patch, between learned begin and end tokens.

    Args:
        vision_dim: Dv.
        text_dim: Dt.
        intermediate: width inside the gated MLP.
        num_positions: N of a learned position embedding in front; 0 is none (CogVLM), CogAgent has 256.
    """

    def __init__(self, vision_dim: int, text_dim: int, intermediate: int = 11008, num_positions: int = 0):
        super().__init__()
        check_positive(intermediate=intermediate)
        if not isinstance(num_positions, int) or num_positions < 0:
            raise ConfigError(f"glu: num_positions is {num_positions!r}; give the number of patches, or 0")
        self.out_dim = text_dim
        self.num_positions = num_positions
        self.positions = nn.Parameter(torch.zeros(num_positions, vision_dim)) if num_positions else None
        self.stem = nn.Sequential(
            nn.Linear(vision_dim, text_dim, bias=False), nn.LayerNorm(text_dim), nn.GELU()
        )
        self.gate = nn.Linear(text_dim, intermediate, bias=False)
        self.up = nn.Linear(text_dim, intermediate, bias=False)
        self.down = nn.Linear(intermediate, text_dim, bias=False)
        self.begin = nn.Parameter(torch.zeros(text_dim))
        self.end = nn.Parameter(torch.zeros(text_dim))

    def num_tokens(self, num_patches: int) -> int:
        """One soft token a patch, and two borders."""
        if self.num_positions not in (0, num_patches):
            raise ConfigError(
                f"glu: num_positions is {self.num_positions}, found {num_patches} patches; use that, or 0"
            )
        return num_patches + 2

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] -> [I, N + 2, Dt]."""
        self.num_tokens(features.shape[1])  # one position would broadcast over any number of patches
        if self.positions is not None:
            features = features + self.positions
        x = self.stem(features)
        x = self.down(silu(self.gate(x)) * self.up(x))  # [I, N, Dt]
        begin, end = (border.expand(len(x), 1, -1) for border in (self.begin, self.end))
        return torch.cat([begin, x, end], dim=1)
