"""Training on a stream: it stops at max_steps, goes on exactly where it was, over ranks and workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from runs import TUNINGS, make_rows, make_world, run_config
from safetensors.torch import load_file
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.data.collator import Collator
from mllm.errors import ConfigError
from mllm.model.checkpoint import read_manifest
from mllm.training.build import build_processor
from mllm.training.callbacks import known_lengths
from mllm.training.longest import longest_rows
from mllm.training.metrics import read_metrics
from mllm.training.streams import open_stream
from mllm.training.train import train

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "files").mkdir()
    content = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": content})
    features = Features({"id": Value("string"), "image": List(Image()), "messages": messages})
    rows = make_rows(20)
    for row in rows:
        parts = [part for message in row["messages"] for part in message["content"]]
        row["image"] = [part.pop("image") for part in parts if part["type"] == "image"]
        for part in parts:
            part.setdefault("text", None)
    for number, (start, end) in enumerate(((0, 3), (3, 12), (12, 13), (13, 20))):
        part = Dataset.from_list(rows[start:end], features=features)
        part.to_parquet(folder / "files" / f"train-{number}.parquet")
    return folder


def config(world: Path, output: Path, data: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    made = run_config(world, output, TUNINGS["all"], **options).model_dump(exclude_unset=True)
    stream = {"path": f"hf:{world / 'files'}", "streaming": True, "shuffle_buffer": 3}
    return RunConfig.model_validate({**made, "data": {**stream, **(data or {})}})


def test_only_the_longest_of_the_first_rows_are_kept(world: Path, tmp_path: Path) -> None:
    """With their pictures, hundreds of rows may be gigabytes."""
    made = config(world, tmp_path / "run")
    stream = open_stream(made.data, 0)
    collator = Collator(build_processor(made.model))
    known = known_lengths(None, stream, collator, 3)
    rows = list(stream.once())
    assert known.lengths is not None
    assert known.lengths.tokens.tolist() == [len(collator.encode(row).input_ids) for row in rows]
    longest = longest_rows(None, known.lengths, known.numbers, 3)
    assert known.rows == {number: rows[number] for number in longest}
    assert len(known_lengths(None, stream, None, 3).rows) == 3


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


class Crash(TrainerCallback):
    """Dies two steps after a checkpoint was written, with more batches read ahead."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 3])
def test_a_resumed_run_is_the_run_that_was_never_stopped(world: Path, tmp_path: Path, workers: int) -> None:
    options: dict[str, Any] = {"max_steps": 10, "save_steps": 5, "num_workers": workers}
    options |= {"per_device_batch_size": 3, "gradient_accumulation_steps": 2}
    train(config(world, tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "broken", **options), callbacks=[Crash()])
    train(config(world, tmp_path / "broken", **options, resume=True))
    assert len(losses(tmp_path / "whole")) == 10
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, broken[name]), name
    (file,) = read_manifest(tmp_path / "whole")["data"]["files"]
    assert (file["streaming"], file["hashed"]) == (True, "fingerprint")
    if not workers:
        with pytest.raises(ConfigError, match="1 ranks with 1 workers each, here are 1 with 2"):
            train(config(world, tmp_path / "broken", **{**options, "num_workers": 2}, resume=True))
        with pytest.raises(ConfigError, match="trained on other data"):
            train(config(world, tmp_path / "broken", {"shuffle_buffer": 4}, **options, resume=True))


@pytest.mark.slow
def test_two_ranks_go_on_exactly_too(world: Path, tmp_path: Path) -> None:
    """Uneven files over ranks and workers: both ranks end; behind a break comes what would have come."""

    def launch(output: str, **options: Any) -> list[float]:
        made = config(
            world, tmp_path / output, per_device_batch_size=2, num_workers=2, save_steps=5, **options
        )
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made.model_dump(exclude_unset=True)))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
                *("scripts/train.py", str(tmp_path / "recipe.yaml")),
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return losses(tmp_path / output)

    whole = launch("whole", max_steps=10)
    assert len(whole) == 10
    launch("broken", max_steps=5)
    assert launch("broken", max_steps=10, resume=True) == whole


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "rows.jsonl"}, "streaming is for hf:"),
        ({"packing": True}, "packing and grouping need the lengths"),
        ({"path": ["hf:a", "hf:b"]}, "streaming reads one data set"),
        ({"replay": {"path": "hf:a", "share": 0.1}}, "streaming reads one data set"),
        ({"streaming": False}, "shuffle_buffer is of streaming"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(
    world: Path, tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(world, tmp_path, data)


def test_a_stream_needs_an_end(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give train\.max_steps"):
        config(world, tmp_path, max_steps=None)
