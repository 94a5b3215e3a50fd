"""Several data sets in one: joined, or drawn from with given shares; and a general set mixed in.

InstructBLIP (arXiv 2305.06500, section 2.4) draws from a data set of S rows with probability proportional
to sqrt(S), so that large sets are not learnt too slowly nor small ones by heart, and corrects some by hand.
Rows of an earlier stage, mixed into a later one, keep a model from forgetting it (replay).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mllm.errors import ConfigError

Mixing = Literal["concat", "sqrt", "weights"]
_CAP = re.compile(r"(first:)?(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True)
class Cap:
    """At most so many rows of a data set: `3000` or `10%`, drawn; `first:3000` or `first:10%`."""

    amount: float
    percent: bool = False
    first: bool = False

    @classmethod
    def parse(cls, text: str | int) -> Cap:
        """A cap as a recipe writes it; raises `ValueError`."""
        match = _CAP.fullmatch(str(text))
        if match is None or float(match[2]) == 0 or (match[3] and float(match[2]) > 100):
            raise ValueError(f"{text!r} is no number of rows; write 3000, 10%, first:3000 or first:10%")
        if not match[3] and "." in match[2]:
            raise ValueError(f"{text!r} is no whole number of rows")
        return cls(float(match[2]), bool(match[3]), bool(match[1]))

    def choose(self, size: int, seed: tuple[int, ...]) -> NDArray[np.int64] | None:
        """The row numbers that are left of `size`, in their order; None means all."""
        count = round(size * self.amount / 100) if self.percent else int(self.amount)
        if count >= size:
            return None
        if self.first:
            return np.arange(count)
        return np.sort(np.random.default_rng(seed).permutation(size)[:count])


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

    With `concat` every row comes exactly once, or as often as its data set's `epochs` say. Otherwise a data
    set that gives more rows than it has is gone through again, in a new order, before any of its rows comes a
    further time.

    Args:
        datasets: map-style data sets.
        names: what errors and reports call them.
        mixing, weights: see `shares`; a weight a data set, 1.0 for all by default.
        seed: of the draw, which is the same in every epoch and on every rank.
        caps: the most rows of each that are used; None for all.
        epochs: with `concat`, how often each is gone through; 1.0 for all by default.
        replay: makes the last data set a general one that is added to what the others give: its share of all.

    Attributes:
        sizes: rows that each data set has.
        chosen: row numbers that a cap leaves of each; None means all.
        counts: rows drawn from each.
        passes: how often each is gone through, of what its cap leaves.

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
        caps: Sequence[Cap | None] | None = None,
        epochs: Sequence[float] | None = None,
        replay: float | None = None,
    ):
        self.datasets, self.names = list(datasets), list(names)
        sizes = self.sizes = [len(data) for data in self.datasets]  # type: ignore[arg-type]
        weights = [1.0] * len(sizes) if weights is None else list(weights)
        for name, size, weight in zip(self.names, sizes, weights, strict=True):
            if not size or weight <= 0:
                fault = "no rows" if not size else f"weight {weight}"
                raise ConfigError(f"data: {name} has {fault}; remove it from data.path")
        of_caps = [None] * len(sizes) if caps is None else caps
        self.chosen = [
            None if cap is None else cap.choose(size, (seed, k, 1))
            for k, (size, cap) in enumerate(zip(sizes, of_caps, strict=True))
        ]
        left = [size if rows is None else len(rows) for size, rows in zip(sizes, self.chosen, strict=True)]
        general = len(sizes) - (replay is not None)  # the first that is replayed, if one is
        passes = [1.0] * len(sizes) if epochs is None else list(epochs)
        counts = _counts(left[:general], mixing, weights[:general], passes[:general])
        source = np.repeat(np.arange(general), counts)
        if mixing != "concat":
            source = np.random.default_rng(seed).permutation(source)
        if replay is not None:
            added = max(1, round(len(source) * replay / (1 - replay)))
            source = np.concatenate([source, np.full(added, general)])
        self.source = source.astype(np.int32)
        self.counts = np.bincount(self.source, minlength=len(sizes)).tolist()
        if 0 in self.counts:
            name = self.names[self.counts.index(0)]
            raise ConfigError(
                f"data: {name} would give none of {len(source)} rows; raise its weight, or remove it"
            )
        self.passes = [count / size for count, size in zip(self.counts, left, strict=True)]
        self.row = np.empty(len(source), dtype=np.int64)
        for k, size in enumerate(left):
            drawn, rows = _passes(size, self.counts[k], (seed, k)), self.chosen[k]
            self.row[self.source == k] = drawn if rows is None else rows[drawn]

    def __len__(self) -> int:
        return len(self.row)

    @property
    def total(self) -> int | None:
        """Rows of an epoch, where they are known."""
        return len(self)

    def __getitem__(self, index: int) -> Any:
        source = self.source[index]
        row = self.datasets[source][int(self.row[index])]
        return {**row, "dataset": self.names[source]} if isinstance(row, dict) else row

    def report(self) -> list[tuple[str, int, float]]:
        """(name, rows drawn, share of all) of each data set."""
        rows = zip(self.names, self.counts, strict=True)
        return [(name, count, count / len(self)) for name, count in rows]

    def record(self) -> list[dict[str, Any]]:
        """What a run's record says of each data set, which must be `Rows`."""
        parts = zip(self.datasets, self.sizes, self.passes, self.report(), strict=True)
        return [
            {
                "path": name,
                "sha256": rows.identity(),  # type: ignore[attr-defined]
                "hashed": rows.hashed,  # type: ignore[attr-defined]
                "rows": size,
                "drawn": drawn,
                "share": share,
                "passes": passes,
            }
            for rows, size, passes, (name, drawn, share) in parts
        ]


def _counts(
    sizes: Sequence[int], mixing: Mixing, weights: Sequence[float], passes: Sequence[float]
) -> np.ndarray:
    """Rows to draw from each data set."""
    if mixing == "concat":
        if len(set(weights)) > 1:
            raise ConfigError("data: concat takes every row once; with weights, mix by sqrt or weights")
        return np.array([round(size * times) for size, times in zip(sizes, passes, strict=True)])
    if any(times != 1 for times in passes):
        raise ConfigError(f"data: epochs are of mixing concat; with {mixing}, give weights")
    # Largest remainders: the counts are the shares, not a draw that only tends to them.
    total = sum(sizes)
    ideal = shares(sizes, mixing, weights) * total
    count = np.floor(ideal).astype(int)
    count[np.argsort(count - ideal, kind="stable")[: total - count.sum()]] += 1
    return count


def _passes(size: int, count: int, seed: tuple[int, int]) -> np.ndarray:
    """`count` row numbers: whole passes over `size` rows, each in an order of its own, and the rest."""
    if count == size:
        return np.arange(size)
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(size) for _ in range(1 + count // size)]
    return np.concatenate(passes)[:count]
