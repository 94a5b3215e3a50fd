"""Attention over packs, row by row: the implementation `packed` of transformers' attention interface.

As a mask for SDPA, the blocks of a pack cost what the whole square costs. Here each row is attended to alone,
so that a pack costs no more than its rows: on a GPU by PyTorch's variable-length flash attention in one call,
elsewhere by one causal SDPA a row.

Without a pack it is `sdpa`: with a padding mask, with a cache, or with several rows in a batch. It also is
where a layer sees only a window, because what is in the window is said by the mask alone.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def _varlen_options() -> frozenset[str]:
    """What PyTorch's operator can be told: a window since 2.11, and since 2.12 that heads are grouped."""
    if find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


_OPTIONS = _varlen_options()


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
    if runs_varlen(query, value) and not options.get("dropout"):
        return _varlen(query, key, value, bounds.int(), max_length_q, options.get("scaling")), None
    sizes = [end - start for start, end in pairwise(bounds.tolist())]
    rows = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **options)[0] for row in rows], dim=1), None


def runs_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's variable-length flash attention computes this: on CUDA, in half precision.

    Its kernels are for compute capability 8.0 (Ampere) and up, and for heads of up to 256 channels in eights,
    which `scaled_dot_product_attention` would pad.
    """
    if query.device.type != "cuda" or "window_size" not in _OPTIONS:
        return False
    width, half = query.shape[-1], (torch.bfloat16, torch.float16)
    return (
        _dtype_of(query) in half
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and _has_kernels()
    )


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    """Whether the GPU is one that the flash kernels are made for."""
    return torch.cuda.get_device_capability() >= (8, 0)


def _dtype_of(states: Tensor) -> torch.dtype:
    """In which it is computed: rotary positions leave queries and keys in float32 under autocast."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else states.dtype


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int | None, scale: float | None
) -> Tensor:
    """[1, heads, S, width] -> [1, S, heads, width]."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = _dtype_of(query)
    # [S, heads, width] each
    q, k, v = (states.squeeze(0).transpose(0, 1).to(dtype) for states in (query, key, value))
    most = int((bounds[1:] - bounds[:-1]).max()) if longest is None else longest
    grouped: Any = {"enable_gqa": k.shape[1] != q.shape[1]} if "enable_gqa" in _OPTIONS else {}
    causal = (-1, 0)
    out: Any = varlen_attn(q, k, v, bounds, bounds, most, most, scale=scale, window_size=causal, **grouped)
    return out.unsqueeze(0)


def packed_mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """No mask where there is no padding, no cache and no window; else the mask of SDPA."""
    uncached = options["q_length"] == options["kv_length"]
    if attention_mask is None and uncached and options.get("local_size") is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **options)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)
