"""Rows -> a training batch: the only writer of labels.

Every row is rendered, tokenised and checked here, on the CPU, where an error can still name the row;
the model only scatters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mllm.data.schema import Row
from mllm.data.tokens import IGNORE
from mllm.errors import DataError

if TYPE_CHECKING:
    from mllm.model.processing import Encoded, MllmProcessor


class Collator:
    """Builds right-padded training batches.

    Args:
        processor: renders, tokenises and reads images.
        max_length: longest row in tokens, images included; whole trailing rounds are removed from longer
            rows and counted in `dropped_turns`, and a row whose first round is too long is refused.
    """

    def __init__(self, processor: MllmProcessor, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of B rows.

        Returns:
            `input_ids`, `attention_mask`, `labels` [B, S]; `pixel_values` [I, C, H, W] where there is an
            image; and, for reports, `row_ids` (B names) and `dropped_turns` (an int).

        Raises:
            DataError: names the row.
        """
        encoded = [self.encode(row) for row in rows]
        width = max(len(row.input_ids) for row in encoded)

        def padded(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (width - len(values))]

        pad = self.processor.tokenizer.pad_token_id
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([padded(row.input_ids, pad) for row in encoded]),
            "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in encoded]),
            "labels": torch.tensor([padded(row.labels, IGNORE) for row in encoded]),
        }
        pixels = [
            self._pixels(row, images.images)
            for row, images in zip(rows, encoded, strict=True)
            if images.images
        ]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        batch["row_ids"] = [name_of(row) for row in rows]
        batch["dropped_turns"] = sum(row.dropped_turns for row in encoded)
        return batch

    def encode(self, row: Row) -> Encoded:
        """Ids and labels of one row, checked."""
        try:
            encoded = self.processor.encode_to_fit(row["messages"], self.max_length)
        except DataError as error:
            raise DataError(f"{name_of(row)}: {error}") from error
        placeholders = encoded.input_ids.count(self.processor.image_token_id)
        wanted = len(encoded.images) * self.processor.num_image_tokens
        if placeholders != wanted:
            raise DataError(f"{name_of(row)}: {placeholders} image placeholders where {wanted} must stand")
        # The first label is never predicted: there is nothing before it.
        if all(label == IGNORE for label in encoded.labels[1:]):
            raise DataError(f"{name_of(row)}: nothing to learn, no token is supervised; remove the row")
        return encoded

    def _pixels(self, row: Row, images: Sequence[Any]) -> torch.Tensor:
        try:
            return self.processor.pixels(images)
        except DataError as error:
            raise DataError(f"{name_of(row)}: {error}") from error


def name_of(row: Row) -> str:
    """How errors call a row: its place in the file if a reader noted it, and its id."""
    source = row.get("source")
    return f"{source} (id {row['id']})" if source else f"row {row['id']}"
