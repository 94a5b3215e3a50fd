"""A callback that stops a run in which other parameters learn than those that are declared to."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from mllm.errors import TrainingStoppedError
from mllm.model.checkpoint import checksum, part_of
from mllm.training.sharded import GradientWatch, local_share, on_any_rank

# Steps that a part may go without a gradient: the first rows may all be text, which no connector sees.
PATIENCE = 10


class TrainabilityGuard(TrainerCallback):
    """What is declared trainable gets gradients, what is declared frozen stays as it is, bit for bit.

    With many ranks all of them see what one of them has found, so that they stop together.
    """

    def __init__(self) -> None:
        self.frozen: dict[str, torch.Tensor] = {}
        self.steps = 0
        self.parts: set[str] = set()
        self.heard: set[str] = set()  # parts with a gradient other than zero on this rank
        self.watch: GradientWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note checksums of the frozen tensors, and the parts that must get gradients."""
        named = list(model.named_parameters())
        self.frozen = {name: checksum(local_share(p)) for name, p in named if not p.requires_grad}
        self.parts = {part_of(name) for name, p in named if p.requires_grad}
        self.heard, self.steps, self.watch = set(), 0, None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin to watch, and not before: the longest rows are tried behind the start."""
        if self.steps == 0:
            trainable = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
            self.watch = GradientWatch(trainable, bool(args.deepspeed))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients of the first steps."""
        self.steps += 1
        if self.steps > PATIENCE or self.watch is None:
            return
        self.heard |= {part_of(name) for name in self.watch.take()}
        if self.steps == 1 and (without := on_any_rank(self.watch.without)):
            raise TrainingStoppedError(f"{without[0]} is declared trainable and gets no gradient")
        if self.steps == PATIENCE:
            self.watch.close()
            self._refuse_silence()

    def _refuse_silence(self) -> None:
        if silent := sorted(self.parts - set(on_any_rank(self.heard))):
            raise TrainingStoppedError(
                f"{silent[0]} is declared trainable and all its gradients were zero for "
                f"{self.steps} steps; freeze it, or check that the rows have images"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Compare the frozen tensors with what they were."""
        if 1 < self.steps < PATIENCE:  # in the first, gates that start closed let nothing else learn
            self._refuse_silence()
        now = dict(model.named_parameters())
        moved = on_any_rank(
            name
            for name, before in self.frozen.items()
            if not torch.equal(checksum(local_share(now[name])), before)
        )
        if moved:
            raise TrainingStoppedError(f"{moved[0]} is declared frozen and has changed")
