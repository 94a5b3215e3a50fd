"""What a recipe means: what learns and how fast, how batches are made up, what a row looks like.

Everything comes from the code that trains; no weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mllm.config import RunConfig, SourceSection
from mllm.data.hf import HF
from mllm.data.rows import open_rows, there_is
from mllm.data.schema import Message, assistant, user
from mllm.data.templates import Piece
from mllm.training.arguments import steps_of_epoch
from mllm.training.build import open_mixture
from mllm.training.memory import way_of_run
from mllm.training.outline import example_batch, outline
from mllm.training.plan import step_flops
from mllm.training.shapes import trace_forward
from mllm.training.tuning import PartReport, part_rates, tuning_table

LITTLE = 0.05  # of the arithmetic: below it, keeping features is not worth its disk
TEXT = 128  # tokens of an answer and its question, for estimates


@dataclass(frozen=True)
class DataReport:
    """One data set; `rows` is None where the file is not there yet."""

    path: str
    rows: int | None
    share: float | None


@dataclass(frozen=True)
class Explanation:
    """What `mllm explain` says.

    Attributes:
        starts_from: the checkpoint of `model.init_from`, if any; not whether it is there yet.
        parts, rates: what learns, and the learning rate of each part.
        pixels: (channels, height, width) of a picture, or of a view of it.
        tokens_an_image: least and most placeholders of an image; (0, 0) for pairs.
        effective_batch: rows of an optimiser step, over all ranks.
        epochs: passes over the rows; None where `max_steps` decides and the rows are not known.
        rows, steps: None where a data file is not there, or is a stream.
        sample: an example row as (text, whether it is learnt); that of the data where there is one.
        absent: what the recipe names and is not on this machine.
        notes: what a reader may not expect.
    """

    stage: str
    starts_from: str | None
    parts: list[PartReport]
    rates: dict[str, float]
    pixels: tuple[int, ...]
    tokens_an_image: tuple[int, int]
    data: list[DataReport]
    rows: int | None
    ranks: int
    effective_batch: int
    epochs: float | None
    steps: int | None
    warmup: str
    schedule: str
    precision: str
    distribution: str
    sample: list[tuple[str, bool]]
    absent: list[str]
    notes: list[str]


def explain(config: RunConfig, ranks: int = 1) -> Explanation:
    """Explain one stage.

    Args:
        config: the run, of `outline.whole_recipe` if stages before it have not run.
        ranks: GPUs that it will run on.

    Raises:
        ConfigError: a part cannot be read.
    """
    options = config.train
    model, processor, parts = outline(config)
    data, rows = _data(config)
    batch = options.per_device_batch_size * options.accumulation(ranks) * ranks
    steps = options.max_steps or (None if rows is None else _steps(config, rows, ranks))
    epochs: float | None = options.num_train_epochs
    if options.max_steps is not None:
        epochs = options.max_steps * batch / rows if rows else None
    warmup = f"{100 * options.warmup_ratio:g}% of the steps"
    return Explanation(
        stage=config.stage,
        starts_from=config.model.init_from,
        parts=parts,
        rates=dict(part_rates(parts, options)),
        pixels=tuple(model.config.pixel_shape),
        tokens_an_image=_tokens(model),
        data=data,
        rows=rows,
        ranks=ranks,
        effective_batch=batch,
        epochs=epochs,
        steps=steps,
        warmup=warmup if options.warmup_steps is None else f"{options.warmup_steps} steps",
        schedule=options.lr_scheduler_type,
        precision=_precision(config),
        distribution=way_of_run(options).name,
        sample=[] if config.on_pairs else _sample(config, processor),
        absent=absent(config),
        notes=[*_stream_notes(config), *_cache_notes(config, model, processor, rows)],
    )


def _data(config: RunConfig) -> tuple[list[DataReport], int | None]:
    """The data sets, and the rows of an epoch; a stream's are not counted: that would be to read it all."""
    sources = config.data.sources
    if not config.data.streaming and all(there_is(source.path) for source in sources):
        mixture = open_mixture(config.data, config.train.seed)
        return [DataReport(*entry) for entry in mixture.report()], len(mixture)
    return [DataReport(source.path, _rows(config, source), None) for source in sources], None


def _rows(config: RunConfig, source: SourceSection) -> int | None:
    if config.data.streaming or not there_is(source.path):
        return None
    return len(open_rows(source.path, source.format or "auto", source.image_root))


