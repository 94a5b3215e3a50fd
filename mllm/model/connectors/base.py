"""What a connector promises."""

from __future__ import annotations

import torch
from torch import nn


class Connector(nn.Module):
    """Maps patch features to soft tokens of the language model."""

    def num_tokens(self, num_patches: int) -> int:
        """M, the number of soft tokens for N patches; the processor asks once."""
        raise NotImplementedError

    def forward(self, features: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """[I, N, Dv] -> [I, M, Dt]; `text` is for connectors that read the instruction."""
        raise NotImplementedError
