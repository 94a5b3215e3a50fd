"""The model: vision encoder, connector, language model, and the one place where they meet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mllm.model.configuration import MllmConfig
from mllm.model.connectors import build_connector
from mllm.model.vision_encoder import patch_features

PARTS = ("vision_encoder", "connector", "language_model")


class MllmForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Any Hugging Face vision model, a connector, and any Hugging Face causal language model, kept whole."""

    config_class = MllmConfig
    config: MllmConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MllmConfig):
        super().__init__(config)
        text_dim = config.text_config.hidden_size
        self.vision_encoder = AutoModel.from_config(config.vision_config)
        self.connector = build_connector(config.connector, config.vision_dim, text_dim)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def from_components(cls, **components: Any) -> tuple[MllmForConditionalGeneration, Any]:
        """Compose a model and its processor from parts; see `mllm.model.compose.compose`."""
        from mllm.model.compose import compose  # compose imports this module

        return compose(**components)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint directory of ours, checked against its manifest, or plain weights."""
        from mllm.model.checkpoint import has_manifest, load_model  # checkpoint imports this module

        if has_manifest(pretrained_model_name_or_path):
            return load_model(pretrained_model_name_or_path, dtype=kwargs.get("dtype"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def train(self, mode: bool = True) -> MllmForConditionalGeneration:
        """Training mode for parts with anything to train; a frozen part never uses dropout."""
        super().train(mode)
        for name in PARTS:
            part = getattr(self, name, None)
            if mode and part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images to soft tokens: [I, C, H, W] -> [I, M, Dt]."""
        features = patch_features(
            self.vision_encoder,
            pixel_values.to(self.vision_encoder.dtype),
            self.config.vision_feature_layer,
            self.config.num_prefix_tokens,
        )  # [I, N, Dv]
        return self.connector(features.to(next(self.connector.parameters()).dtype))

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings with soft tokens in the place of the placeholders: [B, S] -> [B, S, Dt].

        Raises:
            ValueError: placeholders and soft tokens differ in number.
        """
        is_image = input_ids == self.config.image_token_id  # [B, S]
        # The placeholder's id may lie beyond the embedding, so it must not be looked up.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # [B, S, Dt]
        if pixel_values is None:
            if is_image.any():
                raise ValueError(f"{int(is_image.sum())} image placeholders, but no pixel_values")
            return embeds + self._unused_image(embeds) if self.training else embeds
        soft = self.encode_images(pixel_values).to(embeds.dtype)  # [I, M, Dt]
        if is_image.sum() * soft.shape[-1] != soft.numel():
            raise ValueError(
                f"{int(is_image.sum())} image placeholders for {soft.shape[0]} images "
                f"of {soft.shape[1]} tokens each"
            )
        return embeds.masked_scatter(is_image.unsqueeze(-1), soft)

    def _unused_image(self, embeds: torch.Tensor) -> torch.Tensor:
        """Zero, but computed through encoder and connector.

        On many ranks every rank must call every part in every micro-step, or collectives wait for ever
        on the rank whose rows hold text only.
        """
        pixels = torch.zeros(1, *self.config.pixel_shape, device=embeds.device)
        return (self.encode_images(pixels) * 0).sum().to(embeds.dtype)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss when labels are given.

        Args:
            input_ids: [B, S], M placeholders an image.
            pixel_values: [I, C, H, W], every image of the batch in row order; None when there is none, and
                after the first step of cached generation.
            attention_mask: [B, S] (with a cache: [B, past + S]), 0 at padding, on either side.
            position_ids: [B, S]; counted along the attention mask when not given, so that left padding
                does not move a row.
            past_key_values: the language model's cache.
            inputs_embeds: [B, S, Dt] in place of `input_ids` and `pixel_values`.
            labels: [B, S], -100 where masked; shifted inside.
            use_cache: return a cache.
            logits_to_keep: compute only the last k logits (or those at the indices given); 0 means all.
            **kwargs: passed on; `num_items_in_batch` normalises the loss over the global batch.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, pixel_values)
        num_items = kwargs.pop("num_items_in_batch", None)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            # A cache filled during training would only take memory.
            use_cache=False if use_cache is None and labels is not None else use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            vocab_size = output.logits.shape[-1]
            loss = self.loss_function(output.logits, labels, vocab_size, num_items_in_batch=num_items)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=output.logits,
            past_key_values=output.past_key_values,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )
