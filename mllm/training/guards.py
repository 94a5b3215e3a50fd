"""Callbacks that stop a run which would go on wrongly, and that keep its records."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mllm.data.files import write_atomic
from mllm.errors import TrainingStoppedError
from mllm.model.checkpoint import checksum, part_of
from mllm.training.sharded import GradientWatch, local_share, on_any_rank

logger = logging.getLogger(__name__)

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


class MetricsLog(TrainerCallback):
    """Append every log to `metrics.jsonl`; draw the loss curve at the end."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start a new file, or cut a resumed run's file back to the step it resumes from."""
        if state.is_world_process_zero and self.path.exists():
            lines = read_metrics(self.path) if state.global_step else []
            kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= state.global_step]
            write_atomic(self.path, "".join(kept))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """One line a log."""
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw `loss.png` and `speed.png`; the model is not saved yet, so nothing here may end the run."""
        if not state.is_world_process_zero:
            return
        try:
            lines = read_metrics(self.path)
            plot_losses({self.path.parent.name: lines}, self.path.with_name("loss.png"))
            plot_speed(lines, self.path.with_name("speed.png"))
        except (OSError, ValueError, ImportError) as error:  # a full disk, a broken file, no matplotlib
            logger.warning("no curves are drawn of %s (%s: %s)", self.path, type(error).__name__, error)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; an unfinished last line is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def plot_losses(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the loss of each run over its steps as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, lines in runs.items():
        points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per supervised token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path)


def plot_speed(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens a second, waiting for data, and the parts' learning rates over the steps as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    panels = figure.subplots(3, sharex=True)
    rates = sorted({key for line in lines for key in line if key.startswith("learning_rate/")})
    drawn = (["speed/tokens_per_second"], ["speed/data_wait"], rates)
    for axes, keys, label in zip(
        panels, drawn, ("tokens/s", "share waiting for data", "learning rate"), strict=True
    ):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=key.partition("/")[2])
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if panels[2].lines:
        panels[2].legend()
    panels[2].set_xlabel("step")
    figure.savefig(path)
