"""The callbacks of a run: guards first, so that nothing else sees a step that must not be."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.data.collator import Collator
from mllm.data.lengths import Lengths, measure, sizes_of
from mllm.data.mixture import Mixture
from mllm.data.sampler import MicroBatches
from mllm.data.schema import Row
from mllm.data.streaming import RowStream
from mllm.training.batches import PackingTrial, step_flops
from mllm.training.eyes import Eyes, peak_tflops
from mllm.training.guards import TrainabilityGuard
from mllm.training.longest import SAMPLE, LongestFirst, longest_rows, sample_numbers
from mllm.training.metrics import MetricsLog
from mllm.training.step_guards import AdapterGuard, GradientGuard, LossGuard, OptimizerGuard, declared_rates
from mllm.training.steps import StepLog
from mllm.training.validation import validation_callbacks


def eyes_of(config: RunConfig, model: Any, rows: Mixture | RowStream, steps: StepLog) -> Eyes:
    """What the run logs of itself; the use of the machine for decoder-only models, whose costs are known."""
    known = not config.on_pairs and not model.config.is_encoder_decoder
    half = config.train.bf16 or config.train.fp16
    peak = peak_tflops(torch.cuda.get_device_name()) if half and torch.cuda.is_available() else None
    flops = step_flops(model, not config.data.feature_cache) if known else None
    return Eyes(steps, rows.names, flops, peak)


def guards_of(
    config: RunConfig, model: Any, rates: dict[str, float], steps: StepLog
) -> list[TrainerCallback]:
    """What stops a wrong run, and keeps its records."""
    return [
        OptimizerGuard(steps, declared_rates(model, rates)),
        LossGuard(steps),
        GradientGuard(steps),
        AdapterGuard(steps),
        TrainabilityGuard(),
        MetricsLog(Path(config.train.output_dir)),
        *validation_callbacks(config.val),
    ]


@dataclass(frozen=True)
class Known:
    """Rows whose sizes are known, `numbers` [N] of `rows`; `lengths` is None for pairs, all alike.

    Of a stream, `rows` has the longest alone: the pictures of all of them may be gigabytes.
    """

    lengths: Lengths | None
    numbers: np.ndarray
    rows: Any


def known_lengths(
    batches: MicroBatches | None, rows: Mixture | RowStream, collator: Any, keep: int = SAMPLE
) -> Known:
    """Of all rows where the plan needed them, else of a sample; of a stream, of its beginning.

    Args:
        batches: the plan of the run, if it has one.
        rows, collator: of the run.
        keep: how many of the longest rows of a stream are kept.

    Raises:
        DataError: a row of the sample that cannot be trained on.
    """
    pairs = not isinstance(collator, Collator)
    if isinstance(rows, RowStream):
        return _of_stream(rows, None if pairs else collator, keep)
    numbers = sample_numbers(len(rows))
    if pairs:
        return Known(None, numbers, rows)
    lengths = None if batches is None else batches.lengths
    if isinstance(lengths, Lengths) and lengths.tokens.any():  # else a plan that needed none, or not yet
        return Known(lengths, np.arange(len(rows)), rows)
    return Known(measure([rows[int(number)] for number in numbers], collator), numbers, rows)


def _of_stream(stream: RowStream, collator: Collator | None, keep: int) -> Known:
    """Sizes of its first rows, and the longest of these, or the first where all are alike."""
    if collator is None:
        first = list(islice(stream.once(), keep))
        return Known(None, np.arange(len(first)), first)
    sizes: list[tuple[int, ...]] = []
    longest: list[tuple[int, int, Row]] = []  # a heap of (tokens, minus the number, row)
    for number, row in enumerate(islice(stream.once(), SAMPLE)):
        sizes.append(sizes_of(row, collator))
        heapq.heappush(longest, (sizes[-1][0], -number, row))
        if len(longest) > keep:
            heapq.heappop(longest)
    lengths = Lengths(*np.array(sizes, np.int32).T)
    return Known(lengths, np.arange(len(sizes)), {-number: row for _, number, row in longest})


def length_line(lengths: Lengths, rows: int | None, max_length: int | None) -> str:
    """How many rows do not fit, for before the start."""
    every = rows is not None and len(lengths) >= rows
    of = f"all {rows:,} rows" if every else f"a sample of {len(lengths):,} rows"
    empty = int(lengths.empty.sum())
    of += f"; {empty:,} answers without text, trained on their end token alone" if empty else ""
    if max_length is None:
        return f"longest row {int(lengths.tokens.max()):,} tokens, no data.max_length ({of})"
    return (
        f"rows over data.max_length={max_length}: {lengths.over:.2%}, shortened by whole rounds, "
        f"{lengths.dropped_share:.2%} of all turns dropped ({of})"
    )


def trials_of(
    config: RunConfig, collator: Any, batches: MicroBatches | None, known: Known
) -> list[TrainerCallback]:
    """What is tried before step 1, where the model is on its device with the precision of the run."""
    trials: list[TrainerCallback] = [PackingTrial()] if config.data.packing else []
    if config.data.longest_first:
        longest = longest_rows(batches, known.lengths, known.numbers, config.train.per_device_batch_size)
        trials.append(LongestFirst(known.rows, collator, longest))
    return trials
