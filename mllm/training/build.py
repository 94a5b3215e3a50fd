"""A recipe's `model` section -> model and processor, new or from an earlier stage."""

from __future__ import annotations

from typing import Any

import torch

from mllm.config import ModelSection
from mllm.errors import CheckpointError
from mllm.model.checkpoint import has_manifest, load, manifest_hash, origin_of
from mllm.model.compose import compose, describe, set_generation_defaults
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parts import load_named, load_vision_config
from mllm.model.processing import MllmProcessor


def build(section: ModelSection) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """The model and processor that a recipe describes."""
    dtype = getattr(torch, section.dtype)
    if section.init_from is None:
        attention = section.attn_implementation
        return compose(**_parts(section), dtype=dtype, attn_implementation=attention)
    model, processor = load(section.init_from, dtype=dtype)
    if section.attn_implementation:
        model.language_model.set_attn_implementation(section.attn_implementation)
    origin_of(model).parent = {"path": section.init_from, "manifest": manifest_hash(section.init_from)}
    _restyle(processor, section)
    set_generation_defaults(model, processor)
    return model, processor


def build_processor(section: ModelSection) -> MllmProcessor:
    """The processor alone, without reading any weights (to look at data)."""
    if section.init_from is None:
        from transformers import AutoConfig

        parts = _parts(section)
        vision = load_vision_config(parts.pop("vision_encoder"))
        text = load_named(AutoConfig, parts.pop("language_model"), "language_model")
        return describe(vision, text, parts.pop("connector"), **parts)[1]
    if not has_manifest(section.init_from):
        raise CheckpointError(
            f"model.init_from: {section.init_from!r} is no checkpoint; train that stage first"
        )
    processor = MllmProcessor.from_pretrained(section.init_from)
    _restyle(processor, section)
    return processor


def _parts(section: ModelSection) -> dict[str, Any]:
    return {
        "vision_encoder": section.vision_encoder,
        "language_model": section.language_model,
        "connector": section.connector,
        "tokenizer": section.tokenizer or section.language_model,
        "image_processor": section.image_processor or section.vision_encoder,
        "template": section.template or "vicuna_v1",
        "vision_feature_layer": section.vision_feature_layer,
        "vision_feature_select": section.vision_feature_select,
        "image_aspect_ratio": section.image_aspect_ratio or "square",
    }


def _restyle(processor: MllmProcessor, section: ModelSection) -> None:
    """Lay this stage's template and image handling over those of the stage before."""
    if section.template:
        processor.set_template(section.template)
    if section.image_aspect_ratio:
        processor.image_aspect_ratio = section.image_aspect_ratio
