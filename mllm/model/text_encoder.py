"""Text encoders of pretraining: CLIP's, SigLIP's, BERT, and what else gives one vector a text."""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2TextModel,
    SiglipTextModel,
)

from mllm.errors import ConfigError

# Text halves that `AutoModel` does not know.
TEXT_CLASSES: dict[str, type[PreTrainedModel]] = {
    "siglip_text_model": SiglipTextModel,
    "siglip2_text_model": Siglip2TextModel,
}


def text_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a text encoder.

    Raises:
        ConfigError: there is none.
    """
    found: Any = TEXT_CLASSES.get(config.model_type) or MODEL_MAPPING.get(type(config), None)
    if found is None:
        raise ConfigError(f"text_encoder: transformers has no encoder of type {config.model_type!r}")
    return found


def build_text_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A text encoder with fresh weights."""
    return text_class(config)._from_config(config)
