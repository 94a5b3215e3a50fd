"""A resumed run is the run that was never stopped: every stage and mode, other ranks, broken checkpoints."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import on_ranks
from runs import make_world, run_config, write_rows
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from typer.testing import CliRunner

from mllm.cli import app
from mllm.config import RunConfig, TrainSection
from mllm.data.lengths import Lengths
from mllm.data.sampler import MicroBatches
from mllm.errors import CheckpointError, ConfigError
from mllm.training.arguments import steps_of_epoch
from mllm.training.explain import _steps
from mllm.training.metrics import read_metrics
from mllm.training.resume import last_checkpoint
from mllm.training.snapshots import MARKER, STAGING, complete_snapshots, read_marker, rotate
from mllm.training.train import train
from mllm.training.trainer import MllmTrainer

REPOSITORY = Path(__file__).parents[2]
DS_CONFIGS = REPOSITORY / "ds_configs"
STEPS = {"max_steps": 10, "save_steps": 5, "per_device_batch_size": 2, "gradient_accumulation_steps": 2}
CONNECTOR, FULL, LORA = ("frozen", "full", "frozen"), ("full", "full", "full"), ("lora", "full", "lora")
QLORA = ("frozen", "full", "qlora")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_rows(folder / "few", 5)
    return folder


def config(
    world: Path,
    output: Path,
    tuning: tuple[str, str, str],
    data: Mapping[str, Any] | None = None,
    stage: str = "instruct",
    **options: Any,
) -> RunConfig:
    options = {**STEPS, **options}
    if "global_batch_size" in options:
        del options["gradient_accumulation_steps"]
    made = run_config(world, output, tuning, **options).model_dump(exclude_unset=True)
    if "lora" in made["tune"]:
        made["tune"]["lora"]["dropout"] = 0.2
    if stage == "align":
        made["model"]["template"] = "plain"
    return RunConfig.model_validate({**made, "stage": stage, "data": {**made["data"], **(data or {})}})


def mixture(world: Path) -> dict[str, Any]:
    listed = [
        {"path": str(world / name / "rows.jsonl"), "image_root": str(world / name), "weight": weight}
        for name, weight in (("rows", 1.0), ("few", 2.0))
    ]
    return {"path": listed, "image_root": None, "mixing": "weights"}


def metrics(output: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


def same_run(whole: Path, parts: Path, last: int = 10) -> None:
    """Every loss, norm and rate, and every tensor that was saved, bit for bit."""
    assert [line["step"] for line in metrics(parts)] == list(range(1, last + 1))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in metrics(parts)] == [line[key] for line in metrics(whole)], key
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors") if STAGING not in path.parts]
    assert files
    for file in files:
        left, right = load_file(whole / file), load_file(parts / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


class Crash(TrainerCallback):
    """Dies two steps after a checkpoint was written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


PACKED, GROUPED = {"packing": True}, {"grouping": "modality_length"}
MODES: dict[str, tuple[str, tuple[str, str, str], dict[str, Any], dict[str, Any]]] = {
    "align": ("align", CONNECTOR, {}, {}),
    "align_packed": ("align", CONNECTOR, PACKED, {"num_workers": 2}),
    "align_full": ("align", FULL, GROUPED, {}),
    "full": ("instruct", FULL, {}, {"num_workers": 2, "bf16": True}),
    "full_packed_mixture": ("instruct", FULL, {**PACKED, "mixing": "weights"}, {}),
    "lora": ("instruct", LORA, {}, {"num_workers": 2}),
    "lora_packed_grouped": ("instruct", LORA, {**PACKED, **GROUPED}, {}),
    "lora_checkpointing": ("instruct", LORA, {}, {"gradient_checkpointing": True}),
    "qlora": ("instruct", QLORA, {}, {}),
    "qlora_packed_mixture": ("instruct", QLORA, {**PACKED, "mixing": "weights"}, {}),
}


FAST = ("align_packed", "full", "lora", "qlora_packed_mixture")


