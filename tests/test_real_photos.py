"""The whole way on real COCO photos, through the command line: data, both stages, POPE, questions.

A hundred photos cannot teach a tiny model to see. What must hold is that every command works on them,
that the loss falls, and that what is reported is what was computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mllm.data.rows import open_rows
from mllm.training.metrics import read_metrics

pytestmark = pytest.mark.slow


def mllm(*arguments: object) -> str:
    """Output of a command, run as a user runs it."""
    code = "import sys; sys.argv[0] = 'mllm'; from mllm.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def falls(run: Path) -> bool:
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    third = len(losses) // 3
    return sum(losses[-third:]) < 0.9 * sum(losses[:third])


def test_photos_to_answers(tmp_path: Path, data_dir: Path) -> None:
    coco = data_dir / "coco_tiny"
    notes, photos = coco / "annotations", coco / "train2017"
    align, instruct = tmp_path / "align.jsonl", tmp_path / "instruct.jsonl"
    captions, instances = notes / "captions_train2017.json", notes / "instances_train2017.json"
    mllm("data", "convert", captions, align, "--image-root", photos, "--check-images")
    mllm("data", "generate", instruct, "--captions", captions, "--instances", instances)
    assert len(open_rows(align)) == 250
    assert len(open_rows(instruct)) >= 100

    common = [f"data.image_root={photos}", "train.logging_steps=1", "train.per_device_batch_size=8"]
    mllm(
        *("train", "quickstart/align", f"data.path={align}", f"train.output_dir={tmp_path / 'one'}"),
        *common,
        "train.max_steps=40",
    )
    mllm(
        *("train", "quickstart/instruct", f"data.path={instruct}", f"train.output_dir={tmp_path / 'two'}"),
        *common,
        *("train.max_steps=40", "data.max_length=2048"),
        f"model.init_from={tmp_path / 'one'}",
    )
    assert falls(tmp_path / "one")
    assert falls(tmp_path / "two")

    mllm("eval", "build", notes / "instances_val2017.json", tmp_path / "pope")
    for decode in ("greedy", "vcd"):
        questions = tmp_path / "pope" / "pope_random.jsonl"
        predictions = tmp_path / f"{decode}.jsonl"
        asked = ("eval", "run", tmp_path / "two", questions, predictions, "--image-root", coco / "val2017")
        mllm(*asked, "--decode", decode, "--max-new-tokens", "8", "--batch-size", "16")
        result = json.loads(mllm("eval", "score", predictions, questions, "--json"))
        assert result["n"] == len(questions.read_text().splitlines())
        assert 0 <= result["accuracy"] <= 1
        assert result["run"]["decode"]["name"] == decode
    for photo in sorted((data_dir / "photos").glob("*.jpg")):
        printed = mllm(
            *("chat", tmp_path / "two", "--image", photo, "--prompt", "What is this?", "--json"),
            *("--max-new-tokens", "12"),
        )
        assert json.loads(printed)["images"] == [str(photo)]
