"""What is asked of an image, in the tokens of a connector that reads it (InstructBLIP's Q-Former)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

FOLDER = "instruction_tokenizer"


class InstructionTokenizer:
    """A second tokenizer, beside the language model's.

    Args:
        tokenizer: that of the connector's text branch (BERT's for InstructBLIP).
        max_length: longer instructions lose their beginning, as in LAVIS (`truncation_side="left"`, 128).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128):
        self.tokenizer = tokenizer
        self.tokenizer.truncation_side = "left"
        self.max_length = max_length

    def __call__(self, instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """`instruction_ids` and `instruction_mask` [I, L], one row an image, padded on the right."""
        encoded = self.tokenizer(
            list(instructions),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {"instruction_ids": encoded["input_ids"], "instruction_mask": encoded["attention_mask"]}

    def save(self, folder: Path) -> None:
        """Write it into a processor's directory."""
        self.tokenizer.save_pretrained(folder / FOLDER)

    @classmethod
    def load(cls, folder: Path) -> InstructionTokenizer | None:
        """Read it from a processor's directory; None where there is none."""
        place = folder / FOLDER
        return cls(AutoTokenizer.from_pretrained(place)) if place.is_dir() else None
