"""Load the published parts a model is made of, and tell later whether they are still the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from mllm.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
SHIPPED = "mllm://"


@dataclass(frozen=True)
class Base:
    """Where an untrained part came from: a directory or Hub name; what its weights were; the dtype to use."""

    source: str
    fingerprint: str
    dtype: str = "float32"


def base_of(source: str | Path, module: PreTrainedModel) -> Base:
    """The base that `module` was loaded from; a directory is named so that it is found from anywhere."""
    place = str(Path(source).resolve()) if Path(source).is_dir() else str(source)
    return Base(place, fingerprint(source, module))


def load_vision_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a vision model; of a CLIP-like pair, the vision half's."""
    config = load_named(AutoConfig, source, "vision_encoder")
    return getattr(config, "vision_config", config)


def load_vision_encoder(
    source: str | Path | PreTrainedModel, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A vision model; of a CLIP-like pair, the vision half."""
    if isinstance(source, PreTrainedModel):
        half: Any = source.vision_model if hasattr(source.config, "vision_config") else source
        return half
    config = load_vision_config(source)
    model_class = MODEL_MAPPING[type(config)]
    return load_named(model_class, source, "vision_encoder", config=config, dtype=dtype or torch.float32)


def load_language_model(
    source: str | Path | PreTrainedModel,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """A causal language model, whole."""
    if isinstance(source, PreTrainedModel):
        return source
    options = {"attn_implementation": attention} if attention else {}
    return load_named(AutoModelForCausalLM, source, "language_model", dtype=dtype or torch.float32, **options)


BASE_LOADERS = {"vision_encoder": load_vision_encoder, "language_model": load_language_model}


def resolve(source: str | Path) -> str:
    """`mllm://x` means `x` in the installed package, so that what is shipped is found on any machine."""
    text = str(source)
    return str(PACKAGE / text.removeprefix(SHIPPED)) if text.startswith(SHIPPED) else text


def load_named(factory: Any, source: Any, what: str, **kwargs: Any) -> Any:
    """`factory.from_pretrained(source)`, with an error that names the part; an object is returned."""
    if not isinstance(source, (str, Path)):
        if isinstance(source, PreTrainedModel):
            raise ConfigError(f"{what}: say which one; the model was given as an object, which has none")
        return source
    try:
        return factory.from_pretrained(resolve(source), **kwargs)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{what}: cannot load {str(source)!r}: {first_line} "
            "(give a directory, or a Hub name that can be reached)"
        ) from error


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
