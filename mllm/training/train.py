"""One stage of training, from a recipe to a checkpoint: parse, build, tune, train, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from mllm.config import RunConfig, load_recipe
from mllm.data.lengths import Lengths
from mllm.data.mixture import Mixture
from mllm.data.packing import check_packing
from mllm.data.sampler import MicroBatches
from mllm.data.streaming import RowStream
from mllm.errors import ConfigError
from mllm.model.checkpoint import check_grounds
from mllm.publish.card import write_card_after_training
from mllm.training.arguments import check_options, run_record, training_arguments
from mllm.training.asking import Asking, Asks
from mllm.training.batches import make_collator, micro_batches
from mllm.training.build import build, open_mixture
from mllm.training.callbacks import Known, eyes_of, guards_of, known_lengths, length_line, trials_of
from mllm.training.eyes import QuietProgress
from mllm.training.failures import told_in_one_line
from mllm.training.feature_cache import cached_features
from mllm.training.launch import forgotten_afterwards
from mllm.training.pretraining import build_pretraining
from mllm.training.rehearsal import Rehearsal
from mllm.training.resume import AsOftenAsSaid, agreed, last_checkpoint
from mllm.training.sharded import fsdp_settings
from mllm.training.snapshots import clean, complete_snapshots
from mllm.training.speed import packed_implementation, speed_up
from mllm.training.steps import StepLog
from mllm.training.streams import StreamPosition, open_stream, saved_positions, stream_batches
from mllm.training.trainer import MllmTrainer
from mllm.training.tuning import PartReport, apply_tuning, part_rates, tuning_table, upcast_trained
from mllm.training.validation import Validation, open_validation
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


@dataclass(frozen=True)
class Tuned:
    """The model as it will be trained, its processor, what of it learns, and how fast each part."""

    model: Any
    processor: Any
    reports: list[PartReport]
    rates: dict[str, float]


@dataclass(frozen=True)
class Feed:
    """What comes to the model.

    Attributes:
        dataset: what the loader reads.
        batches: which rows each batch has; None leaves it to the Trainer, or to a stream.
        position: in a stream.
        feeder: makes the batches, of features that were computed before where the recipe says so.
        known: rows whose lengths were measured.
        validation: what is measured beside; it takes pixels, which it blanks and shuffles.
    """

    dataset: Any
    batches: MicroBatches | None
    position: StreamPosition | None
    feeder: Any
    known: Known
    validation: Validation | None


def _train(config: RunConfig, callbacks: Sequence[TrainerCallback], asker: Asks | None) -> Path:
    options, folder = config.train, Path(config.train.output_dir)
    torch.manual_seed(options.seed)  # the connector's first weights
    rows = (open_stream if config.data.streaming else open_mixture)(config.data, options.seed)
    record = run_record(config, rows)
    # What cannot go on is told here, before minutes of loading.
    checkpoint = last_checkpoint(folder, options.resume, record)
    positions = (
        saved_positions(checkpoint, options.num_workers) if checkpoint and config.data.streaming else None
    )
    # Built before the arguments exist: with ZeRO-3 in them, parts would be created already partitioned,
    # and no checkpoint could be copied into them.
    tuned = _tuned(config)
    if checkpoint is not None:
        check_grounds(tuned.model, Path(checkpoint))
    arguments = _arguments(config, rows, tuned.model)
    feed = _feed(config, rows, tuned, arguments, positions)
    watchdog = Watchdog(
        Progress(), folder, options.watchdog_seconds, arguments.process_index, arguments.world_size
    )
    bar = QuietProgress()
    trainer = _trainer(config, rows, tuned, feed, arguments, record, watchdog, callbacks)
    if options.rehearsal:
        trainer.add_callback(Rehearsal(trainer))
    if config.eval is not None and asker is not None:
        trainer.add_callback(Asking(config.eval, asker, tuned.processor, trainer.log))
    trainer.add_callback(bar)
    checkpoint = agreed(checkpoint)
    if trainer.is_world_process_zero():
        _announce(config, rows, tuned, feed.known.lengths, checkpoint)
        clean(folder)
    # Warnings are written above the bar, not into it.
    with closing(watchdog), told_in_one_line(options), logging_redirect_tqdm(), closing(bar):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    if trainer.is_world_process_zero():
        write_card_after_training(folder)
    return folder


def _tuned(config: RunConfig) -> Tuned:
    """Build, tune, and choose the kernels."""
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
    return Tuned(model, processor, reports, part_rates(reports, options))


def _arguments(config: RunConfig, rows: Mixture | RowStream, model: Any) -> TrainingArguments:
    """Hugging Face's arguments, with what FSDP2 has to know of this model."""
    arguments = training_arguments(config, rows.total)
    if config.train.fsdp:
        compute = torch.bfloat16 if config.train.bf16 else torch.float32
        arguments.fsdp_plugin_args |= fsdp_settings(model, compute)
    return arguments


