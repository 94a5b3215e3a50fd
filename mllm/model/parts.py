"""Load the published parts a model is made of, and tell later whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # see mllm/model/__init__.py
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllm.errors import ConfigError
from mllm.model.fused_vision import FusedImageProcessor, FusedVisionConfig, FusedVisionEncoder
from mllm.model.language_model import build_language_model, language_model_class
from mllm.model.text_encoder import build_text_encoder, text_class
from mllm.model.vision_encoder import VISION_CLASSES, FeatureLayer, build_vision_encoder, vision_class

PACKAGE = Path(__file__).parents[1]
SHIPPED = "mllm://"


@dataclass(frozen=True)
class Base:
    """Where an untrained part came from: a directory or Hub name; what its weights were; how to load them."""

    source: str
    fingerprint: str
    dtype: str = "float32"
    quantization: str | None = None


def base_of(source: str | Path, module: PreTrainedModel, quantization: str | None = None) -> Base:
    """The base that `module` was loaded from; a directory is named so that it is found from anywhere."""
    place = str(Path(source).resolve()) if Path(source).is_dir() else str(source)
    return Base(place, fingerprint(source, module), quantization=quantization)


def load_vision_config(source: Any, layer: FeatureLayer | Sequence[FeatureLayer]) -> PreTrainedConfig:
    """The configuration of a vision model; arguments as in `load_vision_encoder`."""
    layers = _layers(source, layer)
    if isinstance(source, (list, tuple)):
        each = [load_vision_config(s, one) for s, one in zip(source, layers, strict=True)]
        return FusedVisionConfig(each, layers)
    config = load_config(source, "vision_encoder")
    return getattr(config, "vision_config", config)


def load_vision_encoder(
    source: Any, dtype: torch.dtype | None = None, layer: FeatureLayer | Sequence[FeatureLayer] = "last"
) -> PreTrainedModel:
    """A vision model that computes the feature layer.

    Args:
        source: a directory or Hub name, a model (of a CLIP-like pair, the vision half is taken), a
            configuration `{"model_type": ..., argument: value}` for fresh weights, or a list of these,
            whose features are fused.
        dtype: of the weights; default: float32.
        layer: the feature layer, of a list also one each.
    """
    layers = _layers(source, layer)
    if isinstance(source, (list, tuple)):
        each = [load_vision_encoder(s, dtype, one) for s, one in zip(source, layers, strict=True)]
        return FusedVisionEncoder.of(each, layers)
    if isinstance(source, PreTrainedModel):
        half: Any = source.vision_model if hasattr(source.config, "vision_config") else source
        wanted = vision_class(half.config, layers[0])
        if not isinstance(half, wanted):
            raise ConfigError(
                f"vision_encoder: the feature layer {layer!r} needs a {wanted.__name__}, found a "
                f"{type(half).__name__}; give the directory of the model"
            )
        return half
    config = load_vision_config(source, layer)
    if isinstance(source, Mapping):
        return nn.Module.to(build_vision_encoder(config, layers[0]), dtype or torch.float32)
    model, report = load_named(
        vision_class(config, layers[0]),
        source,
        "vision_encoder",
        config=config,
        dtype=dtype or torch.float32,
        output_loading_info=True,
        # Unlike other pairs' halves, these do not find their weights among the whole model's.
        key_mapping={r"^vision_model\.": ""} if config.model_type in VISION_CLASSES else None,
    )
    # transformers only warns, and goes on with random weights. A ViT's pooler is often not published.
    missing = {name for name in report["missing_keys"] if layer == "pooled" or not name.startswith("pooler.")}
    if missing:
        raise ConfigError(
            f"vision_encoder: {str(source)!r} has no weights for {min(missing)!r} ({len(missing)} missing); "
            "give the directory of the whole model, or another vision_feature_layer"
        )
    return model


def _layers(source: Any, layer: FeatureLayer | Sequence[FeatureLayer]) -> list[FeatureLayer]:
    """The feature layer of each encoder."""
    count = len(source) if isinstance(source, (list, tuple)) else 1
    if isinstance(layer, (int, str)):
        return [layer] * count
    if len(layer) != count or count == 1:
        raise ConfigError(
            f"vision_feature_layer: {len(layer)} layers for {count} vision encoders; give one, or one each"
        )
    return list(layer)


def load_image_processor(source: Any, side: int | None = None) -> Any:
    """An image processor that gives [I, C, H, W]; of a list, their fusion. `side` is another H and W."""
    if isinstance(source, (list, tuple)):
        return FusedImageProcessor([load_image_processor(each, side) for each in source])
    processor = load_named(AutoImageProcessor, source, "image_processor")
    if side is not None:
        processor.size = dict.fromkeys(dict(processor.size), side)  # the shortest edge, or both
        if getattr(processor, "crop_size", None):
            processor.crop_size = {"height": side, "width": side}
        return processor
    if not hasattr(processor, "max_num_patches"):
        return processor
    # SigLIP 2 NaFlex's own gives patches, their number up to the picture's shape. On a square picture
    # this one gives the same pixels.
    side = isqrt(processor.max_num_patches) * processor.patch_size
    return SiglipImageProcessorPil(
        size={"height": side, "width": side},
        resample=processor.resample,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )


def load_language_model(
    source: str | Path | Mapping[str, Any] | PreTrainedModel,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """A causal or encoder-decoder language model, whole; of a configuration, with fresh weights.

    With `quantization="nf4"` its linear layers but the head are loaded in 4 bit (QLoRA, arXiv 2305.14314).
    """
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    dtype = dtype or torch.float32
    if quantization is not None:
        return _load_in_4_bit(source, dtype, options)
    if isinstance(source, PreTrainedModel):
        return source
    config = load_config(source, "language_model")
    if isinstance(source, Mapping):
        return nn.Module.to(build_language_model(config, **options), dtype)
    return load_named(language_model_class(config), source, "language_model", dtype=dtype, **options)


def _load_in_4_bit(source: Any, dtype: torch.dtype, options: Mapping[str, Any]) -> PreTrainedModel:
    """NF4 with double quantisation; everything else, and the products, in `dtype`."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError("4 bit needs bitsandbytes; run: pip install 'mllm[quant]'")
    if not isinstance(source, (str, Path)):
        raise ConfigError("language_model: only a directory or Hub name can be loaded in 4 bit; give one")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    factory = language_model_class(load_config(source, "language_model"))
    # Beside the other parts: by itself it would go to a GPU, and on every rank to the same one.
    placed = {"device_map": {"": "cpu"}, "quantization_config": settings, "dtype": dtype}
    model = load_named(factory, source, "language_model", **placed, **options)
    for layer in model.modules():
        # Else, on some CPUs, the first call without gradients would pack the weights in another way, round
        # their scales, and stop where a layer is narrower than a block.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            layer.register_load_state_dict_pre_hook(_without_statistics)
    # `config.json` says what the model is; that it is loaded in 4 bit, the manifest says.
    del model.config.quantization_config
    return model


