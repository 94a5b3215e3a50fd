"""A recipe's `train` section as Hugging Face arguments, and what a manifest records of the run."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.training_args import OptimizerNames
from transformers.utils import is_flash_attn_2_available

from mllm.config import RunConfig, TrainSection
from mllm.data.hf import HF
from mllm.data.mixture import Mixture
from mllm.data.rows import there_is
from mllm.data.streaming import RowStream
from mllm.errors import ConfigError
from mllm.model import packed_attention  # noqa: F401  (registers with transformers)
from mllm.revision import code_state
from mllm.training.launch import check_launch, engine_of, number_of_ranks

# Of transformers' forty optimisers, those that people mean.
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "lion_8bit"),
    "sgd",
)


def check_options(config: RunConfig) -> None:
    """Raise `ConfigError` before anything is loaded where a recipe asks for what cannot be here."""
    options = config.train
    check_output_dir(options)
    if isinstance(options.resume, str) and options.resume != "auto" and not Path(options.resume).is_dir():
        raise ConfigError(
            f"train.resume: there is no folder {options.resume!r}; give auto, or the path of a checkpoint-N"
        )
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)])
        get_scheduler(options.lr_scheduler_type, optimizer, 1, 2, options.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.lr_scheduler_type or _kwargs: {error}") from error
    if options.optim is not None:
        check_optimizer(options.optim)
    try:
        for callback in get_reporting_integration_callbacks(options.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"train.report_to: {error}") from error
    if config.val is not None and not (config.val.path.startswith(HF) or there_is(config.val.path)):
        raise ConfigError(f"val.path: there is no {config.val.path!r}; fix the path")
    if options.bf16 and torch.cuda.is_available():
        check_bf16(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    check_attention_name(config.model.attn_implementation)
    _check_flash(config)
    check_launch(options)


def check_output_dir(options: TrainSection) -> None:
    """Raise `ConfigError` for a place where a run cannot write."""
    folder = Path(options.output_dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ConfigError(f"train.output_dir: {str(place)!r} is no folder that can be written; name another")


def check_optimizer(name: str) -> None:
    """Raise `ConfigError` for an optimiser that transformers does not know, or that needs a GPU."""
    if name not in {*OptimizerNames}:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        near += difflib.get_close_matches(name, [one.value for one in OptimizerNames], n=1, cutoff=0.8)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(OPTIMIZERS)}, or another of its"
        raise ConfigError(f"train.optim: transformers knows no {name!r}; {hint}")
    if "paged" in name and not torch.cuda.is_available():
        raise ConfigError(f"train.optim: {name!r} pages between a GPU and the CPU; there is no GPU")


def check_attention_name(name: str | None) -> None:
    """Raise `ConfigError` for an attention that transformers does not know; says what each one needs."""
    if name is None or name in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()) or "/" in name:
        return  # with a slash it is a kernel on the Hub
    raise ConfigError(
        f"model.attn_implementation: there is no {name!r}; use sdpa or eager (run everywhere), packed (for "
        "data.packing, everywhere), flash_attention_2 (a GPU, pip install flash-attn, train.bf16 or fp16) or "
        "flex_attention (a GPU), or leave it out"
    )


def _check_flash(config: RunConfig) -> None:
    """Flash attention has needs of its own, which transformers tells after it has loaded the weights."""
    name, options = config.model.attn_implementation, config.train
    if name is None or not name.startswith("flash_attention"):
        return
    if not torch.cuda.is_available():
        lack = "it needs a GPU, and there is none"
    elif name == "flash_attention_2" and not is_flash_attn_2_available():
        lack = "it needs flash-attn; run: pip install flash-attn --no-build-isolation"
    elif not (options.bf16 or options.fp16):
        lack = "it computes in 16 bit alone; set train.bf16=true"
    else:
        return
    raise ConfigError(f"model.attn_implementation is {name!r}, but {lack}; or use sdpa")


def check_bf16(device: str, capability: tuple[int, int]) -> None:
    """Raise `ConfigError` for an NVIDIA GPU that has no bf16 arithmetic, as those before Ampere (8.0)."""
    if torch.version.hip is None and capability < (8, 0):
        raise ConfigError(
            f"train.bf16: {device} (compute capability {capability[0]}.{capability[1]}) has no bf16 "
            "arithmetic; use train.bf16=false train.fp16=true, or train.bf16=false for float32"
        )


def training_arguments(config: RunConfig, rows: int | None) -> TrainingArguments:
    """Hugging Face's arguments for a run over that many rows, or over a stream.

    Raises:
        ConfigError: a stage on pairs whose batch has no negatives, or is larger than the data; or a global
            batch that the ranks cannot divide.
    """
    options = config.train
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.per_device_batch_size,
        # Needed before there are arguments: DeepSpeed's configuration is filled in while they are made.
        gradient_accumulation_steps=options.accumulation(number_of_ranks()),
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps or -1,
        **_optimization(config),
        **_recomputation(options),
        **_saving_and_validation(config),
        bf16=options.bf16,
        fp16=options.fp16,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # the filter hides exactly what must be seen
        report_to=options.report_to,
        seed=options.seed,
        dataloader_num_workers=options.num_workers,
        dataloader_drop_last=config.on_pairs,  # every rank needs negatives, and equally many
        remove_unused_columns=False,
        ignore_data_skip=config.data.streaming,  # a stream is taken up at its position instead
        deepspeed=options.deepspeed,
        fsdp=options.fsdp or None,  # type: ignore[arg-type]  # the annotation is of an older form
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"} if options.fsdp else None,
        ddp_find_unused_parameters=False,  # `apply_tuning` has frozen what the loss does not reach
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs are visible to one process; start one for each: torchrun "
            f"--nproc-per-node {arguments.n_gpu} scripts/train.py RECIPE, or show one: CUDA_VISIBLE_DEVICES=0"
        )
    batch = arguments.train_batch_size * arguments.world_size
    if config.on_pairs and not 2 <= batch <= (batch if rows is None else rows):
        raise ConfigError(
            f"train.per_device_batch_size: a batch has {batch} pairs, the data have {rows or 'any number'}; "
            "give a size from 2 up, for the negatives, to that"
        )
    return arguments


def _optimization(config: RunConfig) -> dict[str, Any]:
    options, optim = config.train, config.train.optim
    if optim is None and config.tune.language_model == "qlora" and torch.cuda.is_available():
        # arXiv 2305.14314, section 3: its states make room for a long row.
        optim = "paged_adamw_32bit"
    return {
        **({} if optim is None else {"optim": optim}),
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.lr_scheduler_type,
        "lr_scheduler_kwargs": _schedule_settings(options),
        # Below 1 it is a share of all steps.
        "warmup_steps": options.warmup_ratio if options.warmup_steps is None else options.warmup_steps,
        "adam_beta1": options.adam_beta1,
        "adam_beta2": options.adam_beta2,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
    }


def _recomputation(options: TrainSection) -> dict[str, Any]:
    """Of whole layers; selective checkpointing is ours (`recompute`)."""
    if options.gradient_checkpointing is not True:
        return {}
    # The name of newer versions, which warn of the older one.
    new = hasattr(TrainingArguments, "activation_checkpointing")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _saving_and_validation(config: RunConfig) -> dict[str, Any]:
    options, val = config.train, config.val
    best = val is not None and val.keep_best
    limit = options.save_total_limit
    if best and not options.save_steps:
        limit = limit or 1  # only best checkpoints are saved, and of those the last is the best
    return {
        # With steps, `KeepBest` saves at the best ones as well.
        "save_strategy": "steps" if options.save_steps else "best" if best else "no",
        "save_steps": options.save_steps or 500,
        "save_total_limit": limit,
        "eval_strategy": "steps" if val else "no",
        "eval_steps": val.every if val else None,
        "metric_for_best_model": "loss" if val else None,
        "greater_is_better": False if val else None,
    }


def _schedule_settings(options: TrainSection) -> dict[str, Any]:
    """`min_lr` as a share of the rate: the schedule would look the rate up where ZeRO hides it."""
    settings = dict(options.lr_scheduler_kwargs)
    if settings.get("min_lr") is not None:
        settings["min_lr_rate"] = settings.pop("min_lr") / options.learning_rate
    return settings


def run_record(config: RunConfig, rows: Mixture | RowStream) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that made it."""
    data = config.data
    caps = [source.max_rows for source in data.sources]
    order = {"mixing": data.mixing, "grouping": data.grouping, "max_rows": caps, "seed": config.train.seed}
    return {
        "stage": config.stage,
        "tune": config.tune.model_dump(),
        "data": {"files": rows.record(), "rows": rows.total, **order},
        "train": config.train.model_dump(),
        "batch": _batch_record(config, rows.total),
        "recipe": config.model_dump(exclude_unset=True),  # what was said, so that it can be run again
        "code": code_state(),
    }


def _batch_record(config: RunConfig, rows: int | None) -> dict[str, Any]:
    """How a step's rows are divided, by what, and how many steps an epoch has."""
    ranks, size = number_of_ranks(), config.train.per_device_batch_size
    accumulation = config.train.accumulation(ranks)
    together = ranks * size
    steps = None if rows is None or config.on_pairs else steps_of_epoch(rows, ranks, together * accumulation)
    return {
        "ranks": ranks,
        "per_device": size,
        "accumulation": accumulation,
        "global": together * accumulation,
        "contrasted": together if config.on_pairs else None,
        "steps_per_epoch": steps,
        "engine": engine_of(config.train),
    }


def steps_of_epoch(rows: int, ranks: int, batch: int) -> int:
    """Optimiser steps of `batch` rows that `MicroBatches` makes of an epoch."""
    steps, left = divmod(rows, batch)  # fewer rows than ranks join the step before
    return steps + (left >= ranks or not steps)
