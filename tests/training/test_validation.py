"""Validation and questions during training: right numbers, and not a bit of difference to the training."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import make_picture
from matplotlib import rc_context
from runs import TUNINGS, make_world, run_config, tune

import mllm
from eval.during_training import Asker
from mllm.config import EvalSection, RunConfig, ValSection
from mllm.data.collator import Collator
from mllm.data.packing import PackingCollator
from mllm.data.rows import open_rows
from mllm.data.schema import assistant, images_of, user
from mllm.errors import ConfigError, DataError
from mllm.training.build import build
from mllm.training.metrics import plot_losses, read_metrics
from mllm.training.train import train
from mllm.training.validation import Blanked, Validation, shuffle_images

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    questions = []
    for number in range(8):
        make_picture(number).save(folder / "rows" / f"q{number}.png")
        label = "yes" if number % 2 else "no"
        questions.append(
            {
                "question_id": number,
                "image": f"q{number}.png",
                "text": "Is there a fox in the image?",
                "label": label,
            }
        )
    (folder / "pope_random.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


def metrics(output: Path, key: str = "loss") -> list[dict[str, Any]]:
    return [line for line in read_metrics(output / "metrics.jsonl") if key in line]


def validated(config: RunConfig, world: Path, **changes: Any) -> RunConfig:
    section = ValSection(path=str(world / "rows" / "rows.jsonl"), **{"every": 2, **changes})
    return config.model_copy(update={"val": section})


def asked(config: RunConfig, world: Path, **changes: Any) -> RunConfig:
    settings = {
        "every": 2,
        "rows": 6,
        "max_new_tokens": 3,
        "batch_size": 4,
        "image_root": str(world / "rows"),
    }
    section = EvalSection(questions=str(world / "pope_random.jsonl"), **{**settings, **changes})
    return config.model_copy(update={"eval": section})


# -- the numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Collator, PackingCollator])
def test_the_loss_is_that_of_the_rows_by_hand(world: Path, cls: Any) -> None:
    """Row by row, without any of the code under test, in whatever batches."""
    model, processor = build(run_config(world, world / "x", TUNINGS["llm"]).model)
    rows = open_rows(world / "rows" / "rows.jsonl", "auto", world / "rows")
    sums, count, pictured = torch.zeros(2), 0, 0
    for row in rows:
        batch = Collator(processor)([row])
        logits = model.eval()(batch["input_ids"], batch.get("pixel_values")).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").detach()
        number = int((labels != -100).sum())
        sums += torch.tensor([loss, loss * bool(images_of(row["messages"]))])
        count += number
        pictured += number * bool(images_of(row["messages"]))
    for size in (3, 16):
        if cls is PackingCollator:
            model.language_model.set_attn_implementation("packed")
        places: list[int] = []
        hook = model.get_output_embeddings().register_forward_hook(
            lambda _, args, out: places.append(out.shape[1])  # noqa: B023
        )
        found = Validation(ValSection(path="x"), rows, cls(processor), size).measure(
            model, Accelerator(cpu=True)
        )
        hook.remove()
        # All rows, and those with images twice more: the head sees labels alone, as in training.
        assert sum(places) == count + 2 * pictured
        assert found["loss"] == pytest.approx(sums[0].item() / count, rel=1e-5)
        assert found["image_gap"] == found["loss_shuffled"] - found["loss_images"]


def test_the_loss_on_the_training_data_is_the_training_loss(world: Path, tmp_path: Path) -> None:
    """A rate too small to move anything: both are of the same weights."""
    config = run_config(
        world, tmp_path / "run", TUNINGS["llm"], per_device_batch_size=16, max_steps=1, learning_rate=1e-12
    )
    output = train(validated(config, world, every=1, batch_size=5))
    (trained,), (found,) = metrics(output), metrics(output, "val/loss")
    assert found["step"] == 1
    assert found["val/loss"] == pytest.approx(trained["loss"], rel=1e-5)


def test_images_are_exchanged_for_different_ones() -> None:
    """Three rows ask about one picture; none of them may get it again."""
    names = ["a", "a", "a", "b", "c"]
    rows: list[Any] = [
        {"id": str(n), "messages": [user("q", name), assistant("x")]} for n, name in enumerate(names)
    ]
    rows.append({"id": "two", "messages": [user("q", "b", "c"), assistant("x")]})
    changed = shuffle_images(rows)
    assert changed is not None
    for before, after in zip(rows, changed, strict=True):
        own, others = images_of(before["messages"]), images_of(after["messages"])
        assert len(own) == len(others)
        assert all(x != y for x, y in zip(own, others, strict=True))
    assert images_of(rows[0]["messages"]) == ["a"]
    assert shuffle_images(rows[:3]) is None
    picture = make_picture(3, (30, 20))
    (blank,) = images_of(Blanked([{"id": "1", "messages": [user("q", picture)]}], (9, 8, 7))[0]["messages"])
    assert blank.size == (30, 20)
    assert blank.getcolors() == [(600, (9, 8, 7))]


# -- training does not notice -----------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_are_the_same_with_and_without(world: Path, tmp_path: Path, packing: bool) -> None:
    """LoRA with dropout and shuffled rows: the random numbers are those of a run without, bit for bit."""

    def losses(name: str, extra: bool) -> list[Any]:
        tuning = {**tune(*TUNINGS["lora_all"]), "lora": {"r": 4, "alpha": 8, "dropout": 0.3}}
        config = run_config(world, tmp_path / name, tuning, max_steps=5)
        config = config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})
        if extra:
            config = asked(validated(config, world), world, decode="sample,temperature=1.0")
        output = train(config, asker=Asker() if extra else None)
        return [(line["loss"], line["grad_norm"]) for line in metrics(output)]

    assert losses("with", True) == losses("without", False)
    assert [line["step"] for line in metrics(tmp_path / "with", "val/loss")] == [2, 4, 5]
    names = {"val/loss", "val/loss_images", "val/loss_shuffled", "val/loss_blank", "val/image_gap"}
    assert names <= set(metrics(tmp_path / "with", "val/loss")[0])
    # Questions: behind every second step, and behind the last.
    assert [line["step"] for line in metrics(tmp_path / "with", "eval/pope/accuracy")] == [2, 4, 5]


def test_predictions_are_kept_and_scored(world: Path, tmp_path: Path) -> None:
    config = asked(run_config(world, tmp_path / "run", TUNINGS["connector"], max_steps=2), world)
    with pytest.raises(ConfigError, match=r"eval: nobody was named to ask"):
        train(config)
    missing = asked(config, world, image_root=str(tmp_path))
    nowhere = missing.model.model_copy(update={"vision_encoder": "nowhere"})  # not come to
    with pytest.raises(DataError, match=r"pope_random.jsonl:1: image .* is not there \(6 of 6"):
        train(missing.model_copy(update={"model": nowhere}), asker=Asker())
    output = train(config, asker=Asker())
    (line,) = metrics(output, "eval/pope/accuracy")
    folder = output / "eval" / "step-2"
    answers = [json.loads(text) for text in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == list(range(6))
    says_yes = [
        not {"No", "no", "not"} & set(a["answer"].split(".")[0].replace(",", "").split(" ")) for a in answers
    ]
    right = sum(yes == (a["label"] == "yes") for yes, a in zip(says_yes, answers, strict=True))
    assert line["eval/pope/accuracy"] == pytest.approx(right / 6)
    assert json.loads((folder / "score.json").read_text())["run"]["checkpoint"]["step"] == 2


# -- does the model look? ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named_colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain pictures; the answer is the colour, which nothing but the picture tells."""
    from PIL import Image

    folder = make_world(tmp_path_factory.mktemp("colours"))
    colours = {"fox": (250, 10, 10), "world": (10, 250, 10), "hello": (10, 10, 250), "brown": (250, 250, 250)}
    lines = []
    for number, (word, colour) in enumerate(list(colours.items()) * 2):
        Image.new("RGB", (32, 32), colour).save(folder / "rows" / f"c{number}.png")
        messages = [user("what", f"c{number}.png"), assistant(word)]
        lines.append(json.dumps({"id": f"c{number}", "messages": messages}))
    (folder / "rows" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flagged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the validation warned of; a busy machine may also bring a warning of slow data."""
    return [record.getMessage() for record in caplog.records if record.name == "mllm.training.validation"]


@pytest.mark.slow
def test_a_model_that_looks_passes_and_one_with_a_cut_connector_is_flagged(
    named_colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(
        named_colours, tmp_path / "run", TUNINGS["all"], max_steps=60, learning_rate=3e-3,
        per_device_batch_size=8, logging_steps=20,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="mllm.training.validation"):
        output = train(validated(config, named_colours, every=60))
    (found,) = metrics(output, "val/loss")
    assert found["val/loss_shuffled"] > found["val/loss_images"] + 0.5
    assert found["val/loss_blank"] > found["val/loss_images"]
    assert not flagged(caplog)
    model, processor = mllm.load(output)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.zero_()
    rows = open_rows(named_colours / "rows" / "rows.jsonl", "auto", named_colours / "rows")
    validation = Validation(ValSection(path="x"), rows, Collator(processor), 8)
    with caplog.at_level(logging.WARNING, logger="mllm.training.validation"):
        cut = validation.measure(model, Accelerator(cpu=True))
    assert abs(cut["image_gap"]) < 1e-5
    (message,) = flagged(caplog)
    assert "THE MODEL IGNORES THE IMAGE" in message
    assert "\n" not in message


# -- the best checkpoint ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_steps", "limit"), [(0, None), (0, 2), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_the_best_checkpoint_is_kept_and_a_run_that_gets_worse_ends(
    world: Path, tmp_path: Path, save_steps: int, limit: int | None
) -> None:
    """At a rate at which soon every step makes it worse."""
    config = run_config(world, tmp_path / "run", TUNINGS["llm"], max_steps=12, learning_rate=0.3)
    config = validated(config, world, every=1, keep_best=True, patience=4)
    saving = {"save_steps": save_steps, "save_total_limit": limit}
    raw = {**config.model_dump(exclude_unset=True), "val": config.val}
    output = train(RunConfig.model_validate({**raw, "train": {**raw["train"], **saving}}))
    losses = {line["step"]: line["val/loss"] for line in metrics(output, "val/loss")}
    best = min(losses, key=lambda step: losses[step])
    assert len(losses) == best + 4
    kept = {int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*")}
    assert best in kept
    mllm.load(output / f"checkpoint-{best}")
    assert len(kept) <= (2 if save_steps else limit or 1)


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_whole_one_does(world: Path, tmp_path: Path) -> None:
    """Also where it is validated only from the resume on: the checkpoint then knows no such callback."""
    config = run_config(
        world, tmp_path / "run", TUNINGS["llm"], max_steps=12, learning_rate=0.3, save_steps=1
    )
    settings = {"every": 1, "keep_best": True, "patience": 3}
    output = train(validated(config, world, **settings))
    ended = metrics(output, "val/loss")[-1]["step"]
    assert 3 < ended < 12
    for step in range(ended - 1, 13):
        shutil.rmtree(output / f"checkpoint-{step}", ignore_errors=True)
    resumed = config.model_copy(update={"train": config.train.model_copy(update={"resume": "auto"})})
    train(validated(resumed, world, **settings))
    assert metrics(output, "val/loss")[-1]["step"] == ended
    shutil.rmtree(output)
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 2})}))
    train(validated(resumed, world, **settings))
    assert metrics(output, "val/loss")[0]["step"] == 3


def test_everything_is_reported_where_the_recipe_says(world: Path, tmp_path: Path) -> None:
    """Through the Trainer's integrations; TensorBoard's files can be read back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_config(world, tmp_path / "run", TUNINGS["connector"], max_steps=2, report_to=["tensorboard"])
    output = train(validated(config, world))
    (file,) = output.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    tags = set(events.Tags()["scalars"])
    names = ("loss", "speed/tokens_per_second", "speed/data_wait", "supervised/all", "memory/peak_gib")
    wanted = {f"train/{name}" for name in (*names, "val/loss", "val/image_gap", "learning_rate/connector")}
    assert wanted <= tags, wanted - tags
    (line,) = metrics(output, "val/loss")
    assert events.Scalars("train/val/loss")[0].value == pytest.approx(line["val/loss"])


def test_the_picture_of_the_losses_has_those_of_validation(tmp_path: Path) -> None:
    """In one whose words can be read; rows that all have an image are one curve, not two."""
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    seen = {"val/loss_images": 1.5, "val/loss_shuffled": 1.6, "val/loss_blank": 1.7, "step": 2}
    runs = {"a": lines, "b": [*lines, {**seen, "val/loss": 1.5}], "c": [*lines, {**seen, "val/loss": 1.4}]}
    with rc_context({"svg.fonttype": "none"}):
        plot_losses(runs, tmp_path / "loss.svg")
    drawn = (tmp_path / "loss.svg").read_text()
    assert [drawn.count(f">{name}<") for name in runs] == [1, 1, 1]
    for what, names in {
        "validation": "bc",
        "validation, rows with an image": "c",
        "the same with others' images": "bc",
        "the same with blank images": "bc",
    }.items():
        assert [name for name in runs if f">{name}, {what}<" in drawn] == list(names)


def test_pairs_are_refused(world: Path) -> None:
    raw = run_config(world, world / "x", TUNINGS["llm"]).model_dump(exclude_unset=True)
    raw |= {"stage": "pretrain_vision", "model": {"vision_encoder": "a", "text_encoder": "b"}, "tune": {}}
    with pytest.raises(ValueError, match="val is for conversations"):
        RunConfig.model_validate({**raw, "val": {"path": "x"}})


# -- ranks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = run_config(world, tmp_path_factory.mktemp("one") / "run", TUNINGS["llm"])
    return train(asked(validated(config, world, batch_size=3), world), asker=Asker())


def zero(stage: int) -> str | None:
    return str(REPOSITORY / "ds_configs" / f"zero{stage}.json") if stage else None


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_measure_what_one_does(world: Path, one_process: Path, tmp_path: Path, stage: int) -> None:
    """torchrun, and DeepSpeed's ZeRO-3."""
    two = run_config(world, tmp_path / "two", TUNINGS["llm"], per_device_batch_size=2, deepspeed=zero(stage))
    launch(asked(validated(two, world, batch_size=3), world), tmp_path / "two.yaml")
    for key in ("loss", "val/loss", "val/loss_shuffled", "val/loss_blank", "eval/pope/accuracy"):
        ours, theirs = ([line[key] for line in metrics(run, key)] for run in (tmp_path / "two", one_process))
        assert len(ours) == (3 if key == "loss" else 2)
        assert ours == pytest.approx(theirs, rel=1e-4), key


@pytest.mark.slow
def test_zero_3_does_not_notice_either(world: Path, tmp_path: Path) -> None:
    """With dropout and recomputation: hooks that were left open would show in the second step."""
    losses = {}
    for name in ("plain", "all"):
        tuning = {**tune(*TUNINGS["lora_llm_vision"]), "lora": {"r": 4, "alpha": 8, "dropout": 0.3}}
        config = run_config(
            world, tmp_path / name, tuning, per_device_batch_size=2, gradient_accumulation_steps=2,
            gradient_checkpointing=True, deepspeed=zero(3), max_steps=4,
        )  # fmt: skip
        if name == "all":
            config = asked(validated(config, world), world, decode="sample,temperature=1.0")
        data = config.data.model_copy(update={"longest_first": name == "all"})
        launch(config.model_copy(update={"data": data}), tmp_path / f"{name}.yaml")
        losses[name] = [(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / name)]
    assert len(losses["all"]) == 4
    assert losses["all"] == losses["plain"]


def launch(config: RunConfig, recipe: Path) -> None:
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(REPOSITORY / "scripts" / "train.py"), str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
