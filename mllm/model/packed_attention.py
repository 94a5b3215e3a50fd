"""Attention over packs, row by row: the implementation `packed` of transformers' attention interface.

As a mask for SDPA, the blocks of a pack cost what the whole square costs. Here each row is attended to alone,
so that a pack costs no more than its rows: on a GPU by PyTorch's variable-length flash attention in one call,
elsewhere by one causal SDPA a row.

Without a pack it is `sdpa`: with a padding mask, with a cache, or with several rows in a batch. It also is
where a layer sees only a window, because what is in the window is said by the mask alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None  # since PyTorch 2.10


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of [B, heads, S, width], in transformers' calling convention: [B, S, heads, width].

    With B = 1 and no mask, rows begin at `cu_seq_lens_q` [rows + 1], or wherever `position_ids` [1, S] are
    0. A larger B holds no packs.
    """
    length = query.shape[2]
    if attention_mask is not None or len(query) > 1 or key.shape[2] != length:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    bounds = cu_seq_lens_q
    if bounds is None and position_ids is not None:  # a model that does not hand its arguments on
        bounds = nn.functional.pad((position_ids[0] == 0).nonzero()[:, 0], (0, 1), value=length)
    if bounds is None or len(bounds) < 3:
        return sdpa_attention_forward(module, query, key, value, None, **options)
    if runs_varlen(query) and not options.get("dropout"):
        return _varlen(query, key, value, bounds.int(), max_length_q, options.get("scaling")), None
    sizes = [end - start for start, end in pairwise(bounds.tolist())]
    rows = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **options)[0] for row in rows], dim=1), None


def runs_varlen(query: Tensor) -> bool:
    """Whether PyTorch's variable-length attention computes this: on CUDA, in half precision."""
    if query.device.type != "cuda" or not _HAS_VARLEN:
        return False
    half = (torch.bfloat16, torch.float16)
    return query.dtype in half or (
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") in half
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int | None, scale: float | None
) -> Tensor:
    """[1, heads, S, width] -> [1, S, heads, width]."""
    from torch.nn.attention.varlen import varlen_attn

    # Rotary positions leave queries and keys in float32 under autocast, which this operator does not know.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # [S, heads, width]
    most = int((bounds[1:] - bounds[:-1]).max()) if longest is None else longest
    grouped = len(key[0]) != len(query[0])
    causal = (-1, 0)
    out: Any = varlen_attn(
        q, k, v, bounds, bounds, most, most, scale=scale, window_size=causal, enable_gqa=grouped
    )
    return out[None]


def packed_mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """No mask where there is no padding, no cache and no window; else the mask of SDPA."""
    uncached = options["q_length"] == options["kv_length"]
    if attention_mask is None and uncached and options.get("local_size") is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **options)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)
