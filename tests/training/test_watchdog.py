"""A run that hangs says which rank stands where, and ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launched import WORKER, command_of, start
from runs import TUNINGS, make_world, run_config

from mllm.config import EvalSection, RunConfig
from mllm.training.train import train
from mllm.training.watchdog import EXIT_CODE, Position, Progress, Watchdog, explain


def test_it_names_those_that_are_behind() -> None:
    waiting = Position(7, 2, "backward", ("r1", "r2"), 3)
    text = explain({0: waiting, 1: Position(7, 1, "forward", ("r3",), 0), 2: waiting}, 4, 600)
    assert "behind: rank 1 at step 7, micro-step 1, forward (0 images; rows r3)" in text
    assert "waiting: ranks 0, 2 at step 7, micro-step 2, backward" in text
    assert "no word from rank 3" in text
    assert "\n" not in text


def test_ranks_at_one_place_are_told_apart_by_their_rows() -> None:
    text = explain({0: Position(1, 1, "forward", ("a",), 2), 1: Position(1, 1, "forward", ("b",), 0)}, 2, 5)
    assert (
        "all stand at the same place: rank 0 at step 1, micro-step 1, forward (2 images; rows a); rank 1"
        in text
    )


def test_a_rank_between_steps_is_ahead_of_those_within_and_never_late(tmp_path: Path) -> None:
    progress = Progress()
    watchdog = Watchdog(progress, tmp_path, 600, 0, 1)
    progress.at("optimizer", step=3, micro_step=1)
    before = progress.position
    progress.at(None)
    assert progress.position.order > before.order
    progress.since = time.monotonic() - 601
    assert not watchdog.late
    progress.at("data")
    assert not watchdog.late
    progress.since = time.monotonic() - 601
    assert watchdog.late


def test_reading_and_waiting_are_phases_of_their_own() -> None:
    progress, phases = Progress(), []

    def batches() -> list[int]:
        for index in range(2):
            phases.append(progress.position.phase)
            yield index

    for _ in progress.fetched(batches()):
        phases.append(progress.position.phase)
    assert phases == ["data", "count"] * 2


def test_reports_of_an_earlier_run_are_none_of_this_one(tmp_path: Path) -> None:
    watchdog = Watchdog(Progress(), tmp_path, 0, 0, 2)
    watchdog.folder.mkdir()
    for rank in range(2):
        (watchdog.folder / f"rank-{rank}.json").write_text("{}")

    class State:
        global_step = 0

    watchdog.on_train_begin(None, State(), None)
    assert watchdog._reports() == []
    (watchdog.folder / "rank-1.json").unlink()
    (watchdog.folder / "rank-1.json").write_text(json.dumps({"rank": 1}))
    assert watchdog._reports() == [{"rank": 1}]


def test_it_ends_the_run_also_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no folder")
    code = (
        "import sys, threading, time; from pathlib import Path\n"
        "from mllm.training.watchdog import Progress, Watchdog\n"
        "progress = Progress(); progress.at('forward')\n"
        "threading.Thread(target=Watchdog(progress, Path(sys.argv[1]), 0.1, 0, 1)._look).start()\n"
        "time.sleep(1000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == EXIT_CODE
    assert "error: no progress for 0.1 s on rank 0; " in done.stderr


class Slow:
    """Takes longer to ask than a micro-step may take."""

    def __init__(self, ends: list[int]) -> None:
        self.ends, self.ended = ends, 0

    def check(self, section: EvalSection) -> None:
        pass

    def ask(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        before = len(self.ends)
        time.sleep(1)
        self.ended += len(self.ends) - before
        return {"accuracy": 1.0}


def test_questions_behind_a_step_may_take_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self: ends.append(1))  # it would end this process
    config = run_config(make_world(tmp_path), tmp_path / "run", TUNINGS["connector"], watchdog_seconds=0.3)
    asked = {"questions": "q.jsonl", "image_root": ".", "every": 1}
    slow = Slow(ends)
    train(RunConfig.model_validate({**config.model_dump(exclude_unset=True), "eval": asked}), asker=slow)
    assert slow.ended == 0


@pytest.mark.slow
def test_a_rank_that_stalls_ends_the_run(tmp_path: Path) -> None:
    """Two real ranks, of which the second stops in front of step 2's forward pass.

    A run before it goes through: its first rank writes a checkpoint for longer than a micro-step may take.
    """
    world = make_world(tmp_path / "world")
    config = run_config(world, tmp_path / "run", TUNINGS["all"], watchdog_seconds=8, max_steps=4)
    job = {"name": "stall", "config": config.model_dump(mode="json", exclude_unset=True), "fault": "stall"}
    saves = run_config(
        world, tmp_path / "saves", TUNINGS["all"], watchdog_seconds=3, max_steps=3, save_steps=2
    )
    first = {
        "name": "saves",
        "config": saves.model_dump(mode="json", exclude_unset=True),
        "fault": "slow disk",
    }
    (tmp_path / "jobs.json").write_text(json.dumps([first, job]))
    code, text = start(
        [*command_of("torchrun"), str(WORKER), str(tmp_path / "jobs.json")], tmp_path / "log"
    ).finish()
    assert code not in (0, -9, -15), text[-3000:]
    assert "error: no progress for 8 s; behind: rank 1 at step 2, micro-step 0, count" in text
    # Torch's data parallelism waits for the others in front of the forward pass or within the backward.
    assert re.search("waiting: rank 0 at step 2, micro-step 1, (for|back)ward", text)
    folder = tmp_path / "run" / "watchdog"
    reports = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(report["step"], report["micro_step"]) for report in reports] == [(2, 1), (2, 0)]
    assert [len(report["rows"]) for report in reports] == [4, 0]
    assert reports[0]["images"] > 0
    assert all("behind: rank 1" in report["verdict"] for report in reports)
    assert "many_runs.py" in (folder / "rank-1.stack.txt").read_text()
    assert "on_step_begin" in (folder / "rank-1.stack.txt").read_text()
