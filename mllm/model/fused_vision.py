"""Several vision encoders as one: their patch features side by side (Prismatic: DINOv2 + SigLIP).

Each encoder has its own image processor and its own feature layer. Their pixels travel stacked on the
channel axis, [I, E * 3, H, W], so that nothing else need know that there is more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from mllm.errors import ConfigError
from mllm.model.vision_encoder import FeatureLayer, build_vision_encoder, count_prefix, patch_features


class FusedVisionConfig(PreTrainedConfig):
    """Configuration of `FusedVisionEncoder`.

    Args:
        encoders: the configurations of the encoders.
        layers: the feature layer of each.
    """

    model_type = "mllm_fused_vision"

    def __init__(
        self,
        encoders: Sequence[PreTrainedConfig | dict[str, Any]] = (),
        layers: Sequence[FeatureLayer] = (),
        **kwargs: Any,
    ):
        # As dictionaries: transformers does not write configurations that stand in a list.
        self.encoders = [e.to_dict() if isinstance(e, PreTrainedConfig) else e for e in encoders]
        self.layers = list(layers)
        super().__init__(**kwargs)


class FusedVisionEncoder(PreTrainedModel):
    """Patch features of several encoders, concatenated; class and register tokens are dropped."""

    config_class = FusedVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    supports_gradient_checkpointing = True

    def __init__(self, config: FusedVisionConfig):
        super().__init__(config)
        self.encoders = nn.ModuleList(
            build_vision_encoder(AutoConfig.for_model(**encoder), layer)
            for encoder, layer in zip(config.encoders, config.layers, strict=True)
        )
        self.post_init()

    @classmethod
    def of(cls, encoders: Sequence[PreTrainedModel], layers: Sequence[FeatureLayer]) -> FusedVisionEncoder:
        """Fuse encoders that exist already."""
        with torch.device("meta"):
            fused = cls(FusedVisionConfig([encoder.config for encoder in encoders], layers))
        fused.encoders = nn.ModuleList(encoders)
        return fused.eval()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """[I, E * C, H, W] to `last_hidden_state` [I, N, sum of Dv].

        Raises:
            ConfigError: the encoders see grids of different sizes.
        """
        features = []
        views = pixel_values.chunk(len(self.encoders), dim=1)  # E times [I, C, H, W]
        for encoder, layer, view in zip(self.encoders, self.config.layers, views, strict=True):
            tokens = patch_features(encoder, view, layer, 0)
            features.append(tokens[:, count_prefix(encoder.config, tokens.shape[1], view.shape[-2:]) :])
        counts = [patches.shape[1] for patches in features]
        if len(set(counts)) > 1:
            raise ConfigError(
                f"vision_encoder: fused encoders must see equal grids, these give {counts} patches; "
                "choose patch and image sizes that agree"
            )
        return BaseModelOutput(last_hidden_state=torch.cat(features, dim=-1))


class FusedImageProcessor(BaseImageProcessor):
    """The pixels of several image processors, stacked on the channel axis.

    Args:
        image_processors: image processors, or their settings as they are saved.
    """

    def __init__(self, image_processors: Sequence[Any] = (), **kwargs: Any):
        super().__init__(**kwargs)
        self.image_processors = [_revived(p) if isinstance(p, dict) else p for p in image_processors]

    @property
    def image_mean(self) -> list[float]:
        """The first one's, the colour that pictures are padded with."""
        return self.image_processors[0].image_mean

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """`pixel_values` [I, E * C, H, W].

        Raises:
            ConfigError: the image processors give different sizes.
        """
        options = {**kwargs, "return_tensors": "pt"}
        pixels = [p(images=images, **options)["pixel_values"] for p in self.image_processors]
        sizes = [tuple(view.shape[-2:]) for view in pixels]
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"image_processor: fused encoders must see pictures of one size, these give {sizes}; "
                "give a list of image processors that agree"
            )
        return BatchFeature({"pixel_values": torch.cat(pixels, dim=1)})

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        return super().to_dict() | {"image_processors": [p.to_dict() for p in self.image_processors]}


def _revived(settings: dict[str, Any]) -> Any:
    return get_image_processor_class_from_name(settings["image_processor_type"]).from_dict(settings)