def _steps(config: RunConfig, rows: int, ranks: int) -> int:
    """Optimiser steps as a run counts them: pairs that do not fill a batch are left out."""
    options = config.train
    accumulation = options.accumulation(ranks)
    if config.on_pairs:
        an_epoch = max(1, math.ceil(rows // (ranks * options.per_device_batch_size) / accumulation))
    else:
        an_epoch = steps_of_epoch(rows, ranks, ranks * options.per_device_batch_size * accumulation)
    return math.ceil(an_epoch * options.num_train_epochs)


def _tokens(model: Any) -> tuple[int, int]:
    if not hasattr(model.config, "num_image_tokens"):
        return (0, 0)
    if model.tiling is None:
        return (model.config.num_image_tokens,) * 2
    # A square and the shapes of the pinpoints, each at its own size and at a tile's.
    sizes = [(model.tiling.tile,) * 2, *model.tiling.pinpoints]
    counts = [model.tiling.num_tokens(size) for size in sizes]
    return min(counts), max(counts)


def _precision(config: RunConfig) -> str:
    options, frozen = config.train, config.model.dtype
    mixed = "bfloat16" if options.bf16 else "float16" if options.fp16 else None
    if options.deepspeed is not None:
        return f"weights in {mixed or 'float32'}, float32 masters of what learns"
    products = f"products in {mixed}" if mixed else "no mixed precision"
    return f"frozen weights in {frozen}, trained ones in float32, {products}"


def _sample(config: RunConfig, processor: Any) -> list[tuple[str, bool]]:
    source = config.data.sources[0]
    messages: list[Message] = [user("What is shown here?", "picture.jpg"), assistant("A dog on a beach.")]
    if not config.data.streaming and there_is(source.path):
        messages = open_rows(source.path, source.format or "auto", source.image_root)[0]["messages"]
    pieces: list[Piece] = processor.pieces(messages)
    return [(piece.text, piece.supervised) for piece in pieces]


def absent(config: RunConfig) -> list[str]:
    """Files and folders that a run will read and that are not on this machine, as `key: place`."""
    data, val, ask = config.data, config.val, config.eval
    files = [("data.path", source.path) for source in data.sources]
    files += [("val.path", val.path)] if val else []
    files += [("eval.questions", ask.questions)] if ask else []
    folders = [("data.image_root", source.image_root) for source in data.sources]
    folders += [("val.image_root", val.image_root)] if val else []
    folders += [("eval.image_root", ask.image_root)] if ask else []
    lacking = [f"{key}: {place}" for key, place in files if not there_is(place) and not _on_the_hub(place)]
    lacking += [f"{key}: {place}" for key, place in folders if place and not Path(place).is_dir()]
    return list(dict.fromkeys(lacking))


def _on_the_hub(place: str) -> bool:
    """Whether it may be a data set that is downloaded, or in the library's cache."""
    return place.startswith(HF) and not place.removeprefix(HF).startswith(("/", ".", "~"))


def _stream_notes(config: RunConfig) -> Iterator[str]:
    for source in config.data.sources if config.data.streaming else ():
        yield f"{source.path} is read as a stream; its rows are not counted, nor passes over them"


def _cache_notes(config: RunConfig, model: Any, processor: Any, rows: int | None) -> Iterator[str]:
    """What `data.feature_cache` takes of the disk and saves of the arithmetic, and whether that pays."""
    if not config.data.feature_cache:
        return
    share = vision_share(model, processor)
    half = config.model.dtype != "float32" or (
        config.train.deepspeed is not None and (config.train.bf16 or config.train.fp16)
    )
    one = model.config.num_patches * model.config.vision_dim * (2 if half else 4)
    many = "" if rows is None else f", about {one * rows / 1e9:,.3g} GB with one picture a row"
    text = f"data.feature_cache takes {one / 1e6:,.3g} MB a picture{many}, and saves {share:.1%} of a step's "
    text += "arithmetic from the second epoch or run over the same pictures on"
    if share < LITTLE:
        text += ": that is little, reading may take longer; leave it out"
    elif config.train.num_train_epochs <= 1:
        text += "; in one epoch each is seen once, so that this run alone gains nothing"
    yield text


def vision_share(model: Any, processor: Any) -> float:
    """Share of the vision encoder in the arithmetic of a row with one image and `TEXT` tokens beside it.

    Args:
        model: of `outline`, with shapes only.
        processor: its processor.
    """
    tokens = model.config.num_image_tokens + TEXT
    trace = trace_forward(model, example_batch(model, processor, 2, tokens), None)
    both = [
        sum(flops for part, flops in counts.items() if part.startswith("vision_encoder"))
        for counts in (trace.forward, trace.backward)
    ]
    return sum(both) / 2 / step_flops(trace, 2, tokens).of([tokens], 1, TEXT)


def report(found: Explanation) -> Group:
    """The explanation for a terminal."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    least, most = found.tokens_an_image
    tokens = f"{least}" if least == most else f"{least} to {most}"
    steps = "not known" if found.steps is None else f"{found.steps:,}"
    if found.epochs is not None:
        steps += f", {found.epochs:.3g} epoch{'s' * (found.epochs != 1)}"
    lines = {
        "stage": found.stage + (f", from {found.starts_from}" if found.starts_from else ""),
        "an image": f"{'x'.join(map(str, found.pixels))} numbers"
        + (f", {tokens} tokens" if found.sample else ""),
        "batch": f"{found.effective_batch} rows a step on {found.ranks} GPU{'s' * (found.ranks > 1)}",
        "steps": f"{steps}, {found.schedule} schedule, warm-up {found.warmup}",
        "precision": found.precision,
        "spread by": found.distribution,
    }
    for name, line in lines.items():
        facts.add_row(name, line)
    for one in found.data:
        rows = "not counted" if one.rows is None else f"{one.rows:,} rows"
        facts.add_row("data", f"{one.path}: {rows}" + ("" if one.share is None else f", {one.share:.1%}"))
    sample = Text()
    for text, learnt in found.sample:
        sample.append(text, style="green" if learnt else "dim")
    shown = [Text("\nA row, what is learnt in green:", style="bold"), sample] if found.sample else []
    notes = [Text(f"Note: {note}") for note in found.notes]
    return Group(facts, Text(), tuning_table(found.parts, found.rates), *shown, *notes)
