"""How much memory and time a recipe takes on given GPUs, before it is started, and what to change to fit.

Weights, gradients and optimiser states are counted over the parameters; activations are what autograd saves
in one forward pass of the recipe's own model, run with shapes only (`shapes`). What each rank holds under
DeepSpeed follows the ZeRO paper (arXiv 1910.02054, section 5) and DeepSpeed's settings in `ds_configs/`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mllm.config import Checkpointing, RunConfig
from mllm.errors import ConfigError
from mllm.model.adapters import is_adapter
from mllm.training.flops import StepFlops
from mllm.training.outline import example_batch, outline
from mllm.training.shapes import Trace, shapes_only, trace_forward
from mllm.training.tuning import upcast_trained

GIB = 2**30
USABLE = 0.94  # of a card: the rest is the CUDA context, workspaces and fragmentation
# Dense bf16 TFLOP/s of the data sheets, by the card's memory: RTX 4090, A100 40 GB, H100, H200.
PEAK = {24: 165.0, 40: 312.0, 80: 989.0, 141: 989.0}
# NF4 with double quantisation (arXiv 2305.14314): 4 bit, a byte for 64 weights, a float for 64 * 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
LIVE = 10**9  # parameters that ZeRO-3 keeps gathered at most: stage3_max_live_parameters


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
class Way:
    """How training is spread over ranks."""

    name: str
    zero: int = 0
    optimizer_on_cpu: bool = False
    weights_on_cpu: bool = False


WAYS = (
    Way("no DeepSpeed"),
    Way("zero1", 1),
    Way("zero2", 2),
    Way("zero3", 3),
    Way("zero2_offload", 2, True),
    Way("zero3_offload", 3, True, True),
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the fullest moment of a step; `host` is in the CPU's memory.

    `buffers` holds what is communicated, the largest layer while it is recomputed and the gradient of the
    logits, as far as they are there at the same time.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    images: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(asdict(self).values()) - self.host


@dataclass(frozen=True)
class Facts:
    """What the bytes depend on, for one precision of the weights.

    Attributes:
        weights: bytes of all weights.
        parameters: how many numbers they are.
        trained: how many of them learn.
        each: bytes of a weight that learns, and of its gradient.
        pixels: bytes of the pixels of a row.
        width: of the language model; DeepSpeed's buckets follow it.
        two, three: what micro-batches of two and three rows keep.
    """

    weights: int
    parameters: int
    trained: int
    each: int
    pixels: int
    width: int
    two: Trace
    three: Trace

    @staticmethod
    def of_rows(two: int, three: int, rows: int) -> int:
        """A size that is linear in the rows, from two of its values."""
        return max(0, two + (rows - 2) * (three - two))


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
        hardware_tflop: what is computed: also at positions without a label, and a second time.
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
        tflops: peak of a card; default: that of the usual card with this memory.
        efficiency: share of the peak that training reaches; published figures are 0.25 to 0.5.

    Raises:
        ConfigError: a part cannot be read, or the card is not known and `tflops` is not given.
    """
    peak = tflops if tflops is not None else PEAK.get(int(gpus.memory))
    if peak is None:
        raise ConfigError(f"a card with {gpus.memory:g} GB is not known; give --tflops, its dense bf16 peak")
    options, own = config.train, way_of(config.train.deepspeed)
    rows, accumulation = options.per_device_batch_size, options.accumulation(gpus.count)
    plain, sharded = Measure(config, deepspeed=False), Measure(config, deepspeed=True)
    image = plain.image_tokens
    longest = tokens or (image + 64 if config.stage == "align" else config.data.max_length or image + 512)
    mean = min(mean_tokens or tokens or image + 200, longest)
    facts = {True: plain.facts(longest), False: sharded.facts(longest)}

    def memory(way: Way, rows: int, checkpointing: Checkpointing) -> Memory:
        return bytes_a_rank(facts[way.zero == 0], way, gpus.count, rows, checkpointing)

    def fits(way: Way, rows: int, checkpointing: Checkpointing) -> bool:
        return memory(way, rows, checkpointing).total <= USABLE * gpus.memory * GIB

    timed = (sharded if own.zero else plain).trace(2, mean)
    flops = step_flops(timed, 2, mean)
    # The trace has a label at every position behind the image.
    computed = sum(timed.forward.values()) + sum(timed.backward.values())
    hardware = rows * accumulation * (computed + timed.again * (options.gradient_checkpointing is True)) / 2
    labels = min(mean, max(1, mean - image))
    seconds = hardware / (peak * 1e12 * efficiency)
    return Plan(
        gpus=gpus,
        rows=rows,
        accumulation=accumulation,
        tokens=longest,
        mean_tokens=mean,
        assumed=tokens is None,
        checkpointing=options.gradient_checkpointing,
        options=[
            Option(
                way.name,
                memory(way, rows, options.gradient_checkpointing),
                fits(way, rows, options.gradient_checkpointing),
                way == own,
            )
            for way in WAYS
        ],
        flops=flops,
        model_tflop=flops.of([mean], 1, labels) * rows * accumulation / 1e12,
        hardware_tflop=hardware / 1e12,
        tflops=peak,
        efficiency=efficiency,
        step_seconds=seconds,
        samples_per_second=rows * accumulation * gpus.count / seconds,
        changes=list(_changes(config, own, fits)),
    )


