"""Floating point operations of a training step, counted from what is multiplied.

Not 6 N T: a frozen weight has no gradient of its own, embeddings are looked up, attention is causal, and
the head is only needed where there is a label. A multiplication and an addition are two operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def linear_flops(products: int, input_grad: bool = False, weight_grad: bool = False) -> int:
    """Of a matrix product with `products` multiplications (tokens x inputs x outputs).

    The backward pass has the same number for the gradient of the input, and for that of the weight
    (Kaplan et al., arXiv 2001.08361, section 2.1, count 2 + 4 where both are needed).
    """
    return 2 * products * (1 + input_grad + weight_grad)


def attention_flops(queries: int, keys: int, width: int, causal: bool) -> int:
    """Of the forward pass of one attention over `width` channels (all heads together).

    Scores and the weighted sum are 2 * queries * keys * width each; with causality half of the scores are
    never needed (FlashAttention's count). The backward pass has twice as many; what a kernel computes again
    on the way is not counted.
    """
    return 4 * queries * keys * width // (2 if causal else 1)


@dataclass(frozen=True)
class StepFlops:
    """What a training step of one model costs, forward and backward.

    Attributes:
        image: of an image, through encoder and connector.
        token: of a token of the language model, image tokens included, without what `label` counts.
        square: of a pair of tokens of one row: attention is `square * length**2`.
        label: of a position whose prediction is needed: the head, and mostly the last feed-forward.
        again: of a token that is computed a second time under gradient checkpointing.
    """

    image: float
    token: float
    square: float
    label: float
    again: float = 0.0

    def of(self, lengths: Sequence[int], images: int, labels: int) -> float:
        """FLOPs that the model needs for rows of these lengths, to divide by seconds for MFU.

        Args:
            lengths: tokens of each row, without padding.
            images: images in all rows together.
            labels: positions with a label in all rows together.
        """
        squares = sum(length**2 for length in lengths)
        return self.image * images + self.token * sum(lengths) + self.square * squares + self.label * labels


def decoder_flops(
    lengths: Sequence[int],
    labels: int,
    *,
    weights: int,
    head: int,
    width: int,
    layers: int,
    trained: int = 0,
    head_trained: int = 0,
    input_grad: bool = True,
) -> float:
    """Of a decoder-only language model, from its sizes alone.

    With T tokens, N weights in matrix products and A = 2 T^2 d L for causal attention:
    stage 1 (a connector before a frozen model) is 4 N T + 3 A, LoRA with P weights (4 N + 6 P) T + 3 A, and
    full training 6 N T + 3 A; the head adds 4 or 6 of its own weights a label.

    Args:
        lengths: tokens of each row.
        labels: positions with a label in all rows together.
        weights: N, weights of all matrix products but those of `head`, adapters included.
        head: weights of the head, and of what else is computed at labels only.
        width: d, all heads of attention together.
        layers: L.
        trained: how many of `weights` get a gradient; adapters as all the others.
        head_trained: how many of `head` do.
        input_grad: whether gradients flow through to what stands before the model.
    """
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    body = linear_flops(tokens * weights, input_grad) + 2 * tokens * trained
    attention = layers * 2 * squares * width * (3 if input_grad else 1)
    return body + attention + linear_flops(labels * head, True) + 2 * labels * head_trained
