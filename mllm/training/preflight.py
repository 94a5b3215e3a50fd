"""`--preflight`: everything that can go wrong before step 1 and in it, in minutes, without training.

Rows are checked one by one; then the run is started as it would be, on all its ranks, and stopped before its
first step: parts are loaded and tuned, the longest rows go forward and backward, a checkpoint is rehearsed,
the first batches come. What is wrong is listed, and written to `output_dir/preflight.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.data.check import DataCheck, check_rows
from mllm.data.files import write_atomic
from mllm.errors import DataError, MllmError
from mllm.training.arguments import check_options
from mllm.training.asking import Asks
from mllm.training.batches import make_collator
from mllm.training.build import build_processor, open_mixture
from mllm.training.longest import LongestFirst
from mllm.training.outline import outline
from mllm.training.train import train


@dataclass(frozen=True)
class Check:
    """One line of the report; `passed` is None where it was not come to."""

    name: str
    passed: bool | None
    detail: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """What was checked; `data` is None where the data could not be opened."""

    checks: list[Check]
    data: dict[str, Any] | None

    @property
    def passed(self) -> bool:
        """Whether the run may be started."""
        return all(check.passed for check in self.checks)


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


def preflight(config: RunConfig, asker: Asks | None = None, show: bool = True) -> Report:
    """Check a run; also under a launcher, where each rank looks at its share of the rows.

    Args:
        config: the run.
        asker: as for `train`.
        show: a progress bar.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(config.train.output_dir)
    first, found, longest = _check_data(config, rank, ranks, show and rank == 0)
    # Nothing of it is reported: a tracker would show a run that never was.
    changes = {"output_dir": str(folder / "preflight"), "resume": False, "report_to": []}
    aside = config.train.model_copy(update=changes)
    marks = Marks()
    callbacks: list[TrainerCallback] = [*([longest] if longest else []), marks]
    cache = config.data.feature_cache
    changes = {
        "longest_first": config.data.longest_first and longest is None,
        # What is computed of it stays for the run.
        "feature_cache": str(folder / "feature_cache") if cache is True else cache,
    }
    data = config.data.model_copy(update=changes)
    error: MllmError | None = None
    try:
        check_options(config)  # also what is left out below
        train(config.model_copy(update={"train": aside, "data": data}), callbacks=callbacks, asker=asker)
    except StoppedBeforeStepOneError:
        pass
    except MllmError as caught:
        error = caught
    if rank == 0:
        shutil.rmtree(folder / "preflight", ignore_errors=True)
    rows_first = not first.passed and isinstance(error, DataError)
    told = None if error is None or rows_first else str(error)
    checks = _start_checks(config, marks.at, told, longest)
    report = Report([first, *checks], None if found is None else _as_dict(found))
    text = json.dumps({"passed": report.passed, **asdict(report)}, indent=1) + "\n"
    write_atomic(folder / (f"preflight.rank{rank}.json" if rank else "preflight.json"), text)
    return report


def _check_data(
    config: RunConfig, rank: int, ranks: int, show: bool
) -> tuple[Check, DataCheck | None, LongestFirst | None]:
    """The rows, one by one; and the trial of the longest, where the run does not plan its batches itself."""
    begun = time.perf_counter()
    if config.data.streaming:
        return Check("data", True, "a stream: of its first rows, the longest are tried", 0.0), None, None
    size = config.train.per_device_batch_size
    try:
        rows = open_mixture(config.data, config.train.seed)
        processor = outline(config)[1] if config.on_pairs else build_processor(config.model)
        collator = make_collator(config, processor)
        found = check_rows(
            rows, collator, workers=config.train.num_workers, keep=size, rank=rank, ranks=ranks, show=show
        )
    except MllmError as error:
        return Check("data", False, str(error), time.perf_counter() - begun), None, None
    worst = next(iter(found.faults.items()), None)
    detail = f"{found.rows:,} rows, {found.pictures:,} pictures, longest row {found.tokens:,} tokens"
    if config.data.max_length and not config.on_pairs:
        over = found.over / max(1, found.rows)
        detail += (
            f"; {over:.2%} of rows over data.max_length, {found.dropped / max(1, found.turns):.2%} of turns"
        )
    if worst is not None:
        one = found.bad[0]
        detail += f"; {len(found.bad)} bad rows, the first: {one['row']}: {one['fault']}"
    check = Check("data", not found.bad, detail, time.perf_counter() - begun)
    planned = config.data.packing or config.data.grouping != "none"
    own = config.data.longest_first and not planned and found.longest
    return check, found, LongestFirst(rows, collator, found.longest) if own else None


def _start_checks(
    config: RunConfig, at: Mapping[str, float], error: str | None, longest: LongestFirst | None
) -> list[Check]:
    """How far the start came: the first thing that was not reached has failed.

    Without an `error` it was a bad row that ended the start, and that is told already.
    """
    tried = (
        "not wanted: data.longest_first=false" if not config.data.longest_first else "forward and backward"
    )
    if longest is not None and longest.tokens:
        tried += f", {len(longest.rows)} rows, {longest.tokens:,} tokens"
    names = {
        "built": ("model", "parts are loaded, tuned and in the optimiser's hands"),
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


def _as_dict(found: DataCheck) -> dict[str, Any]:
    return {**asdict(found), "faults": found.faults}


def table(report: Report) -> Table:
    """The report for a terminal."""
    shown = Table("check", "", "seconds", "what", title="Preflight", title_justify="left", box=None)
    for check in report.checks:
        word = {True: "[green]passed", False: "[red]FAILED", None: "[dim]-"}[check.passed]
        shown.add_row(check.name, word, f"{check.seconds:.1f}", check.detail.replace("[", r"\["))
    for fault, count in (report.data or {}).get("faults", {}).items():
        shown.add_row("", "", "", f"{count} x {fault}".replace("[", r"\["))
    return shown
