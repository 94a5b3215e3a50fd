"""The loop: loss normalisation, rates and groups, guards, resuming, records, and two processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import TUNINGS, logits_of, make_world, run_config, write_rows
from safetensors.torch import load_file
from transformers import TrainerCallback

import mllm
from mllm.config import DataSection, RunConfig, SourceSection
from mllm.data.collator import Collator
from mllm.data.rows import open_rows
from mllm.errors import ConfigError
from mllm.training.build import build
from mllm.training.metrics import read_metrics
from mllm.training.resume import last_checkpoint
from mllm.training.train import train
from mllm.training.trainer import TrainingStoppedError
from mllm.training.tuning import apply_tuning

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class Gradients(TrainerCallback):
    """The gradients of the first optimiser step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any
    ) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def with_rows(config: RunConfig, path: Path) -> RunConfig:
    data = config.data.model_copy(
        update={"path": [SourceSection(path=str(path))], "image_root": str(path.parent)}
    )
    return config.model_copy(update={"data": data})


def metrics(output: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


# -- the loss ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(world: Path) -> Path:
    """Eight rows: one optimiser step of any of the batchings below sees them all."""
    return write_rows(world / "eight", 8)


def first_gradients(
    world: Path, output: Path, eight: Path, batch: int, steps: int
) -> dict[str, torch.Tensor]:
    spy = Gradients()
    config = run_config(
        world,
        output,
        TUNINGS["all"],
        max_steps=1,
        per_device_batch_size=batch,
        gradient_accumulation_steps=steps,
        max_grad_norm=0.0,
    )
    train(with_rows(config, eight), callbacks=[spy])
    return spy.found


@pytest.fixture(scope="module")
def whole_batch(
    world: Path, eight: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    return first_gradients(world, tmp_path_factory.mktemp("8x1") / "run", eight, 8, 1)


@pytest.mark.parametrize(("batch", "steps"), [(4, 2), (2, 4), (1, 8)])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(
    world: Path, tmp_path: Path, eight: Path, whole_batch: dict[str, torch.Tensor], batch: int, steps: int
) -> None:
    """Answers differ in length and some micro-batches are text only, so a mean of means would show."""
    found = first_gradients(world, tmp_path / "run", eight, batch, steps)
    assert set(found) == set(whole_batch)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, whole_batch[name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_loss_is_the_mean_over_supervised_tokens(
    world: Path, eight: Path, tmp_path: Path, whole_batch: dict[str, torch.Tensor]
) -> None:
    """By hand, row by row, without a trainer."""
    config = run_config(world, tmp_path / "run", TUNINGS["all"], max_steps=1)
    torch.manual_seed(config.train.seed)
    model, processor = build(config.model)
    apply_tuning(model, config.tune)
    collate, losses, count = Collator(processor), [], 0
    for row in open_rows(eight, "auto", eight.parent):
        batch = collate([row])
        logits = model(batch["input_ids"], batch.get("pixel_values")).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(whole_batch[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
    config = run_config(world, tmp_path / "run", TUNINGS["all"], max_steps=1, per_device_batch_size=8)
    output = train(with_rows(config, eight))
    assert metrics(output)[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_a_text_only_batch_calls_every_part(world: Path) -> None:
    """On many ranks a part that is not called would leave the others waiting: zero gradients, not None."""
    config = run_config(world, world / "x", TUNINGS["all"])
    model, processor = build(config.model)
    apply_tuning(model, config.tune)
    rows = list(open_rows(world / "rows" / "rows.jsonl", "auto", world / "rows"))[1::3]
    batch = Collator(processor)(rows)
    assert "pixel_values" not in batch
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    model.train()
    loss = model(**tensors).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert name.startswith("language_model") or not parameter.grad.any(), name
    model.eval()
    torch.testing.assert_close(model(**tensors).loss, loss)


def test_training_learns(world: Path, tmp_path: Path) -> None:
    config = run_config(
        world, tmp_path / "run", TUNINGS["all"], max_steps=25, learning_rate=3e-3, per_device_batch_size=8
    )
    losses = [line["loss"] for line in metrics(train(config))]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


# -- rates and groups -------------------------------------------------------------------------------


class Groups(TrainerCallback):
    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kw: Any
    ) -> None:
        names = {id(p): n for n, p in model.named_parameters()}
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        self.groups = [
            {**group, "names": {names[id(p)] for p in group["params"]}} for group in optimizer.param_groups
        ]
        self.trainable = {n for n, p in model.named_parameters() if p.requires_grad}


def test_each_part_has_its_rate_and_norms_no_decay(world: Path, tmp_path: Path) -> None:
    rates = {"vision_encoder": 2e-6, "connector": 2e-5}
    spy = Groups()
    config = run_config(
        world,
        tmp_path / "run",
        TUNINGS["all"],
        max_steps=2,
        learning_rate=2e-4,
        learning_rates=rates,
        weight_decay=0.1,
    )
    output = train(config, callbacks=[spy])
    listed = [name for group in spy.groups for name in group["names"]]
    assert sorted(listed) == sorted(spy.trainable)
    for group in spy.groups:
        assert {name.split(".")[0] for name in group["names"]} == {group["part"]}
        assert group["lr"] == pytest.approx(rates.get(group["part"], 2e-4))
        assert group["weight_decay"] in (0.0, 0.1)
        for name in group["names"]:
            assert ("bias" in name or "norm" in name) == (group["weight_decay"] == 0.0), name
    assert {group["part"] for group in spy.groups} == {*rates, "language_model"}
    line = metrics(output)[0]
    assert {part: line[f"learning_rate/{part}"] for part in {**rates, "language_model": 0}} == pytest.approx(
        {**rates, "language_model": 2e-4}
    )


def test_the_rate_of_a_part_moves_that_part(world: Path, tmp_path: Path) -> None:
    """Adam's first step is as large as the rate, whatever the gradient."""
    before, _ = build(run_config(world, tmp_path, TUNINGS["llm"]).model)
    config = run_config(
        world,
        tmp_path / "run",
        TUNINGS["llm"],
        max_steps=1,
        learning_rate=1e-4,
        learning_rates={"connector": 1e-2},
    )
    torch.manual_seed(config.train.seed)
    before, _ = build(config.model)
    after = dict(mllm.load(train(config))[0].named_parameters())
    moved: dict[str, float] = {}
    for name, parameter in before.named_parameters():
        part = name.split(".")[0]
        moved[part] = max(moved.get(part, 0.0), (after[name] - parameter).abs().max().item())
    assert moved["vision_encoder"] == 0
    assert moved["connector"] == pytest.approx(1e-2, rel=1e-2)
    assert moved["language_model"] == pytest.approx(1e-4, rel=1e-2)


# -- guards -----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_names_the_rows(world: Path, tmp_path: Path) -> None:
    config = run_config(
        world, tmp_path / "run", TUNINGS["llm"], learning_rate=1e30, max_grad_norm=0.0, max_steps=4
    )
    with pytest.raises(
        TrainingStoppedError, match=r"step [23]: the loss is (nan|inf) on rows .*r\d+"
    ) as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "mllm_manifest.json").exists()


def test_a_gradient_that_is_no_number_stops(world: Path, tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
            if state.global_step == 1:
                weight = next(p for p in model.connector.parameters() if p.requires_grad)
                weight.register_hook(lambda gradient: gradient * float("nan"))

    config = run_config(world, tmp_path / "run", TUNINGS["connector"])
    with pytest.raises(TrainingStoppedError, match="step 2: a gradient is not finite"):
        train(config, callbacks=[Spoil()])


def test_a_trained_part_that_gets_no_gradient_stops(world: Path, tmp_path: Path) -> None:
    """Rows without pictures train no connector."""
    rows = tmp_path / "text" / "rows.jsonl"
    rows.parent.mkdir()
    lines = (world / "rows" / "rows.jsonl").read_text().splitlines()
    rows.write_text("\n".join(lines[1::3]) + "\n")
    for max_steps, steps in ((2, 2), (20, 10)):
        config = with_rows(run_config(world, tmp_path / "run", TUNINGS["llm"], max_steps=max_steps), rows)
        with pytest.raises(
            TrainingStoppedError, match=f"connector is declared trainable.* zero for {steps} steps"
        ):
            train(config)
    config = with_rows(run_config(world, tmp_path / "run", ("frozen", "frozen", "full")), rows)
    train(config)


def test_a_first_batch_of_text_does_not_stop_a_run(world: Path, tmp_path: Path) -> None:
    """With one row a step and a third of the rows text only, some step without a picture comes early."""

    class SawText(TrainerCallback):
        quiet = 0

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any
        ) -> None:
            self.quiet += all(not p.grad.any() for p in model.connector.parameters())

    spy = SawText()
    train(
        run_config(world, tmp_path / "run", TUNINGS["llm"], per_device_batch_size=1, max_steps=8),
        callbacks=[spy],
    )
    assert 0 < spy.quiet < 8


def test_a_frozen_tensor_that_moves_stops(world: Path, tmp_path: Path) -> None:
    class Thaw(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
            with torch.no_grad():  # by one bit
                weight = model.vision_encoder.get_parameter("encoder.layers.0.mlp.fc1.weight")
                weight.view(torch.int32)[3, 3] ^= 1

    config = run_config(world, tmp_path / "run", TUNINGS["connector"], max_steps=1)
    with pytest.raises(
        TrainingStoppedError, match=r"layers.0.mlp.fc1.weight is declared frozen and has changed"
    ):
        train(config, callbacks=[Thaw()])


# -- resuming ---------------------------------------------------------------------------------------


class Crash(TrainerCallback):
    """Dies two steps after a checkpoint was written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "text"), [("llm", "gpt2"), ("lora_llm_vision", "llama"), ("all", "llama")])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path, name: str, text: str) -> None:
    """With dropout (GPT-2's and LoRA's) and shuffling, on a decaying rate: bit for bit."""
    world = make_world(tmp_path, text=text)
    options = {
        "max_steps": 10,
        "save_steps": 5,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.2,
        "gradient_accumulation_steps": 2,
        "per_device_batch_size": 2,
    }

    def config(output: str, **more: Any) -> RunConfig:
        made = run_config(world, tmp_path / output, TUNINGS[name], **options, **more)
        lora = made.tune.lora.model_copy(update={"dropout": 0.2})
        return made.model_copy(update={"tune": made.tune.model_copy(update={"lora": lora})})

    whole = train(config("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(config("parts"), callbacks=[Crash()])
    assert metrics(tmp_path / "parts")[-1]["step"] > 5, "some steps behind the checkpoint must be cut off"
    parts = train(config("parts", resume=True))
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in metrics(parts)] == [line[key] for line in metrics(whole)], key
    assert [line["step"] for line in metrics(parts)] == list(range(1, 11))
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        if (whole / file).exists():
            left, right = load_file(whole / file), load_file(parts / file)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[n], right[n]) for n in left)


def test_a_run_resumes_on_the_rows_that_it_began_with(world: Path, tmp_path: Path) -> None:
    output, tuning = tmp_path / "run", TUNINGS["connector"]
    train(run_config(world, output, tuning, max_steps=2, save_steps=1))
    moved = write_rows(tmp_path / "moved")
    resumed = with_rows(run_config(world, output, tuning, resume=True), moved)
    train(resumed)  # the same rows in another place
    other = write_rows(tmp_path / "other", count=13)
    for changed in (
        with_rows(run_config(world, output, tuning, resume=True, max_steps=4), other),
        run_config(world, output, tuning, resume=True, max_steps=4, seed=7),
    ):
        with pytest.raises(ConfigError, match=r"train.resume: .* was trained on other data, or with another"):
            train(changed)


def test_a_mixture_is_recorded_and_resumes_as_it_was_drawn(world: Path, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few", count=4)
    sources = [world / "rows" / "rows.jsonl", few]
    listed = [{"path": str(path), "image_root": str(path.parent)} for path in sources]

    def mixed(output: Path, **train_options: Any) -> RunConfig:
        made = run_config(world, output, TUNINGS["connector"], save_steps=2, **train_options)
        data = DataSection.model_validate({"path": listed, "mixing": "sqrt"})
        return made.model_copy(update={"data": data})

    whole = train(mixed(tmp_path / "whole", max_steps=4))
    train(mixed(tmp_path / "cut", max_steps=2))
    resumed = train(mixed(tmp_path / "cut", max_steps=4, resume=True))
    ours, theirs = (mllm.load(path)[0].state_dict() for path in (whole, resumed))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    data = json.loads((whole / "mllm_manifest.json").read_text())["data"]
    # Roots of 16 and 4 rows: 2 to 1 of the 20.
    assert [(file["rows"], file["drawn"], file["share"]) for file in data["files"]] == [
        (16, 13, 13 / 20),
        (4, 7, 7 / 20),
    ]
    assert data["mixing"] == "sqrt"


def test_resume_takes_the_newest_complete_checkpoint(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert last_checkpoint(output, True, {}) is None
    assert last_checkpoint(output, "auto", {}) is None
    train(run_config(world, output, TUNINGS["connector"], save_steps=1))
    data = json.loads((output / "mllm_manifest.json").read_text())
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-10")
    assert last_checkpoint(output, True, data) == str(output / "checkpoint-10")  # by number, not by letter
    (output / "checkpoint-10" / "trainer_state.json").unlink()  # killed while it was written
    assert last_checkpoint(output, True, data) == str(output / "checkpoint-3")
    assert last_checkpoint(output, False, data) is None
    with pytest.raises(
        ConfigError, match=r"train.resume: .*checkpoint-10' is no complete training checkpoint"
    ):
        last_checkpoint(output, str(output / "checkpoint-10"), data)
    again = train(run_config(world, output, TUNINGS["connector"], resume=str(output / "checkpoint-2")))
    assert [line["step"] for line in metrics(again)] == [1, 2, 3]


@pytest.mark.parametrize("other", ["llm", "lora_llm"])
def test_resuming_with_another_tuning_is_refused(world: Path, tmp_path: Path, other: str) -> None:
    output = train(run_config(world, tmp_path / "run", TUNINGS["connector"], save_steps=1, max_steps=1))
    with pytest.raises(ConfigError, match=r"was trained with tune\.\w+=\w+, this run has \w+; set it back"):
        train(run_config(world, output, TUNINGS[other], resume=True))


def test_resume_of_a_run_that_starts_from_adapters(world: Path, tmp_path: Path) -> None:
    """Weights that the stage before trained and this one does not are part of the model all the same."""
    first = train(run_config(world, tmp_path / "first", TUNINGS["lora_llm_vision"]))
    section = {"init_from": str(first)}
    whole = train(
        run_config(world, tmp_path / "whole", TUNINGS["connector"], section, save_steps=2, max_steps=4)
    )
    config = run_config(
        world, whole, TUNINGS["connector"], section, max_steps=4, resume=str(whole / "checkpoint-2")
    )
    want = logits_of(*mllm.load(whole))
    assert torch.equal(logits_of(*mllm.load(train(config))), want)


# -- records ----------------------------------------------------------------------------------------


def test_metrics_and_curve(world: Path, tmp_path: Path) -> None:
    output = train(
        run_config(world, tmp_path / "run", TUNINGS["connector"], save_steps=1, save_total_limit=1)
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(line["loss"] > 0 and "grad_norm" in line for line in lines if "loss" in line)
    assert "train_runtime" in lines[-1]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-3"]
    train(run_config(world, tmp_path / "run", TUNINGS["connector"], max_steps=1))  # a new run, a new file
    assert [line["step"] for line in metrics(output)] == [1]


def test_what_stands_beside_the_model_cannot_end_a_run(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the card nor a curve can be written here."""
    for name in ("README.md", "loss.png"):
        (tmp_path / "run" / name).mkdir(parents=True)
    output = train(run_config(world, tmp_path / "run", TUNINGS["connector"]))
    assert mllm.load(output)
    assert re.search(r"no curves are drawn of .*metrics.jsonl \(IsADirectoryError", caplog.text)
    assert f"write it with: mllm card {output}" in caplog.text


def test_an_unfinished_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_dropped_turns_are_counted(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS["connector"], per_device_batch_size=16, max_steps=1)
    processor = build(config.model)[1]
    rows = open_rows(world / "rows" / "rows.jsonl", "auto", world / "rows")
    lengths = [(len(row["messages"]), len(processor.encode(row["messages"]).input_ids)) for row in rows]
    limit = max(length for turns, length in lengths if turns == 2)
    dropped = 2 * sum(length > limit for _, length in lengths)
    assert dropped > 0
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": limit})})
    assert metrics(train(config))[0]["dropped_turns"] == dropped


# -- two processes ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "lora_llm_vision"])
def test_two_processes_are_one(world: Path, tmp_path: Path, name: str) -> None:
    """Same gradients (their norm tells) and weights as one process with the whole batch; one writes.

    With one row a micro-batch, one process often has a picture where the other has none.
    """
    one = run_config(
        world,
        tmp_path / "one",
        TUNINGS[name],
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=1,
        seed=2,  # one row is too long, and the second rank has it
    )
    two = run_config(
        world,
        tmp_path / "two",
        TUNINGS[name],
        per_device_batch_size=1,
        gradient_accumulation_steps=2,
        save_steps=1,
        seed=2,
    )
    one, two = (
        config.model_copy(update={"data": config.data.model_copy(update={"max_length": 196})})
        for config in (one, two)
    )
    recipe = tmp_path / "two.yaml"
    recipe.write_text(yaml.safe_dump(two.model_dump(exclude_unset=True)))
    train(one)
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(REPOSITORY / "scripts" / "train.py"), str(recipe)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    single, double = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in double] == [1, 2, 3]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in double] == pytest.approx([line[key] for line in single], rel=1e-4), key
    assert double[-1]["dropped_turns"] == single[-1]["dropped_turns"] > 0
    for step in (1, 3):
        left = dict(mllm.load(tmp_path / "one" / f"checkpoint-{step}")[0].named_parameters())
        right = dict(mllm.load(tmp_path / "two" / f"checkpoint-{step}")[0].named_parameters())
        far = max((left[n] - right[n]).abs().max().item() for n in left)
        assert far < 1e-4, step
