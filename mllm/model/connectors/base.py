"""What a connector promises."""

from __future__ import annotations

from torch import Tensor, nn

from mllm.errors import ConfigError

Text = Tensor | None  # [I, L]: ids or mask of the instruction; only instruction-aware connectors read them


class Connector(nn.Module):
    """Maps patch features to soft tokens of the language model."""

    out_dim: int  # width of the soft tokens: Dt, or Dv where a fusion reads the image at its own width

    reads_text: bool = False  # whether `forward` needs the instruction

    keeps_grid: bool = False  # whether a square of patches becomes a square of tokens, for tiling

    def num_tokens(self, num_patches: int) -> int:
        """M, the number of soft tokens for N patches; the processor asks once.

        Raises:
            ConfigError: this connector cannot take N patches.
        """
        raise NotImplementedError

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] -> [I, M, out_dim]."""
        raise NotImplementedError


def check_positive(**settings: int) -> None:
    """Raise ConfigError, naming the setting, unless every one is a whole number of at least 1."""
    for name, value in settings.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"connector: {name} is {value!r}; give a whole number of at least 1")
