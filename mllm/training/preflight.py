"""`--preflight`: everything that can go wrong before step 1 and in it, in minutes, without training.

Rows are checked one by one; then the run is started as it would be, on all its ranks, and stopped before its
first step: parts are loaded and tuned, the longest rows go forward and backward, a checkpoint is rehearsed,
the first batches come. What is wrong is listed, and written to `output_dir/preflight.json`.
A feature cache is not filled: a few pictures are, and what all will take is told.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.data.check import DataCheck, check_rows
from mllm.data.mixture import Mixture
from mllm.errors import DataError, MllmError
from mllm.training.arguments import check_options, check_output_dir
from mllm.training.asking import Asks
from mllm.training.batches import make_collator
from mllm.training.build import build_processor, open_mixture
from mllm.training.feature_cache import try_cache
from mllm.training.longest import LongestFirst
from mllm.training.memory import way_of_run
from mllm.training.outline import outline
from mllm.training.preflight_report import Check, Report, data_line, over_ranks, table
from mllm.training.resume import find_checkpoint
from mllm.training.snapshots import complete_snapshots
from mllm.training.train import train
from mllm.training.validation import open_validation

__all__ = ["Check", "Report", "preflight", "table"]


class StoppedBeforeStepOneError(Exception):
    """All is well; not an error that anybody sees."""


class Marks(TrainerCallback):
    """Notes how far the start has come, and ends it where the first step would begin."""

    def __init__(self) -> None:
        self.at = {"begun": time.perf_counter()}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is built and tuned."""
        self.at["built"] = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trials are callbacks before this one."""
        self.at["tried"] = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The rehearsal is over, and the rows of the first step are here."""
        self.at["ready"] = time.perf_counter()
        raise StoppedBeforeStepOneError

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A finished run was resumed: no step is left."""
        self.at["ready"] = time.perf_counter()
        raise StoppedBeforeStepOneError


class CacheTrial(TrainerCallback):
    """Tries the feature cache on a few pictures when the model is there.

    Args:
        config: the run.
        marks: told when it is over.
    """

    def __init__(self, config: RunConfig, marks: Marks) -> None:
        self.config, self.marks = config, marks
        self.detail = ""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See `try_cache`."""
        rows, collator = open_data(self.config)
        self.detail = try_cache(self.config, args, model, collator.processor, rows)
        self.marks.at["kept"] = time.perf_counter()


def preflight(config: RunConfig, asker: Asks | None = None, show: bool = True) -> Report:
    """Check a run; also under a launcher, where each rank looks at its share of the rows.

    Args:
        config: the run.
        asker: as for `train`.
        show: a progress bar.

    Returns:
        What all ranks have found, on rank 0; on others what they have found themselves.
    """
    check_output_dir(config.train)  # or the report could not be written
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(config.train.output_dir)
    (folder / f"preflight.rank{rank}.json").unlink(missing_ok=True)  # of an earlier one
    first, found, longest = _check_data(config, rank, ranks, show and rank == 0)
    rows_checks = [first, *([_check_validation(config)] if config.val else [])]
    marks = Marks()
    cache = CacheTrial(config, marks) if config.data.feature_cache else None
    error: MllmError | None = None
    try:
        check_options(config)  # also what is left out below
        callbacks = [longest, marks, cache]
        train(_aside(config, longest is not None), callbacks=[c for c in callbacks if c], asker=asker)
    except StoppedBeforeStepOneError:
        pass
    except MllmError as caught:
        error = caught
    if rank == 0:
        shutil.rmtree(folder / "preflight", ignore_errors=True)
    rows_first = not first.passed and isinstance(error, DataError)
    told = None if error is None or rows_first else str(error)
    checks = _start_checks(config, marks.at, told, longest, cache)
    return over_ranks(config, Report.of([*rows_checks, *checks], found), folder, rank, ranks)


