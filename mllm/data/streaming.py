"""A Hugging Face data set read as it comes, for data that cannot be indexed: split, shuffled, resumable.

Each worker of each rank is a lane. Where the files of the data set divide evenly among the lanes, a lane
reads files of its own, in an order of the pass; else every lane reads all files and keeps one row of as many
as there are lanes. Either way the lanes divide the rows: none comes twice in a pass and none is lost. A lane
never ends: behind its last row begins its next pass. So all ranks have equally many micro-batches, whatever
the files hold, and no rank waits for another at an end.

Rows are shuffled in blocks, each permuted by the seed, the pass and its number. Unlike a buffer that is
refilled as it is drawn from (`datasets`' own is lost at a checkpoint, says its documentation), a block can be
read again: a position is a few numbers, and going on from it gives exactly the rows that would have come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mllm.data.hf import check_columns, identity, load, parse_hf, readable, row_of
from mllm.data.readers import READERS, Reader
from mllm.data.rows import detect_format, resolve_images
from mllm.data.schema import Row
from mllm.errors import ConfigError, DataError

READ = 64  # rows that are decoded at a time


@dataclass(frozen=True)
class Position:
    """Where a lane is: at the beginning of a block, and how many rows of it have been given.

    Attributes:
        epoch: passes before this one.
        file: of the lane's files in this pass, the one that the block begins in.
        row: rows of that file before the block.
        seen: rows of the pass before the block, those of other lanes included.
        block: its number in the pass.
        taken: rows of the block that have been given.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    seen: int = 0
    block: int = 0
    taken: int = 0


class RowStream:
    """The rows of `hf:...` as a stream; `lane` gives those of one worker.

    Args:
        path: see `mllm.data.hf`.
        format: a key of `READERS`, or `auto`.
        image_root: the folder that image paths are relative to.
        buffer: rows of a block.
        seed: of all orders.

    Raises:
        ConfigError: it cannot be read.
        DataError: it is empty, or no column has text.
    """

    def __init__(self, path: str, format: str, image_root: str | None, buffer: int, seed: int):
        self.place, self.buffer, self.seed = parse_hf(path), buffer, seed
        self.names, self.total = [str(self.place)], None
        data = load(self.place, streaming=True)
        # Not decoded: images are decoded where the others are, by our own guarded code.
        self.data = data.decode(False) if data.features else data
        self.image_root = image_root
        first = next(_rows_of(self.data, str(self.place)), None)
        if first is None:
            raise DataError(f"{self.place}: there are no rows; a data set needs at least one")
        self.columns = check_columns(list(first), str(self.place))
        where = f"{self.place} row 0"
        self.format = format if format != "auto" else detect_format(self._raw(first, where), where)
        self.reader: Reader = READERS[self.format]

    @property
    def files(self) -> int:
        """Files, or other parts that can be read alone."""
        return int(self.data.num_shards)

    def by_files(self, lanes: int) -> bool:
        """Whether so many lanes each read files of their own."""
        return self.files % lanes == 0

    def record(self) -> list[dict[str, Any]]:
        """What a run's record says of the data."""
        found = {"sha256": identity(self.place, self.data), "hashed": "fingerprint"}
        return [{"path": self.names[0], **found, "streaming": True, "shuffle_buffer": self.buffer}]

    def once(self) -> Iterator[Row]:
        """All rows, each once, as one lane has them first."""
        for row, position in self.lane(0, 1, Position()):
            if position.epoch:
                return
            yield row

    def lane(self, number: int, lanes: int, start: Position) -> Iterator[tuple[Row, Position]]:
        """Rows of one lane without end, each with the position behind it."""
        at = start
        while True:
            rows = 0
            for block, found in self._blocks(number, lanes, at):
                order = np.random.default_rng((self.seed, number, block.epoch, block.block)).permutation(
                    len(found)
                )
                for taken in range(block.taken, len(found)):
                    raw, where = found[order[taken]]
                    yield self._row(raw, where), replace(block, taken=taken + 1)
                rows += len(found)
            if not rows and at == Position(epoch=at.epoch):
                raise DataError(
                    f"{self.place}: fewer rows than the {lanes} workers of all ranks; lower train.num_workers"
                )
            at = Position(epoch=at.epoch + 1)

    def _blocks(
        self, number: int, lanes: int, start: Position
    ) -> Iterator[tuple[Position, list[tuple[Any, str]]]]:
        """The blocks of a pass from `start` on."""
        at, block = start, []
        for raw, where, behind in self._read(number, lanes, start):
            block.append((raw, where))
            if len(block) == self.buffer:
                yield at, block
                at, block = replace(behind, block=at.block + 1), []
        if block:
            yield at, block

    def _read(self, number: int, lanes: int, start: Position) -> Iterator[tuple[Any, str, Position]]:
        """(raw row, its place, position behind it) of the lane's rows, in the order of the files."""
        order = np.random.default_rng((self.seed, start.epoch)).permutation(self.files)
        own = self.by_files(lanes)
        order = order[number::lanes] if own else order
        seen = start.seen
        for place in range(start.file, len(order)):
            file = int(order[place])
            row = start.row if place == start.file else 0
            part = self.data.shard(num_shards=self.files, index=file)
            for raw in _rows_of(part.skip(row) if row else part, f"{self.place} file {file}"):
                row, seen = row + 1, seen + 1
                if own or (seen - 1) % lanes == number:
                    where = f"{self.place} file {file} row {row - 1}"
                    yield raw, where, Position(start.epoch, place, row, seen)

    def _raw(self, columns: Any, where: str) -> Any:
        return row_of({name: columns.get(name) for name in self.columns}, where)

    def _row(self, columns: Any, where: str) -> Row:
        row = self.reader(self._raw(columns, where), where)
        return {**resolve_images(row, self.image_root, False, where), "source": where}


class StreamBatches(IterableDataset[dict[str, Any]]):
    """One rank's batches of a stream, each with `position`: (lane of the rank, `Position` behind the batch).

    Args:
        stream: the rows.
        collator: makes a batch of rows.
        batch_size: rows of a batch.
        rank, ranks: which rank this is, and of how many.
        workers: of the data loader.
        positions: of each lane of this rank, where it goes on.
        done: batches that this rank has had; the loader asks its workers in turn, and the next one goes on.
    """

    def __init__(
        self,
        stream: RowStream,
        collator: Any,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        positions: Sequence[Position] | None = None,
        done: int = 0,
    ):
        self.stream, self.collator, self.batch_size = stream, collator, batch_size
        self.rank, self.ranks, self.width = rank, ranks, max(1, workers)
        self.positions = list(positions or [Position()] * self.width)
        self.done = done

    @property
    def lanes(self) -> int:
        """Of all ranks."""
        return self.ranks * self.width

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if (worker.num_workers if worker else 1) != self.width:
            raise ConfigError("a stream's batches must be loaded by as many workers as they were made for")
        mine = (self.done + (worker.id if worker else 0)) % self.width
        rows = self.stream.lane(self.rank * self.width + mine, self.lanes, self.positions[mine])
        while True:
            taken = list(islice(rows, self.batch_size))
            batch = self.collator([row for row, _ in taken])
            yield {**batch, "position": (mine, asdict(taken[-1][1]))}


def _rows_of(data: Any, where: str) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.IterableDataset`; raises `DataError` where it cannot be read further."""
    # With a batch size, because plain iteration divides among the workers once more.
    with readable(where, DataError):
        for batch in data.iter(batch_size=READ):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
