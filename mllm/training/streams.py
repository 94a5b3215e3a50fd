"""A stream of rows in training: made from a recipe, its position kept with every checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from mllm.config import DataSection
from mllm.data.streaming import Position, RowStream, StreamBatches
from mllm.errors import ConfigError
from mllm.training.launch import number_of_ranks

logger = logging.getLogger(__name__)


def open_stream(section: DataSection, seed: int) -> RowStream:
    """The rows of a recipe's `data` section with `streaming`."""
    (source,) = section.sources
    return RowStream(source.path, source.format or "auto", source.image_root, section.shuffle_buffer, seed)


class StreamPosition(TrainerCallback, ExportableState):
    """How far this rank has come in its stream: by what was trained on, not by what workers read ahead.

    It goes into the Trainer's own state file, which is written last: a checkpoint has it, or is none.
    """

    def __init__(self, width: int, done: int = 0, positions: list[dict[str, int] | None] | None = None):
        self.done = done
        self.positions: list[dict[str, int] | None] = positions or [None] * width
        self.of_ranks: list[dict[str, Any]] = []

    def note(self, position: tuple[int, dict[str, int]]) -> None:
        """A batch was trained on."""
        self.positions[position[0]] = position[1]
        self.done += 1

    def gather(self) -> None:
        """Collect all ranks' positions; every rank calls this."""
        self.of_ranks = gather_object([{"done": self.done, "positions": list(self.positions)}])

    def state(self) -> dict[str, Any]:
        """As the Trainer's state file has it."""
        return {"args": {"width": len(self.positions)}, "attributes": {"of_ranks": self.of_ranks}}


def stream_batches(
    stream: RowStream, collator: Any, args: TrainingArguments, saved: list[dict[str, Any]] | None = None
) -> tuple[StreamBatches, StreamPosition]:
    """This rank's batches and what keeps the position in them; from the beginning, or from where ranks were.

    `saved` is of `saved_positions`.
    """
    own: dict[str, Any] = saved[args.process_index] if saved else {}
    position = StreamPosition(max(1, args.dataloader_num_workers), **own)
    batches = StreamBatches(
        stream,
        collator,
        args.per_device_train_batch_size,
        args.process_index,
        args.world_size,
        args.dataloader_num_workers,
        [Position(**at) if at else Position() for at in position.positions],
        position.done,
    )
    if args.should_save and not stream.by_files(batches.lanes):
        logger.warning(
            "%s has %d files for %d workers of all ranks: every worker reads every file; with a multiple of "
            "that many files each would read its own",
            stream.place,
            stream.files,
            batches.lanes,
        )
    return batches, position


def saved_positions(checkpoint: str, workers: int) -> list[dict[str, Any]]:
    """Where each rank of a checkpoint's run was: `{"done": batches, "positions": of each worker}`.

    Raises:
        ConfigError: it is of other ranks or workers, who divide the rows otherwise.
    """
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    kept = state.get("stateful_callbacks", {}).get(StreamPosition.__name__)
    if not kept or not kept["attributes"]["of_ranks"]:
        raise ConfigError(f"train.resume: {checkpoint} has no position in a stream; set data.streaming=false")
    found: list[dict[str, Any]] = kept["attributes"]["of_ranks"]
    had, here = (len(found), len(found[0]["positions"])), (number_of_ranks(), max(1, workers))
    if had != here:
        raise ConfigError(
            f"train.resume: {checkpoint} is of a stream over {had[0]} ranks with {had[1]} workers each, here "
            f"are {here[0]} with {here[1]}; go on with the same, or read without data.streaming"
        )
    return found
