"""A run from kept features is the run from pixels, and its vision encoder rests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import make_picture
from pydantic import ValidationError
from runs import make_world, run_config, tune
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.data.feature_store import FeatureStore, image_key
from mllm.errors import ConfigError, DataError
from mllm.training import feature_cache
from mllm.training.build import build
from mllm.training.explain import explain
from mllm.training.feature_cache import check_cacheable
from mllm.training.metrics import read_metrics
from mllm.training.train import train

REPOSITORY = Path(__file__).parents[2]
STAGE_1 = ("frozen", "full", "frozen")
LORA = ("frozen", "full", "lora")
FULL = ("frozen", "full", "full")
# So wide that the encoder is most of the work.
LARGE = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


class Calls(TrainerCallback):
    """Pictures that the vision encoder sees in a step, and pixels that reach the model."""

    def __init__(self) -> None:
        self.pictures = 0
        self.in_training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.vision_encoder.register_forward_hook(self._seen)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.in_training = True

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.in_training = False

    def _seen(self, module: Any, args: Any, output: Any) -> None:
        self.pictures += len(output[0]) * self.in_training


class Trial(TrainerCallback):
    """Pictures that the vision encoder sees between the building of the trainer and the end of the trials."""

    def __init__(self) -> None:
        self.pictures = 0
        self.seen: list[int] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.vision_encoder.register_forward_hook(self._count)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self.pictures)

    def _count(self, module: Any, args: Any, output: Any) -> None:
        self.pictures += len(output[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def cached(config: RunConfig, folder: Any, **data: Any) -> RunConfig:
    section = config.data.model_copy(update={"feature_cache": folder, **data})
    return RunConfig.model_validate(
        config.model_copy(update={"data": section}).model_dump(exclude_unset=True)
    )


def logged(output: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(output / "metrics.jsonl") if key in line]


def losses(output: Path) -> list[float]:
    return logged(output, "loss")


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("tuning", "packing", "bf16"),
    [(STAGE_1, False, False), (STAGE_1, True, True), (LORA, False, True), (FULL, True, False)],
)
def test_the_losses_are_those_of_pixels(
    tuning: Any, packing: bool, bf16: bool, world: Path, tmp_path: Path
) -> None:
    """Every third row has no picture, others have two; one picture of a run may be in several batches."""
    options: Any = {"max_steps": 5, "per_device_batch_size": 2, "bf16": bf16}
    plain = run_config(world, tmp_path / "plain", tuning, **options)
    section = plain.data.model_copy(update={"packing": packing})
    plain = plain.model_copy(update={"data": section})
    kept = run_config(world, tmp_path / "kept", tuning, **options)
    saw, rested = Calls(), Calls()
    train(plain, callbacks=[saw])
    train(cached(kept, str(tmp_path / "cache"), packing=packing), callbacks=[rested])
    assert (saw.pictures > 0, rested.pictures) == (True, 0)
    assert losses(tmp_path / "kept") == losses(tmp_path / "plain")
    shares, flops = (
        [logged(tmp_path / name, key) for name in ("plain", "kept")]
        for key in ("supervised/with_images", "total_flos")
    )
    assert shares[0] == shares[1]
    assert 0 < sum(shares[0]) < 5
    assert flops[0] > flops[1]  # the encoder's are not counted where it rests


def test_the_longest_rows_are_tried_as_they_are_trained_on(world: Path, tmp_path: Path) -> None:
    calls = Trial()
    config = cached(run_config(world, tmp_path / "run", STAGE_1, max_steps=1), str(tmp_path / "cache"))
    train(config, callbacks=[calls])
    assert calls.seen == [0]


def test_a_second_run_computes_nothing_and_what_changes_is_computed_again(
    world: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    computed: list[int] = []
    real = feature_cache.fill

    def fill(store: Any, features: Any, processor: Any, missing: Any, *args: Any, **options: Any) -> None:
        computed.append(len(missing))
        real(store, features, processor, missing, *args, **options)

    monkeypatch.setattr(feature_cache, "fill", fill)
    shutil.copytree(world, tmp_path / "world")
    config = run_config(tmp_path / "world", tmp_path / "run", STAGE_1, max_steps=1)
    section = config.model.model_copy(update={"vision_encoder": str(world / "vision")})
    config = cached(config.model_copy(update={"model": section}), True)
    train(config)
    pictures = sorted((tmp_path / "world" / "rows").glob("*.png"))
    train(config)
    make_picture(77).save(pictures[0])
    train(config)
    padded = config.model.model_copy(update={"image_aspect_ratio": "pad"})
    train(config.model_copy(update={"model": padded}))
    other = config.model.model_copy(update={"vision_feature_layer": -1})
    train(config.model_copy(update={"model": other}))
    assert computed == [len(pictures), 0, 1, len(pictures), len(pictures)]
    facts = [json.loads(p.read_text()) for p in (tmp_path / "run" / "feature_cache").glob("*/features.json")]
    assert sorted((fact["image_aspect_ratio"], fact["layer"]) for fact in facts) == [
        ("pad", -2),
        ("square", -2),
        ("square", -1),
    ]


def test_a_crash_while_filling_loses_a_block_at_most(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(feature_cache, "BATCH", 2)
    monkeypatch.setattr(feature_cache.fill, "__defaults__", (0, False, 3 * 16 * 32 * 4))  # three pictures
    config = cached(run_config(world, tmp_path / "run", STAGE_1, max_steps=1), str(tmp_path / "cache"))
    real, taken = FeatureStore.add, []

    def add(self: Any, keys: Any, features: Any) -> None:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(len(keys))
        real(self, keys, features)

    monkeypatch.setattr(FeatureStore, "add", add)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert taken == [3, 3]
    monkeypatch.setattr(FeatureStore, "add", lambda *args: (taken.append(len(args[1])), real(*args)))
    train(config)
    assert sum(taken) == len(list((world / "rows").glob("*.png")))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_resumed_run_goes_on_from_the_same_features(world: Path, tmp_path: Path) -> None:
    options: Any = {"save_steps": 2, "max_steps": 4}
    whole = cached(run_config(world, tmp_path / "whole", FULL, **options), str(tmp_path / "cache"))
    train(whole)
    cut = cached(run_config(world, tmp_path / "cut", FULL, **options), str(tmp_path / "cache"))
    train(cut.model_copy(update={"train": cut.train.model_copy(update={"max_steps": 2})}))
    count = len(blocks(tmp_path / "cache"))
    train(cut.model_copy(update={"train": cut.train.model_copy(update={"resume": True})}))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(blocks(tmp_path / "cache")) == count


def test_a_damaged_block_and_a_bad_picture_are_one_line(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    config = cached(
        run_config(tmp_path / "world", tmp_path / "run", STAGE_1, max_steps=1), str(tmp_path / "cache")
    )
    picture = tmp_path / "world" / "rows" / "r0-0.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"rows\.jsonl:1 \(id r0\): image .*r0-0\.png' is"):
        train(config)
    picture.write_bytes(whole)
    train(config)
    (block,) = blocks(tmp_path / "cache")
    block.write_bytes(block.read_bytes()[:-8])
    with pytest.raises(DataError, match="this block of the feature cache is damaged; delete it"):
        train(config)


def test_a_picture_is_known_by_path_size_and_time(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    make_picture(1).save(picture)
    first = image_key(picture)
    assert image_key(str(picture)) == first
    os.utime(picture, ns=(0, 5))
    assert image_key(picture) != first
    assert image_key(make_picture(1)) == image_key(make_picture(1)) != image_key(make_picture(2))
    spans = [SimpleNamespace(path=str(picture), offset=offset, size=9) for offset in (0, 9)]
    assert len({image_key(spans[0]), image_key(spans[1]), image_key(picture)}) == 3
    assert image_key(BytesIO(b"a")) == image_key(BytesIO(b"a")) != image_key(BytesIO(b"b"))
    store = FeatureStore(tmp_path / "store", (2, 3), torch.bfloat16)
    features = torch.randn(4, 2, 3)
    store.add([image_key(make_picture(n)) for n in range(4)], features)
    store.refresh()
    assert torch.equal(store.take([make_picture(2), make_picture(0)]), features[[2, 0]].bfloat16())
    assert store.take([]).shape == (0, 2, 3)
    with pytest.raises(DataError, match="is not in the feature cache"):
        store.take([picture])
    with pytest.raises(DataError, match=r"holds features \[4, 2, 3\], not those of this encoder"):
        FeatureStore(tmp_path / "store", (3, 2), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tune": {"vision_encoder": "full"}}, "tune.vision_encoder is 'full'"),
        ({"tune": {"vision_encoder": "lora"}}, "tune.vision_encoder is 'lora'"),
        ({"model": {"tiling": {"type": "anyres"}}}, "does not keep the views of model.tiling"),
    ],
)
def test_what_cannot_be_kept_is_refused_when_a_recipe_is_read(
    change: dict[str, Any], reason: str, world: Path
) -> None:
    raw = run_config(world, Path("none"), STAGE_1).model_dump(exclude_unset=True)
    raw["data"]["feature_cache"] = True
    for name, section in change.items():
        raw[name] = {**raw[name], **section}
    with pytest.raises(ValidationError, match=reason):
        RunConfig.model_validate(raw)


def test_what_cannot_be_kept_is_refused_when_the_model_is_there(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", tune(*STAGE_1), max_steps=1)
    override = {**tune(*STAGE_1), "overrides": {"vision_encoder.post_layernorm": "full"}}
    last = config.model.model_copy(update={"vision_feature_layer": "pooled"})
    changed = {"tune": type(config.tune).model_validate(override), "model": last}
    with pytest.raises(ConfigError, match=r"the vision encoder learns \(post_layernorm\.weight\)"):
        train(cached(config.model_copy(update=changed), str(tmp_path / "cache")))
    model, _ = build(config.model)
    model.requires_grad_(False)
    check_cacheable(model)
    model.config.tiling = {"type": "anyres", "pinpoints": [[32, 64]]}
    with pytest.raises(ConfigError, match="tiles its pictures"):
        check_cacheable(model)


def test_a_disk_that_is_too_small_is_found_before(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    config = cached(run_config(world, tmp_path / "run", STAGE_1, max_steps=1), str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"pictures take .* GB, and .* GB left"):
        train(config)


def test_explain_says_when_it_pays(world: Path) -> None:
    config = cached(run_config(world, Path("none"), STAGE_1, num_train_epochs=2.0), True)
    (note,) = explain(config).notes
    assert "0.00205 MB a picture, about 3.28e-05 GB with one picture a row" in note  # 16 x 32 floats, 16 rows
    assert "that is little" in note
    large = config.model.model_copy(update={"vision_encoder": {"model_type": "clip_vision_model", **LARGE}})
    config = config.model_copy(update={"model": large})
    (note,) = explain(config).notes
    assert ("that is little" in note, "gains nothing" in note) == (False, False)
    once = config.train.model_copy(update={"num_train_epochs": 1.0})
    (note,) = explain(config.model_copy(update={"train": once})).notes
    assert "this run alone gains nothing" in note


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        {"deepspeed": "ds_configs/zero3.json"},
        {"fsdp": True, "bf16": True, "rehearsal": False},
    ],
    ids=["zero3", "fsdp"],
)
def test_two_ranks_fill_one_cache_and_train_from_it(way: dict[str, Any], world: Path, tmp_path: Path) -> None:
    """Real processes, one of which often has no picture in its batch; FSDP casts layers and autocasts."""
    if "deepspeed" in way:
        pytest.importorskip("deepspeed")
    options: Any = {"max_steps": 4, "per_device_batch_size": 1, **way}
    for name, folder in (("plain", False), ("kept", str(tmp_path / "cache"))):
        config = cached(run_config(world, tmp_path / name, FULL, **options), folder)
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["scripts/train.py", str(recipe)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(blocks(tmp_path / "cache")) == 2
    kept, want = losses(tmp_path / "kept"), losses(tmp_path / "plain")
    assert kept[0] == pytest.approx(want[0], abs=1e-6)
    assert kept == pytest.approx(want, abs=5e-4 if "fsdp" in way else 1e-5)  # bf16 rounds by the batch
