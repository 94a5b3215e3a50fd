"""The last layer's feed-forward where there is a label, and nowhere else.

What stands behind it, norms and the head, looks at one position at a time, so that no loss reads what it
makes of images, questions and padding. Of a model with 32 layers that is 2 % of a step's arithmetic, of a
smaller one more. Hooks of PyTorch's choose its input and put its output back; attention sees all as before.
Compiled layers (`train.compile`) compute every position.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mllm.errors import ConfigError
from mllm.model.language_model import decoder_layers


class LabelFeedForward:
    """Hooks on a language model's last layer, without effect outside `only_at`.

    Args:
        layer: the last layer.
        feed_forward: a module of it that looks at each position by itself.
    """

    def __init__(self, layer: nn.Module, feed_forward: nn.Module):
        self._asked: tuple[Tensor, int] | None = None
        self._chosen: tuple[Tensor, int] | None = None
        self._shape: Any = None
        self.module = feed_forward
        # Bound methods, so that a copied model has its own.
        self._handles = [
            layer.register_forward_pre_hook(self._enter),
            feed_forward.register_forward_pre_hook(self._choose),
            feed_forward.register_forward_hook(self._put_back),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def only_at(self, places: Tensor, positions: int) -> Iterator[None]:
        """Within it only these positions are computed; all others leave the layer as attention left them.

        Args:
            places: [n], positions in the flattened [B * S].
            positions: B * S; of any other number of positions all are computed.
        """
        self._asked = (places, positions)
        try:
            yield
        finally:
            self._asked = None

    def _enter(self, layer: nn.Module, inputs: Any) -> None:
        # At the layer, whose inside alone is called when the backward pass recomputes it, and must choose as
        # before. A language model called by itself forgets what was chosen.
        self._chosen = self._asked

    def _choose(self, feed_forward: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        self._shape = None
        # Layers share their compiled code, which looks at no hooks: what one chose, another would have to.
        if torch.compiler.is_compiling():
            return None
        if self._chosen is None or inputs[0].shape[:-1].numel() != self._chosen[1]:
            return None
        self._shape = inputs[0].shape
        return (inputs[0].flatten(0, -2).index_select(0, self._chosen[0])[None],)  # [1, n, D]

    def _put_back(self, feed_forward: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._shape is None or self._chosen is None:
            return None
        whole = output.new_zeros(self._shape[:-1].numel(), output.shape[-1])  # [B * S, D]
        return whole.index_copy_(0, self._chosen[0], output[0]).view(self._shape)


def label_feed_forward(language_model: Any) -> LabelFeedForward | None:
    """Hooks for this language model, or None where its last layer has no such feed-forward.

    It must be dense, a module of its own, and take one input: a router may balance over all positions, OPT's
    two matrices belong to the layer, and BLOOM's module adds the residual stream itself. Nor may learned
    tokens stand in front, which no label counts.
    """
    if language_model.config.is_encoder_decoder or hasattr(language_model, "soft_prompt"):
        return None
    try:
        layer = decoder_layers(language_model)[-1]
    except ConfigError:
        return None
    feed_forward = getattr(layer, "mlp", None)
    if feed_forward is None or len(inspect.signature(type(feed_forward).forward).parameters) != 2:
        return None
    weighted = [m for m in feed_forward.modules() if next(m.parameters(recurse=False), None) is not None]
    dense = all(isinstance(m, (nn.Linear, Conv1D)) for m in weighted)
    return LabelFeedForward(layer, feed_forward) if dense else None
