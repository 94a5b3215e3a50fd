"""Runs on packs and on grouped batches: the padded run's steps, resumed in order, on one rank or two."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import make_model
from runs import TUNINGS, make_world, run_config, write_rows
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.data.lengths import Lengths
from mllm.data.packing import PackingCollator
from mllm.data.tokens import IGNORE
from mllm.errors import ConfigError
from mllm.training.batches import row_flops
from mllm.training.metrics import read_metrics
from mllm.training.train import train

REPOSITORY = Path(__file__).parents[2]
PACKED = {"packing": True}
GROUPED = {"grouping": "modality_length"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def config(world: Path, output: Path, data: dict[str, Any], tuning: str = "all", **options: Any) -> RunConfig:
    made = run_config(world, output, TUNINGS[tuning], **options).model_dump(exclude_unset=True)
    return RunConfig.model_validate({**made, "data": {**made["data"], **data}})


def metrics(output: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(("batch", "steps"), [(4, 2), (5, 1)])
@pytest.mark.parametrize("tuning", ["all", "lora_llm"])
def test_a_packed_run_takes_the_steps_of_the_padded_run(
    world: Path, tmp_path: Path, tuning: str, batch: int, steps: int
) -> None:
    """Over three epochs, and with a rest of one row: had one step other rows, its loss would tell."""
    options: dict[str, Any] = {
        "max_steps": 7,
        "per_device_batch_size": batch,
        "gradient_accumulation_steps": steps,
    }
    for name, data in (("padded", {}), ("packed", PACKED)):
        train(config(world, tmp_path / name, data, tuning, **options))
    padded, packed = metrics(tmp_path / "padded"), metrics(tmp_path / "packed")
    assert len(packed) == 7
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in packed] == pytest.approx([line[key] for line in padded], rel=1e-4), key


class Crash(TrainerCallback):
    """Dies in the second epoch, two steps after a checkpoint was written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("data", [PACKED, GROUPED, {**PACKED, **GROUPED}], ids=["packed", "grouped", "both"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    world: Path, tmp_path: Path, data: dict[str, Any]
) -> None:
    options: dict[str, Any] = {
        "max_steps": 10,
        "save_steps": 5,
        "gradient_accumulation_steps": 2,
        "per_device_batch_size": 2,
    }
    whole = train(config(world, tmp_path / "whole", data, **options))
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "parts", data, **options), callbacks=[Crash()])
    parts = train(config(world, tmp_path / "parts", data, **options, resume=True))
    assert [line["step"] for line in metrics(parts)] == list(range(1, 11))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in metrics(parts)] == [line[key] for line in metrics(whole)], key
    left, right = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("changed", [{}, {**PACKED, **GROUPED}])
def test_resuming_in_another_order_is_refused(world: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    train(config(world, tmp_path / "run", GROUPED, "connector", max_steps=1, save_steps=1))
    wanted = {**changed, "grouping": "none"}
    with pytest.raises(ConfigError, match="was trained on other data, or with another"):
        train(config(world, tmp_path / "run", wanted, "connector", max_steps=2, resume=True))


def test_packs_that_would_not_fit_are_refused_before_the_first_step(world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_batch_size": 4, "max_steps": 2}
    with pytest.raises(ConfigError, match=r"pack_length is 400, but the longest pack has \d+ tokens; divide"):
        train(config(world, tmp_path / "run", {**PACKED, "pack_length": 400}, **options))
    train(config(world, tmp_path / "run", {**PACKED, "pack_length": 900}, **options))


def test_a_language_model_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path, text="opt")
    made = config(world, tmp_path / "run", PACKED, "connector")
    slow = made.model.model_copy(update={"attn_implementation": "sdpa"})
    with pytest.raises(ConfigError, match="OPTForCausalLM with attention 'sdpa'"):
        train(made.model_copy(update={"model": slow}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(made)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pack_length": 512}, "pack_length is of packs, and packing is false"),
        ({"grouping": "length"}, "should be 'none' or 'modality_length'"),
    ],
)
def test_settings_that_mean_nothing(world: Path, tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(world, tmp_path, data)


@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_flops_are_those_counted(tuning: str) -> None:
    """Products as PyTorch counts them; attention on CPU is not among those, so it is added by formula."""
    model, processor = make_model()
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    model.language_model.requires_grad_(tuning == "full")
    model.get_input_embeddings().requires_grad_(False)
    row: Any = {
        "id": "a",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "what is this " * 40}]},
            {"role": "assistant", "content": [{"type": "text", "text": "the quick brown fox " * 40}]},
        ],
    }
    batch = PackingCollator(processor)([row])
    tokens = batch["input_ids"].shape[1]
    model.eval()
    with FlopCounterMode(display=False) as counter:
        embeds = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        output = model(inputs_embeds=embeds, labels=batch["labels"], num_items_in_batch=torch.tensor(1))
        output.loss.backward()
    labels = int((batch["labels"] != IGNORE).sum())
    assert 0 < labels < tokens
    found = row_flops(model)(Lengths(*(np.array([n]) for n in (tokens, labels, 0))))
    text = model.config.text_config
    attention = 6 * text.num_hidden_layers * tokens**2 * text.hidden_size
    assert found[0] - attention == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("data", [PACKED, GROUPED], ids=["packed", "grouped"])
def test_two_processes_are_one(world: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    """Over the end of an epoch, where two rows are left over."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 6}
    data = {**data, "path": str(write_rows(tmp_path / "rows", 18)), "image_root": str(tmp_path / "rows")}
    one = config(world, tmp_path / "one", data, per_device_batch_size=2, **options)
    two = config(world, tmp_path / "two", data, per_device_batch_size=1, **options)
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
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in double] == pytest.approx([line[key] for line in single], rel=1e-4), key
