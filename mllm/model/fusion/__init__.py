"""Deep fusion: image features inside the layers of a language model. One file and one line adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from mllm.errors import ConfigError
from mllm.model.fusion.base import Fusion
from mllm.model.fusion.gated_cross_attention import GatedCrossAttention
from mllm.model.fusion.high_res_cross_attention import HighResCrossAttention
from mllm.model.fusion.stack import FusionStack
from mllm.model.fusion.visual_expert import VisualExpert
from mllm.model.typed import build_typed

FUSIONS: dict[str, Callable[..., Fusion]] = {
    "gated_cross_attention": GatedCrossAttention,
    "visual_expert": VisualExpert,
    "high_res_cross_attention": HighResCrossAttention,
    "stack": FusionStack,
}


def build_fusion(
    settings: Mapping[str, Any], text_config: PreTrainedConfig, media_dim: int, media_tokens: int
) -> Fusion:
    """Build the fusion named by `settings["type"]`; the other keys are its arguments.

    Raises:
        ConfigError: unknown type or argument, or an encoder-decoder language model.
    """
    if text_config.is_encoder_decoder:
        raise ConfigError(
            f"fusion is for decoder-only language models; found {text_config.model_type}; leave fusion out"
        )
    return build_typed("fusion", FUSIONS, settings, text_config, media_dim, media_tokens)


__all__ = ["FUSIONS", "Fusion", "build_fusion"]
