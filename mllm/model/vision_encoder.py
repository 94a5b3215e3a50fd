"""pixel_values -> patch features, for any Hugging Face vision model.

`layer` counts as Hugging Face's `hidden_states` do: 0 is the embedding, -2 the output of the last block
but one (LLaVA). `last` is `last_hidden_state`, which for SigLIP and DINOv2 is *not* `hidden_states[-1]`:
it has passed the final layer norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from mllm.errors import ConfigError

FeatureLayer = int | Literal["last"]
FeatureSelect = Literal["patch", "full"]


def patch_features(
    vision_encoder: nn.Module,
    pixel_values: torch.Tensor,
    layer: FeatureLayer,
    num_prefix_tokens: int,
) -> torch.Tensor:
    """Features of one layer, without the first `num_prefix_tokens` (class and register tokens).

    Args:
        vision_encoder: any model whose output has `last_hidden_state` and `hidden_states`.
        pixel_values: [I, C, H, W].
        layer: see the module's docstring.
        num_prefix_tokens: what to drop in front; 0 keeps everything.

    Returns:
        [I, N, Dv].
    """
    output = vision_encoder(pixel_values=pixel_values, output_hidden_states=layer != "last")
    features = output.last_hidden_state if layer == "last" else output.hidden_states[layer]
    return features[:, num_prefix_tokens:]


def feature_shape(
    vision_config: Any,
    build: Callable[[Any], nn.Module],
    pixel_shape: Sequence[int],
    layer: FeatureLayer,
) -> tuple[int, int, int]:
    """(tokens, prefix tokens, width) of a vision model, found by a forward on the meta device.

    A prefix token is one that is no patch: what is left over when the patch grid is taken away. So a
    class token is dropped where there is one (CLIP, DINOv2) and nothing is lost where there is none
    (SigLIP).

    Args:
        vision_config: the vision model's configuration; only `patch_size` is read.
        build: a function from configuration to model.
        pixel_shape: (C, H, W) as the image processor gives it, which need not be the size in the
            configuration (DINOv2 was trained at 518 and is used at 224).
        layer: the feature layer.
    """
    patch = vision_config.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    _, height, width = pixel_shape
    grid = (height // patch_height) * (width // patch_width)
    with torch.device("meta"), torch.no_grad():
        tokens, dim = patch_features(build(vision_config), torch.empty(1, *pixel_shape), layer, 0).shape[1:]
    if tokens < grid:
        raise ConfigError(f"the vision model gives {tokens} tokens for a grid of {grid} patches")
    return tokens, tokens - grid, dim
