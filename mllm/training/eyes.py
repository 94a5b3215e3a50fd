"""What one wants to see of a run beside its loss: speed, waiting, use, memory, what is supervised.

Everything is counted from sizes that the collator knows, on the CPU, and added up over ranks once a log.
Speeds are over the time of steps: saving, validating and logging do not count.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback

from mllm.data.collator import RowCount
from mllm.training.flops import StepFlops
from mllm.training.steps import StepLog

logger = logging.getLogger(__name__)

# Dense bf16 TFLOP/s with float32 accumulation, from the data sheets; the first name that fits counts, as a
# word of its own: an L40 is no L4, and an RTX A1000 no A100.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "A10": 125.0,
    "L4": 121.0,
}
WAIT = 0.2  # share of the time from which on waiting for data is worth a warning
_SUMS = ("samples", "tokens", "image_tokens", "labels", "image_labels", "flops", "seconds", "waited")


def peak_tflops(device: str) -> float | None:
    """The dense bf16 peak of a device of this name, if it is known."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)


class Eyes(TrainerCallback):
    """Adds up what the steps were made of; the trainer's log takes the report.

    Args:
        steps: what the trainer notes of each step.
        sources: names of the mixture's data sets.
        flops: what a step costs, or None where that is not known.
        peak: TFLOP/s that the device has at most, or None where that is not known or does not apply.
    """

    def __init__(
        self, steps: StepLog, sources: Sequence[str], flops: StepFlops | None, peak: float | None
    ) -> None:
        self.steps, self.flops, self.peak = steps, flops, peak
        self.sources = list(dict.fromkeys(sources))
        self.sums = dict.fromkeys(self._keys(), 0.0)
        self.windows, self.warned = 0, False
        self.rates: dict[str, float] = {}

    def _keys(self) -> list[str]:
        return [*_SUMS, *(f"{kind}/{name}" for kind in ("tokens", "labels") for name in self.sources)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One rank warns for all."""
        self.warned = not state.is_world_process_zero

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Note the rate of each part now: when the step is logged, the schedule is one step ahead."""
        groups = optimizer.param_groups if optimizer is not None else ()
        self.rates = {group["part"]: float(group["lr"]) for group in groups if "part" in group}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the step."""
        counts, sums = self.steps.counts, self.sums
        sums["samples"] += len(counts)
        sums["seconds"] += self.steps.seconds
        sums["waited"] += self.steps.waited
        sums["flops"] += self.flops_of(counts)
        for count in counts:
            sums["tokens"] += count.tokens
            sums["image_tokens"] += count.image_tokens
            sums["labels"] += count.labels
            sums["image_labels"] += count.labels * (count.views > 0)
            if f"tokens/{count.dataset}" in sums:
                sums[f"tokens/{count.dataset}"] += count.tokens
                sums[f"labels/{count.dataset}"] += count.labels

    def flops_of(self, counts: Sequence[RowCount]) -> float:
        """FLOPs that the model needs for rows of these sizes; 0 where that is not known."""
        if self.flops is None:
            return 0.0
        views, labels = (sum(getattr(count, key) for count in counts) for key in ("views", "labels"))
        return self.flops.of([count.tokens for count in counts], views, labels)

    def report(self, add_up: Callable[[torch.Tensor], torch.Tensor], ranks: int) -> dict[str, float]:
        """The log of the steps since the last one, and begin anew.

        Args:
            add_up: sums a tensor [K] over ranks; called by every rank.
            ranks: how many there are.
        """
        total = add_up(torch.tensor(list(self.sums.values()), dtype=torch.float64)).tolist()
        sums = dict(zip(self.sums, total, strict=True))
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.windows += 1
        if sums["samples"] == 0 or sums["seconds"] == 0:
            return {}
        seconds = sums["seconds"] / ranks
        logs = {
            "speed/samples_per_second": sums["samples"] / seconds,
            "speed/tokens_per_second": sums["tokens"] / seconds,
            "speed/text_tokens_per_second": (sums["tokens"] - sums["image_tokens"]) / seconds,
            "speed/image_tokens_per_second": sums["image_tokens"] / seconds,
            "speed/data_wait": sums["waited"] / sums["seconds"],
            **self._use(sums["flops"], sums["seconds"]),
            **self._supervised(sums),
        }
        self._warn(logs["speed/data_wait"])
        return logs

    def _use(self, flops: float, seconds: float) -> dict[str, float]:
        """TFLOP/s of a rank, and their share of what the device could do (MFU)."""
        if not flops:
            return {}
        tflops = flops / seconds / 1e12
        return {"speed/tflops": tflops, **({"speed/mfu": tflops / self.peak} if self.peak else {})}

    def _supervised(self, sums: dict[str, float]) -> dict[str, float]:
        """Which share of the tokens is learnt, in all and of each data set; and the share of each in that."""
        if not sums["labels"]:  # a stage on pairs
            return {}
        logs = {
            "supervised/all": sums["labels"] / sums["tokens"],
            "supervised/with_images": sums["image_labels"] / sums["labels"],
        }
        for name in self.sources if len(self.sources) > 1 else ():
            short = (
                Path(name).stem if len({Path(n).stem for n in self.sources}) == len(self.sources) else name
            )
            logs[f"supervised/{short}"] = sums[f"labels/{name}"] / max(1.0, sums[f"tokens/{name}"])
            logs[f"supervised_share/{short}"] = sums[f"labels/{name}"] / sums["labels"]
        return logs

    def _warn(self, wait: float) -> None:
        # In the first window the loader's workers are still starting.
        if wait > WAIT and self.windows > 1 and not self.warned:
            self.warned = True
            logger.warning(
                "steps wait %.0f %% of their time for data; raise train.num_workers, or use smaller pictures",
                100 * wait,
            )


def peak_memory() -> float:
    """GiB that this process had at most: of the GPU's memory, or without one, of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":  # which has no `resource`
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar with loss, speed and waiting at its end, in place of a line for each log."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the newest numbers; what is measured now and then has a line of its own above the bar."""
        if not (state.is_world_process_zero and self.training_bar is not None and logs):
            return
        if found := {key: value for key, value in logs.items() if key.startswith(("val/", "eval/"))}:
            told = ", ".join(f"{key.rpartition('/')[2]} {value:.4g}" for key, value in found.items())
            group = next(iter(found)).rpartition("/")[0]
            self.training_bar.write(f"step {state.global_step}, {group}: {told}", file=sys.stderr)
        if "loss" not in logs:
            return
        shown = {"loss": f"{float(logs['loss']):.4f}"}
        if "speed/tokens_per_second" in logs:
            shown["tok/s"] = f"{logs['speed/tokens_per_second']:,.0f}"
            shown["wait"] = f"{logs['speed/data_wait']:.0%}"
        self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """End the bar, also of a run that stopped, so that what is said next begins a line of its own."""
        if self.training_bar is not None:
            self.training_bar.leave = self.training_bar.n > 0  # nothing is known of a run without a step
            self.training_bar.close()
            self.training_bar = None
