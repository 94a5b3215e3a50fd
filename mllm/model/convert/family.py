"""What a family of transformers' models has to say, so that `stock.py` can convert it in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from mllm.errors import ConfigError
from mllm.model.configuration import MllmConfig
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.processing import MllmProcessor


class Family:
    """One of transformers' classes and its counterpart among our models."""

    model: Any
    processor: Any

    # -- in ---------------------------------------------------------------------------------------------

    def read(self, config: Any, processor: Any, template: str | None) -> tuple[MllmConfig, MllmProcessor]:
        """Our configuration and processor for theirs.

        Raises:
            ConfigError: a setting that our model does not have.
        """
        raise NotImplementedError

    # -- both ways --------------------------------------------------------------------------------------

    def names(self, config: Any) -> Iterator[tuple[str, str]]:
        """Prefixes of tensors, theirs and ours; together they cover the model."""
        raise NotImplementedError

    def generator(self, model: PreTrainedModel) -> PreTrainedModel:
        """The module whose generation configuration says where an answer ends."""
        return model

    def batch(self, processor: Any, text: str, image: Any) -> dict[str, torch.Tensor]:
        """What their processor makes of a prompt with one image, under our names."""
        raise NotImplementedError

    # -- out --------------------------------------------------------------------------------------------

    def write(self, model: MllmForConditionalGeneration) -> PreTrainedConfig:
        """Their configuration for ours, with parts of its own that may be changed.

        Raises:
            ConfigError: they have no such model; says what they lack.
        """
        raise NotImplementedError

    def write_processor(self, config: Any, processor: MllmProcessor) -> ProcessorMixin:
        """Their processor for ours; `config` is theirs."""
        raise NotImplementedError


def demand(what: str, **settings: tuple[Any, Any]) -> None:
    """Raise ConfigError at the first setting (found, wanted) that is not the one wanted."""
    for name, (found, wanted) in settings.items():
        if found != wanted:
            raise ConfigError(f"{name} is {found!r}, and {what} only for {wanted!r}")
