"""How much memory and time a recipe takes on given GPUs, before it is started, and what to change to fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mllm.config import Checkpointing, RunConfig
from mllm.errors import ConfigError
from mllm.training.flops import StepFlops
from mllm.training.memory import FSDP, WAYS, Measure, Memory, Way, bytes_a_rank, way_of_run
from mllm.training.shapes import Trace

GIB = 2**30
USABLE = 0.94  # of a card: the rest is the CUDA context, workspaces and fragmentation
# TFLOP/s of the data sheets in 16 bit (dense) and in float32, by the card's memory: RTX 4090, A100 40 GB,
# H100, H200.
PEAK = {24: (165.0, 82.6), 40: (312.0, 19.5), 80: (989.0, 67.0), 141: (989.0, 67.0)}

Fits = Callable[[Way, int, Checkpointing], bool]  # a way, rows a micro-batch, what is computed again


@dataclass(frozen=True)
class Gpus:
    """`count` cards of `memory` GiB each."""

    count: int
    memory: float

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """`8x80` -> 8 cards of 80 GB."""
        found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
        if found is None or int(found[1]) < 1 or float(found[2]) <= 0:
            raise ConfigError(f"--gpus {text!r}: write the number of cards and the GB of each: 8x80")
        return cls(int(found[1]), float(found[2]))


@dataclass(frozen=True)
class Option:
    """One way with its memory, and whether that fits."""

    way: str
    memory: Memory
    fits: bool
    chosen: bool


@dataclass(frozen=True)
class Plan:
    """What `mllm plan` says.

    Attributes:
        tokens: of the longest row, which the memory is for.
        mean_tokens: of a mean row, which the time is for.
        assumed: nobody gave `tokens`, and the data were not read for it.
        step_seconds: of arithmetic at `efficiency` of `tflops`: no communication, no waiting for data.
        model_tflop: TFLOP of a step on one rank that the model needs.
        hardware_tflop: what is computed, a second time too.
    """

    gpus: Gpus
    rows: int
    accumulation: int
    tokens: int
    mean_tokens: int
    assumed: bool
    checkpointing: Checkpointing
    options: list[Option]
    flops: StepFlops
    model_tflop: float
    hardware_tflop: float
    tflops: float
    efficiency: float
    step_seconds: float
    samples_per_second: float
    changes: list[str]


def plan(
    config: RunConfig,
    gpus: Gpus,
    *,
    tokens: int | None = None,
    mean_tokens: int | None = None,
    tflops: float | None = None,
    efficiency: float = 0.4,
) -> Plan:
    """Plan one stage.

    Args:
        config: the run, of `outline.whole_recipe` if stages before it have not run.
        gpus: the cards.
        tokens: of the longest row, image included; default: the image and 64 where only captions are
            learnt, else `data.max_length`.
        mean_tokens: of a mean row; default: the image and 200, or `tokens` where that is less.
        tflops: peak of a card; default: that of the usual card with this memory, in the run's precision.
        efficiency: share of the peak that training reaches; published figures are 0.25 to 0.5.

    Raises:
        ConfigError: a part cannot be read, or the card is not known and `tflops` is not given.
    """
    options, own = config.train, way_of_run(config.train)
    peak = tflops or _peak(config, gpus)
    rows, accumulation = options.per_device_batch_size, options.accumulation(gpus.count)
    measures = {cast: Measure(config, deepspeed=cast) for cast in (False, True)}
    image = measures[False].image_tokens
    longest = tokens or (image + 64 if config.stage == "align" else config.data.max_length or image + 512)
    mean = min(mean_tokens or tokens or image + 200, longest)
    facts = {cast: measure.facts(longest) for cast, measure in measures.items()}

    def memory(way: Way, rows: int, checkpointing: Checkpointing) -> Memory:
        return bytes_a_rank(facts[way.cast], way, gpus.count, rows, checkpointing)

    def fits(way: Way, rows: int, checkpointing: Checkpointing) -> bool:
        return memory(way, rows, checkpointing).total <= USABLE * gpus.memory * GIB

    checkpointing = options.gradient_checkpointing
    trace = measures[own.cast].trace(2, mean)
    needed = (sum(trace.forward.values()) + sum(trace.backward.values())) * rows * accumulation / 2
    again = trace.again * (checkpointing is True) * rows * accumulation / 2
    seconds = (needed + again) / (peak * 1e12 * efficiency)
    return Plan(
        gpus=gpus,
        rows=rows,
        accumulation=accumulation,
        tokens=longest,
        mean_tokens=mean,
        assumed=tokens is None,
        checkpointing=checkpointing,
        options=[
            Option(way.name, memory(way, rows, checkpointing), fits(way, rows, checkpointing), way == own)
            for way in [*WAYS, *([own] if own not in WAYS else [])]
        ],
        flops=step_flops(trace, 2, mean),
        model_tflop=needed / 1e12,
        hardware_tflop=(needed + again) / 1e12,
        tflops=peak,
        efficiency=efficiency,
        step_seconds=seconds,
        samples_per_second=rows * accumulation * gpus.count / seconds,
        changes=list(_changes(config, own, fits)),
    )


def _peak(config: RunConfig, gpus: Gpus) -> float:
    """TFLOP/s of the usual card with this memory, in the precision of the run's products."""
    if gpus.memory not in PEAK:
        raise ConfigError(f"a card with {gpus.memory:g} GB is not known; give --tflops, its peak (dense)")
    half = config.train.bf16 or config.train.fp16 or config.model.dtype != "float32"
    return PEAK[int(gpus.memory)][0 if half else 1]