@pytest.mark.parametrize("mode", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in MODES])
def test_five_steps_and_five_are_ten(world: Path, tmp_path: Path, mode: str) -> None:
    """Epochs of four steps or five, on a decaying rate, with dropout wherever there is LoRA."""
    stage, tuning, data, options = MODES[mode]
    if "qlora" in tuning:
        pytest.importorskip("bitsandbytes")
    if "mixing" in data:
        data = {**data, **mixture(world)}
    options = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2, **options}

    def made(name: str, **more: Any) -> RunConfig:
        return config(world, tmp_path / name, tuning, data, stage, **options, **more)

    whole = train(made("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(made("parts", resume="auto"), callbacks=[Crash()])
    assert metrics(tmp_path / "parts")[-1]["step"] > 5, "some steps behind the checkpoint must be cut off"
    same_run(whole, train(made("parts", resume="auto")))


def test_the_command_resumes(world: Path, tmp_path: Path) -> None:
    """`--resume auto` starts where there is nothing, and goes on where there is something."""
    run = CliRunner().invoke
    recipe = tmp_path / "run.yaml"
    options = {"save_steps": 1, "max_steps": 2}
    made = config(world, tmp_path / "run", CONNECTOR, **options).model_dump(exclude_unset=True)
    recipe.write_text(yaml.safe_dump(made))
    for steps in (2, 4):
        found = CliRunner().invoke(
            app, ["train", str(recipe), f"train.max_steps={steps}", "--resume", "auto"]
        )
        assert found.exit_code == 0, found.output
        assert ("resuming from" in found.output) == (steps == 4)
    same_run(train(config(world, tmp_path / "whole", CONNECTOR, max_steps=4)), tmp_path / "run", 4)
    found = run(app, ["train", str(recipe), "--resume", str(tmp_path / "none: here")])
    assert isinstance(found.exception, ConfigError)  # which `main` prints as one line
    assert "none: here'; give auto, or the path" in str(found.exception)
    found = run(app, ["train", str(recipe), "train.max_steps=1"])
    assert "starting anew" in found.output


# -- checkpoints on disk ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    return train(config(world, folder, CONNECTOR, max_steps=3, save_steps=1))


def record_of(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "mllm_manifest.json").read_text())
    return record


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "model.safetensors", MARKER, "rng_state.pth"]
)
@pytest.mark.parametrize("cut", ["half", "gone"])
def test_a_broken_checkpoint_is_passed_over(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, cut: str
) -> None:
    output = shutil.copytree(saved, tmp_path / "run")
    file = output / "checkpoint-3" / name
    if cut == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(output, "auto", record_of(output)) == str(output / "checkpoint-2")
    assert "checkpoint-3 is ignored" in caplog.text
    with pytest.raises(ConfigError, match="checkpoint-3' is no complete training checkpoint"):
        last_checkpoint(output, str(output / "checkpoint-3"), record_of(output))


def test_old_checkpoints_go_and_the_last_complete_one_stays(saved: Path, tmp_path: Path) -> None:
    output = shutil.copytree(saved, tmp_path / "run")
    (output / "checkpoint-3" / MARKER).unlink()
    rotate(output, 1)  # what is not complete does not count as one that is kept
    assert [path.name for path in complete_snapshots(output)] == ["checkpoint-2"]
    assert not (output / "checkpoint-1").exists()


