"""Neighbouring patches become one token (MiniGPT-v2, arXiv 2310.09478 section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from mllm.errors import ConfigError
from mllm.model.connectors.base import Connector, Text, check_positive


class ConcatLinearConnector(Connector):
    """Concatenates `factor` consecutive patches of the row-major grid, a strip and not a square, then Linear.

    Args:
        vision_dim: Dv.
        text_dim: Dt.
        factor: patches in a token; MiniGPT-v2 and MiniGPT-4 with LLaMA-2 have 4.
    """

    def __init__(self, vision_dim: int, text_dim: int, factor: int = 4):
        super().__init__()
        check_positive(factor=factor)
        self.out_dim = text_dim
        self.factor = factor
        self.proj = nn.Linear(vision_dim * factor, text_dim)

    def num_tokens(self, num_patches: int) -> int:
        """N / factor."""
        if num_patches % self.factor:
            raise ConfigError(
                f"concat_linear: factor {self.factor} does not divide {num_patches} patches; "
                "use a divisor, and no class token"
            )
        return num_patches // self.factor

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] -> [I, N / factor, Dt]."""
        tokens = self.num_tokens(features.shape[1])
        return self.proj(features.reshape(-1, tokens, self.factor * features.shape[-1]))
