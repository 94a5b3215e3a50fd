"""The longest rows before step 1: what does not fit shows in the first minute, not in the third hour.

They go forward and backward once (with ZeRO-3, forward), on every rank and at the run's batch size, and leave
nothing behind: no gradient, no random number, no step. So the losses of a run are the same with and without
it, and the rows of every step as well; to reorder the rows instead would change both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from mllm.data.lengths import Lengths
from mllm.data.mixture import Mixture
from mllm.data.sampler import MicroBatches
from mllm.data.schema import Row
from mllm.model.checkpoint import part_of
from mllm.training.aside import aside
from mllm.training.batches import pack_tokens
from mllm.training.steps import model_inputs

SAMPLE = 512  # rows that are measured where the lengths of all are not known
TRIED = 16  # global batches that are divided to find the longest pack


def longest_rows(
    batches: MicroBatches | None, lengths: Lengths | None, numbers: np.ndarray, size: int
) -> list[int]:
    """Row numbers of the largest micro-batch that is to be expected.

    Args:
        batches: the plan of the run; for packs, the longest pack is one of its own.
        lengths: of the rows `numbers`; None where no row has a length (pairs).
        numbers: the rows that are known, all or a sample.
        size: rows a micro-batch.
    """
    if lengths is None:
        return numbers[:size].tolist()
    if batches is not None and batches.flops is not None:
        return _longest_pack(batches)
    order = np.argsort(-lengths.tokens, kind="stable")
    return numbers[order[:size]].tolist()


def _longest_pack(batches: MicroBatches) -> list[int]:
    """The longest pack of the global batches with most tokens, or with the longest rows, of the first epoch.

    Packs of one global batch are balanced, so the longest one is where most tokens are, or where a single
    row outweighs the mean. Where lengths are not known, it is the longest of a sample of them.
    """
    batches.set_epoch(0)
    every = list(batches.global_batches())
    if not isinstance(batches.lengths, Lengths):
        every = every[:: -(-len(every) // TRIED)]
    tokens = [batches.lengths.take(batch).tokens for batch in every]
    by_sum = np.argsort([-rows.sum() for rows in tokens], kind="stable")[:TRIED]
    by_row = np.argsort([-rows.max() for rows in tokens], kind="stable")[:TRIED]
    packs = [
        pack
        for number in dict.fromkeys([*by_sum.tolist(), *by_row.tolist()])
        for step in batches.divide(every[number])
        for pack in step
    ]
    return max(packs, key=lambda pack: pack_tokens(batches, pack))


class LongestFirst(TrainerCallback):
    """Computes the loss and the gradients of the longest rows before the first step, and drops them.

    Args:
        data: rows of the run.
        collator: makes its batches.
        rows: the numbers of the longest.
    """

    def __init__(self, data: Sequence[Row] | Mixture, collator: Any, rows: Sequence[int]) -> None:
        self.data, self.collator, self.rows = data, collator, list(rows)
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Forward and backward, in training mode, with the precision of the run."""
        batch = self.collator([self.data[row] for row in self.rows])
        self.tokens = sum(count.tokens for count in batch["counts"])
        inputs = model_inputs(batch, args.device)
        with aside(model), torch.enable_grad():
            model.train()
            states = [] if args.deepspeed else _room_for_states(model, args.device, args.optim)
            loss = model(**inputs).loss
            _backward(loss, model, bool(args.deepspeed))
            del loss, states
        model.zero_grad(set_to_none=True)


def _backward(loss: torch.Tensor, model: nn.Module, deepspeed: bool) -> None:
    """As far as it leaves nothing behind.

    DeepSpeed's hooks would keep the gradients of weights in buckets of its own, so they are not computed, but
    for the first weight of each part, which all activations lie behind. With ZeRO-3 a backward pass that is
    not a whole one leaves weights gathered, and the losses behind it were seen to differ: there the forward
    pass alone is tried, with all that it keeps for the backward pass.
    """
    if not deepspeed:
        loss.backward()
    elif not is_deepspeed_zero3_enabled():
        torch.autograd.grad(loss, _first_of_each_part(model), allow_unused=True)


def _room_for_states(model: nn.Module, device: torch.device, optim: str) -> list[torch.Tensor]:
    """Memory that Adam's moments will take from the first step on.

    Nothing on a CPU, which gives no OOM, for moments that are paged to it, and for other optimisers.
    """
    if device.type == "cpu" or not optim.startswith("adamw"):
        return []
    dtype = torch.uint8 if "8bit" in optim else None
    return [torch.empty_like(p, dtype=dtype) for p in model.parameters() if p.requires_grad for _ in range(2)]


def _first_of_each_part(model: nn.Module) -> list[nn.Parameter]:
    first: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first.setdefault(part_of(name), parameter)
    return list(first.values())


def sample_numbers(rows: int) -> np.ndarray:
    """At most `SAMPLE` row numbers, evenly over all."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE)).astype(int))