def _aside(config: RunConfig, longest_is_tried: bool) -> RunConfig:
    """The run as it is started here: in a folder of its own, and with nothing reported.

    A tracker would show a run that never was. With pixels in place of kept features it needs as much memory,
    or a little more. A run that will be resumed is resumed here, and its checkpoints have their room already.
    """
    output_dir = Path(config.train.output_dir)
    resumed = find_checkpoint(output_dir, config.train.resume)
    limit, there = config.train.save_total_limit, len(complete_snapshots(output_dir))
    changes: dict[str, Any] = {
        "output_dir": str(output_dir / "preflight"),
        "resume": False if resumed is None else str(resumed),
        "save_total_limit": limit if limit is None else max(0, limit - there),
        "report_to": [],
    }
    options = config.train.model_copy(update=changes)
    tried = config.data.longest_first and not longest_is_tried
    data = config.data.model_copy(update={"longest_first": tried, "feature_cache": False})
    return config.model_copy(update={"train": options, "data": data})


def open_data(config: RunConfig) -> tuple[Mixture, Any]:
    """The rows of a run, not streamed, and what makes batches of them; no model is loaded."""
    rows = open_mixture(config.data, config.train.seed)
    processor = outline(config)[1] if config.on_pairs else build_processor(config.model)
    return rows, make_collator(config, processor)


def _check_data(
    config: RunConfig, rank: int, ranks: int, show: bool
) -> tuple[Check, DataCheck | None, LongestFirst | None]:
    """The rows, one by one; and the trial of the longest, where the run does not plan its batches itself."""
    begun = time.perf_counter()
    if config.data.streaming:
        return Check("data", True, "a stream: of its first rows, the longest are tried", 0.0), None, None
    size = config.train.per_device_batch_size
    try:
        rows, collator = open_data(config)
        found = check_rows(
            rows, collator, workers=config.train.num_workers, keep=size, rank=rank, ranks=ranks, show=show
        )
    except MllmError as error:
        return Check("data", False, str(error), time.perf_counter() - begun), None, None
    check = data_line(config, found, time.perf_counter() - begun)
    planned = config.data.packing or config.data.grouping != "none"
    own = config.data.longest_first and not planned and found.longest
    return check, found, LongestFirst(rows, collator, found.longest) if own else None


def _check_validation(config: RunConfig) -> Check:
    """The rows that will be measured: a bad one would stop the run at the first validation."""
    begun = time.perf_counter()
    try:
        collator = make_collator(config, build_processor(config.model))  # `data` may not be there
        validation = open_validation(config, collator)
        assert validation is not None
        for row in validation.rows:
            collator([row])
    except MllmError as error:
        return Check("validation", False, str(error), time.perf_counter() - begun)
    return Check("validation", True, f"{len(validation.rows):,} rows", time.perf_counter() - begun)


def _start_checks(
    config: RunConfig,
    at: Mapping[str, float],
    error: str | None,
    longest: LongestFirst | None,
    cache: CacheTrial | None,
) -> list[Check]:
    """How far the start came: the first thing that was not reached has failed.

    Without an `error` it was a bad row that ended the start, and that is told already.
    """
    forward_alone = "tried" in at and way_of_run(config.train).zero == 3  # see `longest`
    tried = "forward" if forward_alone else "forward and backward"
    if not config.data.longest_first:
        tried = "not wanted: data.longest_first=false"
    if longest is not None and longest.tokens:
        tried += f", {len(longest.rows)} rows, {longest.tokens:,} tokens"
    names = {
        "built": ("model", "parts are loaded, tuned and in the optimiser's hands"),
        **({"kept": ("feature cache", cache.detail)} if cache else {}),
        "tried": ("longest batch", tried),
        "ready": ("rehearsal and first batches", "a checkpoint was written and read back, rows have come"),
    }
    checks, before, failed = [], at["begun"], False
    for mark, (name, detail) in names.items():
        if mark in at:
            checks.append(Check(name, True, detail, at[mark] - before))
            before = at[mark]
        elif error is not None and not failed:
            checks.append(Check(name, False, error, time.perf_counter() - before))
            failed = True
        else:
            checks.append(Check(name, None, "not come to" if failed else "not come to: the rows first", 0.0))
    return checks
