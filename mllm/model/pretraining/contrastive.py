"""Contrastive losses over the global batch: the rows of all ranks are each other's negatives.

Every loss here is a rank's *share*: its mean over the ranks is the loss of the global batch, and since DDP
averages gradients and `gather` passes them back to the rank that a row came from, so are the gradients.
(LAVIS gathers ITC features without gradient; its gradient is not that of its own global loss.)
All ranks must have equally many rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)  # gloo cannot reduce_scatter
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, with gradient: [B, ...] -> [G, ...]."""
    return x if world_size() == 1 else _Gather.apply(x.contiguous())


def own_rows(x: Tensor) -> Tensor:
    """Where this rank's B rows stand in the global batch: [B]."""
    first = dist.get_rank() * len(x) if dist.is_initialized() else 0
    return torch.arange(first, first + len(x), device=x.device)


def contrastive_loss(image_to_text: Tensor, text_to_image: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean of both directions' cross-entropy: the match of row i is column i of the global batch.

    Args:
        image_to_text: scores [B, >= G] of this rank's images; columns beyond G are further negatives.
        text_to_image: scores [B, >= G] of this rank's texts.
        smoothing: label smoothing.
    """
    target = own_rows(image_to_text)
    to_text = F.cross_entropy(image_to_text, target, label_smoothing=smoothing)
    to_image = F.cross_entropy(text_to_image, target, label_smoothing=smoothing)
    return (to_text + to_image) / 2


def clip_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's softmax loss (arXiv 2103.00020) of unit vectors [B, D] and [B, D]."""
    scale = log_scale.exp()
    return contrastive_loss(scale * image @ gather(text).T, scale * text @ gather(image).T)


def siglip_loss(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's sigmoid loss (arXiv 2303.15343) of unit vectors [B, D] and [B, D].

    Every pair is a yes-or-no question of its own; the sum over all pairs is divided by the rows.
    """
    scores = log_scale.exp() * image @ gather(text).T + bias  # [B, G]
    matches = F.one_hot(own_rows(image), scores.shape[1])
    return -F.logsigmoid((2 * matches - 1) * scores).sum() / len(image)


def hard_negatives(scores: Tensor, generator: torch.Generator) -> Tensor:
    """For each of this rank's rows another row of the global batch, drawn by softmax: [B, G] -> [B].

    Args:
        scores: [B, G]; row i's own column is left out.
        generator: in the same state on every rank, or the draw depends on how rows are spread over ranks.
    """
    own = own_rows(scores)
    chances = scores.detach().float().scatter(1, own[:, None], -torch.inf).softmax(-1).cumsum(-1)
    draws = torch.rand(scores.shape[1], generator=generator).to(scores.device)[own]
    # In (0, sum]: no draw can meet a column of chance 0, and rounding of the sum does no harm.
    points = (1 - draws)[:, None] * chances[:, -1:]
    return torch.searchsorted(chances, points).squeeze(1)


def batch_generator(ids: Tensor) -> torch.Generator:
    """A generator seeded by the global batch's token ids [G, T], so that all ranks draw alike."""
    flat = ids.flatten().cpu()
    return torch.Generator().manual_seed(int((flat * torch.arange(1, len(flat) + 1)).sum()))
