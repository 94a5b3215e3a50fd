"""A run's records: every log as a line of `metrics.jsonl`, and pictures of its losses and its speed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mllm.data.files import write_atomic

logger = logging.getLogger(__name__)

# What `loss.png` shows of a run: the key of a log, what it is called there, and how its line is drawn.
LOSSES = {
    "loss": ("", "-"),
    "val/loss": ("validation", "o-"),
    "val/loss_images": ("validation, rows with an image", "o-"),
    "val/loss_shuffled": ("the same with others' images", "o--"),
    "val/loss_blank": ("the same with blank images", "o:"),
}


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
    """Draw the losses of each run over its steps as a PNG: of training, and of validation where there is one.

    Args:
        runs: the lines of a metrics file by the name of the run.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, lines in runs.items():
        points = {key: _points(lines, key) for key in LOSSES}
        if points["val/loss_images"] == points["val/loss"]:  # all rows have an image
            del points["val/loss_images"]
        for key, drawn in points.items():
            what, style = LOSSES[key]
            _draw(axes, drawn, ", ".join(filter(None, (name, what))), style)
    axes.set_ylabel("loss per supervised token")
    axes.set_xlabel("step")
    figure.savefig(path)


def plot_speed(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens a second, waiting for data, and the parts' learning rates over the steps as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    panels = figure.subplots(3, sharex=True)
    rates = sorted({key for line in lines for key in line if key.startswith("learning_rate/")})
    drawn = {
        "tokens/s": ["speed/tokens_per_second"],
        "share waiting for data": ["speed/data_wait"],
        "learning rate": rates,
    }
    for axes, (label, keys) in zip(panels, drawn.items(), strict=True):
        axes.set_ylabel(label)
        for key in keys:
            _draw(axes, _points(lines, key), key.partition("/")[2] if key in rates else "", "-")
    panels[-1].set_xlabel("step")
    figure.savefig(path)


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _draw(axes: Any, points: list[tuple[int, float]], label: str, style: str) -> None:
    """A curve, which the legend names if it has a name."""
    axes.grid(alpha=0.3)
    if not points:
        return
    axes.plot(*zip(*points, strict=True), style, label=label or None, markersize=3)
    if label:
        axes.legend(fontsize="small")
