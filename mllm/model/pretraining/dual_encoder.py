"""CLIP and SigLIP: an image encoder and a text encoder, pulled together by a contrastive loss.

    pixel_values -> vision_encoder -> pooled [B, Dv] -> vision_proj -+
                                                                     +-> scores [B, G] -> loss
    input_ids    -> text_encoder   -> pooled [B, Dt] -> text_proj  --+

What is kept of it is the vision encoder: every checkpoint has it in Hugging Face's own form in the folder
`vision_encoder/`, image processor included, so that a recipe can name that folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import ModelOutput

from mllm.model.configuration import as_config
from mllm.model.parted import PartedModel, fixed_ids, fixed_pixels
from mllm.model.pretraining.contrastive import clip_loss, siglip_loss
from mllm.model.text_encoder import build_text_encoder
from mllm.model.vision_encoder import FeatureLayer, build_vision_encoder

Objective = Literal["clip", "siglip"]
MAX_LOG_SCALE = math.log(100)  # CLIP section 2.5: more makes training unstable


class DualEncoderConfig(PreTrainedConfig):
    """Configuration of `DualEncoder`.

    Args:
        vision_config: the vision encoder's.
        text_config: the text encoder's; its output must have a `pooler_output`.
        objective: `clip` or `siglip`.
        embed_dim: width in which images and texts meet.
        vision_feature_layer: a layer of one vector an image, see `mllm.model.vision_encoder`.
        vision_dim: Dv.
        pixel_shape: [C, H, W] of one preprocessed image.
    """

    model_type = "mllm_dual_encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        objective: Objective = "clip",
        embed_dim: int = 512,
        vision_feature_layer: FeatureLayer = "pooled",
        vision_dim: int = 1,
        pixel_shape: tuple[int, int, int] | list[int] = (3, 1, 1),
        **kwargs: Any,
    ):
        self.vision_config = as_config(vision_config, "clip_vision_model")
        self.text_config = as_config(text_config, "clip_text_model")
        self.objective = objective
        self.embed_dim = embed_dim
        self.vision_feature_layer = vision_feature_layer
        self.num_prefix_tokens = 0
        self.vision_dim = vision_dim
        self.pixel_shape = list(pixel_shape)
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


@dataclass
class DualEncoderOutput(ModelOutput):
    """Loss (this rank's share of the global batch's) and the scores [B, B] of its own pairs."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class DualHeads(nn.Module):
    """Projections, and the learned scale and bias of the scores; started as the papers do."""

    def __init__(self, vision_dim: int, text_dim: int, embed_dim: int, objective: Objective):
        super().__init__()
        self.vision_proj = nn.Linear(vision_dim, embed_dim, bias=False)
        self.text_proj = nn.Linear(text_dim, embed_dim, bias=False)
        sigmoid = objective == "siglip"
        self.log_scale = nn.Parameter(torch.tensor(math.log(10 if sigmoid else 1 / 0.07)))
        # Most pairs do not match: without it the first steps would only learn to say no.
        self.bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled [B, Dv] and [B, Dt] to unit vectors [B, D]."""
        image, text = (x.to(self.vision_proj.weight.dtype) for x in (image, text))
        return F.normalize(self.vision_proj(image), dim=-1), F.normalize(self.text_proj(text), dim=-1)


class DualEncoder(PartedModel):
    """A vision and a text encoder trained on pairs, with CLIP's or SigLIP's loss."""

    config_class = DualEncoderConfig
    config: DualEncoderConfig
    parts = ("vision_encoder", "text_encoder", "heads")
    text_encoder: Any
    heads: Any
    main_input_name = "pixel_values"

    @classmethod
    def build_part(cls, config: DualEncoderConfig, part: str) -> nn.Module:
        """One part with fresh weights."""
        if part == "vision_encoder":
            return build_vision_encoder(config.vision_config, config.vision_feature_layer)
        if part == "text_encoder":
            return build_text_encoder(config.text_config)
        text_dim = config.text_config.hidden_size
        return DualHeads(config.vision_dim, text_dim, config.embed_dim, config.objective)

    def embed(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of images [B, D] and texts [B, D]."""
        text = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return self.heads(self.vision_features(pixel_values).squeeze(1), text)

    def probe_inputs(self) -> dict[str, torch.Tensor]:
        """One image and eight tokens, the last of them as the text encoder expects it."""
        device: Any = self.heads.log_scale.device
        text = self.config.text_config
        ids = fixed_ids(text.vocab_size, -1)
        ids[-1] = text.eos_token_id or 0  # CLIP pools there
        return {
            "pixel_values": fixed_pixels(self.config.pixel_shape, device),
            "input_ids": ids[None].to(device),
        }

    def probe_logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The two vectors and their score: [3, K]."""
        image, text = self.embed(**inputs)
        score = self.scores(image, text)
        return torch.cat([image, text, score.expand(1, image.shape[1])])

    def scores(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Scores [B, T] of unit vectors [B, D] and [T, D]."""
        scores = self.heads.log_scale.exp() * image @ text.T
        return scores if self.heads.bias is None else scores + self.heads.bias

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> DualEncoderOutput:
        """Pixels [B, C, H, W] and token ids [B, T] of B pairs -> loss over the global batch."""
        heads = self.heads
        if self.training and heads.bias is None:
            with torch.no_grad():
                heads.log_scale.clamp_(max=MAX_LOG_SCALE)
        image, text = self.embed(pixel_values, input_ids, attention_mask)
        loss = (
            clip_loss(image, text, heads.log_scale)
            if heads.bias is None
            else siglip_loss(image, text, heads.log_scale, heads.bias)
        )
        return DualEncoderOutput(loss=loss, logits=self.scores(image, text))

    def save_products(self, folder: Path, processor: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
        """The vision encoder as a Hugging Face model directory, from which later stages start."""
        own = {n.removeprefix("vision_encoder."): t for n, t in state_dict.items() if n.startswith("vision_")}
        self.vision_encoder.save_pretrained(folder / "vision_encoder", state_dict=own)
        processor.image_processor.save_pretrained(folder / "vision_encoder")
