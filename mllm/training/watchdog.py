"""A run whose ranks wait for each other for ever says where each of them stands, and ends.

Collectives pair up by their order alone. A rank that is stuck, or that takes another way through the code,
leaves the others waiting without a word. Here a thread of every rank looks at how long ago the trainer last
said what it is about to do; the ranks tell each other through files in the run's folder, since their own
connection is what hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback

from mllm.data.files import write_atomic

T = TypeVar("T")
FOLDER = "watchdog"
# In the order of a step: fetch its rows, add up its tokens over the ranks, and so on.
PHASES = ("data", "count", "forward", "backward", "optimizer")
EXIT_CODE = 70  # an internal error, by BSD's list
GRACE = 30.0  # seconds in which the other ranks are to say where they are


@dataclass(frozen=True)
class Position:
    """Where a rank stands; `phase` is None where it may take its time (evaluating, saving)."""

    step: int = 0
    micro_step: int = 0
    phase: str | None = None
    rows: tuple[str, ...] = ()
    images: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        """What comes later is larger."""
        return self.step, self.micro_step, PHASES.index(self.phase) if self.phase else len(PHASES)

    def __str__(self) -> str:
        place = f"step {self.step}, micro-step {self.micro_step}, {self.phase or 'between steps'}"
        if not self.rows:
            return place
        return f"{place} ({self.images} images; rows {', '.join(self.rows)})"


class Progress:
    """What the trainer is about to do; written by it, read by the watchdog's thread."""

    def __init__(self) -> None:
        self.position, self.since = Position(), time.monotonic()

    def at(self, phase: str | None, **changes: Any) -> None:
        """Enter a phase; what is not given stays as it was."""
        self.position = replace(self.position, phase=phase, **changes)
        self.since = time.monotonic()

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Enter a micro-step's forward pass."""
        given = (inputs.get(name) for name in ("image_sizes", "pixel_values", "image_features"))
        pictures = next((images for images in given if images is not None), None)
        self.at(
            "forward",
            micro_step=self.position.micro_step + 1,
            rows=tuple(inputs.get("row_ids", ())),
            images=0 if pictures is None else len(pictures),
        )

    def fetched(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; reading them and waiting for other ranks are phases of their own."""
        iterator = iter(batches)
        while True:
            self.at("data")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.at("count")
            yield batch


class Watchdog(TrainerCallback):
    """Ends the run when no phase of a micro-step was entered for too long.

    Args:
        progress: the trainer's.
        folder: the run's `output_dir`, which all ranks see.
        seconds: patience; 0 never ends a run.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, progress: Progress, folder: Path, seconds: float, rank: int, world: int):
        self.progress, self.seconds, self.rank, self.world = progress, seconds, rank, world
        self.folder = folder / FOLDER
        self.done = threading.Event()
        self.old: dict[Path, int] = {}  # reports that an earlier run has left

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to look."""
        self._report_of(self.rank).unlink(missing_ok=True)
        self.old = {path: path.stat().st_mtime_ns for path in self.folder.glob("rank-*.json")}
        self.progress.at(None, step=state.global_step)
        if self.seconds:
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What follows may take its time: logging, evaluating, saving."""
        self.progress.at(None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look no more."""
        self.close()

    def close(self) -> None:
        """Look no more; also to be called when training ends with an error."""
        self.done.set()

    @property
    def late(self) -> bool:
        """Whether this rank has waited longer than it should."""
        waited = time.monotonic() - self.progress.since
        return self.progress.position.phase is not None and waited > self.seconds

    def _look(self) -> None:
        """Sleep most of the time; a rank that is not late itself reports when another one has done so."""
        while not self.done.wait(min(self.seconds / 10, 10.0)):
            if self.late or self._reports():
                self._end()

    def _end(self) -> None:
        position, waited = self.progress.position, time.monotonic() - self.progress.since
        sys.stderr.write(f"watchdog: rank {self.rank} has been for {waited:.0f} s at {position}\n")
        try:
            self._tell(position, waited)
        except (OSError, ValueError) as error:  # a full disk must not keep the run hanging
            sys.stderr.write(f"error: no progress for {self.seconds:g} s on rank {self.rank}; {error}\n")
        sys.stderr.flush()
        time.sleep(1)  # the launcher ends all ranks with the first: let them finish writing
        # The main thread waits inside a library, where it can be neither interrupted nor asked to raise.
        os._exit(EXIT_CODE)

    def _tell(self, position: Position, waited: float) -> None:
        """Write down where this rank stands, wait for the others' words, and say what follows from them."""
        stack = self._report_of(self.rank).with_suffix(".stack.txt")
        stack.parent.mkdir(parents=True, exist_ok=True)
        with stack.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        report = {"rank": self.rank, "seconds": round(waited, 1), **asdict(position), "stack": stack.name}
        write_atomic(self._report_of(self.rank), json.dumps(report) + "\n")
        positions = self._await_others()
        text = explain(positions, self.world, self.seconds)
        write_atomic(self._report_of(self.rank), json.dumps({**report, "verdict": text}, indent=1) + "\n")
        if self.rank == min(positions):
            sys.stderr.write(f"error: {text}; stacks are in {self.folder}\n")

    def _await_others(self) -> dict[int, Position]:
        """Where the ranks are that say so in time."""
        until = time.monotonic() + GRACE
        while len(reports := self._reports()) < self.world and time.monotonic() < until:
            time.sleep(0.2)
        return {
            report["rank"]: Position(
                report["step"],
                report["micro_step"],
                report["phase"],
                tuple(report["rows"]),
                report["images"],
            )
            for report in reports
        }

    def _reports(self) -> list[dict[str, Any]]:
        """What the ranks of this run have written."""
        if not self.folder.is_dir():  # so it is as long as all is well: one look at the disk
            return []
        found = []
        for path in self.folder.glob("rank-*.json"):
            with suppress(OSError, ValueError):  # another rank has just removed it, or is about to replace it
                if path.stat().st_mtime_ns != self.old.get(path):
                    found.append(json.loads(path.read_text(encoding="utf-8")))
        return found

    def _report_of(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"


def explain(positions: Mapping[int, Position], world: int, seconds: float) -> str:
    """In one line: where the ranks stand, those that are behind first."""
    behind = min(position.order for position in positions.values())
    late = [rank for rank, position in sorted(positions.items()) if position.order == behind]
    others: dict[str, list[int]] = {}
    for rank, position in sorted(positions.items()):
        if rank not in late:
            others.setdefault(
                f"step {position.step}, micro-step {position.micro_step}, {position.phase}", []
            ).append(rank)
    shown = "; ".join(f"rank {rank} at {positions[rank]}" for rank in late[:4])
    more = f"; and {len(late) - 4} more" if len(late) > 4 else ""
    rest = "; ".join(f"{_ranks(ranks)} at {place}" for place, ranks in others.items())
    silent = sorted(set(range(world)) - set(positions))
    parts = [
        f"no progress for {seconds:g} s",
        f"behind: {shown}{more}" if others else f"all stand at the same place: {shown}{more}",
        f"waiting: {rest}" if others else "",
        f"no word from {_ranks(silent)}" if silent else "",
        "where a step only takes long, raise train.watchdog_seconds",
    ]
    return "; ".join(part for part in parts if part)


def _ranks(ranks: list[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}"