def _without_statistics(layer: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Leave out what bitsandbytes saves beside a weight in 4 bit and cannot load: the layer has it already.

    A strict load, as that of DeepSpeed's checkpoints, would refuse it.
    """
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def load_text_encoder(source: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A text model such as BERT; sources as in `load_vision_encoder`, of which it is the other half."""
    if isinstance(source, PreTrainedModel):
        half: Any = source.text_model if hasattr(source.config, "vision_config") else source
        return half
    config = load_config(source, "text_encoder")
    config = getattr(config, "text_config", config)
    if isinstance(source, Mapping):
        model: Any = build_text_encoder(config)
        return model.to(dtype or torch.float32)
    options: Any = {"config": config, "dtype": dtype or torch.float32}
    return load_named(text_class(config), source, "text_encoder", **options)


BASE_LOADERS = {
    "vision_encoder": load_vision_encoder,
    "text_encoder": load_text_encoder,
    "language_model": load_language_model,
}


def resolve(source: str | Path) -> str:
    """`mllm://x` means `x` in the installed package, so that what is shipped is found on any machine."""
    text = str(source)
    return str(PACKAGE / text.removeprefix(SHIPPED)) if text.startswith(SHIPPED) else text


def load_named(factory: Any, source: Any, what: str, **kwargs: Any) -> Any:
    """`factory.from_pretrained(source)`, with an error that names the part; an object is returned."""
    if not isinstance(source, (str, Path)):
        if isinstance(source, (PreTrainedModel, Mapping)):
            given = "an object" if isinstance(source, PreTrainedModel) else "a configuration"
            raise ConfigError(f"{what}: say which one; the model was given as {given}, which has none")
        return source
    try:
        return factory.from_pretrained(resolve(source), **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"{what}: cannot load {str(source)!r}: {_one_line(error)} "
            "(give a directory, or a Hub name that can be reached)"
        ) from error


def load_config(source: Any, what: str) -> PreTrainedConfig:
    """The configuration of a model, or the one that a recipe spells out."""
    if not isinstance(source, Mapping):
        return load_named(AutoConfig, source, what)
    try:
        known = AutoConfig.for_model(str(source.get("model_type")))
        # transformers keeps what it does not know, and nothing reads it.
        if unknown := sorted(key for key in source if not hasattr(known, key)):
            raise ConfigError(f"{what}: {source['model_type']} has no setting {unknown[0]!r}; remove it")
        return AutoConfig.for_model(**source)
    except ConfigError:
        raise
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(
            f"{what}: {_one_line(error)} (a configuration is a model_type of transformers and its settings)"
        ) from error


def _one_line(error: Exception) -> str:
    """An error of transformers on one line; some list all models that there are."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def fingerprint(source: str | Path, module: PreTrainedModel) -> str:
    """What identifies a base model's weights: the Hub commit, or a hash over samples of its files."""
    folder = Path(resolve(source))
    if not folder.is_dir():
        return f"commit:{getattr(module.config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            # The header names every tensor; the rest is sampled, since 14 GB take minutes to hash.
            for offset in sorted({0, size // 3, 2 * size // 3, max(0, size - 65536)}):
                stream.seek(offset)
                digest.update(stream.read(65536))
    return f"sha256:{digest.hexdigest()}"
