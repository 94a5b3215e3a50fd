"""A model made of named parts: each is built, tuned, saved and loaded by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.model.vision_encoder import patch_features


class PartedModel(PreTrainedModel):
    """Base of our models. A subclass names its parts and says how each is built."""

    parts: ClassVar[tuple[str, ...]]
    origin: Any
    vision_encoder: Any
    vision_batch_size: int | None = None
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        for part in self.parts:
            setattr(self, part, self.build_part(config, part))
        self.connect()
        self.post_init()

    @classmethod
    def build_part(cls, config: Any, part: str) -> nn.Module | None:
        """One part with fresh weights; None where this configuration has no such part."""
        raise NotImplementedError

    def connect(self) -> None:
        """Tie the parts together; called again whenever a part was replaced."""

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the model takes from its vision encoder: [I, C, H, W] -> [I, N, Dv].

        In training with `vision_batch_size`, so many images at a time, and on every rank as often as on the
        one with most images: weights that are spread over ranks are gathered in each call.
        """
        pixels = pixel_values.to(self.vision_encoder.dtype)
        if not self.training or self.vision_batch_size is None:
            return self._features(pixels)
        batches = pixels.split(self.vision_batch_size)
        features = [self._features(batch) for batch in batches]  # [<= size, N, Dv] each
        for _ in range(most_of_ranks(len(batches), pixels.device) - len(batches)):
            self._features(pixels[:1])
        return torch.cat(features)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        layer, prefix = self.config.vision_feature_layer, self.config.num_prefix_tokens
        return patch_features(self.vision_encoder, pixels, layer, prefix)

    def probe_inputs(self) -> dict[str, torch.Tensor]:
        """A small fixed input that reaches every part."""
        raise NotImplementedError

    def probe_logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """What this model computes from `probe_inputs`: numbers [rows, K] that every part bears on."""
        return self(**inputs).logits[0, -2:]  # [2, V]

    def save_products(self, folder: Path, processor: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Write into a checkpoint's folder what other tools or stages want to read there."""

    def named_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts that this model has, in the order of the data flow."""
        for name in self.parts:
            part = getattr(self, name, None)
            if part is not None:
                yield name, part

    def train(self, mode: bool = True) -> Any:
        """Training mode for parts with anything to train; a frozen part never uses dropout."""
        super().train(mode)
        for _, part in self.named_parts():
            if mode and not any(p.requires_grad for p in part.parameters()):
                part.eval()
                for layer in part.modules():
                    # transformers recomputes layers in training mode only. Their children stay as they are,
                    # and so without dropout; OPT's layers, which drop out themselves, are not recomputed.
                    if isinstance(layer, GradientCheckpointingLayer) and not _has_rate(layer):
                        layer.training = layer.gradient_checkpointing
        return self

    def enable_input_require_grads(self) -> None:
        """Nothing: activation checkpointing here is the non-reentrant one, which does not need it.

        transformers would make the embeddings' output require a gradient, and with it a frozen vision
        encoder's, whose backward pass would then be computed for nobody.
        """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint directory of ours, checked against its manifest, or plain weights."""
        from mllm.model.checkpoint import has_manifest, load_model  # checkpoint imports this module

        if has_manifest(pretrained_model_name_or_path):
            return load_model(pretrained_model_name_or_path, dtype=kwargs.get("dtype"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def most_of_ranks(count: int, device: torch.device) -> int:
    """The largest of the ranks' counts."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _has_rate(layer: nn.Module) -> bool:
    """Whether a layer holds a number that may be its own rate of dropout."""
    return any(isinstance(value, float) and value > 0 for value in vars(layer).values())


def fixed_pixels(shape: tuple[int, ...] | list[int], device: torch.device | str) -> torch.Tensor:
    """One image [1, C, H, W] that is the same on every machine."""
    count = int(torch.tensor(shape).prod())
    return torch.cos(torch.arange(count) * 0.01).reshape(1, *shape).to(device)


def fixed_ids(vocab_size: int, avoid: int, length: int = 8) -> torch.Tensor:
    """Token ids [length] spread over the vocabulary, none of them `avoid`."""
    ids = (torch.arange(length) * 37 + 11) % vocab_size
    return ids.masked_fill(ids == avoid, 0)
