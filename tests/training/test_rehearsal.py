"""A save and a load before step 1; what is written is checked; a full disk costs nothing that was there."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch_runs
from runs import make_world, run_config
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import mllm
from mllm.config import RunConfig, ValSection
from mllm.errors import CheckpointError, TrainingStoppedError
from mllm.model.checkpoint.verify import verify
from mllm.training.metrics import read_metrics
from mllm.training.snapshots import STAGING, complete_snapshots
from mllm.training.train import train
from mllm.training.trainer import MllmTrainer

FULL, LORA = ("full", "full", "full"), ("lora", "full", "lora")
QLORA = ("frozen", "full", "qlora")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class Bytes(TrainerCallback):
    """What the trainer expected of a checkpoint, and what stood on the disk while it ran."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert not (Path(args.output_dir) / STAGING).exists()


def with_dropout(config: RunConfig) -> RunConfig:
    lora = config.tune.lora.model_copy(update={"dropout": 0.2})
    return config.model_copy(update={"tune": config.tune.model_copy(update={"lora": lora})})


@pytest.mark.parametrize("tuning", [FULL, LORA, QLORA], ids=["full", "lora", "qlora"])
def test_a_run_is_the_same_with_it_and_without(
    world: Path, tmp_path: Path, tuning: tuple[str, str, str]
) -> None:
    """With dropout, which would draw otherwise had the rehearsal drawn; it leaves nothing behind."""
    if "qlora" in tuning:
        pytest.importorskip("bitsandbytes")
    outputs = []
    for rehearsal in (True, False):
        config = run_config(world, tmp_path / str(rehearsal), tuning, rehearsal=rehearsal, save_steps=2)
        config = with_dropout(config) if "lora" in tuning[2] else config
        outputs.append(train(config, callbacks=[Bytes()]))
    losses = [[line["loss"] for line in read_metrics(o / "metrics.jsonl") if "loss" in line] for o in outputs]
    assert losses[0] == losses[1]
    left, right = (mllm.load(output)[0].state_dict() for output in outputs)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_a_tensor_that_is_not_saved_stops_before_the_first_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that differs from its base where nobody trained it would come back as the base."""
    plain = MllmTrainer.create_optimizer

    def spoiling(self: Any, model: Any = None) -> Any:
        with torch.no_grad():
            self.model.vision_encoder.get_parameter("encoder.layers.0.mlp.fc1.weight").add_(1.0)
        return plain(self, model)

    monkeypatch.setattr(MllmTrainer, "create_optimizer", spoiling)
    config = run_config(world, tmp_path / "run", ("frozen", "full", "frozen"), save_steps=1)
    with pytest.raises(TrainingStoppedError, match=r"rehearsal of a save: .*(does not compute|is not what)"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / STAGING).exists()
    train(config.model_copy(update={"train": config.train.model_copy(update={"rehearsal": False})}))


def test_what_was_written_is_read_again(world: Path, tmp_path: Path) -> None:
    output = train(run_config(world, tmp_path / "run", LORA, max_steps=1))
    verify(output)
    for file, fault in (
        ("model.safetensors", "is not on the disk as it was"),
        ("adapter/adapter_model.safetensors", "has changed since"),
    ):
        tensors = load_file(output / file)
        name = min(tensors)
        save_file({**tensors, name: tensors[name] + 1}, output / file)
        with pytest.raises(CheckpointError, match=fault):
            verify(output)
        save_file({n: t for n, t in tensors.items() if n != name}, output / file)
        with pytest.raises(CheckpointError, match=r"was not written|is missing"):
            verify(output)
        save_file(tensors, output / file)
    verify(output)


class Spoil(TrainerCallback):
    """One weight becomes infinite behind step 2."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                next(model.connector.parameters()).view(-1)[0] = float("inf")


