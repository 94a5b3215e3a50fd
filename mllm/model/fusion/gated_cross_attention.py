"""Gated cross-attention in front of a frozen language model's layers (Flamingo, arXiv 2204.14198)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.errors import ConfigError
from mllm.model.fusion.base import Fusion, image_slots
from mllm.model.fusion.cross_attention import CrossAttention


class Media(NamedTuple):
    """What the blocks of one call read."""

    key_value: dict[str, Tensor]  # of each block: [B, T * M, 2 * heads * head_dim]
    mask: Tensor  # [B, S, T * M], true where a position reads


class GatedCrossAttention(Fusion):
    """A gated block in front of every `every`-th layer; the defaults are OpenFlamingo's.

    An image takes one position of the sequence, with an embedding that is learned here. From there to the
    next image every position reads that image and no other; text before the first image reads none. The
    gates start closed: at first the model computes what its language model does, bit for bit.

    Args:
        text_config: configuration of the language model.
        media_dim: width of the connector's tokens; Dv with a resampler that has `project: false`.
        media_tokens: M.
        every: layers a block.
        first: whether the first block stands before the first layer (Flamingo) or before layer `every - 1`,
            counted from 0 (OpenFlamingo).
        heads: attention heads of a block.
        head_dim: width of a head.
        ff_mult: width inside the feed-forward block, in multiples of Dt.
        activation: a name known to transformers: `gelu` (OpenFlamingo) or `relu2` (Flamingo).
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        media_dim: int,
        media_tokens: int,
        every: int = 4,
        first: bool = False,
        heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 4,
        activation: str = "gelu",
    ):
        super().__init__()
        dim, depth = text_config.hidden_size, text_config.num_hidden_layers
        if activation not in ACT2FN:
            raise ConfigError(f"gated_cross_attention: unknown activation {activation!r}; use gelu or relu2")
        if heads < 1 or head_dim < 1 or ff_mult < 1:
            raise ConfigError("gated_cross_attention: heads, head_dim and ff_mult must be at least 1")
        if every < 1 or (every > depth and not first):
            raise ConfigError(
                f"gated_cross_attention: every is {every}, but there are {depth} layers; use 1 to {depth}"
            )
        self.image_embedding = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks: Any = nn.ModuleDict(
            {
                str(index): GatedBlock(dim, media_dim, heads, head_dim, ff_mult * dim, activation)
                for index in range(0 if first else every - 1, depth, every)
            }
        )

    def num_placeholders(self, media_tokens: int) -> int:
        """One position an image, whatever the number of its tokens."""
        return 1

    def prepare(self, is_image: Tensor, soft: Tensor, high: Tensor | None = None) -> tuple[Tensor, Media]:
        """Keys and values of every block, and which position reads which image."""
        soft = soft.to(self.image_embedding.dtype)
        index, _ = image_slots(is_image.sum(1), len(soft))  # [B, T]
        key_value = {
            name: block.attention.key_value(soft)[index].flatten(1, 2) for name, block in self.blocks.items()
        }
        latest = is_image.cumsum(1)  # [B, S], counted from 1; 0 before the first image
        image = torch.arange(1, index.shape[1] + 1, device=soft.device).repeat_interleave(soft.shape[1])
        mask = latest.unsqueeze(-1) == image  # [B, S, T * M]
        return self.image_embedding.expand(len(soft), 1, -1), Media(key_value, mask)

    def carry(self, context: Media) -> Media:
        """What comes next reads what the last position read."""
        return context._replace(mask=context.mask[:, -1:])

    def attach_layer(self, index: int, layer: nn.Module) -> list[Any]:
        """In front of the layer, one of `blocks` or nothing."""
        return [layer.register_forward_pre_hook(partial(self._before, str(index)), with_kwargs=True)]

    def _before(self, name: str, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        media = self.take(kwargs)
        if name not in self.blocks:
            return args, kwargs
        read = (media.key_value[name], media.mask) if media is not None else ()
        return (self.blocks[name](args[0], *read), *args[1:]), kwargs


class GatedBlock(GradientCheckpointingLayer):
    """Cross-attention and a feed-forward block, both pre-norm, each behind a gate tanh(0) = 0."""

    def __init__(self, dim: int, media_dim: int, heads: int, head_dim: int, hidden: int, activation: str):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, media_dim, heads, head_dim)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden, bias=False),
            ACT2FN[activation],
            nn.Linear(hidden, dim, bias=False),
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, key_value: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]; where there is no image in the batch, the feed-forward block alone."""
        y = x.to(self.attention_gate.dtype)  # the language model may be kept in a lower precision
        if key_value is not None and mask is not None:
            y = y + self.attention_gate.tanh() * self.attention(self.norm(y), key_value, mask)
        y = y + self.feed_forward_gate.tanh() * self.feed_forward(y)
        return y.to(x.dtype)
