"""What `plan` says of ZeRO is what two real DeepSpeed ranks hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture
from memory import PeakBytes, held
from ranks import on_ranks
from runs import make_world, run_config
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mllm.config import RunConfig
from mllm.data.collator import Collator
from mllm.data.rows import open_rows
from mllm.data.schema import assistant, user
from mllm.training.build import build_processor
from mllm.training.memory import FSDP, WAYS, Measure, bytes_a_rank
from mllm.training.sharded import local_share
from mllm.training.train import train

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
TUNINGS = {"full": ("full", "full", "full"), "lora": ("frozen", "full", "lora")}
STAGES = {way.name: way for way in WAYS if way.zero}
ROWS = 2
# Wide and short: in full training, what ZeRO divides is half of the memory; with LoRA, activations are most.
LANGUAGE_MODEL = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 128, "intermediate_size": 384,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


class Held(TrainerCallback):
    """Bytes that a DeepSpeed rank holds behind its first step, and at most in later ones.

    In one step a rank may have rows of one length, and no mask of padding.
    """

    def __init__(self) -> None:
        self.leave_out = held()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.peak = PeakBytes(self.leave_out)
            self.peak.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            if state.global_step == state.max_steps:
                self.peak.__exit__(None, None, None)
            return
        optimizer: Any = kwargs["optimizer"]
        self.weights = sum(local_share(p).nbytes for p in kwargs["model"].parameters())
        if not args.deepspeed:
            moments = [local_share(x) for one in optimizer.state.values() for x in one.values()]
            self.optimizer = sum(tensor.nbytes for tensor in moments if tensor.dim())
            return
        while not hasattr(optimizer, "dtype"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        masters = (
            optimizer.fp32_partitioned_groups_flat if zero3 else optimizer.single_partition_of_fp32_groups
        )
        moments = [
            x for one in optimizer.optimizer.state.values() for x in one.values() if torch.is_tensor(x)
        ]
        self.optimizer = sum(tensor.nbytes for tensor in [*masters, *moments] if tensor.dim())


def held_by_a_rank(rank: int, world: int, configs: dict[Any, RunConfig]) -> dict[Any, tuple[int, int, int]]:
    """(weights, optimiser, most bytes of a step) of each run."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for name, config in configs.items():
        watch = Held()
        train(config, callbacks=[watch])
        unset_hf_deepspeed_config()  # or all models of this process would be built for ZeRO-3
        found[name] = (watch.weights, watch.optimizer, watch.peak.peak)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one length, every other a token shorter, so that there is a mask as in `plan`'s example."""
    world = make_world(tmp_path_factory.mktemp("world"))
    make_picture().save(world / "rows" / "picture.png")
    rows = [
        {"id": f"r{n}", "messages": [user("what", "picture.png"), assistant("a " * (24 - n % 2) + "a")]}
        for n in range(16)
    ]
    (world / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


@pytest.mark.slow
def test_what_two_ranks_hold(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    parts = {"vision_encoder": str(world / "vision"), "tokenizer": str(world / "language")}
    parts |= {"template": "vicuna_v1", "dtype": "bfloat16", "language_model": LANGUAGE_MODEL}
    configs = {}
    for tuning in TUNINGS:
        for name in STAGES:
            options: Any = {"bf16": True, "max_steps": 4, "deepspeed": str(DS_CONFIGS / f"{name}.json")}
            options["per_device_batch_size"] = ROWS
            configs[tuning, name] = run_config(
                world, tmp_path / tuning / name, TUNINGS[tuning], parts, **options
            )
    config = configs["full", "zero2"]
    row = open_rows(world / "rows" / "rows.jsonl", image_root=world / "rows")[0]
    tokens = len(Collator(build_processor(config.model)).encode(row).input_ids)
    facts = {tuning: Measure(configs[tuning, "zero2"], deepspeed=True).facts(tokens) for tuning in TUNINGS}
    ratios = {}
    for number, rank in enumerate(on_ranks(held_by_a_rank, 2, tmp_path, configs)):
        for (tuning, name), (weights, optimizer, peak) in rank.items():
            way = STAGES[name]
            found = bytes_a_rank(facts[tuning], way, 2, ROWS, False)
            # On a CPU what is offloaded lies beside the rest.
            share = -(-facts[tuning].trained // 2)
            assert weights == pytest.approx(facts[tuning].weights / (2 if way.zero == 3 else 1), rel=0.02)
            assert optimizer == pytest.approx(12 * share, rel=0.02), (tuning, name)
            ratios[tuning, name, number] = (found.total + found.host) / peak
    assert {what: ratio for what, ratio in ratios.items() if not 0.85 <= ratio <= 1.15} == {}, ratios


@pytest.mark.slow
def test_what_two_ranks_hold_under_fsdp(world: Path, tmp_path: Path) -> None:
    parts = {"vision_encoder": str(world / "vision"), "tokenizer": str(world / "language")}
    parts |= {"template": "vicuna_v1", "dtype": "bfloat16", "language_model": LANGUAGE_MODEL}
    configs = {
        name: run_config(
            world, tmp_path / name, tuning, parts,
            bf16=True, max_steps=4, fsdp=True, per_device_batch_size=ROWS, rehearsal=False,
        )
        for name, tuning in TUNINGS.items()
    }  # fmt: skip
    config = configs["full"]
    row = open_rows(world / "rows" / "rows.jsonl", image_root=world / "rows")[0]
    tokens = len(Collator(build_processor(config.model)).encode(row).input_ids)
    for rank in on_ranks(held_by_a_rank, 2, tmp_path, configs):
        for name, (weights, optimizer, peak) in rank.items():
            facts = Measure(configs[name], deepspeed=False).facts(tokens)
            found = bytes_a_rank(facts, FSDP, 2, ROWS, False)
            assert weights == pytest.approx(found.weights, rel=0.01)
            assert optimizer == pytest.approx(found.optimizer, rel=0.01)
            assert found.total == pytest.approx(peak, rel=0.15), name
