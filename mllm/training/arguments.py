"""A recipe's `train` section as Hugging Face arguments, and what a manifest records of the run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mllm.config import RunConfig, TrainSection
from mllm.data.files import sha256_of
from mllm.errors import ConfigError


def check_deepspeed(options: TrainSection) -> None:
    """Raise `ConfigError` before anything is loaded if a recipe asks for DeepSpeed and cannot have it."""
    if options.deepspeed is None:
        return
    if not Path(options.deepspeed).is_file():
        raise ConfigError(
            f"train.deepspeed: there is no file {options.deepspeed!r}; samples are in ds_configs/"
        )
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "train.deepspeed is set and deepspeed is not installed; run: pip install 'mllm[deepspeed]', "
            "or train without it: train.deepspeed=null"
        )


def training_arguments(config: RunConfig) -> TrainingArguments:
    """Hugging Face's arguments for a run."""
    options = config.train
    return TrainingArguments(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.per_device_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps,
        lr_scheduler_type=options.lr_scheduler_type,
        lr_scheduler_kwargs=options.lr_scheduler_kwargs,
        # Below 1 it is a share of all steps.
        warmup_steps=options.warmup_ratio if options.warmup_steps is None else options.warmup_steps,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        fp16=options.fp16,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=options.save_total_limit,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # the filter hides exactly what must be seen
        seed=options.seed,
        dataloader_num_workers=options.num_workers,
        dataloader_drop_last=config.on_pairs,  # every rank needs negatives, and equally many
        deepspeed=options.deepspeed,
        ddp_find_unused_parameters=False,  # `apply_tuning` has frozen what the loss does not reach
        report_to=options.report_to,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )


def run_record(config: RunConfig, rows: int) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that made it."""
    files = [{"path": s.path, "sha256": sha256_of(Path(s.path))} for s in config.data.sources]
    return {
        "stage": config.stage,
        "tune": config.tune.model_dump(),
        "data": {"files": files, "rows": rows},
        "recipe": config.model_dump(),
    }
