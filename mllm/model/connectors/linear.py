"""One linear layer (LLaVA v1, arXiv 2304.08485 section 4.1)."""

from __future__ import annotations

from torch import Tensor, nn

from mllm.model.connectors.base import Connector, Text


class LinearConnector(Connector):
    """`y = W x + b` on every patch.

    Args:
        vision_dim: Dv.
        text_dim: Dt.
    """

    keeps_grid = True

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        self.out_dim = text_dim
        self.proj = nn.Linear(vision_dim, text_dim)

    def num_tokens(self, num_patches: int) -> int:
        """One soft token a patch."""
        return num_patches

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] -> [I, N, Dt]."""
        return self.proj(features)