class Look(TrainerCallback):
    """What is complete on the disk at every save."""

    def __init__(self, output: Path):
        self.output = output
        self.seen: list[list[str]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append([path.name for path in complete_snapshots(self.output)])


def test_going_back_and_starting_anew_keep_the_newest(world: Path, tmp_path: Path) -> None:
    """By launch, then by step: what an earlier launch left at a higher step is older."""
    output = tmp_path / "run"
    options = {"save_steps": 1, "save_total_limit": 2}
    train(config(world, output, CONNECTOR, max_steps=5, **options))
    look = Look(output)
    train(config(world, output, CONNECTOR, max_steps=2, **options), callbacks=[look])
    assert look.seen == [["checkpoint-5", "checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    (output / STAGING / "checkpoint-9").mkdir(parents=True)  # a save that was killed
    train(config(world, output, CONNECTOR, max_steps=3, **options, resume="auto"))
    assert [line["step"] for line in metrics(output)] == [1, 2, 3]
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (output / STAGING).exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"learning_rate": 2e-3},
            r"was trained with train.learning_rate=0.001, this run has 0.002; set it back",
        ),
        ({"per_device_batch_size": 1}, r"4 rows a step, this run has 2 .*set train.global_batch_size=4"),
    ],
)
def test_what_would_silently_differ_is_refused(
    world: Path, saved: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    output = shutil.copytree(saved, tmp_path / "run")
    with pytest.raises(ConfigError, match=message) as error:
        train(config(world, output, CONNECTOR, **{"max_steps": 4, **changed}, resume="auto"))
    assert "\n" not in str(error.value)
    # And before anything is loaded: with parts that are not there it says the same.
    unbuilt = config(world, output, CONNECTOR, **{"max_steps": 4, **changed}, resume="auto")
    parts = unbuilt.model.model_copy(update={"language_model": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=message):
        train(unbuilt.model_copy(update={"model": parts}))


def test_what_it_stands_on_must_be_what_it_was(world: Path, tmp_path: Path) -> None:
    """An earlier stage that was trained again, a connector taken over from it, a base model written anew."""
    parts = shutil.copytree(world, tmp_path / "world")
    first = config(parts, tmp_path / "first", CONNECTOR, max_steps=1, save_steps=1)
    train(first)
    options: dict[str, Any] = {"max_steps": 1, "save_steps": 1}
    second = run_config(parts, tmp_path / "second", LORA, {"init_from": str(tmp_path / "first")}, **options)
    train(second)
    model = {**first.model.model_dump(exclude_unset=True), "connector_from": str(tmp_path / "first")}
    third = run_config(parts, tmp_path / "third", ("frozen", "frozen", "lora"), model, **options)
    train(third)
    first = config(parts, tmp_path / "first", CONNECTOR, max_steps=2, save_steps=1, resume="auto")
    train(first)
    for run in (second, third):
        again = run.train.model_copy(update={"resume": "auto"})
        with pytest.raises(
            CheckpointError, match=r"first, which it started from, has changed since; put back"
        ):
            train(run.model_copy(update={"train": again}))
    base = parts / "language" / "model.safetensors"
    save_file({name: 2 * x for name, x in load_file(base).items()}, base, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"base of its language model, .*language, has changed since"):
        train(first)


def test_a_cap_of_as_many_other_rows_is_refused(world: Path, tmp_path: Path) -> None:
    """Ten rows that are drawn and the first ten are as many, and others."""

    def capped(cap: Any) -> dict[str, Any]:
        path = world / "rows" / "rows.jsonl"
        return {"path": [{"path": str(path), "image_root": str(path.parent), "max_rows": cap}]}

    options: dict[str, Any] = {"max_steps": 1, "save_steps": 1}
    train(config(world, tmp_path / "run", CONNECTOR, capped(10), **options))
    options["resume"] = "auto"
    with pytest.raises(ConfigError, match=r"trained on other data"):
        train(config(world, tmp_path / "run", CONNECTOR, capped("first:10"), **options))
    train(config(world, tmp_path / "run", CONNECTOR, capped(10), **options))


def test_a_finished_run_has_nothing_left_to_do(world: Path, tmp_path: Path) -> None:
    """In the middle of an epoch of four steps, where Trainer alone would take one more."""
    output = train(config(world, tmp_path / "run", CONNECTOR, max_steps=6))
    before = load_file(output / "model.safetensors")
    train(config(world, output, CONNECTOR, max_steps=6, resume="auto"))
    after = load_file(output / "model.safetensors")
    assert [line["step"] for line in metrics(output)] == list(range(1, 7))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert record_of(output)["step"] == 6


def test_the_global_batch_is_kept_by_accumulation() -> None:
    section = TrainSection(output_dir="x", global_batch_size=16, per_device_batch_size=2)
    assert [section.accumulation(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match=r"16 is no multiple of 3 ranks x train\.per_device_batch_size 2"):
        section.accumulation(3)
    options = {"global_batch_size": 16, "per_device_batch_size": 2}
    run = run_config(Path("x"), Path("y"), CONNECTOR, **options)
    # Two rows that are left over are a step of their own, but not for four ranks.
    assert [_steps(run, 34, ranks) for ranks in (1, 2, 4)] == [3, 3, 2]
    for rows, ranks in ((34, 4), (33, 2), (3, 2), (16, 4), (17, 1)):
        none = np.zeros(rows, np.int32)
        batches = MicroBatches(Lengths(*(none for _ in fields(Lengths))), 2, 16 // (2 * ranks), ranks)
        assert steps_of_epoch(rows, ranks, 16) == math.ceil(len(batches) / batches.accumulation)
    both = section.model_copy(update={"gradient_accumulation_steps": 4})
    assert both.accumulation(2) == 4
    with pytest.raises(ConfigError, match="steps is 4, but global_batch_size 16 on 4 ranks needs 2"):
        both.accumulation(4)


def test_dropped_turns_are_counted_on(world: Path, tmp_path: Path) -> None:
    """Also those of steps between the last log and the save."""
    options = {"max_steps": 9, "save_steps": 5, "logging_steps": 3}
    short = {"max_length": 196}

    def dropped(output: Path) -> list[int]:
        return [line.get("dropped_turns", 0) for line in metrics(output)]

    whole = dropped(train(config(world, tmp_path / "whole", CONNECTOR, short, **options)))
    train(config(world, tmp_path / "parts", CONNECTOR, short, **{**options, "max_steps": 5}))
    train(config(world, tmp_path / "parts", CONNECTOR, short, **options, resume="auto"))
    assert dropped(tmp_path / "parts") == whole
    assert whole[2] > whole[1] > whole[0], "some in step 4 and 5, and more later"


# -- other ranks --------------------------------------------------------------------------------------


def rows_of_steps(rank: int, world: int, runs: Mapping[str, RunConfig]) -> dict[str, dict[int, list[str]]]:
    """Train on this rank; the rows that it had in each optimiser step of each run."""
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    found: dict[str, dict[int, list[str]]] = {}
    plain = MllmTrainer.training_step

    def noting(self: Any, model: Any, inputs: Any, *others: Any) -> Any:
        found[name].setdefault(self.state.global_step + 1, []).extend(inputs["row_ids"])
        return plain(self, model, inputs, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MllmTrainer, "training_step", noting)
        for name, run in runs.items():
            found[name] = {}
            train(run)
    return found


def by_step(ranks: list[dict[str, dict[int, list[str]]]], name: str) -> dict[int, list[str]]:
    return {step: sorted(row for rank in ranks for row in rank[name][step]) for step in ranks[0][name]}


@pytest.mark.slow
def test_other_ranks_go_on_with_the_same_rows(world: Path, tmp_path: Path) -> None:
    """Three steps on two ranks and four on one, and the other way; each over the end of an epoch.

    18 rows leave two for its last step. Rows and losses are those of the run that was never stopped.
    """
    path = write_rows(tmp_path / "rows", 18)
    own = {"path": str(path), "image_root": str(path.parent)}
    options = {"max_steps": 7, "save_steps": 3, "global_batch_size": 4, "per_device_batch_size": 1}
    modes = {"plain": {}, "packed": PACKED}

    def runs(part: str, **more: Any) -> dict[str, RunConfig]:
        return {
            f"{part}-{name}": config(
                world, tmp_path / f"{part}-{name}", FULL, {**data, **own}, **options, **more
            )
            for name, data in modes.items()
        }

    def cut(part: str, name: str) -> None:
        """The run as it was behind its third step."""
        shutil.copytree(tmp_path / f"{part}-{name}", tmp_path / f"{part}-cut-{name}")
        for step in (6, 7):
            shutil.rmtree(tmp_path / f"{part}-cut-{name}" / f"checkpoint-{step}")

    single = [rows_of_steps(0, 1, runs("one"))]
    for name in modes:
        cut("one", name)
    (tmp_path / "ranks").mkdir()
    double = on_ranks(
        rows_of_steps, 2, tmp_path / "ranks", runs("two") | runs("one-cut", resume="auto", num_workers=1)
    )
    for name in modes:
        cut("two", name)
    single[0] |= rows_of_steps(0, 1, runs("two-cut", resume="auto"))
    for part, whole, resumed in (("one", single, double), ("two", double, single)):
        for name in modes:
            want, found = by_step(whole, f"{part}-{name}"), by_step(resumed, f"{part}-cut-{name}")
            assert sorted(found) == [4, 5, 6, 7]
            assert found == {step: want[step] for step in found}, (part, name)
            epoch = [row for step in range(1, 6) for row in want[step]]
            assert len(epoch) == len(set(epoch)) == 18
            left, right = (metrics(tmp_path / f"{part}{cut}-{name}") for cut in ("", "-cut"))
            assert [x["step"] for x in right] == list(range(1, 8))
            assert [x["loss"] for x in right] == pytest.approx([x["loss"] for x in left], rel=1e-5)


def zero_runs(rank: int, world: int, runs: Mapping[str, RunConfig]) -> None:
    """Train on this rank, and refuse what one rank left."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    for name, run in runs.items():
        if name == "refused":
            with pytest.raises(
                ConfigError, match="was saved under DeepSpeed ZeRO-2, this run is under one pro"
            ):
                train(run)
        elif "cut" in name:
            with pytest.raises(KeyboardInterrupt):
                train(run, callbacks=[CrashAt(4)])
        else:
            train(run)
        unset_hf_deepspeed_config()  # or transformers builds the next model for ZeRO-3


class CrashAt(Crash):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_zero_resumes_exactly_and_on_the_same_ranks_only(world: Path, tmp_path: Path) -> None:
    """Six steps are three and three on two real ranks, with LoRA's dropout."""
    pytest.importorskip("deepspeed")
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "per_device_batch_size": 1}
    runs = {}
    for stage in ("zero2", "zero3"):
        own = {**options, "deepspeed": str(DS_CONFIGS / f"{stage}.json")}
        place = tmp_path / f"{stage}-parts"
        runs[f"{stage}-whole"] = config(world, tmp_path / f"{stage}-whole", LORA, **own)
        runs[f"{stage}-cut"] = config(world, place, LORA, **own)
        runs[f"{stage}-resumed"] = config(world, place, LORA, **own, resume="auto")
        if stage == "zero2":
            runs["refused"] = config(world, place, LORA, **options, resume="auto")
    on_ranks(zero_runs, 2, tmp_path, runs)
    for stage in ("zero2", "zero3"):
        same_run(tmp_path / f"{stage}-whole", tmp_path / f"{stage}-parts", 6)
        marker = read_marker(tmp_path / f"{stage}-whole" / "checkpoint-6")
        assert sum(marker["files"].values()) <= 1.05 * marker["expected_bytes"]
        # What is frozen is not saved with every checkpoint: of a 7B model it would be 14 GB.
        held = tmp_path / f"{stage}-whole" / "checkpoint-6" / "global_step6"
        for file in held.glob("*model_states.pt"):
            state = torch.load(file, weights_only=False)
            assert "connector.layers.0.weight" in state["module"] or stage == "zero3"
            assert not any("base_layer" in name for name in state["module"])
            assert state["frozen_param_fragments"] is None
    output = tmp_path / "zero2-parts"
    record = record_of(output)
    record["batch"] |= {"ranks": 1, "accumulation": 4}
    with pytest.raises(ConfigError, match=r"state in 2 parts, DeepSpeed ZeRO-2 on 1 ranks cannot .* start 2"):
        last_checkpoint(output, "auto", record)
