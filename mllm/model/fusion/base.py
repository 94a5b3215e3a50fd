"""What a deep fusion promises, and how its modules come to stand inside a language model.

The modules are our own part, `model.fusion`; the language model keeps its module tree, and with it its
tensor names, its base checkpoint and its adapters. They are attached to its decoder layers with PyTorch's
forward hooks. What they need at a call travels as one keyword argument, `fusion_context`, through the
language model down to each layer: nothing is remembered from one call to the next, and activation
checkpointing, which runs the inside of a layer a second time, sees the same tensors again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm.errors import ConfigError
from mllm.model.language_model import decoder_layers

KEY = "fusion_context"
Context = Any  # a named tuple of the fusion's own; None where there is no image


class Fusion(nn.Module):
    """Base of the fusions.

    A subclass is constructed with (text_config, media_dim, media_tokens, **settings): the width of the
    connector's tokens and their number an image.
    """

    key: str = KEY  # the name of its context among the arguments of a layer
    high_res_size: int | None = None  # side of `pixel_values_high`, for a fusion with an encoder of its own

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []
        self._reached = False

    def num_placeholders(self, media_tokens: int) -> int:
        """Placeholders an image takes in the sequence."""
        return media_tokens

    def prepare(self, is_image: Tensor, soft: Tensor, high: Tensor | None = None) -> tuple[Tensor, Context]:
        """What goes into the sequence, and what goes to the layers.

        Args:
            is_image: [B, S], where placeholders stand.
            soft: [I, M, D], the connector's tokens of the batch's images in row order. In training, where
                every module must be called on every rank, a batch of text only comes with one image that
                no placeholder belongs to.
            high: [I, C, H, W], the images once more at `high_res_size`.

        Returns:
            (soft tokens that replace the placeholders [I, P, Dt], context).
        """
        raise NotImplementedError

    def carry(self, context: Context) -> Context:
        """The context of the next token, in cached generation."""
        raise NotImplementedError

    def arguments(self, context: Context) -> dict[str, Context]:
        """The context as the language model's keyword arguments."""
        return {self.key: context}

    def members(self) -> Iterator[Fusion]:
        """The fusions that this one is made of."""
        yield self

    def position_ids(self, is_image: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Position ids [B, S] where the fusion has its own numbering, else None."""
        return None

    def start_from(self, language_model: PreTrainedModel) -> None:
        """Take first weights from the language model, where the fusion starts as a copy of it."""

    def attach_layer(self, index: int, layer: nn.Module) -> list[Any]:
        """Hook this fusion's modules into one decoder layer; returns the hooks' handles."""
        raise NotImplementedError

    def attach(self, language_model: PreTrainedModel) -> None:
        """Hook into every decoder layer.

        Raises:
            ConfigError: the language model takes no further keyword arguments.
        """
        for handle in self._handles:
            handle.remove()
        check_takes_kwargs(language_model)
        self._handles = [language_model.register_forward_hook(self._check_reached, with_kwargs=True)]
        for index, layer in enumerate(decoder_layers(language_model)):
            self._handles += self.attach_layer(index, layer)

    def take(self, kwargs: dict[str, Any]) -> Context:
        """The context among a module's keyword arguments, which the module itself must not see."""
        self._reached = self._reached or self.key in kwargs
        return kwargs.pop(self.key, None)

    def _check_reached(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        reached, self._reached = self._reached, False
        # A model may swallow what it does not know: the images would be lost without a word.
        if self.key in kwargs and not reached:
            raise ConfigError(
                f"{type(model).__name__} does not pass keyword arguments down into its layers, so this "
                "fusion cannot be attached; use another language model (Llama, Qwen2 and Mistral do)"
            )


def check_takes_kwargs(module: nn.Module) -> None:
    """Raise ConfigError unless `forward` takes keyword arguments beyond those that it names."""
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        raise ConfigError(
            f"{type(module).__name__} takes no further keyword arguments, so this fusion cannot be attached; "
            "use another language model (Llama, Qwen2 and Mistral do)"
        )


def image_slots(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Where the images of each row lie in the batch's flat list of images.

    Args:
        counts: [B], images a row.
        total: I, images in all; without any placeholder there may still be one.

    Returns:
        (index [B, T] into the list, filled [B, T]), T being the most images a row has, at least 1. Slots
        that are not filled hold some other image, which must be masked.
    """
    slot = torch.arange(max(int(counts.max()), 1), device=counts.device)
    first = counts.cumsum(0) - counts  # [B]
    index = (first[:, None] + slot).clamp(max=total - 1)  # [B, T]
    return index, slot < counts[:, None]
