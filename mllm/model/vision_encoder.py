"""pixel_values -> patch features, for any Hugging Face vision model.

`layer` counts as Hugging Face's `hidden_states` do: 0 is the embedding, -2 the output of the last block
but one (LLaVA). `last` is `last_hidden_state`, which for SigLIP, DINOv2 and BLIP-2's EVA-CLIP is *not*
`hidden_states[-1]`: it has passed the final layer norm. `pooled` is the model's one vector an image
(`pooler_output`), `projected` that of CLIP in the space it shares with text (`image_embeds`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    Blip2VisionModel,
    CLIPVisionModelWithProjection,
    InstructBlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from mllm.errors import ConfigError

# Vision halves that `AutoModel` does not know: EVA-CLIP ViT-g/14 as BLIP-2 and InstructBLIP carry it.
VISION_CLASSES: dict[str, type[PreTrainedModel]] = {
    "blip_2_vision_model": Blip2VisionModel,
    "instructblip_vision_model": InstructBlipVisionModel,
}
PROJECTED_CLASSES: dict[str, type[PreTrainedModel]] = {"clip_vision_model": CLIPVisionModelWithProjection}

FeatureLayer = int | Literal["last", "pooled", "projected"]
FeatureSelect = Literal["patch", "full"]


def vision_class(config: PreTrainedConfig, layer: FeatureLayer) -> type[PreTrainedModel]:
    """The class that computes this feature layer.

    Raises:
        ConfigError: there is none.
    """
    found: Any
    if layer == "projected":
        found = PROJECTED_CLASSES.get(config.model_type)
    else:
        found = VISION_CLASSES.get(config.model_type) or MODEL_MAPPING.get(type(config), None)
    if found is None:
        hint = f"; 'projected' is for {', '.join(PROJECTED_CLASSES)}" if layer == "projected" else ""
        raise ConfigError(f"no vision model of type {config.model_type!r} gives the layer {layer!r}{hint}")
    return found


def build_vision_encoder(config: PreTrainedConfig, layer: FeatureLayer = "last") -> PreTrainedModel:
    """A vision model with fresh weights, of the class that computes `layer`."""
    return vision_class(config, layer)._from_config(config)


def patch_features(
    vision_encoder: nn.Module,
    pixel_values: torch.Tensor,
    layer: FeatureLayer,
    num_prefix_tokens: int,
) -> torch.Tensor:
    """Features of one layer, without the first `num_prefix_tokens` (class and register tokens).

    Args:
        vision_encoder: any model whose output has what `layer` asks for.
        pixel_values: [I, C, H, W], at any size that the model or its `interpolate_pos_encoding` can take.
        layer: see the module's docstring.
        num_prefix_tokens: what to drop in front; 0 keeps everything.

    Returns:
        [I, N, Dv]; N is 1 for `pooled` and `projected`.
    """
    inputs = _inputs(vision_encoder, pixel_values)
    output = vision_encoder(**inputs, output_hidden_states=isinstance(layer, int))
    if layer == "projected":
        return output.image_embeds[:, None]
    if layer == "pooled":
        if output.get("pooler_output") is None:
            raise ConfigError(f"vision_feature_layer: {type(vision_encoder).__name__} has no pooled features")
        # [I, Dv], or [I, Dv, 1, 1] of a convolutional network
        return output.pooler_output.flatten(1)[:, None]
    if layer == "last":
        return output.last_hidden_state[:, num_prefix_tokens:]
    count = len(output.hidden_states)
    if not -count <= layer < count:
        raise ConfigError(
            f"vision_feature_layer is {layer}, but there are {count}; use {-count} to {count - 1}"
        )
    return output.hidden_states[layer][:, num_prefix_tokens:]


def _inputs(vision_encoder: nn.Module, pixel_values: torch.Tensor) -> dict[str, Any]:
    config: Any = vision_encoder.config
    # Of the class: an object's own `forward` may be wrapped by accelerate, which hides the arguments.
    takes = inspect.signature(type(vision_encoder).forward).parameters
    if "spatial_shapes" in takes:
        return naflex_inputs(pixel_values, config.patch_size)
    if "interpolate_pos_encoding" not in takes:
        return {"pixel_values": pixel_values}
    size = config.image_size
    native = (size, size) if isinstance(size, int) else tuple(size)
    return {
        "pixel_values": pixel_values,
        "interpolate_pos_encoding": tuple(pixel_values.shape[-2:]) != native,
    }


def naflex_inputs(pixel_values: torch.Tensor, patch: int) -> dict[str, torch.Tensor | None]:
    """Pixels [I, C, H, W] as SigLIP 2's NaFlex model takes them: in patches [I, N, P * P * C]."""
    rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    grid = pixel_values[..., : rows * patch, : columns * patch]
    grid = grid.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch))  # [I, C, rows, P, columns, P]
    patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [I, N, P * P * C]
    return {
        "pixel_values": patches,
        "pixel_attention_mask": None,  # no patch is padding
        # On the CPU: the model reads them as Python numbers.
        "spatial_shapes": torch.tensor([[rows, columns]], device="cpu").expand(len(patches), -1),
    }


def feature_shape(
    vision_config: Any,
    pixel_shape: Sequence[int],
    layer: FeatureLayer,
) -> tuple[int, int, int]:
    """(tokens, prefix tokens, width) of a vision model, found by a forward on the meta device.

    Args:
        vision_config: the vision model's configuration.
        pixel_shape: (C, H, W) as the image processor gives it, which need not be the size in the
            configuration (DINOv2 was trained at 518 and is used at 224).
        layer: the feature layer.
    """
    with torch.device("meta"), torch.no_grad():
        encoder = build_vision_encoder(vision_config, layer)
        if encoder.main_input_name != "pixel_values":
            raise ConfigError(f"vision_encoder: a {vision_config.model_type!r} reads no images; name another")
        try:
            features = patch_features(encoder, torch.empty(1, *pixel_shape), layer, 0)
        except RuntimeError as error:
            raise ConfigError(
                f"vision_encoder: a {vision_config.model_type!r} cannot read images of {list(pixel_shape)}: "
                f"{str(error).splitlines()[0]}; change model.image_size or model.image_processor"
            ) from error
    if features.dim() != 3:
        raise ConfigError(
            f"vision model {vision_config.model_type!r} gives feature maps, no tokens; "
            "use vision_feature_layer: pooled"
        )
    tokens, dim = features.shape[1:]
    if layer in ("pooled", "projected"):
        return tokens, 0, dim
    return tokens, count_prefix(vision_config, tokens, pixel_shape[1:]), dim


def count_prefix(vision_config: Any, tokens: int, size: Sequence[int]) -> int:
    """Tokens that are no patch: what is left over when the patch grid is taken away.

    So a class token is dropped where there is one (CLIP, DINOv2) and nothing is lost where there is none
    (SigLIP, two fused encoders).
    """
    patch = getattr(vision_config, "patch_size", None)
    if patch is None:
        return 0
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    grid = (size[0] // patch_height) * (size[1] // patch_width)
    if tokens < grid:
        raise ConfigError(f"the vision model gives {tokens} tokens for a grid of {grid} patches")
    return tokens - grid
