"""What a preflight has found: on one rank, on all of them together, as a file and as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from mllm.config import RunConfig
from mllm.data.check import DataCheck
from mllm.data.files import write_atomic

# Seconds that ranks wait for each other: where the start fails at once, shares of rows differ. A rank that
# has failed waits less, since rank 0 may be waiting for it in turn.
WAIT = 600
WAIT_OF_FAILED = 120


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

    @classmethod
    def of(cls, checks: list[Check], found: DataCheck | None) -> Report:
        """With the rows' faults counted."""
        return cls(checks, None if found is None else found.record())

    @property
    def of_all(self) -> bool:
        """Whether all ranks have reported."""
        return not any(check.name == "ranks" for check in self.checks)

    def write(self, path: Path) -> None:
        """As JSON."""
        write_atomic(path, json.dumps({"passed": self.passed, **asdict(self)}, indent=1) + "\n")


def data_line(config: RunConfig, found: DataCheck, seconds: float) -> Check:
    """What is told of the rows."""
    detail = f"{found.rows:,} rows, {found.pictures:,} pictures, longest row {found.tokens:,} tokens"
    if config.data.max_length and not config.on_pairs:
        over = found.over / max(1, found.rows)
        dropped = found.dropped / max(1, found.turns)
        detail += f"; {over:.2%} of rows over data.max_length, {dropped:.2%} of turns dropped"
    if found.empty:
        detail += f"; {found.empty:,} answers without text, trained on their end token alone, the first in "
        detail += found.first_empty
    if found.bad:
        one = found.bad[0]
        detail += f"; {len(found.bad)} bad rows, the first: {one['row']}: {one['fault']}"
    return Check("data", not found.bad, detail, seconds)


def over_ranks(config: RunConfig, own: Report, folder: Path, rank: int, ranks: int) -> Report:
    """Write `preflight.json`, of all ranks together, and return it on rank 0; on others their own.

    Through files, because a rank that failed takes part in no collective any more. A rank that is not the
    first leaves when its report was taken, or a launcher would end rank 0 before it has written.
    """
    files = {number: folder / f"preflight.rank{number}.json" for number in range(1, ranks)}
    if rank:
        own.write(files[rank])
        if _wait(lambda: not files[rank].exists(), WAIT if own.passed else WAIT_OF_FAILED):
            return own
        files[rank].unlink(missing_ok=True)
        return _alone(own, folder, rank)
    _wait(lambda: all(file.is_file() for file in files.values()))
    reports, silent = [own], []
    for number, file in files.items():
        if file.is_file():
            read = json.loads(file.read_text(encoding="utf-8"))
            reports.append(Report([Check(**check) for check in read["checks"]], read["data"]))
        else:
            silent.append(number)
    merged = merge(config, reports, silent)
    merged.write(folder / "preflight.json")
    for file in files.values():
        file.unlink(missing_ok=True)
    return merged


def _alone(own: Report, folder: Path, rank: int) -> Report:
    """What a rank tells that rank 0 has not heard, as `preflight.json`, or nobody would know why."""
    told = [replace(check, detail=f"rank {rank}: {check.detail}") for check in own.checks]
    unheard = Check("ranks", False, "rank 0 has not reported; it waits for this one, or has ended", 0.0)
    alone = Report([*told, unheard], own.data)
    alone.write(folder / "preflight.json")
    return alone


def merge(config: RunConfig, reports: Sequence[Report], silent: Sequence[int] = ()) -> Report:
    """One report of all ranks' reports, the first being rank 0's; `silent` ranks have none."""
    checks = [_merge_checks(of_ranks) for of_ranks in zip(*(r.checks for r in reports), strict=True)]
    parts = [DataCheck(**_known(report.data)) for report in reports if report.data is not None]
    found = None
    if len(parts) == len(reports):
        found = merge_data(parts)
        checks[0] = data_line(config, found, checks[0].seconds)
    if silent:
        detail = f"ranks {', '.join(map(str, silent))} have not reported; do all share train.output_dir?"
        checks.append(Check("ranks", False, detail, WAIT))
    return Report.of(checks, found)


def merge_data(parts: Sequence[DataCheck]) -> DataCheck:
    """What was found in the ranks' shares of the rows."""
    return replace(
        max(parts, key=lambda part: part.tokens),  # it has the longest row
        rows=sum(part.rows for part in parts),
        pictures=sum(part.pictures for part in parts),
        turns=sum(part.turns for part in parts),
        dropped=sum(part.dropped for part in parts),
        over=sum(part.over for part in parts),
        empty=sum(part.empty for part in parts),
        first_empty=next((part.first_empty for part in parts if part.first_empty), ""),
        bad=[one for part in parts for one in part.bad],
    )


def _merge_checks(of_ranks: Sequence[Check]) -> Check:
    """The first rank's that failed, or else that was not come to, or else rank 0's; the longest time."""
    worst = min(range(len(of_ranks)), key=lambda rank: {False: 0, None: 1, True: 2}[of_ranks[rank].passed])
    one = of_ranks[worst]
    detail = f"rank {worst}: {one.detail}" if worst else one.detail
    return Check(one.name, one.passed, detail, max(check.seconds for check in of_ranks))


def _known(data: dict[str, Any]) -> dict[str, Any]:
    return {field.name: data[field.name] for field in fields(DataCheck)}


def _wait(done: Callable[[], bool], seconds: float = WAIT) -> bool:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def table(report: Report) -> Table:
    """The report for a terminal."""
    shown = Table("check", "", "seconds", "what", title="Preflight", title_justify="left", box=None)
    for check in report.checks:
        word = {True: "[green]passed", False: "[red]FAILED", None: "[dim]-"}[check.passed]
        shown.add_row(check.name, word, f"{check.seconds:.1f}", check.detail.replace("[", r"\["))
    for fault, count in (report.data or {}).get("faults", {}).items():
        shown.add_row("", "", "", f"{count} x {fault}".replace("[", r"\["))
    return shown
