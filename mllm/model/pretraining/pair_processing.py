"""Image-caption pairs -> `pixel_values`, `input_ids`, `attention_mask`: the processor of pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from mllm.data.images import load_image


class PairProcessor(ProcessorMixin):
    """An image processor and the text encoder's tokenizer.

    Args:
        image_processor: any Hugging Face image processor.
        tokenizer: any Hugging Face tokenizer.
        max_text_length: T; longer captions are cut.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, max_text_length: int = 32, **kwargs: Any
    ):
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, images: Sequence[Any] | None = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Paths or PIL images [B, C, H, W], and captions [B, T].

        Captions are always padded to T: ranks exchange them, so they must be equally long everywhere.
        """
        batch: dict[str, torch.Tensor] = {}
        if images is not None:
            pictures = [load_image(image) for image in images]
            batch["pixel_values"] = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        if text is not None:
            tokens = self.tokenizer(
                list(text),
                padding="max_length",
                truncation=True,
                max_length=self.max_text_length,
                padding_side="right",
                return_tensors="pt",
            )
            ids = tokens["input_ids"]
            # SigLIP's tokenizer gives no mask: its text encoder was trained to read the padding.
            batch |= {"input_ids": ids, "attention_mask": tokens.get("attention_mask", torch.ones_like(ids))}
        return BatchFeature(batch)
