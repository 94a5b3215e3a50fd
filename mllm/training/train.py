"""One stage of training, from a recipe to a checkpoint: parse, build, tune, train, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mllm.config import RunConfig, load_recipe
from mllm.data.lengths import Lengths
from mllm.data.mixture import Mixture
from mllm.data.packing import check_packing
from mllm.data.streaming import RowStream
from mllm.errors import ConfigError
from mllm.publish.card import write_card_after_training
from mllm.training.arguments import check_options, run_record, training_arguments
from mllm.training.asking import Asking, Asks
from mllm.training.batches import make_collator, micro_batches
from mllm.training.build import build, open_mixture
from mllm.training.callbacks import eyes_of, guards_of, known_lengths, length_line, trials_of
from mllm.training.eyes import QuietProgress
from mllm.training.failures import told_in_one_line
from mllm.training.feature_cache import cached_features
from mllm.training.launch import forgotten_afterwards
from mllm.training.pretraining import build_pretraining
from mllm.training.rehearsal import Rehearsal
from mllm.training.resume import agreed, last_checkpoint
from mllm.training.sharded import fsdp_settings
from mllm.training.snapshots import clean, complete_snapshots
from mllm.training.speed import packed_implementation, speed_up
from mllm.training.steps import StepLog
from mllm.training.streams import open_stream, stream_batches, take_up
from mllm.training.trainer import MllmTrainer
from mllm.training.tuning import PartReport, apply_tuning, part_rates, tuning_table, upcast_trained
from mllm.training.validation import open_validation
from mllm.training.watchdog import Progress, Watchdog


def train(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    asker: Asks | None = None,
) -> Path:
    """Run one stage.

    Args:
        recipe: a recipe's file or shipped name, or a configuration.
        overrides: `section.key=value`, laid over a recipe's file.
        callbacks: called beside our own, in the way of Hugging Face's Trainer.
        asker: of the questions of a recipe's section `eval`: `eval.during_training.Asker()`.

    Returns:
        The checkpoint directory (the run's `output_dir`).
    """
    config = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe, overrides)
    check_options(config)
    if config.eval is not None and asker is None:
        raise ConfigError(
            "eval: nobody was named to ask the questions; give train(..., asker=eval.during_training.Asker())"
        )
    if config.eval is not None and asker is not None:
        asker.check(config.eval)  # what is missing is told before anything is loaded
    with forgotten_afterwards():
        return _train(config, callbacks, asker)


def _train(config: RunConfig, callbacks: Sequence[TrainerCallback], asker: Asks | None) -> Path:
    options, folder = config.train, Path(config.train.output_dir)
    torch.manual_seed(options.seed)  # the connector's first weights
    rows = (open_stream if config.data.streaming else open_mixture)(config.data, options.seed)
    # Built before the arguments exist: with ZeRO-3 in them, parts would be created already partitioned,
    # and no checkpoint could be copied into them.
    model, processor, reports = _tuned(config)
    rates = part_rates(reports, options)
    collator = make_collator(config, processor)
    arguments = training_arguments(config, rows.total)
    if options.fsdp:
        arguments.fsdp_plugin_args |= fsdp_settings(model, torch.bfloat16 if options.bf16 else torch.float32)
    dataset: Any = rows
    batches = position = None
    if isinstance(rows, RowStream):
        dataset, position = stream_batches(rows, collator, arguments)
    else:
        batches = micro_batches(config, arguments, model, rows, collator)
    record = run_record(config, rows, arguments, batches)
    known = known_lengths(batches, rows, collator, options.per_device_batch_size)
    validation = open_validation(config, collator)
    feeder = collator  # validation, which blanks and shuffles pictures, takes pixels
    if config.data.feature_cache:
        feeder = collator.with_features(cached_features(config, arguments, model, processor, rows))
    steps, progress = StepLog(), Progress()
    watchdog = Watchdog(
        progress, folder, options.watchdog_seconds, arguments.process_index, arguments.world_size
    )
    trainer = MllmTrainer(
        model=model,
        args=arguments,
        batches=batches,
        stream=position,
        train_dataset=dataset,
        eval_dataset=validation and validation.rows,
        data_collator=feeder,
        processor=processor,
        rates=rates,
        record=record,
        steps=steps,
        progress=progress,
        eyes=eyes_of(config, model, rows, steps),
        validation=validation,
        callbacks=[
            watchdog,  # first: what others do behind a step, as asking questions, may take its time
            *guards_of(config, model, rates, steps),
            *trials_of(config, feeder, batches, known),
            *callbacks,
        ],
    )
    if options.rehearsal:
        trainer.add_callback(Rehearsal(trainer))
    if config.eval is not None and asker is not None:
        trainer.add_callback(Asking(config.eval, asker, processor, trainer.log))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    bar = QuietProgress()
    trainer.add_callback(bar)
    if trainer.is_world_process_zero():
        _announce(config, rows, known.lengths)
        Console(stderr=True).print(tuning_table(reports, rates))
        clean(folder)
    checkpoint = agreed(last_checkpoint(folder, options.resume, record))
    if trainer.is_world_process_zero() and checkpoint:
        Console(stderr=True).print(f"resuming from {checkpoint}")
    elif trainer.is_world_process_zero() and (earlier := complete_snapshots(folder)):
        Console(stderr=True).print(
            f"[bold]starting anew[/]: {earlier[-1]} is of an earlier start, and this one writes over what it "
            "left; to go on from it, stop now and give train.resume=auto"
        )
    if position is not None and checkpoint:
        take_up(dataset, position, Path(checkpoint))
    # Warnings are written above the bar, not into it.
    with closing(watchdog), told_in_one_line(options), logging_redirect_tqdm(), closing(bar):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    if trainer.is_world_process_zero():
        write_card_after_training(folder)
    return folder


def _tuned(config: RunConfig) -> tuple[Any, Any, list[PartReport]]:
    """The model as it will be trained, its processor, and what of it learns."""
    options = config.train
    model: Any
    processor: Any
    model, processor = build_pretraining(config) if config.on_pairs else build(config.model, config.tune)
    reports = apply_tuning(model, config.tune)
    if config.data.packing:
        check_packing(model)
        if config.model.attn_implementation is None:
            model.language_model.set_attn_implementation(packed_implementation(options))
    if options.deepspeed is None:  # DeepSpeed keeps its own float32 master weights
        upcast_trained(model, config.tune)
    speed_up(model, options)
    return model, processor, reports


def _announce(config: RunConfig, rows: Mixture | RowStream, lengths: Lengths | None) -> None:
    """Say what the run learns from, how much each data set gives, and how much of it does not fit."""
    console = Console(stderr=True)
    total = "a stream of rows" if rows.total is None else f"{rows.total:,} rows"
    console.print(f"[bold]{config.stage}[/]: {total} -> {config.train.output_dir}")
    if isinstance(rows, Mixture) and len(rows.names) > 1:
        for (name, count, share), passes in zip(rows.report(), rows.passes, strict=True):
            console.print(f"  {name}: {count:,} rows, {share:.1%}, {passes:.2f} times over")
    if lengths is not None:
        console.print(length_line(lengths, rows.total, config.data.max_length))
