"""How long every row is, images included, before training starts and without decoding a picture.

Sampling by length and packing need the lengths of all rows. They come from the same code that makes the
batches, so they are exact (LLaVA's are words, at 128 an image). Tokenising a large set takes minutes, so all
workers of all ranks measure a part each, and the result is kept beside the data, under a name that changes
with the data, the processor and this package.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

import mllm
from mllm.data.collator import Collator
from mllm.data.files import atomic_path, sha256_of, track
from mllm.data.images import image_size
from mllm.data.mixture import Mixture
from mllm.data.rows import Rows
from mllm.data.schema import Row
from mllm.data.tokens import IGNORE
from mllm.errors import DataError

CHUNK = 256


@dataclass(frozen=True)
class Lengths:
    """Sizes of N rows.

    Attributes:
        tokens: [N], image placeholders included.
        labels: [N], supervised tokens.
        views: [N], pictures that the vision encoder sees: images, or with tiling their views.
        turns: [N], messages of the row as it is in the file.
        dropped: [N], those of them that `data.max_length` has no room for.
    """

    tokens: np.ndarray
    labels: np.ndarray
    views: np.ndarray
    turns: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    @property
    def over(self) -> float:
        """Share of the rows that are longer than `data.max_length`, and are shortened."""
        return float((self.dropped > 0).mean()) if len(self.dropped) else 0.0

    @property
    def dropped_share(self) -> float:
        """Share of the messages that this drops."""
        return float(self.dropped.sum() / max(1, self.turns.sum()))

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: np.ndarray) -> Lengths:
        """The sizes of these rows, in this order."""
        of_rows = (getattr(self, one.name) for one in fields(self))
        return Lengths(*(sizes[rows] if len(sizes) else sizes for sizes in of_rows))


@dataclass(frozen=True)
class Ranks:
    """Who measures together.

    Attributes:
        rank, size: which this is, and how many there are.
        gather: a list of one object of each rank -> the list of all, on every rank.
    """

    rank: int
    size: int
    gather: Callable[[list[Any]], list[Any]]


ALONE = Ranks(0, 1, list)


def mixture_lengths(
    mixture: Mixture, collator: Collator, workers: int = 0, show: bool = False, ranks: Ranks = ALONE
) -> Lengths:
    """Sizes of a mixture's rows; a row that is drawn twice is measured once."""
    per_set = [
        file_lengths(rows, collator, workers, show, chosen, ranks)  # type: ignore[arg-type]
        for rows, chosen in zip(mixture.datasets, mixture.chosen, strict=True)
    ]
    joined = Lengths(*(np.concatenate([getattr(one, f.name) for one in per_set]) for f in fields(Lengths)))
    starts = np.cumsum([0, *map(len, per_set[:-1])])
    place = mixture.row.copy()
    for k, chosen in enumerate(mixture.chosen):
        if chosen is not None:
            mine = mixture.source == k
            place[mine] = np.searchsorted(chosen, place[mine])
    return joined.take(starts[mixture.source] + place)


def file_lengths(
    rows: Rows,
    collator: Collator,
    workers: int = 0,
    show: bool = False,
    chosen: np.ndarray | None = None,
    ranks: Ranks = ALONE,
) -> Lengths:
    """Sizes of the rows of one file, read from beside it where they are known.

    Args:
        rows: of the file.
        collator: makes the batches; rows that it shortens to its `max_length` count as shortened.
        workers: processes that tokenise.
        show: a progress bar.
        chosen: the numbers of the rows that are wanted; None means all.
        ranks: who measures a part each; all of them call this.

    Raises:
        DataError: a row that could not be trained on; names it.
    """
    cache = rows.path.with_name(f"{rows.path.name}.lengths-{fingerprint(rows, collator, chosen)}.npy")
    if all(ranks.gather([cache.is_file()])):  # else all measure, or some would wait for what others skip
        return Lengths(*np.load(cache))
    wanted: Any = rows if chosen is None else Subset(rows, chosen)  # type: ignore[arg-type]
    lengths = measure(wanted, collator, workers, show, ranks)
    if ranks.rank == 0 and os.access(cache.parent, os.W_OK):  # a read-only disk: measured every time
        with atomic_path(cache) as partial:
            np.save(partial, np.stack([getattr(lengths, one.name) for one in fields(Lengths)]))
    return lengths


def measure(
    rows: Sequence[Row],
    collator: Collator,
    workers: int = 0,
    show: bool = False,
    ranks: Ranks = ALONE,
) -> Lengths:
    """Sizes of rows, in their order; see `file_lengths`."""
    chunks = _Chunks(rows, collator)
    mine = range(ranks.rank, len(chunks), ranks.size)
    found: Any = DataLoader(Subset(chunks, mine), batch_size=None, num_workers=workers)
    sizes: list[np.ndarray] = []
    fault = None
    for chunk in track(found, "lengths", len(mine), show):
        if isinstance(chunk, DataError):
            fault = str(chunk)
            break  # and tell the others, who would wait
        sizes.append(chunk.numpy())
    parts = ranks.gather([(fault, sizes)])
    for fault, _ in parts:
        if fault:
            raise DataError(fault)
    in_order = [parts[i % ranks.size][1][i // ranks.size] for i in range(len(chunks))]
    return Lengths(*np.concatenate(in_order).T)


def fingerprint(rows: Rows, collator: Collator, chosen: np.ndarray | None = None) -> str:
    """What lengths depend on: the rows, where their images are, the processor, the limit, this package."""
    root = str(rows.image_root and rows.image_root.absolute())
    kinds = ",".join(one.name for one in fields(Lengths))
    parts = [mllm.__version__, kinds, rows.identity(), root, str(collator.max_length)]
    if chosen is not None:
        parts.append(hashlib.sha256(chosen.tobytes()).hexdigest())
    with TemporaryDirectory() as folder:
        collator.processor.save_pretrained(folder)
        parts += [sha256_of(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class _Chunks(Dataset[Any]):
    """Sizes of `CHUNK` rows at a time: [rows, 5]."""

    def __init__(self, rows: Sequence[Row], collator: Collator):
        self.rows, self.collator = rows, collator

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / CHUNK)

    def __getitem__(self, chunk: int) -> np.ndarray | DataError:
        numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.rows)))
        try:
            return np.array([self._sizes(self.rows[i]) for i in numbers], dtype=np.int32)
        except DataError as error:
            return error  # raised in a worker it would arrive as a page of traceback

    def _sizes(self, row: Row) -> tuple[int, ...]:
        encoded = self.collator.encode(row)
        tiles = self.collator.processor.tiles
        images = encoded.images
        views = len(images) if tiles is None else sum(tiles.num_tiles(image_size(i)) for i in images)
        labels = sum(label != IGNORE for label in encoded.labels)
        return len(encoded.input_ids), labels, views, len(row["messages"]), encoded.dropped_turns
