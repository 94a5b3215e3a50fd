"""Two or more linear layers with GELU between them (LLaVA-1.5, arXiv 2310.03744: `mlp2x_gelu`)."""

from __future__ import annotations

from torch import Tensor, nn

from mllm.errors import ConfigError
from mllm.model.connectors.base import Connector, Text


class MlpConnector(Connector):
    """Linear(Dv, Dt), then (GELU, Linear(Dt, Dt)) `depth - 1` times, on every patch.

    Args:
        vision_dim: Dv.
        text_dim: Dt.
        depth: number of linear layers; LLaVA-1.5 has 2. GELU is the exact one.
    """

    keeps_grid = True

    def __init__(self, vision_dim: int, text_dim: int, depth: int = 2):
        super().__init__()
        self.out_dim = text_dim
        if depth < 2:
            raise ConfigError(f"connector 'mlp' needs depth >= 2, found {depth}; use 'linear' for one layer")
        layers: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
        self.layers = nn.Sequential(*layers)

    def num_tokens(self, num_patches: int) -> int:
        """One soft token a patch."""
        return num_patches

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] -> [I, N, Dt]."""
        return self.layers(features)
