"""A second encoder, at high resolution, that every layer reads (CogAgent, arXiv 2312.08914)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mllm.errors import ConfigError
from mllm.model.fusion.base import Fusion, check_takes_kwargs, image_slots
from mllm.model.fusion.cross_attention import CrossAttention
from mllm.model.language_model import build_language_model, decoder_layers
from mllm.model.vision_encoder import FeatureLayer, build_vision_encoder, feature_shape, patch_features

# Inside a layer x + attention(norm x), then x + mlp(norm x): what Llama, Qwen2 and Mistral are made of.
SEQUENTIAL = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class Media(NamedTuple):
    """What the layers of one call read."""

    key_value: list[Tensor]  # of each layer: [B, T * N, 2 * cross_dim]
    mask: Tensor  # [B, 1, T * N], true where a row reads


class HighResCrossAttention(Fusion):
    """Between the self-attention and the MLP of every layer: x + cross_attention(norm x, image).

    All positions of a row read all images of the row. CogAgent's own first weights are not in its
    repository. Here the norm starts as a copy of the one in front of the MLP, and the output projection at
    zero, so that at first the model computes what it does without this branch, bit for bit.

    Args:
        text_config: configuration of the language model.
        media_dim: not used: the low-resolution tokens go into the sequence as they are.
        media_tokens: M, placeholders an image.
        vision_config: configuration of the encoder, `model_type` included. In a recipe, `vision_encoder`
            names a model instead, whose weights the branch then starts from.
        image_size: height and width of its images.
        vision_feature_layer: index into its hidden states, or `last`; CogAgent skips the last block.
        cross_dim: width of queries, keys and values.
        heads: attention heads.
        position_embedding: add a learned embedding to the features, zero at first.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        media_dim: int,
        media_tokens: int,
        vision_config: Mapping[str, Any],
        image_size: int = 1120,
        vision_feature_layer: FeatureLayer = -2,
        cross_dim: int = 1024,
        heads: int = 32,
        position_embedding: bool = True,
    ):
        super().__init__()
        if cross_dim % heads:
            raise ConfigError(
                f"high_res_cross_attention: cross_dim is {cross_dim}; use a multiple of heads ({heads})"
            )
        self.high_res_size = image_size
        self.media_tokens = media_tokens
        self.vision_feature_layer = vision_feature_layer
        config = AutoConfig.for_model(**vision_config)
        total, self.num_prefix_tokens, width = feature_shape(
            config, (3, image_size, image_size), vision_feature_layer
        )
        self.encoder = build_vision_encoder(config)
        self.positions = (
            nn.Parameter(torch.zeros(total - self.num_prefix_tokens, width)) if position_embedding else None
        )
        with torch.device("meta"):
            layers = decoder_layers(build_language_model(text_config))
        self.layers: Any = nn.ModuleList(
            CrossLayer(layer, text_config, width, cross_dim, heads) for layer in layers
        )
        self._held: tuple[Media, Tensor] | None = None

    def features(self, high: Tensor) -> Tensor:
        """[I, C, H, W] -> [I, N, D]."""
        pixels = high.to(self.encoder.dtype)
        return patch_features(self.encoder, pixels, self.vision_feature_layer, self.num_prefix_tokens)

    def prepare(self, is_image: Tensor, soft: Tensor, high: Tensor | None = None) -> tuple[Tensor, Media]:
        """Keys and values of every layer, and which rows read which images."""
        if high is None or len(high) != len(soft):
            found = "no" if high is None else len(high)
            raise ValueError(f"{found} pixel_values_high for {len(soft)} images")
        features = self.features(high)
        if self.positions is not None:
            features = features + self.positions
        features = features.to(self.layers[0].attention.out.weight.dtype)
        index, filled = image_slots(is_image.sum(1) // self.media_tokens, len(soft))  # [B, T]
        key_value = [layer.attention.key_value(features)[index].flatten(1, 2) for layer in self.layers]
        mask = filled.repeat_interleave(features.shape[1], dim=1).unsqueeze(1)  # [B, 1, T * N]
        return soft, Media(key_value, mask)

    def carry(self, context: Media) -> Media:
        """What comes next reads the same."""
        return context

    def start_from(self, language_model: PreTrainedModel) -> None:
        """Every norm starts as a copy of the one behind it."""
        theirs: Any = decoder_layers(language_model)
        for own, layer in zip(self.layers, theirs, strict=True):
            own.norm.load_state_dict(layer.post_attention_layernorm.state_dict())

    def attach_layer(self, index: int, layer: Any) -> list[Any]:
        """Around the self-attention, which gets the context and the layer's input as an argument."""
        check_takes_kwargs(layer)
        return [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.self_attn.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.self_attn.register_forward_hook(partial(self._after, index)),
        ]

    def _enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # The input goes along as an argument, because a layer that is recomputed in the backward pass is
        # not called again, its inside is.
        media = kwargs.get(self.key)
        kwargs[self.key] = None if media is None else (media, args[0])
        return args, kwargs

    def _before(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._held = self.take(kwargs)
        return args, kwargs

    def _after(self, index: int, attention: nn.Module, args: Any, output: Any) -> Any:
        held, self._held = self._held, None
        if held is None:
            return output
        media, x = held
        attended, *rest = output
        cross = self.layers[index](x + attended, media.key_value[index], media.mask)
        return (attended + cross, *rest)


class CrossLayer(nn.Module):
    """Norm and cross-attention that stand inside one decoder layer."""

    def __init__(self, layer: Any, text_config: Any, media_dim: int, cross_dim: int, heads: int):
        super().__init__()
        if {name for name, _ in layer.named_children()} != SEQUENTIAL:
            raise ConfigError(
                f"high_res_cross_attention: {type(layer).__name__} is not made of "
                f"{', '.join(sorted(SEQUENTIAL))}; use another language model (Llama, Qwen2, Mistral)"
            )
        dim = text_config.hidden_size
        self.norm = type(layer.post_attention_layernorm)(dim, eps=text_config.rms_norm_eps)
        self.attention = CrossAttention(dim, media_dim, heads, cross_dim // heads)
        nn.init.zeros_(self.attention.out.weight)

    def forward(self, x: Tensor, key_value: Tensor, mask: Tensor) -> Tensor:
        """[B, S, D], [B, K, 2 * cross_dim], [B, 1, K] -> [B, S, D]."""
        y = x.to(self.attention.out.weight.dtype)  # the language model may be kept in a lower precision
        return self.attention(self.norm(y), key_value, mask).to(x.dtype)
