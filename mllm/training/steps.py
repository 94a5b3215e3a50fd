"""What an optimiser step was made of: the rows of each micro-batch, their loss, and how long it took.

The trainer notes it, guards and eyes read it. Nothing here waits for the device: losses and counts of labels
stay tensors until a guard asks for them, once a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mllm.data.collator import RowCount
from mllm.data.tokens import IGNORE


@dataclass
class MicroBatch:
    """One forward pass: names and sizes of its rows, its loss [], and its labels [] where it has some."""

    rows: list[str]
    counts: list[RowCount]
    loss: torch.Tensor
    labels: torch.Tensor | None


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What of a batch the model takes, on its device."""
    taken = dict(batch)
    StepLog().take(taken)
    return {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in taken.items()}


@dataclass
class StepLog(TrainerCallback, ExportableState):
    """The micro-batches of the step that is being made on this rank.

    As a callback it only counts on in a resumed run: its state goes into the Trainer's own state file.

    Attributes:
        micro_batches: since the step began.
        waited: seconds that the step waited for the loader.
        norm: of all gradients, where the engine has stepped before a guard can look at them (DeepSpeed).
        dropped_turns: in all batches of this rank since the run began; rank 0 has those of before a resume.
        dropped_everywhere: the same on all ranks together, for the state file.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    waited: float = 0.0
    norm: float | None = None
    dropped_turns: int = 0
    dropped_everywhere: int = 0
    began: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count on from the checkpoint that the run is resumed from."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved and state.is_world_process_zero:
            self.dropped_turns = saved["attributes"]["dropped_everywhere"]

    def state(self) -> dict[str, Any]:
        """As the Trainer's state file has it."""
        return {"args": {}, "attributes": {"dropped_everywhere": self.dropped_everywhere}}

    def begin(self) -> None:
        """A step begins with fetching its rows."""
        self.micro_batches.clear()
        self.waited, self.norm, self.began = 0.0, None, time.perf_counter()

    def timed(self, loader: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each comes is noted."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(loader)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asked
            yield batch

    def take(self, inputs: dict[str, Any]) -> tuple[list[str], list[RowCount]]:
        """Remove from a batch what is for reports: names and sizes of its rows."""
        self.dropped_turns += inputs.pop("dropped_turns", 0)
        return inputs.pop("row_ids", []), inputs.pop("counts", [])

    def note(
        self, rows: list[str], counts: list[RowCount], labels: torch.Tensor | None, loss: torch.Tensor
    ) -> None:
        """Keep what a micro-batch gave; `labels` as in the batch."""
        supervised = None if labels is None else (labels != IGNORE).sum()
        self.micro_batches.append(MicroBatch(rows, counts, loss.detach(), supervised))

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self.began

    @property
    def rows(self) -> list[str]:
        """Names of all rows of the step."""
        return [row for batch in self.micro_batches for row in batch.rows]

    @property
    def counts(self) -> list[RowCount]:
        """Sizes of all rows of the step."""
        return [count for batch in self.micro_batches for count in batch.counts]
