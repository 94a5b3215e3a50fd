"""How long every row is, images included, before training starts and without decoding a picture.

They come from the same code that makes the batches, so they are exact (LLaVA's are words, at 128 an image).
All workers of all ranks measure a part each, and the result is kept beside the data, under a name that
changes with the data, the processor and this package. What is measured is kept as it comes: a count that is
broken off goes on from there, whatever the number of ranks. Of sets for which all this would take minutes,
rows are measured when a step needs them (`mllm.data.lengths_on_demand`).
"""

from __future__ import annotations

import hashlib
import logging
import math
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
from mllm.data.length_store import LengthStore
from mllm.data.mixture import Mixture
from mllm.data.rows import Rows
from mllm.data.schema import Row, empty_answers
from mllm.data.tokens import IGNORE
from mllm.errors import DataError

CHUNK = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lengths:
    """Sizes of N rows.

    Attributes:
        tokens: [N], image placeholders included.
        labels: [N], supervised tokens.
        views: [N], pictures that the vision encoder sees: images, or with tiling their views.
        turns: [N], messages of the row as it is in the file.
        dropped: [N], those of them that `data.max_length` has no room for.
        empty: [N], answers without text, as the row is in the file.
    """

    tokens: np.ndarray
    labels: np.ndarray
    views: np.ndarray
    turns: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    empty: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

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
    cache = lengths_file(rows, collator, chosen)
    kept = read_kept(cache)
    if all(ranks.gather([kept is not None])):  # else all measure, or some would wait for what others skip
        return Lengths(*np.array(kept))
    wanted: Any = rows if chosen is None else Subset(rows, chosen)  # type: ignore[arg-type]
    lengths = measure(wanted, collator, workers, show, ranks, part_file(cache))
    if ranks.rank == 0:
        _keep(lengths, cache)
    ranks.gather([None])  # or the next who asks might not find what is still being written
    return lengths


def lengths_file(rows: Rows, collator: Collator, chosen: np.ndarray | None = None) -> Path:
    """Where the sizes of a file's rows are kept, [kinds, N], when all are known."""
    return rows.path.with_name(f"{rows.path.name}.lengths-{fingerprint(rows, collator, chosen)}.npy")


def part_file(complete: Path) -> Path:
    """Where they are kept while some are missing."""
    return complete.with_suffix(".part")


def _keep(lengths: Lengths, complete: Path) -> None:
    try:
        with atomic_path(complete) as partial:
            np.save(partial, np.stack([getattr(lengths, one.name) for one in fields(Lengths)]))
        part_file(complete).unlink(missing_ok=True)  # by another run on the same data
    except OSError as error:  # a folder of somebody else, a full disk
        logger.warning("lengths of rows are not kept in %s (%s)", complete, error.strerror)


def read_kept(path: Path) -> np.ndarray | None:
    """[kinds, N] of a complete file of sizes; None where there is none, or one that was copied in part."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None


def measure(
    rows: Sequence[Row],
    collator: Collator,
    workers: int = 0,
    show: bool = False,
    ranks: Ranks = ALONE,
    unfinished: Path | None = None,
) -> Lengths:
    """Sizes of rows, in their order; see `file_lengths`.

    `unfinished` keeps what is measured, and has what an earlier call had measured of the same rows.
    """
    kinds = len(fields(Lengths))
    store = None if unfinished is None else LengthStore(unfinished, kinds)
    sizes = np.zeros((len(rows), kinds), np.int32) if store is None else store.read(0, len(rows))
    rank_of = np.arange(len(rows)) // CHUNK % ranks.size  # [N], who measures the row
    fault = None
    wanted = [
        chunk
        for chunk in range(ranks.rank, math.ceil(len(rows) / CHUNK), ranks.size)
        if not sizes[chunk * CHUNK : (chunk + 1) * CHUNK, 0].all()  # no measured row has zero tokens
    ]
    chunks: Any = DataLoader(_Chunks(rows, collator, wanted), batch_size=None, num_workers=workers)
    for start, found in track(chunks, "measuring rows, once for all runs", len(wanted), show):
        if isinstance(found, DataError):
            fault = str(found)
            break  # and tell the others, who would wait
        sizes[start : start + len(found)] = found
        if store is not None:
            store.write(start, np.asarray(found))
    if store is not None:
        store.close()
    parts = ranks.gather([(fault, sizes[rank_of == ranks.rank])])
    for rank, (fault_there, sizes_there) in enumerate(parts):
        if fault_there:
            raise DataError(fault_there)
        sizes[rank_of == rank] = sizes_there
    return Lengths(*np.ascontiguousarray(sizes.T))


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


def sizes_of(row: Row, collator: Collator) -> tuple[int, ...]:
    """One row's, in the order of the fields of `Lengths`; raises `DataError` as the collator does."""
    encoded = collator.encode(row)
    tiles, images = collator.processor.tiles, encoded.images
    views = len(images) if tiles is None else sum(tiles.num_tiles(image_size(i)) for i in images)
    labels = len(encoded.labels) - encoded.labels.count(IGNORE)
    turns, empty = len(row["messages"]), empty_answers(row["messages"])
    return len(encoded.input_ids), labels, views, turns, encoded.dropped_turns, empty


class _Chunks(Dataset[Any]):
    """(first row, sizes [rows, 6] or the fault) of `CHUNK` rows at a time, of the chunks that are wanted."""

    def __init__(self, rows: Sequence[Row], collator: Collator, wanted: Sequence[int]):
        self.rows, self.collator, self.wanted = rows, collator, wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | DataError]:
        start = self.wanted[index] * CHUNK
        numbers = range(start, min(start + CHUNK, len(self.rows)))
        try:
            return start, np.array([sizes_of(self.rows[i], self.collator) for i in numbers], dtype=np.int32)
        except DataError as error:
            return start, error  # raised in a worker it would arrive as a page of traceback
