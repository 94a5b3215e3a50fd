"""Caption rows -> a batch of image-text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mllm.data.collator import RowCount
from mllm.data.images import load_image
from mllm.data.schema import Row, images_of, message_text, name_of
from mllm.errors import DataError

if TYPE_CHECKING:
    from mllm.model.pretraining.pair_processing import PairProcessor


def pair_of(row: Row) -> tuple[Any, str]:
    """The one image of a row and its caption, which is the one answer.

    Raises:
        DataError: names the row.
    """
    images = images_of(row["messages"])
    captions = [message_text(m).strip() for m in row["messages"] if m["role"] == "assistant"]
    if len(images) != 1 or len(captions) != 1 or not captions[0]:
        raise DataError(
            f"{name_of(row)}: {len(images)} images and {len(captions)} answers; a pair is one image and "
            "one caption that is not empty"
        )
    return images[0], captions[0]


class PairCollator:
    """Builds batches of pairs with the processor of a pretraining stage."""

    def __init__(self, processor: PairProcessor):
        self.processor = processor

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`pixel_values` [B, C, H, W], `input_ids` and `attention_mask` [B, T]; and, for reports, the rest.

        Raises:
            DataError: a row is no pair, or its image cannot be read.
        """
        names = [name_of(row) for row in rows]
        images, captions = zip(*map(pair_of, rows), strict=True)
        pictures = [load_image(image, name) for image, name in zip(images, names, strict=True)]
        batch = self.processor(images=pictures, text=captions)
        sizes = batch["attention_mask"].sum(1).tolist()
        counts = [
            RowCount(row.get("dataset", ""), size, 0, 0, 1) for row, size in zip(rows, sizes, strict=True)
        ]
        return {**batch, "row_ids": names, "counts": counts}
