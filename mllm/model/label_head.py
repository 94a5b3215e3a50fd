"""The language model's head where there is a label, and nowhere else.

Most positions of a batch are images, questions and padding, whose logits no loss reads; for 32,000 words they
are also the largest tensor of a step. The head keeps whatever its family does to the logits behind it (bias,
scaling, soft-capping): only its input is chosen, by a hook of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mllm.data.tokens import IGNORE


def next_labels(labels: Tensor) -> Tensor:
    """[B, S] -> [B, S]: at each position the label that it predicts, the one of the next position."""
    return F.pad(labels, (0, 1), value=IGNORE)[:, 1:].contiguous()


@contextmanager
def head_only_at(head: nn.Module, places: Tensor) -> Iterator[None]:
    """Within it, `head` gets the rows of its input [B, S, D] that stand at `places` [n], as [1, n, D].

    Args:
        head: the language model's output embedding.
        places: positions in the flattened [B * S].
    """

    def choose(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1).index_select(0, places)[None],)  # [1, n, D]

    # In front: a hook that gathers a sharded head's weights must not see another input than the head.
    handle = head.register_forward_pre_hook(choose, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def labelled_places(targets: Tensor) -> Tensor:
    """[n], positions in the flattened `targets` [B, S] that have a label; one where none has.

    Every rank must call the head, so it is never called on nothing: a single ignored position gives a loss of
    zero and a graph that reaches all parameters.
    """
    found = (targets.flatten() != IGNORE).nonzero()[:, 0]
    return found if len(found) else found.new_zeros(1)
