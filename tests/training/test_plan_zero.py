"""What `plan` says of ZeRO is what two real DeepSpeed ranks hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from runs import make_world, run_config
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.training.plan import WAYS, Measure, bytes_a_rank
from mllm.training.train import train

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
TUNINGS = {"full": ("full", "full", "full"), "lora": ("frozen", "full", "lora")}
STAGES = {way.name: way for way in WAYS if way.zero and not way.optimizer_on_cpu}


class Held(TrainerCallback):
    """Bytes that a DeepSpeed rank holds behind a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer: Any = kwargs["optimizer"]
        while not hasattr(optimizer, "dtype"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        masters = (
            optimizer.fp32_partitioned_groups_flat if zero3 else optimizer.single_partition_of_fp32_groups
        )
        moments = [x for one in optimizer.optimizer.state.values() for x in one.values() if x.dim()]
        weights = [getattr(p, "ds_tensor", p) for p in kwargs["model"].parameters()]
        self.weights = sum(p.numel() * p.element_size() for p in weights)
        self.optimizer = sum(tensor.nbytes for tensor in [*masters, *moments])


def held_by_a_rank(rank: int, world: int, configs: dict[Any, RunConfig]) -> dict[Any, tuple[int, int]]:
    """(weights, optimiser) of each run."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for name, config in configs.items():
        watch = Held()
        train(config, callbacks=[watch])
        found[name] = (watch.weights, watch.optimizer)
    return found


def test_what_two_ranks_hold(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    world = make_world(tmp_path / "world")
    configs = {}
    # Behind a run with ZeRO-3, transformers builds every model of the process for ZeRO-3: it comes last.
    runs = [(tuning, name) for name in STAGES for tuning in TUNINGS if (tuning, name) != ("full", "zero3")]
    for tuning, name in runs:
        options: Any = {"bf16": True, "max_steps": 1, "deepspeed": str(DS_CONFIGS / f"{name}.json")}
        config = run_config(world, tmp_path / tuning / name, TUNINGS[tuning], **options)
        model = config.model.model_copy(update={"dtype": "bfloat16"})
        configs[tuning, name] = config.model_copy(update={"model": model})
    facts = {tuning: Measure(configs[tuning, "zero2"], deepspeed=True).facts(96) for tuning in TUNINGS}
    for rank in on_ranks(held_by_a_rank, 2, tmp_path, configs):
        for (tuning, name), (weights, optimizer) in rank.items():
            expected = bytes_a_rank(facts[tuning], STAGES[name], 2, 4, False)
            assert expected.weights == pytest.approx(weights, rel=0.02), (tuning, name)
            assert expected.optimizer == pytest.approx(optimizer, rel=0.02), (tuning, name)
