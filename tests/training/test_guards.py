"""Faults put into real runs: each stops within three steps, in one line that names rows and cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TUNINGS, make_world, run_config
from transformers import TrainerCallback

from mllm.data.collator import Collator
from mllm.data.rows import open_rows
from mllm.errors import ConfigError, DataError, TrainingStoppedError
from mllm.model.adapters import adapter_layers
from mllm.training.arguments import check_bf16
from mllm.training.build import build, open_mixture
from mllm.training.callbacks import known_lengths, length_line
from mllm.training.step_guards import declared_rates, group_fault
from mllm.training.train import train
from mllm.training.tuning import apply_tuning

ROWS = r"on rows \S*rows\.jsonl:\d+ \(id r\d+\)"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class Fault(TrainerCallback):
    """Breaks the model, or the optimiser, when the first step begins."""

    def __init__(self, damage: Callable[[Any, Any], None]):
        self.damage = damage
        self.steps = 0

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kw: Any
    ) -> None:
        if state.global_step == 0:
            self.damage(model, optimizer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.steps = state.global_step


def loss_becomes(value: float) -> Callable[[Any, Any], None]:
    def damage(model: Any, optimizer: Any) -> None:
        plain = model.loss_function
        model.loss_function = lambda *args, **kwargs: plain(*args, **kwargs) * value

    return damage


def no_labels(model: Any, optimizer: Any) -> None:
    """As a wrong template would: nothing is left to learn when the batch comes to the model."""
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "labels": kwargs["labels"].fill_(-100)}),
        with_kwargs=True,
    )


def gradient_becomes(value: float) -> Callable[[Any, Any], None]:
    def damage(model: Any, optimizer: Any) -> None:
        # The last of the trained tensors: a look at the first alone would not see it.
        [p for p in model.parameters() if p.requires_grad][-1].register_hook(
            lambda gradient: gradient.index_fill(0, torch.tensor([0]), value)
        )

    return damage


def scale_is_zero(model: Any, optimizer: Any) -> None:
    for _, layer in adapter_layers(model):
        layer.scaling["default"] = 0.0


def one_input_is_cut_off(model: Any, optimizer: Any) -> None:
    """One adapter of many sees nothing."""
    _, layer = adapter_layers(model.language_model)[3]
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 0)


def freeze_connector(model: Any, optimizer: Any) -> None:
    model.connector.requires_grad_(False)


def thaw_encoder(model: Any, optimizer: Any) -> None:
    next(model.vision_encoder.parameters()).requires_grad_(True)


def lose_a_group(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


def wrong_rate(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[-1]["initial_lr"] = 5.0


LORA = TUNINGS["lora_llm"]
FAULTS: dict[str, tuple[tuple[str, str, str], Callable[[Any, Any], None], str]] = {
    "no labels": (TUNINGS["llm"], no_labels, f"step 1: no token is supervised {ROWS}.*; remove the rows"),
    "NaN loss": (TUNINGS["llm"], loss_becomes(float("nan")), f"step 1: the loss is nan {ROWS}"),
    "infinite loss": (TUNINGS["llm"], loss_becomes(float("inf")), f"step 1: the loss is inf {ROWS}"),
    "NaN gradient": (
        TUNINGS["llm"],
        gradient_becomes(float("nan")),
        rf"step 1: a gradient is not finite \(\w+\.\S+\) {ROWS}",
    ),
    "infinite gradient": (
        TUNINGS["llm"],
        gradient_becomes(float("inf")),
        rf"step 1: a gradient is not finite \(language_model\.\S+\) {ROWS}",
    ),
    "zero loss": (TUNINGS["llm"], loss_becomes(0.0), f"step 3: the loss was exactly 0 for 3 steps {ROWS}"),
    "dead adapters": (
        LORA,
        scale_is_zero,
        rf"step 3: the adapter of language_model\S+ \(and \d+ others\) is dead, its gradient was 0 in 3 "
        f"steps, {ROWS}",
    ),
    "one dead adapter": (LORA, one_input_is_cut_off, r"step 3: the adapter of language_model\S+ is dead"),
    "frozen part": (
        TUNINGS["llm"],
        freeze_connector,
        rf"step 1: connector\.\S+ is declared trainable and was frozen after tuning \(4 in all\) {ROWS}",
    ),
    "thawed part": (
        TUNINGS["llm"],
        thaw_encoder,
        r"step 1: vision_encoder\.\S+ is declared frozen and was made trainable",
    ),
    "not optimised": (
        TUNINGS["llm"],
        lose_a_group,
        rf"step 1: connector\.\S+ is declared trainable and is missing from the optimiser {ROWS}",
    ),
    "wrong rate": (
        TUNINGS["llm"],
        wrong_rate,
        r"step 1: language_model\.\S+ is declared to learn at 0.001 and is optimised at 5",
    ),
}


FAST = ("no labels", "NaN gradient", "dead adapters", "frozen part", "not optimised")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_stops_within_three_steps(world: Path, tmp_path: Path, name: str) -> None:
    tuning, damage, message = FAULTS[name]
    fault = Fault(damage)
    config = run_config(world, tmp_path / "run", tuning, max_steps=8, save_steps=1)
    with pytest.raises(TrainingStoppedError, match=message) as error:
        train(config, callbacks=[fault])
    assert "\n" not in str(error.value)
    assert fault.steps < 3
    written = json.loads((tmp_path / "run" / "stopped.rank0.json").read_text())
    assert len(written["micro_batches"][0]["rows"]) == 4
    assert not (tmp_path / "run" / "mllm_manifest.json").exists()


def test_healthy_adapters_are_not_called_dead(world: Path, tmp_path: Path) -> None:
    """With a rate of 0 in the first step, as warm-up has it, and pictures in few of the batches."""
    config = run_config(
        world, tmp_path / "run", TUNINGS["lora_all"], max_steps=6, per_device_batch_size=1, warmup_steps=3
    )
    train(
        config.model_copy(update={"train": config.train.model_copy(update={"lr_scheduler_type": "linear"})})
    )


def test_many_rows_are_named_in_the_file(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS["llm"], per_device_batch_size=12)
    with pytest.raises(TrainingStoppedError, match=r"and 4 more \(all in .*stopped.rank0.json\)"):
        train(config, callbacks=[Fault(gradient_becomes(float("nan")))])


def test_rows_without_labels_are_refused_by_name(world: Path) -> None:
    """One row of a batch, and a batch of nothing else."""
    processor = build(run_config(world, world / "x", TUNINGS["llm"]).model)[1]
    rows = list(open_rows(world / "rows" / "rows.jsonl", "auto", world / "rows"))[:3]
    silent = [{**row, "messages": row["messages"][:1]} for row in rows]
    for batch in ([rows[0], silent[1]], silent):
        with pytest.raises(DataError, match=r"rows.jsonl:\d+ \(id r\d\): .*"):
            Collator(processor)(batch)


def test_rows_over_the_length_are_told_before_the_start(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS["connector"])
    processor = build(config.model)[1]
    rows = open_mixture(config.data, 0)
    sizes = [(len(row["messages"]), len(processor.encode(row["messages"]).input_ids)) for row in rows]
    limit = max(length for turns, length in sizes if turns == 2)
    over = sum(length > limit for _, length in sizes)
    assert over
    known = known_lengths(None, rows, Collator(processor, limit))
    lengths, numbers = known.lengths, known.numbers
    assert len(numbers) == len(rows)
    assert lengths is not None
    line = length_line(lengths, len(rows), limit)
    assert f"{over / len(rows):.2%}, shortened" in line
    assert f"{2 * over / sum(turns for turns, _ in sizes):.2%} of all turns dropped" in line
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": limit})})
    train(config)
    assert f"rows over data.max_length={limit}" in " ".join(capsys.readouterr().err.split())
    # Too long as a whole: refused before the first step, by name and with the length that it needs.
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 20})})
    message = r"rows.jsonl:\d+ \(id r\d+\): the first round needs \d+ tokens and max_length is 20"
    with pytest.raises(DataError, match=message):
        train(config)


def test_groups_are_compared_with_what_was_declared(world: Path) -> None:
    config = run_config(world, world / "x", TUNINGS["llm"])
    model, _ = build(config.model)
    apply_tuning(model, config.tune)
    rates = {"connector": 1e-3, "language_model": 2e-5, "vision_encoder": 1.0}
    declared = declared_rates(model, rates)
    parts = [list(model.connector.parameters()), [*model.language_model.parameters()]]

    def fault(*more: Any) -> str | None:
        groups = [{"params": [*parts[0], *more], "lr": 1e-3}, {"params": parts[1], "lr": 2e-5}]
        optimizer = torch.optim.SGD([torch.zeros(1)])  # which itself would refuse a parameter given twice
        optimizer.param_groups = groups
        return group_fault(model, optimizer, declared)

    assert fault() is None
    assert "is in 2 groups" in str(fault(parts[1][0]))
    assert "1 tensors that tuning did not declare" in str(fault(torch.zeros(1)))


def test_bf16_needs_hardware_that_has_it() -> None:
    check_bf16("NVIDIA A100", (8, 0))
    with pytest.raises(ConfigError, match=r"train.bf16: Tesla V100 .*7\.0.* has no bf16.*train.fp16=true"):
        check_bf16("Tesla V100", (7, 0))


def test_out_of_memory_names_the_three_levers(world: Path, tmp_path: Path) -> None:
    def full(model: Any, optimizer: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.34 GiB. GPU 0 has ...")

    config = run_config(world, tmp_path / "run", TUNINGS["llm"], gradient_accumulation_steps=3)
    with pytest.raises(TrainingStoppedError) as error:
        train(config, callbacks=[Fault(full)])
    message = str(error.value)
    assert "\n" not in message
    assert "2.34 GiB were wanted" in message
    for lever in (
        "train.per_device_batch_size=2 (now 4) with train.gradient_accumulation_steps=6 (now 3)",
        "train.gradient_checkpointing=true (now false)",
        "train.deepspeed=ds_configs/zero3.json (now none)",
    ):
        assert lever in message, lever
