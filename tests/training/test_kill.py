"""Twenty times `kill -9`, at random moments, most of them in a save: always resumable, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TUNINGS, make_world, run_config
from safetensors.torch import load_file
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.training.metrics import read_metrics
from mllm.training.snapshots import STAGING, complete_snapshots, step_of
from mllm.training.train import train

STEPS, KILLS = 14, 20
# Loaded once, by the process that the others are forked from.
PRELOADED = [
    "mllm.training.train",
    "matplotlib.figure",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "peft.tuners.lora",
]
# What Python reports of files: the moments before and behind each are those that a kill can tell apart.
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "shutil.rmtree"}


class Begun(TrainerCallback):
    def __init__(self, begun: Any):
        self.begun = begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.set()


def launch(config: RunConfig, begun: Any, file_events: int | None) -> None:
    """Train; die by SIGKILL at that many events on files of the run."""
    left = file_events or 0
    place = config.train.output_dir

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS and str(arguments[0]).startswith(place):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if file_events is not None:
        sys.addaudithook(count)
    train(config, callbacks=[Begun(begun)])


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    world = make_world(tmp_path / "world")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    draw = random.Random(0)

    def made(name: str, rehearsal: bool) -> RunConfig:
        options: dict[str, Any] = {"save_steps": 1, "save_total_limit": 2, "max_steps": STEPS}
        config = run_config(
            world, tmp_path / name, TUNINGS["lora_llm"], **options, resume="auto", rehearsal=rehearsal
        )
        lora = config.tune.lora.model_copy(update={"dropout": 0.2})
        return config.model_copy(update={"tune": config.tune.model_copy(update={"lora": lora})})

    def start(name: str, events: int | None, seconds: float | None, rehearsal: bool = False) -> int:
        begun = context.Event()
        process = context.Process(target=launch, args=(made(name, rehearsal), begun, events))
        process.start()
        if seconds is not None:
            assert begun.wait(120)
            process.join(seconds)
            process.kill()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), "it could not be resumed"
        return process.exitcode

    kills, in_a_save, before = 0, 0, 0
    while kills < KILLS:
        by_time = kills % 4 == 3
        seconds = draw.uniform(0, 0.6) if by_time else None
        died = start("cut", None if by_time else draw.randrange(1, 130), seconds, rehearsal=kills % 5 == 4)
        kills += died != 0
        output = tmp_path / "cut"
        in_a_save += (output / STAGING).exists()
        newest = max((step_of(path) for path in complete_snapshots(output)), default=0)
        trained = max((line["step"] for line in read_metrics(output / "metrics.jsonl")), default=0)
        assert newest >= max(before, min(trained, STEPS) - 1)
        before = newest
    assert in_a_save >= KILLS // 4
    assert start("cut", None, None) == 0
    assert start("whole", None, None) == 0
    lines = [
        [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("whole", "cut")
    ]
    for key in ("step", "loss", "grad_norm"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]], key
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        if (tmp_path / "whole" / file).exists():
            left, right = (load_file(tmp_path / name / file) for name in ("whole", "cut"))
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)
    assert not (tmp_path / "cut" / STAGING).exists()
    assert not list(tmp_path.glob(".*.tmp-*"))
