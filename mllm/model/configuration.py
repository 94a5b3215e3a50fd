"""The configuration of a composed model: three parts and how they meet."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mllm.model.vision_encoder import FeatureLayer


class MllmConfig(PreTrainedConfig):
    """Configuration of `MllmForConditionalGeneration`.

    Args:
        vision_config: configuration of the vision encoder, any model type.
        text_config: configuration of the language model, causal or encoder-decoder.
        connector: `{"type": "mlp", ...}`, see `mllm.model.connectors`.
        vision_feature_layer: index into the encoder's hidden states, `last` (after the final norm),
            `pooled` or `projected`; see `mllm.model.vision_encoder`.
        num_prefix_tokens: tokens dropped in front of the patches (class and register tokens).
        num_patches: N, patches an image.
        num_image_tokens: M, soft tokens an image, or a view of it with tiling.
        vision_dim: Dv, width of the features.
        pixel_shape: [C, H, W] of one preprocessed image.
        image_token_id: placeholder id; may lie beyond the vocabulary, it is never embedded.
        fusion: `{"type": "gated_cross_attention", ...}`, see `mllm.model.fusion`; None is no deep fusion.
        tiling: `{"type": "anyres", ...}`, see `mllm.model.anyres`; None is one view an image.
        prefix_attention: whether the prompt attends to itself in both directions (PaLI, PaliGemma).
        added_tokens: what was added to the vocabulary, see `mllm.model.added_tokens`.
    """

    model_type = "mllm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        vision_feature_layer: FeatureLayer = -2,
        num_prefix_tokens: int = 0,
        num_patches: int = 1,
        num_image_tokens: int = 1,
        vision_dim: int = 1,
        pixel_shape: tuple[int, int, int] | list[int] = (3, 1, 1),
        image_token_id: int = -1,
        fusion: dict[str, Any] | None = None,
        tiling: dict[str, Any] | None = None,
        prefix_attention: bool = False,
        added_tokens: list[str] | None = None,
        **kwargs: Any,
    ):
        self.vision_config = as_config(vision_config, "clip_vision_model")
        self.text_config = as_config(text_config, "llama")
        self.connector = dict(connector or {"type": "mlp"})
        self.vision_feature_layer = vision_feature_layer
        self.num_prefix_tokens = num_prefix_tokens
        self.num_patches = num_patches
        self.num_image_tokens = num_image_tokens
        self.vision_dim = vision_dim
        self.pixel_shape = list(pixel_shape)
        self.image_token_id = image_token_id
        self.fusion = dict(fusion) if fusion else None
        self.tiling = dict(tiling) if tiling else None
        self.prefix_attention = prefix_attention
        self.added_tokens = list(added_tokens or ())
        kwargs["is_encoder_decoder"] = bool(self.text_config.is_encoder_decoder)
        # Tying is the language model's affair; at this level nothing is tied.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


def as_config(config: PreTrainedConfig | dict[str, Any] | None, default: str) -> PreTrainedConfig:
    """A configuration object from what `config.json` has; `default` is its model type if none is named."""
    if isinstance(config, PreTrainedConfig):
        return config
    arguments = dict(config or {})
    return AutoConfig.for_model(arguments.pop("model_type", default), **arguments)
