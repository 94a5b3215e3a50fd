"""A recipe's `train` section as Hugging Face arguments, and what a manifest records of the run."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from mllm.config import RunConfig, TrainSection
from mllm.data.mixture import Mixture
from mllm.data.streaming import RowStream
from mllm.errors import ConfigError
from mllm.revision import code_state
from mllm.training.launch import check_launch, engine_of, number_of_ranks


def check_options(options: TrainSection) -> None:
    """Raise `ConfigError` before anything is loaded where the section `train` asks for what cannot be."""
    folder = Path(options.output_dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ConfigError(f"train.output_dir: {str(place)!r} is no folder that can be written; name another")
    if isinstance(options.resume, str) and options.resume != "auto" and not Path(options.resume).is_dir():
        raise ConfigError(
            f"train.resume: there is no folder {options.resume!r}; give auto, or the path of a checkpoint-N"
        )
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)])
        get_scheduler(options.lr_scheduler_type, optimizer, 1, 2, options.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.lr_scheduler_type or _kwargs: {error}") from error
    if options.optim is not None and options.optim not in {*OptimizerNames}:
        near = difflib.get_close_matches(options.optim, [*OptimizerNames], n=1)
        hint = f"; did you mean {near[0].value!r}?" if near else ""
        raise ConfigError(f"train.optim: transformers knows no {options.optim!r}{hint}")
    if options.optim is not None and "paged" in options.optim and not torch.cuda.is_available():
        raise ConfigError(f"train.optim: {options.optim!r} pages between a GPU and the CPU; there is no GPU")
    try:
        for callback in get_reporting_integration_callbacks(options.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"train.report_to: {error}") from error
    if options.bf16 and torch.cuda.is_available():
        check_bf16(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    check_launch(options)


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
    options, val = config.train, config.val
    chosen: dict[str, Any] = {} if options.optim is None else {"optim": options.optim}
    if options.optim is None and config.tune.language_model == "qlora" and torch.cuda.is_available():
        # arXiv 2305.14314, section 3: its states make room for a long row.
        chosen["optim"] = "paged_adamw_32bit"
    if options.gradient_checkpointing is True:  # named only then: transformers warns of the older names
        chosen |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.per_device_batch_size,
        # Needed before there are arguments: DeepSpeed's configuration is filled in while they are made.
        gradient_accumulation_steps=options.accumulation(number_of_ranks()),
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps or -1,
        lr_scheduler_type=options.lr_scheduler_type,
        lr_scheduler_kwargs=_schedule_settings(options),
        # Below 1 it is a share of all steps.
        warmup_steps=options.warmup_ratio if options.warmup_steps is None else options.warmup_steps,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        **chosen,
        bf16=options.bf16,
        fp16=options.fp16,
        # With steps, `KeepBest` saves at the best ones as well.
        save_strategy="steps" if options.save_steps else "best" if val and val.keep_best else "no",
        eval_strategy="steps" if val else "no",
        eval_steps=val.every if val else None,
        metric_for_best_model="loss" if val else None,
        greater_is_better=False if val else None,
        save_steps=options.save_steps or 500,
        # Without save_steps only best checkpoints are saved, and of those the last is the best.
        save_total_limit=options.save_total_limit
        or (1 if val and val.keep_best and not options.save_steps else None),
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # the filter hides exactly what must be seen
        seed=options.seed,
        dataloader_num_workers=options.num_workers,
        dataloader_drop_last=config.on_pairs,  # every rank needs negatives, and equally many
        deepspeed=options.deepspeed,
        fsdp=options.fsdp or None,  # type: ignore[arg-type]  # the annotation is of an older form
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"} if options.fsdp else None,
        ddp_find_unused_parameters=False,  # `apply_tuning` has frozen what the loss does not reach
        report_to=options.report_to,
        remove_unused_columns=False,
        ignore_data_skip=config.data.streaming,  # a stream is taken up at its position instead
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
