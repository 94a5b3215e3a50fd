"""Validation during training: does the model learn, and does it look at the image?

The loss a token over rows that are not trained on; and of the rows with an image once more with other rows'
images and with blank ones. A model that does as well without the right image ignores it, however fluent it
is (LAVIS, issues 149 and 463). Same collator, no gradient, no random number that training would miss.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback

from mllm.config import RunConfig, ValSection
from mllm.data.images import image_size
from mllm.data.rows import Rows, open_rows
from mllm.data.schema import Message, Part, Row, image_part, images_of
from mllm.data.tokens import IGNORE
from mllm.training.aside import aside
from mllm.training.steps import model_inputs

logger = logging.getLogger(__name__)


class Validation:
    """The rows to validate on, and how.

    Args:
        section: the recipe's `val`.
        rows: of its file.
        collator: that of the run.
        batch_size: rows a forward pass of one rank.
        workers: processes that make the batches.
    """

    def __init__(self, section: ValSection, rows: Rows, collator: Any, batch_size: int, workers: int = 0):
        self.section, self.collator = section, collator
        self.batch_size, self.workers = batch_size, workers
        count = min(section.rows, len(rows))
        self.rows = [rows[number * len(rows) // count] for number in range(count)]
        self.encoder_decoder = collator.processor.encoder_decoder
        pictured = [row for row in self.rows if images_of(row["messages"])]
        self.parts: dict[str, Sequence[Row]] = {
            "text": [row for row in self.rows if not images_of(row["messages"])],
            "images": pictured,
        }
        shuffled = shuffle_images(pictured)
        if shuffled is not None:
            self.parts |= {"shuffled": shuffled, "blank": Blanked(pictured, collator.processor.mean_colour)}

    def measure(self, model: Any, accelerator: Any) -> dict[str, float]:
        """Losses a supervised token, the same on all ranks; every rank calls with its model.

        Returns:
            `loss` over all rows; `loss_images`, `loss_shuffled` and `loss_blank` over those with images, and
            `image_gap`, how much others' images raise the loss, where two images at least are different.
        """
        with aside(model), torch.no_grad():
            model.eval()
            sums = {name: self._sum(model, accelerator, rows) for name, rows in self.parts.items() if rows}
        total, count = (sum(sums[name][i] for name in ("text", "images") if name in sums) for i in (0, 1))
        found = {"loss": total / count}
        if "shuffled" in sums:
            for name in ("images", "shuffled", "blank"):
                found[f"loss_{name}"] = sums[name][0] / sums[name][1]
            found["image_gap"] = found["loss_shuffled"] - found["loss_images"]
            if found["image_gap"] < self.section.image_gap and accelerator.is_main_process:
                logger.warning(
                    "THE MODEL IGNORES THE IMAGE: with other rows' images the validation loss is %.4f, with "
                    "their own %.4f (blank: %.4f); the gap is below val.image_gap=%g. Check that "
                    "the pictures belong to the rows and that the connector learns",
                    *(found[f"loss_{name}"] for name in ("shuffled", "images", "blank")),
                    self.section.image_gap,
                )
        return found

    def _sum(self, model: Any, accelerator: Any, rows: Sequence[Row]) -> tuple[float, float]:
        """(summed loss, supervised tokens) over rows, which the ranks share."""
        device = accelerator.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for batch, own in self._batches(rows, accelerator.num_processes, accelerator.process_index):
            inputs = model_inputs(batch, device)
            labels = inputs["labels"] if self.encoder_decoder else inputs["labels"][:, 1:]
            # Divided by 1 item, so a sum.
            loss = model(**inputs, num_items_in_batch=1).loss
            if own:
                total += torch.stack([loss.double(), (labels != IGNORE).sum().double()])
        summed, count = accelerator.reduce(total, "sum").tolist()
        return summed, count

    def _batches(
        self, rows: Sequence[Row], ranks: int, rank: int
    ) -> Iterator[tuple[Mapping[str, Any], bool]]:
        """This rank's batches, and whether each counts: all ranks have equally many, or ZeRO-3 would hang."""
        size = self.batch_size
        batches = [list(range(at, min(at + size, len(rows)))) for at in range(0, len(rows), size)]
        rounds = -(-len(batches) // ranks)
        own = [number * ranks + rank for number in range(rounds)]
        loader: DataLoader[Any] = DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=[batches[min(number, len(batches) - 1)] for number in own],
            collate_fn=self.collator,
            num_workers=self.workers,
        )
        for number, batch in zip(own, loader, strict=True):
            yield batch, number < len(batches)


def open_validation(config: RunConfig, collator: Any) -> Validation | None:
    """What the recipe's `val` asks for; None where it has none."""
    section = config.val
    if section is None:
        return None
    rows = open_rows(section.path, section.format, section.image_root or config.data.image_root)
    size = section.batch_size or config.train.per_device_batch_size
    return Validation(section, rows, collator, size, config.train.num_workers)


def validation_callbacks(section: ValSection | None) -> list[TrainerCallback]:
    """What keeps the best checkpoint, and stops early."""
    callbacks: list[TrainerCallback] = []
    if section is not None and section.keep_best:
        callbacks.append(KeepBest())
    if section is not None and section.patience is not None:
        callbacks.append(QuietEarlyStopping(section.patience))
    return callbacks


class KeepBest(TrainerCallback):
    """Saves at every lowest loss; the Trainer then never removes the best checkpoint."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """The state still has the lowest loss of the validations before."""
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            control.should_save = True


class QuietEarlyStopping(EarlyStoppingCallback):
    """Transformers' early stopping without its warning: the best weights are kept, the last are saved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count on where a run is resumed; there is nothing to check, the recipe was."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            counted = saved["attributes"]["early_stopping_patience_counter"]
            self.early_stopping_patience_counter = counted


def shuffle_images(rows: Sequence[Row]) -> list[Row] | None:
    """The rows with each image exchanged for a different one; None where all are the same.

    Different images are exchanged, not places: several rows may ask about one picture.
    """
    different: dict[Any, Any] = {}
    for row in rows:
        for image in images_of(row["messages"]):
            different.setdefault(_key(image), image)
    if len(different) < 2:
        return None
    keys = list(different)
    random.Random(0).shuffle(keys)  # neighbours in a file may be alike
    other = {key: different[after] for key, after in zip(keys, [*keys[1:], keys[0]], strict=True)}
    return [with_images(row, [other[_key(image)] for image in images_of(row["messages"])]) for row in rows]


class Blanked(Sequence[Row]):
    """The rows with plain pictures of the same size in one colour, made when they are asked for."""

    def __init__(self, rows: Sequence[Row], colour: tuple[int, ...]):
        self.rows, self.colour = rows, colour

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        sizes = [image_size(image) for image in images_of(row["messages"])]
        return with_images(row, [Image.new("RGB", (width, height), self.colour) for height, width in sizes])


def with_images(row: Row, images: Sequence[Any]) -> Row:
    """The row with these images in the place of its own."""
    left = iter(images)
    messages: list[Message] = []
    for message in row["messages"]:
        parts: list[Part] = [
            image_part(next(left)) if part["type"] == "image" else part for part in message["content"]
        ]
        messages.append({"role": message["role"], "content": parts})
    return {**row, "messages": messages}


def _key(image: Any) -> Any:
    return image if isinstance(image, str) else id(image)