def way_of(deepspeed: str | None) -> Way:
    """What a DeepSpeed configuration file asks for."""
    if deepspeed is None:
        return WAYS[0]
    try:
        zero = json.loads(Path(deepspeed).read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"train.deepspeed: {deepspeed!r} cannot be read; samples are in ds_configs/"
        ) from error
    on_cpu = [zero.get(key, {}).get("device") == "cpu" for key in ("offload_optimizer", "offload_param")]
    stage = zero.get("stage", 0)
    known = (way for way in WAYS if (way.zero, way.optimizer_on_cpu, way.weights_on_cpu) == (stage, *on_cpu))
    return next(known, Way(Path(deepspeed).stem, stage, *on_cpu))


class Measure:
    """A run's model with the precision that its weights are trained in."""

    def __init__(self, config: RunConfig, deepspeed: bool):
        options, tune = config.train, config.tune
        mixed = torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else None
        self.model, self.processor, self.reports = outline(config)
        self.packed = _packed(self.model) if tune.language_model == "qlora" else {}
        with shapes_only():
            if deepspeed:  # casts everything, and keeps float32 masters of what learns
                torch.nn.Module.to(self.model, mixed or torch.float32)
            else:
                upcast_trained(self.model, tune)
        self.autocast = None if deepspeed else mixed
        self.pixels_as = mixed if deepspeed and mixed is not None else torch.float32

    @property
    def image_tokens(self) -> int:
        """Placeholders of an image of the largest kind; of a pair, none."""
        batch = example_batch(self.model, self.processor, 1, 0)
        image_id = getattr(self.model.config, "image_token_id", None)
        return int((batch["input_ids"] == image_id).sum()) if image_id is not None else 0

    def trace(self, rows: int, tokens: int) -> Trace:
        """A forward pass over equal rows."""
        return trace_forward(
            self.model, example_batch(self.model, self.processor, rows, tokens), self.autocast
        )

    def facts(self, tokens: int) -> Facts:
        """The sizes for rows of this length."""
        batch = example_batch(self.model, self.processor, 1, tokens)
        pixels = sum(tensor.numel() for tensor in batch.values() if tensor.is_floating_point())
        parameters = list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        size = sum(NF4_BYTES * p.numel() if id(p) in self.packed else p.nbytes for p in parameters)
        config = self.model.config
        return Facts(
            weights=round(size),
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in trained),
            each=trained[0].element_size(),
            pixels=pixels * self.pixels_as.itemsize,
            width=getattr(config, "text_config", config.vision_config).hidden_size,
            two=self.trace(2, tokens),
            three=self.trace(3, tokens),
        )


def _packed(model: Any) -> dict[int, str]:
    """The weights that QLoRA keeps in 4 bit, by identity: those of all linear layers but the head."""
    head = model.get_output_embeddings()
    return {
        id(layer.weight): name
        for name, layer in model.language_model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head and not is_adapter(f"{name}.")
    }