def step_flops(trace: Trace, rows: int, tokens: int) -> StepFlops:
    """The costs of a step from the trace of one, of `rows` rows with `tokens` tokens and an image each."""
    both = {key: trace.forward[key] + trace.backward[key] for key in trace.forward}
    body, attention = both.pop("language_model", 0), both.pop("language_model attention", 0)
    head = both.pop("head", 0)
    return StepFlops(
        image=sum(both.values()) / rows,
        token=body / (rows * tokens),
        square=attention / (rows * tokens**2),
        label=head / max(1, trace.predicted),
        again=trace.again / (rows * tokens),
    )


def _changes(config: RunConfig, own: Way, fits: Fits) -> Iterator[str]:
    """What would make a run fit that does not, or what one that fits could do without."""
    options = config.train
    rows, checkpointing = options.per_device_batch_size, options.gradient_checkpointing
    selective: list[Checkpointing] = [] if options.compile else ["selective"]  # they exclude each other
    if fits(own, rows, checkpointing):
        less = [False, *selective] if checkpointing is True else [False] if checkpointing else []
        spared = next((again for again in less if fits(own, rows, again)), None)
        if spared is not None:
            yield f"train.gradient_checkpointing={str(spared).lower()} fits as well, and takes less time"
        return
    more = [True] if checkpointing is True else [checkpointing, *selective, True]
    sizes = [rows // n for n in (1, 2, 4, 8, 16, 32, 64) if rows % n == 0]
    found: list[tuple[int, str]] = []
    for way in (own, *(w for w in WAYS if w != own)):
        fitting = ((size, again) for again in more for size in sizes if fits(way, size, again))
        if first := next(fitting, None):
            found.append((first[0], _change(config, own, way, *first)))
    found.sort(key=lambda one: -one[0])  # those that keep the rows of a micro-batch before those that do not
    yield from (change for _, change in found[:3])
    if not found:
        smaller_tuning = {"full": "lora", "lora": "qlora"}.get(config.tune.language_model)
        hint = f"tune.language_model={smaller_tuning}, or " if smaller_tuning else ""
        yield f"nothing of this fits; try {hint}more or larger cards, or a smaller data.max_length"


def _change(config: RunConfig, own: Way, way: Way, size: int, again: Checkpointing) -> str:
    """The keys that make a run one of `way`, with `size` rows a micro-batch and as many a step as before."""
    options = config.train
    keys: dict[str, Any] = {}
    if way != own:
        keys["deepspeed"] = "null" if way.zero == 0 else f"ds_configs/{way.name}.json"
        if own == FSDP:
            keys["fsdp"] = "false"
    if again != options.gradient_checkpointing:
        keys["gradient_checkpointing"] = str(again).lower()
    if size != options.per_device_batch_size:
        keys["per_device_batch_size"] = size
        if not options.global_batch_size:
            times = options.per_device_batch_size // size
            keys["gradient_accumulation_steps"] = options.gradient_accumulation_steps * times
    return " ".join(f"train.{key}={value}" for key, value in keys.items())


def report(found: Plan) -> Group:
    """The plan as a table and lines, for a terminal."""
    spent = 1 - found.model_tflop / found.hardware_tflop
    again = f", {spent:.0%} of them spent on computing a second time" if spent else ""
    lines = [
        "* as the recipe has it; plain: without DeepSpeed; +cpu: offloaded. A card is taken to hold "
        f"{USABLE:.0%} of its memory.",
        f"A step of {found.rows} x {found.accumulation} rows with {found.mean_tokens} tokens: "
        f"{_short(found.hardware_tflop)} TFLOP a rank{again}. At {found.efficiency:.0%} of {found.tflops:g} "
        f"TFLOP/s, {_short(found.step_seconds)} s, {_short(found.samples_per_second)} rows/s in all, if "
        "neither communication nor data make it wait.",
    ]
    if found.assumed:
        lines.append(
            "Rows were not read, their length is assumed; --preflight measures it, --tokens gives it."
        )
    lines += [f"To change: {change}" for change in found.changes]
    return Group(_memory_table(found), *(Text(line) for line in lines))


def _memory_table(found: Plan) -> Table:
    """Bytes by what they hold, a column for each way."""
    largest = max(option.memory.total for option in found.options)
    recompute = {"True": "on", "False": "off"}.get(str(found.checkpointing), found.checkpointing)
    unit, size = ("GiB", GIB) if largest >= GIB / 4 else ("MiB", 2**20)
    table = Table(
        title=f"{unit} a rank on {found.gpus.count} x {found.gpus.memory:g} GB, micro-batches of "
        f"{found.rows} rows with {found.tokens} tokens, gradient checkpointing {recompute}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("")
    for option in found.options:
        name = option.way.replace("_offload", "+cpu").replace("no DeepSpeed", "plain")
        name += "*" if option.chosen else ""
        table.add_column(name, justify="right", style="bold" if option.chosen else "")
    for row in ("weights", "gradients", "optimizer", "activations", "logits", "images", "buffers", "total"):
        table.add_row(row, *(f"{getattr(option.memory, row) / size:.2f}" for option in found.options))
    table.add_row("fits", *("yes" if option.fits else "no" for option in found.options))
    table.add_row("in CPU memory", *(f"{option.memory.host / size:.2f}" for option in found.options))
    return table


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}" if number < 10 else f"{number:.1f}"
