"""A square of patches becomes one token (nanoVLM; Idefics3, arXiv 2408.12637)."""

from __future__ import annotations

from math import isqrt

from torch import Tensor, nn

from mllm.errors import ConfigError
from mllm.model.connectors.base import Connector, Text, check_positive


class PixelShuffleConnector(Connector):
    """Concatenates each `factor` x `factor` square of patches, then Linear(Dv * factor^2, Dt) without bias.

    Args:
        vision_dim: Dv.
        text_dim: Dt.
        factor: patches along one side of a square; nanoVLM has 4 (v0.1: 2).
    """

    keeps_grid = True

    def __init__(self, vision_dim: int, text_dim: int, factor: int = 2):
        super().__init__()
        check_positive(factor=factor)
        self.out_dim = text_dim
        self.factor = factor
        self.proj = nn.Linear(vision_dim * factor**2, text_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=0.02)  # nanoVLM's

    def num_tokens(self, num_patches: int) -> int:
        """N / factor^2; the patches must form a square grid whose side `factor` divides."""
        side = isqrt(num_patches)
        if side**2 != num_patches or side % self.factor:
            raise ConfigError(
                f"pixel_shuffle: factor {self.factor} cannot group {num_patches} patches; "
                "use a square grid without class token, whose side is a multiple of the factor"
            )
        return num_patches // self.factor**2

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] -> [I, N / factor^2, Dt]."""
        tokens, f = self.num_tokens(features.shape[1]), self.factor
        side = isqrt(tokens)
        grid = features.unflatten(1, (side, f, side, f))  # [I, row, row in it, column, column in it, Dv]
        squares = grid.transpose(2, 3).reshape(-1, tokens, f * f * features.shape[-1])
        return self.proj(squares)