def test_weights_that_are_no_numbers_do_not_replace_good_ones(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", FULL, save_steps=1, save_total_limit=1)
    with pytest.raises(CheckpointError, match=r"'connector\.\S+' has values that are no finite numbers"):
        train(config, callbacks=[Spoil()])
    assert [path.name for path in complete_snapshots(tmp_path / "run")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / STAGING).exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three megabytes: a checkpoint here takes about one."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def ballast(disk: Path, size: int) -> None:
    (disk / "ballast").write_bytes(b"x" * size)


def test_a_disk_that_cannot_hold_the_run_is_seen_before_the_first_step(world: Path, small_disk: Path) -> None:
    config = run_config(world, small_disk / "run", FULL, save_steps=1, max_steps=9)
    with pytest.raises(
        TrainingStoppedError, match=r"write 9 checkpoints of .*save_total_limit=2, or"
    ) as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not (small_disk / "run" / "metrics.jsonl").exists()
    limited = config.train.model_copy(update={"save_total_limit": 2})
    train(config.model_copy(update={"train": limited}))


def test_the_best_checkpoint_is_counted_too(world: Path, small_disk: Path) -> None:
    """The best one stays until a better one is complete, so there are two."""
    ballast(small_disk, 1_300_000)
    config = run_config(world, small_disk / "run", FULL, max_steps=2)
    train(config)
    best = ValSection(path=str(world / "rows" / "rows.jsonl"), every=1, keep_best=True)
    with pytest.raises(TrainingStoppedError, match=r"the run will write 2 checkpoints of "):
        train(config.model_copy(update={"val": best}))


def test_a_lower_limit_makes_room_on_a_full_disk(world: Path, small_disk: Path) -> None:
    config = run_config(world, small_disk / "run", FULL, save_steps=1, max_steps=5, rehearsal=False)
    with pytest.raises(TrainingStoppedError, match=r"is full: .*lower train.save_total_limit"):
        train(config)
    assert [path.name for path in complete_snapshots(small_disk / "run")][-1] == "checkpoint-3"
    limited = {"save_total_limit": 1, "resume": "auto", "rehearsal": True}
    output = train(config.model_copy(update={"train": config.train.model_copy(update=limited)}))
    lines = [line["step"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line]
    assert lines == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("left", [100_000, 350_000, 600_000, 900_000])
def test_a_disk_that_is_full_at_a_save(world: Path, small_disk: Path, left: int) -> None:
    """Whichever file does not fit: the checkpoint before stays, and the run goes on later."""

    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                ballast(small_disk, shutil.disk_usage(small_disk).free - left)

    config = run_config(world, small_disk / "run", FULL, save_steps=1, save_total_limit=1)
    with pytest.raises(TrainingStoppedError, match=r"the disk of .* is full: .*checkpoint-1; make") as error:
        train(config, callbacks=[Fill()])
    assert "\n" not in str(error.value)
    assert [path.name for path in complete_snapshots(small_disk / "run")] == ["checkpoint-1"]
    assert not (small_disk / "run" / STAGING).exists()
    (small_disk / "ballast").unlink()
    resumed = config.train.model_copy(update={"resume": "auto"})
    output = train(config.model_copy(update={"train": resumed}))
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("left", [100_000, 600_000])
def test_a_disk_that_is_full_ends_all_ranks(world: Path, small_disk: Path, tmp_path: Path, left: int) -> None:
    """Whether the first rank cannot write the weights or the optimiser: no rank waits for another."""
    config = run_config(world, small_disk / "run", FULL, save_steps=1, save_total_limit=1, rehearsal=False)
    found = launch_runs("torchrun", tmp_path / "found", {"full": config}, {"full": f"full {left}"})["full"]
    first, second = (rank["error"] or "" for rank in found)
    assert re.match(r"the disk of .* is full: .*checkpoint-1; make room", first)
    assert second == f"rank 0 could not save: {first}"
    assert not (small_disk / "run" / STAGING).exists()


@pytest.mark.slow
def test_a_disk_that_ranks_do_not_share_is_seen_before_the_first_step(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", LORA, save_steps=2)
    for rank in launch_runs("torchrun", tmp_path / "found", {"own": config}, {"own": "own disk"})["own"]:
        assert "1 of 2 ranks have written their part; train.output_dir must be on" in (rank["error"] or "")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_best_checkpoint_stays_where_room_is_made(world: Path, small_disk: Path) -> None:
    """The first is the best at this rate; a limit that is lowered on a full disk removes others."""
    best = ValSection(path=str(world / "rows" / "rows.jsonl"), every=1, keep_best=True)
    options: dict[str, Any] = {"save_steps": 1, "rehearsal": False, "learning_rate": 1.0}
    config = run_config(world, small_disk / "run", ("frozen", "frozen", "full"), max_steps=3, **options)
    train(config.model_copy(update={"val": best}))
    ballast(small_disk, shutil.disk_usage(small_disk).free - 50_000)
    more = config.train.model_copy(update={"max_steps": 4, "save_total_limit": 1, "resume": "auto"})
    train(config.model_copy(update={"val": best, "train": more}))
    names = [path.name for path in complete_snapshots(small_disk / "run")]
    assert names == ["checkpoint-1", "checkpoint-4"]
