"""Which rows are computed together: an epoch as global batches, a global batch as micro-batches of ranks.

A global batch is what one optimiser step learns from. Which rows are in it is decided by the order of the
epoch alone, never by how it is then divided: packed and unpacked runs learn from the same rows in every
step. Every rank computes the whole plan from the seed and takes its own part, so nothing is communicated.

Two ways to divide:

- by rows, as LLaVA (`LengthGroupedSampler` of arXiv 2310.03744's code): equally many rows for each
  micro-batch, of about the same length in all, and one modality a step;
- by FLOPs, for packs: as many rows as make equal work. Longest-processing-time-first scheduling (Graham,
  1969), then exchanges between the heaviest and the lightest pack while they help.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

from mllm.data.lengths import Lengths
from mllm.errors import ConfigError

Divided = list[list[list[int]]]  # [micro-step][rank] -> row numbers


class Sizes(Protocol):
    """What is asked of `Lengths` where some may not be measured yet."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Lengths:
        """The sizes of these rows, in this order."""


class MicroBatches(Sampler[Sequence[int]]):
    """One rank's micro-batches, `accumulation` of them for each optimiser step.

    In every epoch each row comes exactly once, and all ranks have equally many micro-batches. What is left
    at the end makes one smaller step, of fewer micro-batches if it is small; fewer rows than ranks
    join the step before, since every rank must have a row.

    Args:
        lengths: of all rows; with `by_modality` all are asked for at once.
        batch_size: rows a micro-batch, or their mean where packs are balanced.
        accumulation: micro-batches a step.
        ranks, rank: how many there are, and which this is.
        seed: of the order, together with the epoch. Without grouping it is the order of an unpacked run
            under Hugging Face's Trainer with this seed.
        flops: what rows of such lengths cost in a step, [rows]: divide by it, for packs; None by rows.
        by_modality: steps of rows with an image, steps of rows without; only what is left of both is mixed.

    Raises:
        ConfigError: fewer rows than ranks.
    """

    def __init__(
        self,
        lengths: Sizes,
        batch_size: int,
        accumulation: int = 1,
        ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        flops: Callable[[Lengths], np.ndarray] | None = None,
        by_modality: bool = False,
    ):
        if len(lengths) < ranks:
            raise ConfigError(f"data.path has {len(lengths)} rows for {ranks} ranks; every rank needs one")
        self.lengths = lengths
        self.batch_size, self.accumulation = batch_size, accumulation
        self.ranks, self.rank = ranks, rank
        self.seed, self.epoch = seed, 0
        self.flops = flops
        self.groups: list[np.ndarray] = []  # [N] each, which rows are in it
        if by_modality:
            views = lengths.take(np.arange(len(lengths))).views
            self.groups = [views > 0, views == 0]

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch, also when a run is resumed in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        *full, last = self._sizes(len(self.lengths))
        return len(full) * self.accumulation + self._micro_steps(last)

    def __iter__(self) -> Iterator[Sequence[int]]:
        for batch in self.global_batches():
            divided = functools.cache(functools.partial(self.divide, batch))
            yield from (_Later(divided, step, self.rank) for step in range(self._micro_steps(len(batch))))

    def global_batches(self) -> Iterator[np.ndarray]:
        """The rows of each optimiser step of this epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        if self.groups:
            size = self.ranks * self.batch_size * self.accumulation
            steps, rest = [], []
            for group in self.groups:
                rows = order[group[order]]
                whole = len(rows) - len(rows) % size
                steps += np.split(rows[:whole], whole // size) if whole else []
                rest.append(rows[whole:])
            mixed = torch.randperm(len(steps), generator=generator).tolist()
            # Left over last: the Trainer takes only the end of an epoch for a step of fewer micro-batches.
            order = np.concatenate([*(steps[i] for i in mixed), *rest])
        yield from np.split(order, np.cumsum(self._sizes(len(order)))[:-1])

    def divide(self, batch: np.ndarray) -> Divided:
        """The micro-batches of one global batch."""
        steps = self._micro_steps(len(batch))
        count = steps * self.ranks
        sizes = self.lengths.take(batch)
        weight = sizes.tokens.astype(float) if self.flops is None else self.flops(sizes)  # [rows]
        order = np.argsort(-weight, kind="stable")  # places in the batch
        if self.flops is None:
            room = [len(batch) // count + (i < len(batch) % count) for i in range(count)]
            parts = _fill(order, weight, room)
            divided = [parts[at : at + self.ranks] for at in range(0, count, self.ranks)]
        else:
            packs = _exchange(_fill(order, weight, [len(batch)] * count), weight)
            divided = self._deal(packs, weight)
        return [[batch[part].tolist() for part in step] for step in divided]

    def _sizes(self, rows: int) -> list[int]:
        """Rows of each global batch."""
        size = self.ranks * self.batch_size * self.accumulation
        full, left = divmod(rows, size)
        if full and left < self.ranks:
            return [size] * (full - 1) + [size + left]
        return [size] * full + [left] * (left > 0)

    def _micro_steps(self, rows: int) -> int:
        """Micro-batches a rank for so many rows, none of them empty."""
        wanted = -(-rows // (self.ranks * self.batch_size))
        return min(self.accumulation, wanted, rows // self.ranks)

    def _deal(self, packs: list[list[int]], weight: np.ndarray) -> Divided:
        """Packs of like weight in the same micro-step, and ranks even over all of them."""
        totals = [weight[pack].sum() for pack in packs]
        ranked = [packs[i] for i in np.argsort(totals, kind="stable")[::-1]]
        total = np.zeros(self.ranks)
        steps = []
        for at in range(0, len(ranked), self.ranks):
            step: list[list[int]] = [[]] * self.ranks
            # The heaviest of these goes to the rank that has done least.
            for rank, pack in zip(np.argsort(total, kind="stable"), ranked[at:], strict=False):
                step[rank] = pack
            total += [weight[pack].sum() for pack in step]
            steps.append(step)
        return steps


class _Later(Sequence[int]):
    """A micro-batch whose rows are decided when it is looked at.

    A resumed run skips those that were without looking: their rows need not be measured again.
    """

    def __init__(self, divided: Callable[[], Divided], step: int, rank: int) -> None:
        self._divided, self._step, self._rank = divided, step, rank

    def _rows(self) -> list[int]:
        return self._divided()[self._step][self._rank]

    def __len__(self) -> int:
        return len(self._rows())

    def __getitem__(self, place: Any) -> Any:
        return self._rows()[place]

    def __reduce__(self) -> tuple[Any, ...]:
        """To a worker goes the list."""
        return list, (self._rows(),)


def _fill(order: np.ndarray, weight: np.ndarray, room: Sequence[int]) -> list[list[int]]:
    """Each row, the heaviest first, into the lightest part that has room."""
    parts: list[list[int]] = [[] for _ in room]
    heap = [(0.0, i) for i in range(len(room))]
    for row in order.tolist():
        total, i = heapq.heappop(heap)
        parts[i].append(row)
        if len(parts[i]) < room[i]:
            heapq.heappush(heap, (total + weight[row], i))
    return parts


def _exchange(parts: list[list[int]], weight: np.ndarray) -> list[list[int]]:
    """Exchange rows, or move one, between the heaviest and the lightest part while this evens them out."""
    totals = np.array([weight[part].sum() for part in parts])
    for _ in range(4 * len(parts)):
        high, low = int(totals.argmax()), int(totals.argmin())
        gap = totals[high] - totals[low]
        # What would go over: row i of the one for row j of the other, or for nothing.
        for_nothing = 0.0 if len(parts[high]) > 1 else np.inf
        other = np.append(weight[parts[low]], for_nothing)
        moved = weight[parts[high]][:, None] - other  # [rows of high, rows of low + 1]
        i, j = np.unravel_index(np.abs(moved - gap / 2).argmin(), moved.shape)
        if not 0 < moved[i, j] < gap:
            break
        totals[high] -= moved[i, j]
        totals[low] += moved[i, j]
        parts[low].append(parts[high].pop(i))
        if j < len(other) - 1:
            parts[high].append(parts[low].pop(j))
    return parts
