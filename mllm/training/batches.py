"""Which rows the batches of a run hold, where a recipe does not leave that to the Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments

from mllm.config import RunConfig
from mllm.data.collator import Collator
from mllm.data.lengths import Lengths, Ranks, mixture_lengths
from mllm.data.lengths_on_demand import LengthsOnDemand
from mllm.data.mixture import Mixture
from mllm.data.packing import PackingCollator, try_packing
from mllm.data.pairs import PairCollator
from mllm.data.sampler import MicroBatches, Sizes
from mllm.errors import ConfigError
from mllm.model.language_model import weights_in
from mllm.training.flops import StepFlops, attention_flops, linear_flops

# With more rows than these, lengths are measured when a step needs them: a core measures 3,000 rows a second.
MEASURED_AHEAD = 50_000


def make_collator(config: RunConfig, processor: Any) -> Any:
    """What makes the batches of a run."""
    if config.on_pairs:
        return PairCollator(processor)
    return (PackingCollator if config.data.packing else Collator)(processor, config.data.max_length)


def micro_batches(
    config: RunConfig, args: TrainingArguments, model: Any, rows: Mixture, collator: Any
) -> MicroBatches | None:
    """What a recipe's conversations are divided by; None for pairs, which the Trainer divides.

    Its own way would repeat rows where an epoch's last batch does not fill all ranks, and which rows
    depends on how many ranks there are.

    Raises:
        ConfigError: packs longer than `data.pack_length`.
        DataError: a row that cannot be trained on.
    """
    data, options = config.data, config.train
    if config.on_pairs:
        return None
    lengths: Sizes
    whole_plan = data.grouping == "modality_length" or data.pack_length is not None  # needs all lengths
    if not data.packing and data.grouping == "none":  # all alike: in the order of the epoch, none is measured
        lengths = Lengths(*(np.broadcast_to(np.int32(0), len(rows)) for _ in fields(Lengths)))
    elif whole_plan or len(rows) <= MEASURED_AHEAD:
        ranks = Ranks(args.process_index, args.world_size, gather_object)
        lengths = mixture_lengths(rows, collator, options.num_workers, args.should_save, ranks)
    else:
        lengths = LengthsOnDemand(rows, collator)
    batches = MicroBatches(
        lengths,
        options.per_device_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
        args.process_index,
        options.seed,
        flops=row_flops(model, not data.feature_cache) if data.packing else None,
        by_modality=data.grouping == "modality_length",
    )
    if data.packing and data.pack_length is not None:
        _check_pack_length(batches, data.pack_length, math.ceil(options.num_train_epochs))
    return batches


def _check_pack_length(batches: MicroBatches, limit: int, epochs: int) -> None:
    """The plan of every epoch is known, so what would not fit is found before the first step."""
    longest = 0
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches.global_batches():
            packs = [pack for step in batches.divide(batch) for pack in step]
            longest = max(longest, *(pack_tokens(batches, pack) for pack in packs))
    batches.set_epoch(0)
    if longest > limit:
        times = math.ceil(longest / limit)
        raise ConfigError(
            f"data.pack_length is {limit}, but the longest pack has {longest} tokens; divide "
            f"train.per_device_batch_size by {times} and multiply train.gradient_accumulation_steps by it"
        )


def pack_tokens(batches: MicroBatches, pack: list[int]) -> int:
    """Tokens of the rows of a pack."""
    return int(batches.lengths.take(np.array(pack)).tokens.sum())


def row_flops(model: Any, encodes: bool = True) -> Callable[[Lengths], np.ndarray]:
    """What gives the FLOPs of rows in a step, [rows], from their lengths.

    A pack costs the sum of its rows, since they do not attend to each other.
    """
    flops = step_flops(model, encodes)

    def of(lengths: Lengths) -> np.ndarray:
        tokens = lengths.tokens.astype(float)
        linear = flops.token * tokens + flops.image * lengths.views + flops.label * lengths.labels
        return linear + flops.square * tokens**2

    return of


def step_flops(model: Any, encodes: bool = True) -> StepFlops:
    """What a step of this model costs, from the sizes of its parts; the vision encoder's only if it runs."""
    config = model.config.text_config
    language_model, vision = model.language_model, model.vision_encoder
    head = model.get_output_embeddings().weight
    of_head = head.numel() if head is not model.get_input_embeddings().weight else 0
    weights = language_model.num_parameters(exclude_embeddings=True) - of_head
    trained = language_model.num_parameters(only_trainable=True, exclude_embeddings=True)
    trained -= of_head if head.requires_grad else 0
    last = model.label_feed_forward.module if model.label_feed_forward else torch.nn.Identity()
    at_labels, learnt = _count(last), _count(last, trainable=True)
    seen = model.config.num_patches + model.config.num_prefix_tokens
    trains_vision = any(p.requires_grad for p in vision.parameters())
    of_vision = linear_flops(seen * _count(vision), trains_vision, trains_vision)
    of_connector = linear_flops(model.config.num_image_tokens * _count(model.connector), True, True)
    return StepFlops(
        image=of_vision * encodes + of_connector,
        token=linear_flops(weights - at_labels, True) + 2 * (trained - learnt),
        square=3 * config.num_hidden_layers * attention_flops(1, 1, config.hidden_size, True),
        label=linear_flops(head.numel(), True, head.requires_grad)
        + linear_flops(at_labels, True)
        + 2 * learnt,
    )


def _count(module: torch.nn.Module, trainable: bool = False) -> int:
    return sum(weights_in(p) for p in module.parameters() if p.requires_grad or not trainable)


class PackingTrial(TrainerCallback):
    """Tries the language model on packs when it is on its device, with the precision of the run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raise `ConfigError` if it lets the rows of a pack see each other."""
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
            try_packing(model)
