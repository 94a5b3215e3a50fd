"""Rows -> a training batch: the only writer of labels.

Every row is rendered, tokenised and checked here, on the CPU, where an error can still name the row;
the model only scatters.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mllm.data.schema import Row, name_of
from mllm.data.tokens import IGNORE, pad_rows
from mllm.errors import DataError

if TYPE_CHECKING:
    from mllm.data.feature_store import FeatureStore
    from mllm.model.processing import Encoded, MllmProcessor


@dataclass(frozen=True)
class RowCount:
    """Sizes of one row of a batch, counted on the CPU where that holds nobody up.

    Attributes:
        dataset: which data set of the mixture it is from.
        tokens: image placeholders included, padding not.
        image_tokens: placeholders.
        labels: supervised tokens.
        views: pictures, or with tiling their views, as pixels or as kept features.
    """

    dataset: str
    tokens: int
    image_tokens: int
    labels: int
    views: int


class Collator:
    """Builds right-padded training batches.

    Args:
        processor: renders, tokenises and reads images.
        max_length: longest row in tokens, images included; whole trailing rounds are removed from longer
            rows and counted in `dropped_turns`, and a row whose first round is too long is refused.

    Attributes:
        features: where the vision encoder's features lie; batches then have them in place of pixels.
    """

    def __init__(self, processor: MllmProcessor, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length
        self.features: FeatureStore | None = None

    def with_features(self, features: FeatureStore) -> Collator:
        """Another that gives features in place of pixels."""
        other = copy(self)
        other.features = features
        return other

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of B rows.

        Returns:
            `input_ids`, `attention_mask`, `labels` [B, S]; where there is an image,
            `pixel_values` [I, C, H, W] and what else the model takes of images, or, with `features`, always
            `image_features` [I, N, Dv], I being 0 where there is no image; and, for reports, `row_ids`
            (B names), `counts` (B `RowCount`) and `dropped_turns` (an int). For an encoder-decoder language
            model the first two are prompts, `labels` [B, T] are answers, and B counts the answers.

        Raises:
            DataError: names the row.
        """
        examples = [(row, example) for row in rows for example in self.examples(row)]
        encoded = [example for _, example in examples]
        batch: dict[str, Any] = dict(self.layout(encoded))
        pictures = [self._images(row, example.images) if example.images else {} for row, example in examples]
        inputs = [of_row for of_row in pictures if of_row]
        for name in inputs[0] if inputs else ():
            batch[name] = torch.cat([of_row[name] for of_row in inputs])
        if self.features is not None and not inputs:
            # Or this rank would call the encoder while others do not, and with ZeRO-3 wait for them.
            batch["image_features"] = self.features.take([])
        batch |= self.processor.instruction_inputs([text for row in encoded for text in row.instructions])
        batch["row_ids"] = [name_of(row) for row, _ in examples]
        batch["counts"] = [
            self._count(row, example, len(of_row.get("pixel_values", of_row.get("image_features", ()))))
            for (row, example), of_row in zip(examples, pictures, strict=True)
        ]
        batch["dropped_turns"] = sum(row.dropped_turns for row in encoded)
        return batch

    def layout(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """Ids, mask and labels of all rows."""
        pad = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": pad_rows([row.input_ids for row in encoded], pad),
            "attention_mask": pad_rows([[1] * len(row.input_ids) for row in encoded], 0),
            "labels": pad_rows([row.labels for row in encoded], IGNORE),
        }

    def encode(self, row: Row) -> Encoded:
        """Ids and labels of one row, checked."""
        try:
            encoded = self.processor.encode_to_fit(row["messages"], self.max_length)
        except DataError as error:
            raise DataError(f"{name_of(row)}: {error}") from error
        placeholders = encoded.input_ids.count(self.processor.image_token_id)
        wanted = sum(encoded.image_tokens)
        if placeholders != wanted:
            raise DataError(f"{name_of(row)}: {placeholders} image placeholders where {wanted} must stand")
        # The first label is never predicted: there is nothing before it, except for a decoder.
        predicted = encoded.labels if self.processor.encoder_decoder else encoded.labels[1:]
        if predicted.count(IGNORE) == len(predicted):
            raise DataError(f"{name_of(row)}: nothing to learn, no token is supervised; remove the row")
        return encoded

    def examples(self, row: Row) -> list[Encoded]:
        """The row as it is; for an encoder-decoder, each answer with all that came before it."""
        whole = self.encode(row)
        if not self.processor.encoder_decoder:
            return [whole]
        kept = row["messages"][: len(row["messages"]) - whole.dropped_turns]
        ends = [i for i, message in enumerate(kept, 1) if message["role"] == "assistant"]
        return [*(self.processor.encode(kept[:end]) for end in ends[:-1]), whole]

    def _count(self, row: Row, encoded: Encoded, views: int) -> RowCount:
        answer = len(encoded.labels) if self.processor.encoder_decoder else 0
        labels = encoded.labels if self.processor.encoder_decoder else encoded.labels[1:]
        return RowCount(
            dataset=row.get("dataset", ""),
            tokens=len(encoded.input_ids) + answer,
            image_tokens=sum(encoded.image_tokens),
            labels=len(labels) - labels.count(IGNORE),
            views=views,
        )

    def _images(self, row: Row, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        try:
            if self.features is not None:
                return {"image_features": self.features.take(images)}
            return self.processor.image_inputs(images)
        except DataError as error:
            raise DataError(f"{name_of(row)}: {error}") from error
