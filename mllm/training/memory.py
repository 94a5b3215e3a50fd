"""What a rank holds at the fullest moment of a step, by how training is spread over ranks.

Weights, gradients and optimiser states are counted over the parameters; activations are what autograd saves
in one forward pass of the recipe's own model, run with shapes only (`shapes`). What each rank holds under
DeepSpeed follows the ZeRO paper (arXiv 1910.02054, section 5) and DeepSpeed's settings in `ds_configs/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.config import Checkpointing, RunConfig, TrainSection
from mllm.model.adapters import is_adapter
from mllm.training.launch import deepspeed_settings
from mllm.training.outline import example_batch, outline
from mllm.training.shapes import Trace, shapes_only, trace_forward
from mllm.training.tuning import upcast_trained

# NF4 with double quantisation (arXiv 2305.14314): 4 bit, a byte for 64 weights, a float for 64 * 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
LIVE = 10**9  # parameters that ZeRO-3 keeps gathered at most: stage3_max_live_parameters


@dataclass(frozen=True)
class Way:
    """How training is spread over ranks."""

    name: str
    zero: int = 0
    optimizer_on_cpu: bool = False
    weights_on_cpu: bool = False

    @property
    def cast(self) -> bool:
        """Whether all weights are in 16 bit, with float32 masters of what learns, as DeepSpeed has them."""
        return self.zero > 0


WAYS = (
    Way("no DeepSpeed"),
    Way("zero1", 1),
    Way("zero2", 2),
    Way("zero3", 3),
    Way("zero2_offload", 2, True),
    Way("zero3_offload", 3, True, True),
)
FSDP = Way("fsdp")  # of `train.fsdp`


def way_of_run(options: TrainSection) -> Way:
    """How a run is spread over ranks."""
    return FSDP if options.fsdp else way_of(options.deepspeed)


def way_of(deepspeed: str | None) -> Way:
    """What a DeepSpeed configuration file asks for."""
    if deepspeed is None:
        return WAYS[0]
    zero = deepspeed_settings(deepspeed).get("zero_optimization", {})
    on_cpu = [zero.get(key, {}).get("device") == "cpu" for key in ("offload_optimizer", "offload_param")]
    stage = zero.get("stage", 0)
    known = (way for way in WAYS if (way.zero, way.optimizer_on_cpu, way.weights_on_cpu) == (stage, *on_cpu))
    return next(known, Way(Path(deepspeed).stem, stage, *on_cpu))


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
        trained: how many numbers learn.
        each: bytes of a weight that learns, and of its gradient.
        images: bytes of the pixels of a row, or of its kept features.
        width: of the language model; DeepSpeed's buckets follow it.
        gathered: bytes that FSDP has whole at most, of weights and of gradients.
        two, three: what micro-batches of two and three rows keep.
    """

    weights: int
    trained: int
    each: int
    images: int
    width: int
    gathered: int
    two: Trace
    three: Trace

    @staticmethod
    def of_rows(two: int, three: int, rows: int) -> int:
        """A size that is linear in the rows, from two of its values."""
        return max(0, two + (rows - 2) * (three - two))


