"""Transformers' `generate` on a model with images: what it expands, hands on and takes for the prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

IMAGE_INPUTS = ("pixel_values", "image_sizes", "pixel_values_high", "instruction_ids", "instruction_mask")
"""What `embed` takes beside the token ids."""


class ImageGenerationMixin(GenerationMixin):
    """Of `MllmForConditionalGeneration`: the steps of `generate` that images, fusions and encoders change."""

    config: Any
    fusion: Any
    language_model: Any
    position_ids: Any
    image_counts: Any
    embed: Any

    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: Any) -> Any:
        own = self.position_ids(inputs_tensor, model_kwargs.get("attention_mask"))
        return (
            super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs) if own is None else own
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """For several beams or answers a row, all its images are repeated in turn, not each by itself."""
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if kwargs.get(name) is not None}
        if images and expand_size > 1:
            counts = self.image_counts(len(images["pixel_values"]), images.get("image_sizes"))
            views, placeholders = torch.tensor(counts, device=input_ids.device).unbind(1)  # [I]
            in_rows = (input_ids == self.config.image_token_id).sum(1)  # [B]
            row = torch.searchsorted(in_rows.cumsum(0), placeholders.cumsum(0))  # [I], where each stands
            for name, tensor in images.items():
                own = row.repeat_interleave(views) if name == "pixel_values" else row
                copies = torch.cat([own * expand_size + copy for copy in range(expand_size)])
                images[name] = tensor[copies.argsort(stable=True) % len(own)]
        plain: Any = super()
        ids, kwargs = plain._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return ids, kwargs | images

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Also hand on what the fusion's layers need at the next token."""
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if self.fusion is not None and outputs.fusion_context is not None:
            updated["fusion_context"] = self.fusion.carry(outputs.fusion_context)
        return updated

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate`, which an encoder-decoder's prompt enters encoded.

        The result begins with the prompt, that of an encoder-decoder with its start token alone.
        """
        ids: Any = kwargs.get("input_ids", inputs)
        embeds = kwargs.get("inputs_embeds")
        if self.config.prefix_attention:
            # Without a cache, every step sees the answer so far among its inputs: it is not the prompt.
            prompt = ids if embeds is None else embeds[..., 0]  # [B, P]
            kwargs.setdefault("prefix_mask", torch.ones_like(prompt))
        if self.config.is_encoder_decoder and kwargs.get("encoder_outputs") is None:
            of_images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
            if embeds is None:
                embeds, _ = self.embed(ids, **of_images)  # [B, S, Dt]
            for name in ("input_ids", "inputs_embeds"):  # these would be taken for the decoder's
                kwargs.pop(name, None)
            kwargs["encoder_outputs"] = self.language_model.get_encoder()(
                inputs_embeds=embeds, attention_mask=kwargs.get("attention_mask"), return_dict=True
            )
            inputs = None
        plain: Any = super()
        return plain.generate(inputs, *args, **kwargs)
