"""Activation checkpointing that computes again only what is cheap.

Whole layers recomputed (`gradient_checkpointing: true`) cost another forward pass. Here the results of
matrix products and of attention are kept, and norms, activations, rotary positions and sums between them are
computed a second time: most of the memory comes back for a few per cent of the time (selective
checkpointing, Korthikanti et al., arXiv 2205.05198, section 5).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mllm.model.parted import PartedModel

# Matrix products, and which of their arguments are multiplied.
_SIDES = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::bmm": (0, 1), "aten::baddbmm": (1, 2)}
# Attention of every backend, PyTorch's and each flash-attn's; convolutions; products with weights in 4 bit.
_DEAR = (
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_efficient_attention",
    "aten::convolution",
    "torch_attn::",
    "flash_attn",
    "bitsandbytes::",
)


def is_dear_product(inner: int, outer: int) -> bool:
    """Whether a product [T, inner] x [inner, outer] is kept: it took 2 * inner operations a number.

    The second factor of a LoRA makes much out of little: of it, keeping the little side alone is cheaper.
    """
    return outer < 8 * inner


def keep_dear(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what took many operations for each number of its result: a policy of PyTorch's checkpointing."""
    name = operator.name() if hasattr(operator, "name") else str(operator)
    sides = _SIDES.get(name.split(".")[0])
    if sides is not None:
        dear = is_dear_product(*args[sides[1]].shape[-2:])
    else:
        dear = name.startswith(_DEAR)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_selectively(model: PartedModel) -> None:
    """Let every layer of the model's parts compute again what is cheap, in training."""
    contexts = partial(create_selective_checkpoint_contexts, keep_dear)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
