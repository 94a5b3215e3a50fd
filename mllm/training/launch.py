"""Whether the process was started so that what a recipe asks for can run; found before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.integrations import unset_hf_deepspeed_config

from mllm.config import TrainSection
from mllm.errors import ConfigError
from mllm.training.resume import PLAIN

# What accelerate's own configuration sets, and accelerate itself for a run; and the recipe's key for it.
DECIDED_HERE = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp"}


def number_of_ranks() -> int:
    """How many processes train together, also before they have met."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def engine_of(options: TrainSection) -> str:
    """What divides the optimiser's state among ranks."""
    if options.deepspeed:
        zero = deepspeed_settings(options.deepspeed).get("zero_optimization", {})
        return f"DeepSpeed ZeRO-{zero.get('stage', 0)}"
    return f"FSDP ({options.fsdp})" if options.fsdp else PLAIN


def check_launch(options: TrainSection) -> None:
    """Raise `ConfigError` where the launcher, DeepSpeed's file or a missing package stands in the way."""
    ranks = number_of_ranks()
    for variable, key in DECIDED_HERE.items():
        if os.environ.get(variable, "false").lower() == "true" and not getattr(options, key):
            raise ConfigError(
                f"accelerate's configuration turns {key} on, but the recipe does not; give train.{key} "
                "(deepspeed=ds_configs/zero2.json, fsdp=true), or take it out of accelerate's configuration"
            )
    if options.fsdp and ranks < 2:
        raise ConfigError(
            "train.fsdp is for several processes; start with: torchrun --nproc-per-node N scripts/train.py"
        )
    if options.deepspeed is None:
        return
    settings = deepspeed_settings(options.deepspeed)
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "train.deepspeed is set and deepspeed is not installed; run: pip install 'mllm[deepspeed]', "
            "or train without it: train.deepspeed=null"
        )
    if "RANK" not in os.environ:  # DeepSpeed would look for MPI
        raise ConfigError(
            "train.deepspeed needs a launcher; start with: deepspeed --num_gpus N scripts/train.py RECIPE, "
            "or train without it: train.deepspeed=null"
        )
    for section in ("optimizer", "scheduler"):
        if section in settings:  # which would take the place of ours, with one rate for all parts
            raise ConfigError(
                f"{options.deepspeed}: {section!r} is decided by the recipe (train.optim, "
                "train.learning_rates, train.lr_scheduler_type); remove it from the file"
            )
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            f"{options.deepspeed}: zero_optimization.stage3_gather_16bit_weights_on_model_save is not true, "
            "so no checkpoint could be written; set it, as in ds_configs/zero3.json"
        )
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        _build_cpu_adam(options.deepspeed)


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """What DeepSpeed and FSDP leave behind in the process is taken back at the end of the block.

    Else transformers would build every later model in pieces, as ZeRO-3 has it, and accelerate would train
    every later run with the engine of this one.
    """
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        for variable in DECIDED_HERE:
            os.environ.pop(variable, None)


def deepspeed_settings(file: str) -> dict[str, Any]:
    """What a DeepSpeed configuration file says; raises `ConfigError` where it is none."""
    path = Path(file)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"train.deepspeed: there is no file {str(path)!r}; samples are in ds_configs/"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: DeepSpeed's settings are a JSON object, as in ds_configs/zero2.json")
    return settings


def _build_cpu_adam(name: str) -> None:
    """Compile DeepSpeed's optimiser for the CPU, or find that it is there already.

    It would be compiled anyway, but after minutes of loading, and a failure would be pages long.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException

    try:
        CPUAdamBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError, CUDAMismatchException, MissingCUDAException) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name} keeps the optimiser on the CPU; DeepSpeed compiles its CPUAdam for it, and that failed: "
            f"{first}; install g++ and ninja (with GPUs also CUDA's compiler), or take a file without offload"
        ) from error
