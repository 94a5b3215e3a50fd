"""Build a model and its processor from parts: names, directories or objects."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from mllm.errors import ConfigError
from mllm.model.checkpoint import Origin
from mllm.model.configuration import MllmConfig
from mllm.model.connectors import build_connector
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parts import base_of, load_language_model, load_named, load_vision_encoder
from mllm.model.processing import AspectRatio, MllmProcessor
from mllm.model.vision_encoder import FeatureLayer, feature_shape


def compose(
    vision_encoder: str | Path | PreTrainedModel,
    language_model: str | Path | PreTrainedModel,
    connector: Mapping[str, Any] | str = "mlp",
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    template: str = "vicuna_v1",
    vision_feature_layer: FeatureLayer = -2,
    vision_feature_select: str = "patch",
    image_aspect_ratio: AspectRatio = "square",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """Compose a model whose connector is freshly initialised.

    Args:
        vision_encoder: a model, or a directory or Hub name (of a vision model, or of a CLIP-like pair, of
            which the vision half is taken).
        language_model: a causal language model, or a directory or Hub name.
        connector: a type, or `{"type": ..., argument: value}`.
        tokenizer: tokenizer or where it lies; default: with the language model.
        image_processor: image processor or where it lies; default: with the vision encoder.
        template: chat template, see `mllm.data.templates`.
        vision_feature_layer: index into the hidden states (-2 as LLaVA), or `last`.
        vision_feature_select: `patch` drops class and register tokens, `full` keeps them.
        image_aspect_ratio: `square` or `pad`.
        dtype: of the loaded weights; default: float32.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ... for the language model.

    Returns:
        (model, processor).
    """
    vision = load_vision_encoder(vision_encoder, dtype)
    text = load_language_model(language_model, dtype, attn_implementation)
    config, processor = describe(
        vision.config,
        text.config,
        connector,
        tokenizer=tokenizer if tokenizer is not None else language_model,
        image_processor=image_processor if image_processor is not None else vision_encoder,
        template=template,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select=vision_feature_select,
        image_aspect_ratio=image_aspect_ratio,
    )
    module = build_connector(config.connector, config.vision_dim, config.text_config.hidden_size)
    model = _assemble(config, vision, module.to(dtype or torch.float32), text)
    set_generation_defaults(model, processor)
    sources = {"vision_encoder": (vision_encoder, vision), "language_model": (language_model, text)}
    model.origin = Origin(
        base={
            part: base_of(source, module)
            for part, (source, module) in sources.items()
            if isinstance(source, (str, Path))
        }
    )
    return model, processor


def describe(
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    connector: Mapping[str, Any] | str = "mlp",
    *,
    tokenizer: Any,
    image_processor: Any,
    template: str = "vicuna_v1",
    vision_feature_layer: FeatureLayer = -2,
    vision_feature_select: str = "patch",
    image_aspect_ratio: AspectRatio = "square",
) -> tuple[MllmConfig, MllmProcessor]:
    """The configuration and the processor of a model, from configurations alone: no weights are read.

    Arguments as in `compose`.
    """
    if vision_feature_select not in ("patch", "full"):
        raise ConfigError(f"vision_feature_select is {vision_feature_select!r}; use 'patch' or 'full'")
    images = load_named(AutoImageProcessor, image_processor, "image_processor")
    tokens = load_named(AutoTokenizer, tokenizer, "tokenizer")
    pixels = images(images=[Image.new("RGB", (64, 48))], return_tensors="pt")["pixel_values"]
    total, prefix, vision_dim = feature_shape(
        vision_config, AutoModel.from_config, pixels.shape[1:], vision_feature_layer
    )
    prefix = prefix if vision_feature_select == "patch" else 0
    config = MllmConfig(
        # Copies: building a configuration resets the attention implementation of those inside it.
        vision_config=deepcopy(vision_config),
        text_config=deepcopy(text_config),
        connector={"type": connector} if isinstance(connector, str) else dict(connector),
        vision_feature_layer=vision_feature_layer,
        num_prefix_tokens=prefix,
        num_patches=total - prefix,
        vision_dim=vision_dim,
        pixel_shape=list(pixels.shape[1:]),
    )
    with torch.device("meta"):
        module = build_connector(config.connector, vision_dim, text_config.hidden_size)
    config.num_image_tokens = module.num_tokens(config.num_patches)
    processor = MllmProcessor(
        images,
        tokens,
        num_image_tokens=config.num_image_tokens,
        vocab_size=text_config.vocab_size,
        image_aspect_ratio=image_aspect_ratio,
    )
    processor.set_template(template)
    config.image_token_id = processor.image_token_id
    return config, processor


def _assemble(config: MllmConfig, vision: PreTrainedModel, connector: Any, text: PreTrainedModel) -> Any:
    """Put existing parts under one roof: a model is built without memory, then its parts are replaced."""
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    model.vision_encoder, model.connector, model.language_model = vision, connector, text
    model.config.vision_config, model.config.text_config = vision.config, text.config
    return model.eval()


def set_generation_defaults(model: MllmForConditionalGeneration, processor: MllmProcessor) -> None:
    """Stop where an answer ends, never emit the image placeholder, pad with the tokenizer's token."""
    generation = model.generation_config
    generation.eos_token_id = processor.end_token_ids
    generation.pad_token_id = processor.tokenizer.pad_token_id
    generation.bos_token_id = processor.tokenizer.bos_token_id
    # An untrained row of the head can be the argmax; a placeholder without an image then breaks the run.
    inside = processor.vocab_size is None or processor.image_token_id < processor.vocab_size
    generation.suppress_tokens = [processor.image_token_id] if inside else None
