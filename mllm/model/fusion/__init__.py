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
    arguments = dict(settings)
    kind = arguments.pop("type", None)
    if kind not in FUSIONS:
        raise ConfigError(f"unknown fusion type {kind!r}; use one of {', '.join(FUSIONS)}")
    if text_config.is_encoder_decoder:
        raise ConfigError(
            f"fusion {kind!r} is for decoder-only language models; found {text_config.model_type}"
        )
    try:
        return FUSIONS[kind](text_config, media_dim, media_tokens, **arguments)
    except TypeError as error:
        raise ConfigError(f"fusion {kind!r}: {error}") from error


__all__ = ["FUSIONS", "Fusion", "build_fusion"]
