"""One stage of training, from a recipe to a checkpoint: parse, build, tune, train, save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mllm.config import RunConfig, load_recipe
from mllm.data.collator import Collator
from mllm.data.rows import open_rows
from mllm.data.schema import Row
from mllm.model.modeling import PARTS
from mllm.training.arguments import check_deepspeed, run_record, training_arguments
from mllm.training.build import build
from mllm.training.guards import MetricsLog, QuietProgress, TrainabilityGuard
from mllm.training.resume import last_checkpoint
from mllm.training.trainer import MllmTrainer
from mllm.training.tuning import apply_tuning, tuning_table, upcast_trained


def train(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Run one stage.

    Args:
        recipe: a recipe's file or shipped name, or a configuration.
        overrides: `section.key=value`, laid over a recipe's file.
        callbacks: called beside our own, in the way of Hugging Face's Trainer.

    Returns:
        The checkpoint directory (the run's `output_dir`).
    """
    config = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe, overrides)
    options = config.train
    check_deepspeed(options)
    torch.manual_seed(options.seed)  # the connector's first weights
    rows: ConcatDataset[Row] = ConcatDataset(
        [open_rows(path, config.data.format, config.data.image_root) for path in config.data.paths]  # type: ignore[misc]
    )
    # Built before the arguments exist: with ZeRO-3 in them, parts would be created already partitioned,
    # and no checkpoint could be copied into them.
    model, processor = build(config.model)
    reports = apply_tuning(model, config.tune)
    if options.deepspeed is None:  # DeepSpeed keeps its own float32 master weights
        upcast_trained(model, config.tune)
    rates = {part: options.learning_rates.get(part, options.learning_rate) for part in PARTS}  # type: ignore[call-overload]
    trainer = MllmTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=rows,
        data_collator=Collator(processor, config.data.max_length),
        processor=processor,
        rates=rates,
        record=run_record(config, len(rows)),
        callbacks=[TrainabilityGuard(), MetricsLog(Path(options.output_dir)), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress())
    if trainer.is_world_process_zero():
        console = Console(stderr=True)
        console.print(f"[bold]{config.stage}[/]: {len(rows):,} rows -> {options.output_dir}")
        console.print(tuning_table(reports, rates))
    trainer.train(resume_from_checkpoint=last_checkpoint(options.output_dir, options.resume))
    trainer.save_model()
    return Path(options.output_dir)
