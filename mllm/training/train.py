"""One stage of training, from a recipe to a checkpoint: parse, build, tune, train, save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mllm.config import RunConfig, load_recipe
from mllm.data.collator import Collator
from mllm.data.mixture import Mixture
from mllm.data.packing import PackingCollator, check_packing
from mllm.data.pairs import PairCollator
from mllm.data.streaming import RowStream
from mllm.training.arguments import check_options, run_record, training_arguments
from mllm.training.batches import PackingTrial, micro_batches
from mllm.training.build import build, open_mixture
from mllm.training.guards import MetricsLog, QuietProgress, TrainabilityGuard
from mllm.training.launch import forgotten_afterwards
from mllm.training.pretraining import build_pretraining
from mllm.training.rehearsal import Rehearsal
from mllm.training.resume import agreed, last_checkpoint
from mllm.training.sharded import fsdp_settings
from mllm.training.snapshots import clean
from mllm.training.speed import speed_up
from mllm.training.streams import open_stream, stream_batches, take_up
from mllm.training.trainer import MllmTrainer
from mllm.training.tuning import apply_tuning, part_rates, tuning_table, upcast_trained
from mllm.training.watchdog import Progress, Watchdog


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
    check_options(config.train)
    with forgotten_afterwards():
        return _train(config, callbacks)


def _train(config: RunConfig, callbacks: Sequence[TrainerCallback]) -> Path:
    options = config.train
    torch.manual_seed(options.seed)  # the connector's first weights
    streaming = config.data.streaming
    rows = (open_stream if streaming else open_mixture)(config.data, options.seed)
    # Built before the arguments exist: with ZeRO-3 in them, parts would be created already partitioned,
    # and no checkpoint could be copied into them.
    model: Any
    processor: Any
    model, processor = build_pretraining(config) if config.on_pairs else build(config.model, config.tune)
    of_rows = PackingCollator if config.data.packing else Collator
    collator = PairCollator(processor) if config.on_pairs else of_rows(processor, config.data.max_length)
    reports = apply_tuning(model, config.tune)
    if config.data.packing:
        check_packing(model)
        if config.model.attn_implementation is None:
            model.language_model.set_attn_implementation("packed")
    if options.deepspeed is None:  # DeepSpeed keeps its own float32 master weights
        upcast_trained(model, config.tune)
    speed_up(model, options)
    rates = part_rates(reports, options)
    arguments = training_arguments(config, rows.total)
    batches = position = None
    dataset: Any = rows
    if isinstance(rows, RowStream):
        dataset, position = stream_batches(rows, collator, arguments)
    else:
        batches = micro_batches(config, arguments, model, rows, collator)
    record = run_record(config, rows, arguments, batches)
    if options.fsdp:
        compute = torch.bfloat16 if options.bf16 else torch.float32
        arguments.fsdp_plugin_args |= fsdp_settings(model, compute)
    progress = Progress()
    trainer = MllmTrainer(
        model=model,
        args=arguments,
        batches=batches,
        stream=position,
        train_dataset=dataset,
        data_collator=collator,
        processor=processor,
        rates=rates,
        record=record,
        progress=progress,
        callbacks=[TrainabilityGuard(), MetricsLog(Path(options.output_dir)), *callbacks],
    )
    if config.data.packing:
        trainer.add_callback(PackingTrial())
    if options.rehearsal:
        trainer.add_callback(Rehearsal(trainer))
    place, ranks = Path(options.output_dir), (arguments.process_index, arguments.world_size)
    watchdog = Watchdog(progress, place, options.watchdog_seconds, *ranks)
    trainer.add_callback(watchdog)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress())
    if trainer.is_world_process_zero():
        console = Console(stderr=True)
        _print_rows(console, config, rows)
        console.print(tuning_table(reports, rates))
        clean(Path(options.output_dir))
    checkpoint = agreed(last_checkpoint(options.output_dir, options.resume, record))
    if trainer.is_world_process_zero() and checkpoint:
        console.print(f"resuming from {checkpoint}")
    if position is not None and checkpoint:
        take_up(dataset, position, Path(checkpoint))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        watchdog.close()
    trainer.save_model()
    return Path(options.output_dir)


def _print_rows(console: Console, config: RunConfig, rows: Mixture | RowStream) -> None:
    """How many rows the run learns from, and how much of them each data set gives."""
    total = "a stream of rows" if rows.total is None else f"{rows.total:,} rows"
    console.print(f"[bold]{config.stage}[/]: {total} -> {config.train.output_dir}")
    if isinstance(rows, Mixture) and len(rows.names) > 1:
        for (name, count, share), passes in zip(rows.report(), rows.passes, strict=True):
            console.print(f"  {name}: {count:,} rows, {share:.1%}, {passes:.2f} times over")
