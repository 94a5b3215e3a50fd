"""What the report says of VCD is computed from this run's predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.tasks.pope import SPLITS
from mllm.quickstart.report import compare_columns

COLUMN = {"accuracy": 0.5, "accuracy_std": 0.0, "runs": 5}
POPE = dict.fromkeys(("greedy", "sample", "vcd_greedy", "vcd_sample"), COLUMN)


def write(folder: Path, column: str, seed: int, answers: list[str]) -> None:
    for split in SPLITS:
        rows = [{"question_id": i, "answer": answer, "label": "yes"} for i, answer in enumerate(answers)]
        path = folder / f"{column}.{split}.{seed}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_files_of_another_seed_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, "greedy", 7, ["Yes", "No", "No", "No"])
    write(tmp_path, "vcd_greedy", 7, ["Yes", "Yes", "No", "No"])
    for column in ("greedy", "vcd_greedy"):
        write(tmp_path, column, 0, ["No"] * 4)  # left by an earlier run into the same folder
    pair = compare_columns(POPE, tmp_path, 7)["vcd_greedy_minus_greedy"]
    assert pair["change"] == pytest.approx(0.25)
    assert pair["low"] < pair["change"] < pair["high"]
