"""Several data sets in one: joined, or drawn from with given shares.

InstructBLIP (arXiv 2305.06500, section 2.4) draws from a data set of S rows with probability proportional
to sqrt(S), so that large sets are not learnt too slowly nor small ones by heart, and corrects some by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from mllm.errors import ConfigError

Mixing = Literal["concat", "sqrt", "weights"]


def shares(sizes: Sequence[int], mixing: Mixing, weights: Sequence[float]) -> np.ndarray:
    """The share of each data set among the drawn rows; they sum to 1.

    Args:
        sizes: rows of each data set.
        mixing: `concat`: by size; `sqrt`: by the root of the size; `weights`: by `weights` alone.
        weights: of each data set, a factor on its share.
    """
    size = np.asarray(sizes, dtype=float)
    base = {"concat": size, "sqrt": np.sqrt(size), "weights": np.ones_like(size)}[mixing]
    mass = base * np.asarray(weights, dtype=float)
    return mass / mass.sum()


class Mixture(Dataset[Any]):
    """As many rows as its data sets have together, each data set being drawn from by its share.

    With `concat` every row comes exactly once. Otherwise a data set that gives more rows than it has is gone
    through again, in a new order, before any of its rows comes a further time.

    Args:
        datasets: map-style data sets.
        names: what errors and reports call them.
        mixing, weights: see `shares`; a weight a data set, 1.0 for all by default.
        seed: of the draw, which is the same in every epoch and on every rank.

    Attributes:
        sizes: rows that each data set has.
        counts: rows drawn from each.

    Raises:
        ConfigError: a data set that is empty or would give no row, or a weight that is not positive or, with
            `concat`, has no effect.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset[Any]],
        names: Sequence[str],
        mixing: Mixing = "concat",
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ):
        self.datasets, self.names = list(datasets), list(names)
        sizes = self.sizes = [len(data) for data in self.datasets]  # type: ignore[arg-type]
        weights = [1.0] * len(sizes) if weights is None else list(weights)
        for name, size, weight in zip(self.names, sizes, weights, strict=True):
            if not size or weight <= 0:
                fault = "no rows" if not size else f"weight {weight}"
                raise ConfigError(f"data: {name} has {fault}; remove it from data.path")
        total = sum(sizes)
        if mixing == "concat":
            if len(set(weights)) > 1:
                raise ConfigError("data: concat takes every row once; with weights, mix by sqrt or weights")
            source = np.repeat(np.arange(len(sizes)), sizes)
        else:
            # Largest remainders: the counts are the shares, not a draw that only tends to them.
            ideal = shares(sizes, mixing, weights) * total
            count = np.floor(ideal).astype(int)
            count[np.argsort(count - ideal, kind="stable")[: total - count.sum()]] += 1
            source = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), count))
        self.source = source.astype(np.int32)
        self.counts = np.bincount(self.source, minlength=len(sizes)).tolist()
        if 0 in self.counts:
            name = self.names[self.counts.index(0)]
            raise ConfigError(f"data: {name} would give none of {total} rows; raise its weight, or remove it")
        self.row = np.empty(total, dtype=np.int64)
        for k, size in enumerate(sizes):
            self.row[self.source == k] = _passes(size, self.counts[k], (seed, k))

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int) -> Any:
        return self.datasets[self.source[index]][int(self.row[index])]

    def report(self) -> list[tuple[str, int, float]]:
        """(name, rows drawn, share of all) of each data set."""
        rows = zip(self.names, self.counts, strict=True)
        return [(name, count, count / len(self)) for name, count in rows]


def _passes(size: int, count: int, seed: tuple[int, int]) -> np.ndarray:
    """`count` row numbers: whole passes over `size` rows, each in an order of its own, and the rest."""
    if count == size:
        return np.arange(size)
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(size) for _ in range(1 + count // size)]
    return np.concatenate(passes)[:count]
