"""Attention over packs, row by row: the implementation `packed` of transformers' attention interface.

As a mask for SDPA, the blocks of a pack cost what the whole square costs. Here each row is attended to alone,
by PyTorch's causal SDPA, so that a pack costs no more than its rows.

Without a pack it is `sdpa`: with a padding mask, with a cache, or with several rows in a batch. It also is
where a layer sees only a window, because what is in the window is said by the mask alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of [B, heads, S, width], in transformers' calling convention: [B, S, heads, width].

    With B = 1 and no mask, a row begins wherever `position_ids` [1, S] are 0. A larger B holds no packs.
    """
    length = query.shape[2]
    sizes = [length]
    if attention_mask is None and position_ids is not None and len(query) == 1 and key.shape[2] == length:
        starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
        sizes = [end - start for start, end in zip(starts, [*starts[1:], length], strict=True)] or sizes
    if len(sizes) == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **options)[0] for row in rows], dim=1), None


def packed_mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """No mask where there is no padding, no cache and no window; else the mask of SDPA."""
    uncached = options["q_length"] == options["kv_length"]
    if attention_mask is None and uncached and options.get("local_size") is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **options)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)
