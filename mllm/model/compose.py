"""Build a model and its processor from parts: names, directories or objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from mllm.errors import ConfigError
from mllm.model.added_tokens import add_tokens, resize_embeddings
from mllm.model.anyres import tiling_of
from mllm.model.checkpoint import Origin
from mllm.model.configuration import MllmConfig
from mllm.model.connectors import build_connector
from mllm.model.fused_vision import FusedVisionConfig
from mllm.model.fusion import build_fusion
from mllm.model.instructions import InstructionTokenizer
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parts import (
    base_of,
    load_image_processor,
    load_language_model,
    load_named,
    load_vision_config,
    load_vision_encoder,
)
from mllm.model.processing import AspectRatio, MllmProcessor
from mllm.model.vision_encoder import FeatureLayer, feature_shape


def compose(
    vision_encoder: str | Path | PreTrainedModel | Mapping[str, Any] | Sequence[Any],
    language_model: str | Path | PreTrainedModel | Mapping[str, Any],
    connector: Mapping[str, Any] | str = "mlp",
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    template: str = "vicuna_v1",
    vision_feature_layer: FeatureLayer | Sequence[FeatureLayer] = -2,
    vision_feature_select: str = "patch",
    image_size: int | None = None,
    image_aspect_ratio: AspectRatio = "square",
    fusion: Mapping[str, Any] | None = None,
    tiling: Mapping[str, Any] | None = None,
    instruction_tokenizer: Any = None,
    added_tokens: Sequence[str] = (),
    attention: str = "causal",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """Compose a model whose connector is freshly initialised.

    Args:
        vision_encoder: a model, or a directory or Hub name (of a vision model, or of a CLIP-like pair, of
            which the vision half is taken), or a configuration `{"model_type": ...}` for fresh weights,
            or a list of these, whose patch features are concatenated.
        language_model: a language model, or a directory or Hub name, or a configuration.
        connector: a type, or `{"type": ..., argument: value}`.
        tokenizer: tokenizer or where it lies; default: with the language model.
        image_processor: image processor or where it lies; default: with the vision encoder.
        template: chat template, see `mllm.data.templates`.
        vision_feature_layer: index into the hidden states (-2 as LLaVA), `last`, `pooled` or `projected`;
            see `mllm.model.vision_encoder`. Of several encoders also a list, one each.
        vision_feature_select: `patch` drops class and register tokens, `full` keeps them.
        image_size: side of a preprocessed picture in pixels, where it is not the image processor's own.
        image_aspect_ratio: `square` or `pad`.
        fusion: deep fusion, `{"type": ..., argument: value}`; None for none. `vision_encoder` among the
            arguments names the model that an encoder of its own starts from.
        tiling: `{"type": "anyres", ...}`, see `mllm.model.anyres`; None for one view an image.
        instruction_tokenizer: tokenizer of an instruction-aware connector, or where it lies.
        added_tokens: new tokens of the language model, such as `<c{0..511}>`.
        dtype: of the loaded weights; default: float32.
        attention: `causal`, or `prefix`: the prompt attends to itself in both directions.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ... for the language model.
        quantization: `nf4` loads the language model in 4 bit, for QLoRA.

    Returns:
        (model, processor).
    """
    vision = load_vision_encoder(vision_encoder, dtype, vision_feature_layer)
    text = load_language_model(language_model, dtype, attn_implementation, quantization)
    config, processor = describe(
        vision.config,
        text.config,
        connector,
        tokenizer=tokenizer if tokenizer is not None else language_model,
        image_processor=image_processor if image_processor is not None else vision_encoder,
        template=template,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select=vision_feature_select,
        image_size=image_size,
        image_aspect_ratio=image_aspect_ratio,
        fusion=fusion,
        tiling=tiling,
        instruction_tokenizer=instruction_tokenizer,
        added_tokens=added_tokens,
        attention=attention,
    )
    resized = resize_embeddings(text, config.text_config.vocab_size)
    model = _assemble(config, vision, text, dtype or torch.float32)
    for module, settings in zip(model.fusion.members() if fusion else (), _each(fusion), strict=True):
        if "vision_encoder" in settings:
            module.encoder = load_vision_encoder(settings["vision_encoder"], dtype)
    set_generation_defaults(model, processor)
    sources = {"vision_encoder": (vision_encoder, vision), "language_model": (language_model, text)}
    model.origin = Origin(
        base={
            part: base_of(source, module, quantization if part == "language_model" else None)
            for part, (source, module) in sources.items()
            if isinstance(source, (str, Path))
        },
        changed={f"language_model.{name}" for name in resized},
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
    vision_feature_layer: Any = -2,
    vision_feature_select: str = "patch",
    image_size: int | None = None,
    image_aspect_ratio: AspectRatio = "square",
    fusion: Mapping[str, Any] | None = None,
    tiling: Mapping[str, Any] | None = None,
    instruction_tokenizer: Any = None,
    added_tokens: Sequence[str] = (),
    attention: str = "causal",
) -> tuple[MllmConfig, MllmProcessor]:
    """The configuration and the processor of a model, from configurations alone: no weights are read.

    Arguments as in `compose`.
    """
    if vision_feature_select not in ("patch", "full"):
        raise ConfigError(f"vision_feature_select is {vision_feature_select!r}; use 'patch' or 'full'")
    if attention not in ("causal", "prefix"):
        raise ConfigError(f"attention is {attention!r}; use 'causal' or 'prefix'")
    if isinstance(vision_config, FusedVisionConfig):
        if vision_feature_select == "full":
            raise ConfigError("vision_feature_select is 'full', but fused encoders give patches only")
        vision_feature_layer = "last"  # the encoders' own layers are in their configuration
    fusion = deepcopy(dict(fusion)) if fusion else None
    for settings in _each(fusion):
        if "vision_encoder" in settings:
            settings["vision_config"] = load_vision_config(settings.pop("vision_encoder"), "last").to_dict()
    images = load_image_processor(image_processor, image_size)
    tokens = load_named(AutoTokenizer, tokenizer, "tokenizer")
    pixels = images(images=[Image.new("RGB", (64, 48))], return_tensors="pt")["pixel_values"]
    total, prefix, vision_dim = feature_shape(vision_config, pixels.shape[1:], vision_feature_layer)
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
        fusion=fusion,
        tiling=dict(tiling) if tiling else None,
        prefix_attention=attention == "prefix",
    )
    if added_tokens:
        config.text_config.vocab_size = add_tokens(tokens, added_tokens, text_config.vocab_size)
        config.added_tokens = list(added_tokens)
    if config.is_encoder_decoder and config.prefix_attention:
        raise ConfigError(
            f"attention 'prefix' needs a causal language model, found {text_config.model_type!r}"
        )
    with torch.device("meta"):
        module = build_connector(config.connector, vision_dim, text_config.hidden_size)
        tokens_an_image = module.num_tokens(config.num_patches)
        fused = build_fusion(fusion, text_config, module.out_dim, tokens_an_image) if fusion else None
    if fused and fused.high_res_size and isinstance(vision_config, FusedVisionConfig):
        raise ConfigError(
            "fusion: its own encoder's images are made by the image processor of the vision encoder; "
            "give one vision encoder, not several"
        )
    config.num_image_tokens = fused.num_placeholders(tokens_an_image) if fused else tokens_an_image
    tiling_of(config)  # raises ConfigError where it cannot be
    processor = MllmProcessor(
        images,
        tokens,
        num_image_tokens=config.num_image_tokens,
        vocab_size=config.text_config.vocab_size,
        image_aspect_ratio=image_aspect_ratio,
        tiling=config.tiling,
        high_res_size=fused.high_res_size if fused else None,
        encoder_decoder=config.is_encoder_decoder,
    )
    if module.reads_text != (instruction_tokenizer is not None):
        verb = "reads instructions: give" if module.reads_text else "reads no instructions: drop"
        raise ConfigError(f"connector {config.connector['type']!r} {verb} model.instruction_tokenizer")
    if instruction_tokenizer is not None:
        reader = load_named(AutoTokenizer, instruction_tokenizer, "instruction_tokenizer")
        embedding: Any = module.qformer.word_embeddings  # type: ignore[union-attr]
        if len(reader) > (rows := embedding.num_embeddings):
            raise ConfigError(
                f"model.instruction_tokenizer has {len(reader)} words, the connector {rows}; raise vocab_size"
            )
        processor.instruction_tokenizer = InstructionTokenizer(reader)
    processor.set_template(template)
    config.image_token_id = processor.image_token_id
    return config, processor


def _each(fusion: Mapping[str, Any] | None) -> Sequence[Any]:
    """The settings of each fusion, also of those in a stack."""
    return [] if not fusion else fusion["of"] if fusion.get("type") == "stack" else [fusion]


def change_resolution(config: MllmConfig, processor: MllmProcessor, side: int) -> None:
    """Prepare images at another size from now on, in a later stage.

    The vision encoder interpolates its position embeddings, where it can (PaLI-3, arXiv 2310.09199). Both
    arguments are changed in place.

    Raises:
        ConfigError: the connector, the fusion or the tiling cannot take another number of patches.
    """
    images = load_image_processor(processor.image_processor, side)
    pixels = images(images=[Image.new("RGB", (64, 48))], return_tensors="pt")["pixel_values"]
    total, _, _ = feature_shape(config.vision_config, pixels.shape[1:], config.vision_feature_layer)
    num_patches = total - config.num_prefix_tokens
    if (config.fusion or config.tiling) and num_patches != config.num_patches:
        raise ConfigError("model.image_size: a model with fusion or tiling keeps its resolution")
    with torch.device("meta"):
        connector = build_connector(config.connector, config.vision_dim, config.text_config.hidden_size)
    config.num_patches, config.pixel_shape = num_patches, list(pixels.shape[1:])
    config.num_image_tokens = connector.num_tokens(num_patches)
    processor.image_processor, processor.num_image_tokens = images, config.num_image_tokens


def _assemble(
    config: MllmConfig, vision: PreTrainedModel, text: PreTrainedModel, dtype: torch.dtype
) -> MllmForConditionalGeneration:
    """Put existing parts under one roof: a model is built without memory, then its parts are replaced."""
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    model.vision_encoder, model.language_model = vision, text
    for part in ("connector", "fusion"):
        module = model.build_part(config, part)
        setattr(model, part, module.to(dtype) if module is not None else None)
    if model.fusion is not None:
        model.fusion.start_from(text)
    model.config.vision_config, model.config.text_config = vision.config, text.config
    model.connect()
    return model.eval()


def set_generation_defaults(model: MllmForConditionalGeneration, processor: MllmProcessor) -> None:
    """Stop where an answer ends, never emit the image placeholder, pad with the tokenizer's token."""
    generation = model.generation_config
    generation.eos_token_id = processor.end_token_ids
    generation.pad_token_id = processor.tokenizer.pad_token_id
    generation.bos_token_id = processor.tokenizer.bos_token_id
    generation.decoder_start_token_id = model.language_model.generation_config.decoder_start_token_id
    # An untrained row of the head can be the argmax; a placeholder without an image then breaks the run.
    inside = processor.vocab_size is None or processor.image_token_id < processor.vocab_size
    generation.suppress_tokens = [processor.image_token_id] if inside else None
