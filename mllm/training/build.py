"""A recipe's sections -> model and processor, new or from an earlier stage, and its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mllm.config import DataSection, ModelSection, TuneSection
from mllm.data.mixture import Mixture
from mllm.data.rows import open_rows
from mllm.errors import CheckpointError, ConfigError
from mllm.model.checkpoint import has_manifest, load, manifest_hash, model_class, origin_of
from mllm.model.compose import change_resolution, compose, describe, set_generation_defaults
from mllm.model.configuration import MllmConfig
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parted import PartedModel
from mllm.model.parts import load_config, load_vision_config
from mllm.model.processing import MllmProcessor
from mllm.model.transplant import take_connector


def build(
    section: ModelSection, tune: TuneSection | None = None
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """The model and processor that a recipe describes; `tune` says whether to load in 4 bit."""
    dtype = getattr(torch, section.dtype)
    quantization = "nf4" if tune is not None and tune.language_model == "qlora" else None
    if section.init_from is None:
        attention = section.attn_implementation
        model, processor = compose(
            **_parts(section), dtype=dtype, attn_implementation=attention, quantization=quantization
        )
        if section.connector_from:
            take_connector(model, section.connector_from)
        return model, processor
    model, processor = load_earlier(
        section.init_from, MllmForConditionalGeneration, dtype=dtype, quantization=quantization
    )
    change_for_stage(model, processor, section)
    set_generation_defaults(model, processor)
    return model, processor


def change_for_stage(
    model: MllmForConditionalGeneration, processor: MllmProcessor, section: ModelSection
) -> None:
    """Lay what a later stage says of the model over what the stage before made, in place."""
    if section.attn_implementation:
        try:
            model.language_model.set_attn_implementation(section.attn_implementation)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"model.attn_implementation: {' '.join(str(error).split())}") from error
    if section.image_size:
        change_resolution(model.config, processor, section.image_size)
    _restyle(processor, section)
    if section.tiling:
        model.set_tiling(section.tiling)


def build_processor(section: ModelSection) -> MllmProcessor:
    """The processor alone, without reading any weights (to look at data)."""
    if section.init_from is None:
        parts = _parts(section)
        vision = load_vision_config(parts.pop("vision_encoder"), section.vision_feature_layer)
        text = load_config(parts.pop("language_model"), "language_model")
        return describe(vision, text, parts.pop("connector"), **parts)[1]
    check_earlier(section.init_from, MllmForConditionalGeneration)
    processor = MllmProcessor.from_pretrained(section.init_from)
    if section.image_size:
        change_resolution(MllmConfig.from_pretrained(section.init_from), processor, section.image_size)
    _restyle(processor, section)
    return processor


def check_earlier(init_from: str, wanted: type[PartedModel]) -> None:
    """Raise `CheckpointError` unless `model.init_from` is a checkpoint of this class of models."""
    if not has_manifest(init_from):
        raise CheckpointError(f"model.init_from: {init_from!r} is no checkpoint; train that stage first")
    found = model_class(Path(init_from))
    if found is not wanted:
        raise CheckpointError(
            f"model.init_from: {init_from!r} is a {found.__name__}, this stage goes on with a "
            f"{wanted.__name__}; a pretrained Q-Former is taken by model.connector_from, a pretrained "
            "encoder by naming its folder as model.vision_encoder"
        )


def load_earlier(init_from: str, wanted: type[PartedModel], **options: Any) -> tuple[Any, Any]:
    """The model and processor of `model.init_from`, which the new checkpoints will name as their parent."""
    check_earlier(init_from, wanted)
    model, processor = load(init_from, **options)
    origin_of(model).parent = {"path": init_from, "manifest": manifest_hash(init_from)}
    return model, processor


def open_mixture(section: DataSection, seed: int) -> Mixture:
    """The rows of a recipe's `data` section; of one data set, or of several."""
    sources = section.sources
    return Mixture(
        [open_rows(source.path, source.format or "auto", source.image_root) for source in sources],  # type: ignore[misc]
        [source.path for source in sources],
        section.mixing,
        [source.weight for source in sources],
        seed,
        [source.cap for source in sources],
        [source.epochs for source in sources],
        section.replay.share if section.replay else None,
    )


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
        "image_size": section.image_size,
        "image_aspect_ratio": section.image_aspect_ratio or "square",
        "fusion": section.fusion,
        "tiling": section.tiling,
        "instruction_tokenizer": section.instruction_tokenizer,
        "added_tokens": section.added_tokens,
        "attention": section.attention,
    }


def _restyle(processor: MllmProcessor, section: ModelSection) -> None:
    """Lay this stage's template and image handling over those of the stage before."""
    if section.template:
        processor.set_template(section.template)
    if section.tiling:
        processor.set_tiling(section.tiling)
    if section.image_aspect_ratio:
        if section.image_aspect_ratio == "pad" and processor.tiling:
            raise ConfigError("model.image_aspect_ratio is 'pad', but this model tiles images; remove it")
        processor.image_aspect_ratio = section.image_aspect_ratio