def bytes_a_rank(facts: Facts, way: Way, ranks: int, rows: int, checkpointing: Checkpointing) -> Memory:
    """Memory of one of `ranks` ranks with micro-batches of `rows` rows."""
    trained, each = facts.trained, facts.each
    share = -(-trained // ranks)  # of the optimiser, and with it of the gradients
    weights, gradients, host = facts.weights, trained * each, 0
    if way.zero == 0:
        optimizer = 2 * trained * each  # Adam's moments have the dtype of the weights
        moving, at_step = gradients * (ranks > 1), 0  # DistributedDataParallel's buckets
    else:
        optimizer = 12 * share  # float32 master and moments
        bucket = min(facts.width**2, trained) * each
        moving, at_step = 2 * bucket, 4 * share  # a bucket fills while another is sent; float32 gradients
        if way.zero >= 2:
            gradients = share * each
        if way.zero == 3:
            weights //= ranks
            moving += min(facts.weights, LIVE * each)  # gathered at a time
            at_step = 4 * min(share, LIVE)
        if way.optimizer_on_cpu:
            host += optimizer + 4 * share
            optimizer = gradients = at_step = 0
        if way.weights_on_cpu:
            host += weights
            weights = 0
    kept = facts.of_rows(facts.two.kept(checkpointing), facts.three.kept(checkpointing), rows)
    logits = facts.of_rows(facts.two.logits, facts.three.logits, rows)
    # Behind the loss come its gradient in float32 and that of the logits in their own dtype.
    slope = facts.of_rows(facts.two.scores, facts.three.scores, rows) * (4 + each)
    again = facts.of_rows(facts.two.recomputed(), facts.three.recomputed(), rows) if checkpointing else 0
    passing = max(logits + slope, again) - logits + moving
    buffers = max(passing, at_step - kept - logits)
    return Memory(weights, gradients, optimizer, kept, logits, facts.pixels * rows, buffers, host)


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


def _changes(config: RunConfig, own: Way, fits: Callable[[Way, int, Checkpointing], bool]) -> Iterator[str]:
    """What would make a run fit that does not, or what one that fits could do without; the least first."""
    options = config.train
    rows, checkpointing = options.per_device_batch_size, options.gradient_checkpointing
    if fits(own, rows, checkpointing):
        less: tuple[Checkpointing, ...] = (False, "selective") if checkpointing is True else (False,)
        spared = next((way for way in less if checkpointing and fits(own, rows, way)), None)
        if spared is not None:
            yield f"train.gradient_checkpointing={str(spared).lower()} fits as well, and takes less time"
        return
    found = 0
    smaller = [rows // n for n in (1, 2, 4, 8, 16, 32, 64) if rows % n == 0]
    for way in (own, *(w for w in WAYS if w != own)):
        for recompute in dict.fromkeys(
            (checkpointing, *(() if checkpointing is True else ("selective",)), True)
        ):
            size = next((size for size in smaller if fits(way, size, recompute)), None)
            if size is None:
                continue
            file = "null" if way.zero == 0 else f"ds_configs/{way.name}.json"
            keys = {
                "train.deepspeed": None if way == own else file,
                "train.gradient_checkpointing": None
                if recompute == checkpointing
                else str(recompute).lower(),
                "train.per_device_batch_size": None if size == rows else size,
                "train.gradient_accumulation_steps": None
                if size == rows or options.global_batch_size
                else options.gradient_accumulation_steps * rows // size,
            }
            yield " ".join(f"{key}={value}" for key, value in keys.items() if value is not None)
            found += 1
            break
        if found == 3:
            return
    if not found:
        smaller_tuning = {"full": "lora", "lora": "qlora"}.get(config.tune.language_model)
        hint = f"tune.language_model={smaller_tuning}, or " if smaller_tuning else ""
        yield f"nothing of this fits; try {hint}more or larger cards, or a smaller data.max_length"


def report(found: Plan) -> Group:
    """The plan as a table and lines, for a terminal."""
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
        name = option.way.replace("_offload", "+cpu") + ("*" if option.chosen else "")
        table.add_column(name, justify="right", style="bold" if option.chosen else "")
    for row in ("weights", "gradients", "optimizer", "activations", "logits", "images", "buffers", "total"):
        table.add_row(row, *(f"{getattr(option.memory, row) / size:.2f}" for option in found.options))
    table.add_row("fits", *("yes" if option.fits else "no" for option in found.options))
    table.add_row("in CPU memory", *(f"{option.memory.host / size:.2f}" for option in found.options))
    lines = [
        f"* as the recipe has it. A card is taken to hold {USABLE:.0%} of its memory.",
        f"A step of {found.rows} x {found.accumulation} rows with {found.mean_tokens} tokens: "
        f"{found.hardware_tflop:,.3g} TFLOP a rank, {found.model_tflop:,.3g} of them needed. At "
        f"{found.efficiency:.0%} of {found.tflops:g} TFLOP/s, {found.step_seconds:.2g} s, "
        f"{found.samples_per_second:,.3g} rows/s in all, if neither communication nor data make it wait.",
        *(
            ["Rows were not read, their length is assumed; --preflight measures it, --tokens gives it."]
            if found.assumed
            else []
        ),
        *(f"To change: {change}" for change in found.changes),
    ]
    return Group(table, *(Text(line) for line in lines))
