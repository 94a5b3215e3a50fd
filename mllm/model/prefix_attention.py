"""Prefix attention (PaLI-3, PaliGemma): the prompt attends to itself in both directions, the rest is causal.

The prompt of a training row is everything before its first supervised token; in generation it is everything
given. What a causal language model computes is left alone: it is only handed another mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import is_flash_attention_requested

from mllm.data.tokens import IGNORE
from mllm.errors import ConfigError


def prefix_attention_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    prefix_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> Any:
    """The mask that the language model is given in place of `attention_mask`.

    Args:
        config: the language model's; says which form of mask its attention takes.
        inputs_embeds: [B, S, Dt], of which only the shape counts.
        attention_mask: [B, past + S], 0 at padding; None is no padding.
        past_key_values: the cache, or None.
        prefix_mask: [B, P], 1 where the first P tokens belong to the prompt; later ones never do. None takes
            the prompt from `labels` and, without labels, everything that is given with an empty cache.
        labels: [B, S], -100 where masked.

    Returns:
        [B, 1, S, past + S], or one such mask for each kind of layer (full, sliding window).

    Raises:
        ConfigError: flash attention or a static cache, which would silently be causal.
    """
    if is_flash_attention_requested(config):
        raise ConfigError(
            f"attention 'prefix' cannot work with {config._attn_implementation!r}, which takes no such mask; "
            "use attn_implementation 'sdpa'"
        )
    if attention_mask is not None and (not torch.is_tensor(attention_mask) or attention_mask.dim() != 2):
        raise ConfigError("attention 'prefix' cannot work with a static cache; drop cache_implementation")
    if prefix_mask is None:
        if labels is not None:
            prefix_mask = (labels != IGNORE).cumsum(-1) == 0  # [B, S]
        elif past_key_values is None or past_key_values.get_seq_length() == 0:
            prefix_mask = torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device)
        else:
            return attention_mask
    # One block that sees itself whole; -1, also for what the cache will add, is causal.
    blocks = torch.where(prefix_mask.bool(), 0, -1)
    return create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, block_sequence_ids=blocks
    )