def _feed(
    config: RunConfig,
    rows: Mixture | RowStream,
    tuned: Tuned,
    arguments: TrainingArguments,
    positions: list[dict[str, Any]] | None,
) -> Feed:
    """This rank's batches; of a stream from the `positions` on that a checkpoint has."""
    collator = feeder = make_collator(config, tuned.processor)
    dataset: Any = rows
    batches = position = None
    if isinstance(rows, RowStream):
        dataset, position = stream_batches(rows, collator, arguments, positions)
    else:
        batches = micro_batches(config, arguments, tuned.model, rows, collator)
    known = known_lengths(batches, rows, collator, config.train.per_device_batch_size)
    validation = open_validation(config, collator)  # before the cache: a missing file is told at once
    if config.data.feature_cache:
        features = cached_features(config, arguments, tuned.model, tuned.processor, rows)
        feeder = collator.with_features(features)
    return Feed(dataset, batches, position, feeder, known, validation)


def _trainer(
    config: RunConfig,
    rows: Mixture | RowStream,
    tuned: Tuned,
    feed: Feed,
    arguments: TrainingArguments,
    record: dict[str, Any],
    watchdog: Watchdog,
    callbacks: Sequence[TrainerCallback],
) -> MllmTrainer:
    steps = StepLog()
    trainer = MllmTrainer(
        model=tuned.model,
        args=arguments,
        batches=feed.batches,
        stream=feed.position,
        train_dataset=feed.dataset,
        eval_dataset=feed.validation and feed.validation.rows,
        data_collator=feed.feeder,
        processor=tuned.processor,
        rates=tuned.rates,
        record=record,
        steps=steps,
        progress=watchdog.progress,
        eyes=eyes_of(config, tuned.model, rows, steps),
        validation=feed.validation,
        callbacks=[
            watchdog,  # first: what others do behind a step, as asking questions, may take its time
            AsOftenAsSaid(),
            *guards_of(config, tuned.model, tuned.rates, steps),
            *trials_of(config, feed.feeder, feed.batches, feed.known),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _announce(
    config: RunConfig,
    rows: Mixture | RowStream,
    tuned: Tuned,
    lengths: Lengths | None,
    checkpoint: str | None,
) -> None:
    """Say what the run learns from, how much of it does not fit, what learns, and where it goes on from."""
    console = Console(stderr=True)
    total = "a stream of rows" if rows.total is None else f"{rows.total:,} rows"
    console.print(f"[bold]{config.stage}[/]: {total} -> {config.train.output_dir}")
    if isinstance(rows, Mixture) and len(rows.names) > 1:
        for (name, count, share), passes in zip(rows.report(), rows.passes, strict=True):
            console.print(f"  {name}: {count:,} rows, {share:.1%}, {passes:.2f} times over")
    if lengths is not None:
        console.print(length_line(lengths, rows.total, config.data.max_length))
    console.print(tuning_table(tuned.reports, tuned.rates))
    if checkpoint:
        console.print(f"resuming from {checkpoint}")
    elif earlier := complete_snapshots(Path(config.train.output_dir)):
        console.print(
            f"[bold]starting anew[/]: {earlier[-1]} is of an earlier start, and this one writes over what it "
            "left; to go on from it, stop now and give train.resume=auto"
        )