class Measure:
    """A run's model with the precision that its weights are trained in.

    Args:
        config: the run.
        deepspeed: whether DeepSpeed casts the weights.
    """

    def __init__(self, config: RunConfig, deepspeed: bool):
        options, tune = config.train, config.tune
        mixed = torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else None
        self.model, self.processor, self.reports = outline(config)
        self.packed = _packed(self.model) if tune.language_model == "qlora" else set()
        with shapes_only():
            if deepspeed:  # casts everything, and keeps float32 masters of what learns
                torch.nn.Module.to(self.model, mixed or torch.float32)
            else:
                upcast_trained(self.model, tune)
        self.autocast = None if deepspeed else mixed
        self.compute = mixed or torch.float32
        self.features = bool(config.data.feature_cache)
        self.images_as = self.model.vision_encoder.dtype if self.features or deepspeed else torch.float32

    @property
    def image_tokens(self) -> int:
        """Placeholders of an image of the largest kind; of a pair, none."""
        batch = example_batch(self.model, self.processor, 1, 0)
        image_id = getattr(self.model.config, "image_token_id", None)
        return int((batch["input_ids"] == image_id).sum()) if image_id is not None else 0

    def batch(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        """Equal rows, of pixels or, with `data.feature_cache`, of features."""
        return example_batch(self.model, self.processor, rows, tokens, features=self.features)

    def trace(self, rows: int, tokens: int) -> Trace:
        """A forward pass over equal rows."""
        return trace_forward(self.model, self.batch(rows, tokens), self.autocast)

    def facts(self, tokens: int) -> Facts:
        """The sizes for rows of this length."""
        images = sum(x.numel() for x in self.batch(1, tokens).values() if x.is_floating_point())
        parameters = list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        size = sum(NF4_BYTES * p.numel() if id(p) in self.packed else p.nbytes for p in parameters)
        config = self.model.config
        return Facts(
            weights=round(size),
            trained=sum(p.numel() for p in trained),
            each=trained[0].element_size(),
            images=images * self.images_as.itemsize,
            width=getattr(config, "text_config", config.vision_config).hidden_size,
            gathered=self._gathered(),
            two=self.trace(2, tokens),
            three=self.trace(3, tokens),
        )

    def _gathered(self) -> int:
        """Bytes of a layer that computes and of the next, of all that is in no layer, and of their gradients.

        Only the larger of a layer's gradients and of those outside is whole at a time, in float32.
        """
        every = list(self.model.parameters())
        layers = [
            list(layer.parameters())
            for layer in self.model.modules()
            if isinstance(layer, GradientCheckpointingLayer)
        ]
        within = {id(p) for layer in layers for p in layer}
        outside = [p for p in every if id(p) not in within]
        largest = max(layers, key=_count, default=[])
        learnt = max(_count(p for p in group if p.requires_grad) for group in (outside, *layers))
        return (_count(outside) + 2 * _count(largest)) * self.compute.itemsize + 4 * learnt


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _packed(model: Any) -> set[int]:
    """The weights that QLoRA keeps in 4 bit, by identity: those of all linear layers but the head."""
    head = model.get_output_embeddings()
    return {
        id(layer.weight)
        for name, layer in model.language_model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head and not is_adapter(f"{name}.")
    }


@dataclass
class _States:
    """Bytes that do not depend on the rows: `moving` while the backward pass runs, `at_step` behind it."""

    weights: int
    gradients: int
    optimizer: int
    moving: int
    at_step: int = 0
    host: int = 0


def _states(facts: Facts, way: Way, ranks: int) -> _States:
    trained, each = facts.trained, facts.each
    share = -(-trained // ranks)  # of the optimiser, and with it of the gradients
    if way == FSDP:
        return _States(facts.weights // ranks, share * each, 2 * share * each, facts.gathered)
    if way.zero == 0:
        gradients = trained * each
        # Adam's moments have the dtype of the weights; DistributedDataParallel has buckets for all gradients.
        return _States(facts.weights, gradients, 2 * gradients, gradients * (ranks > 1))
    bucket = min(facts.width**2, trained) * each
    found = _States(
        weights=facts.weights,
        gradients=trained * each if way.zero == 1 else share * each,
        optimizer=12 * share,  # float32 master and moments
        moving=2 * bucket,  # one fills while another is sent
        at_step=4 * share,  # float32 gradients
    )
    if way.zero == 3:
        found.weights //= ranks
        found.moving += min(facts.weights, LIVE * each)  # gathered at a time
        found.at_step = 4 * min(share, LIVE)
    if way.optimizer_on_cpu:
        found.host += found.optimizer + 4 * share
        found.optimizer = found.gradients = found.at_step = 0
    if way.weights_on_cpu:
        found.host += found.weights
        found.weights = 0
    return found


def bytes_a_rank(facts: Facts, way: Way, ranks: int, rows: int, checkpointing: Checkpointing) -> Memory:
    """Memory of one of `ranks` ranks with micro-batches of `rows` rows."""
    states, two, three = _states(facts, way, ranks), facts.two, facts.three
    kept = facts.of_rows(two.kept(checkpointing), three.kept(checkpointing), rows)
    logits = facts.of_rows(two.logits, three.logits, rows)
    # Behind the loss come its gradient in float32 and that of the logits in their own dtype.
    slope = facts.of_rows(two.scores, three.scores, rows) * (4 + facts.each)
    again = facts.of_rows(two.recomputed(), three.recomputed(), rows) if checkpointing else 0
    passing = max(logits + slope, again) - logits + states.moving
    return Memory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=kept,
        logits=logits,
        images=facts.images * rows,
        buffers=max(passing, states.at_step - kept - logits),
        host=states.host,
    )
