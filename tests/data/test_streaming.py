"""Streams: every row of a pass once over ranks and workers, in an order that can be taken up anywhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import make_rows
from torch.utils.data import DataLoader

from mllm.data.streaming import Position, RowStream, StreamBatches
from mllm.errors import ConfigError, DataError

SIZES = (7, 1, 12, 5, 3, 9)  # rows of the files
FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)


def write_files(folder: Path, sizes: tuple[int, ...] = SIZES) -> str:
    """The rows of `runs` as parquet files with their pictures inside, and the name of the data set."""
    folder.mkdir()
    rows = iter(make_rows(sum(sizes)))
    for number, size in enumerate(sizes):
        part = list(islice(rows, size))
        for row in part:
            content = [p for m in row["messages"] for p in m["content"]]
            row["images"] = [p.pop("image") for p in content if p["type"] == "image"]
            for p in content:
                p.setdefault("text", None)
        Dataset.from_list(part, features=FEATURES).to_parquet(folder / f"train-{number}.parquet")
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_files(tmp_path_factory.mktemp("stream") / "rows")


def stream_of(files: str, buffer: int = 4, seed: int = 0) -> RowStream:
    return RowStream(files, "auto", None, buffer, seed)


def ids(rows: Any) -> dict[str, Any]:
    """A collator for tests: the names of the rows."""
    return {"ids": [row["id"] for row in rows]}


def first_pass(stream: RowStream, lane: int, lanes: int) -> list[str]:
    rows = stream.lane(lane, lanes, Position())
    found = []
    for row, position in rows:
        if position.epoch:
            return found
        found.append(row["id"])
    raise AssertionError("a stream has no end")


@settings(deadline=None, max_examples=25)
@given(lanes=st.integers(1, 8), buffer=st.integers(1, 20), seed=st.integers(0, 3))
def test_lanes_divide_a_pass(files: str, lanes: int, buffer: int, seed: int) -> None:
    stream = stream_of(files, buffer, seed)
    found = [first_pass(stream, lane, lanes) for lane in range(lanes)]
    assert Counter(row for lane in found for row in lane) == Counter(f"r{i}" for i in range(sum(SIZES)))
    if not stream.by_files(lanes):
        assert max(map(len, found)) - min(map(len, found)) <= 1


@settings(deadline=None, max_examples=25)
@given(lanes=st.integers(1, 4), buffer=st.integers(1, 20), stop=st.integers(0, 90), lane=st.integers(0, 3))
def test_a_lane_goes_on_from_any_position(files: str, lanes: int, buffer: int, stop: int, lane: int) -> None:
    stream, lane = stream_of(files, buffer), lane % lanes
    whole = list(islice(stream.lane(lane, lanes, Position()), stop + 30))
    at = whole[stop - 1][1] if stop else Position()
    again = list(islice(stream_of(files, buffer).lane(lane, lanes, at), 30))
    assert [(row["id"], asdict(p)) for row, p in again] == [(row["id"], asdict(p)) for row, p in whole[stop:]]


def test_orders_differ_between_passes_and_seeds(files: str) -> None:
    rows = [row["id"] for row, _ in islice(stream_of(files).lane(0, 1, Position()), 2 * sum(SIZES))]
    first, second = rows[: sum(SIZES)], rows[sum(SIZES) :]
    assert sorted(first) == sorted(second)
    assert first != second != sorted(first)
    other = [row["id"] for row, _ in islice(stream_of(files, seed=1).lane(0, 1, Position()), sum(SIZES))]
    assert other != first


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_take_turns_and_go_on(files: str, workers: int) -> None:
    """Batches of two ranks, broken off after any number: the same as without a break."""

    def batches(rank: int, positions: list[Position] | None = None, done: int = 0) -> Any:
        data = StreamBatches(stream_of(files), ids, 3, rank, 2, workers, positions, done)
        return DataLoader(data, batch_size=None, collate_fn=lambda batch: batch, num_workers=workers)

    for rank in range(2):
        whole = list(islice(batches(rank), 12))
        for stop in (1, 4, 7):
            positions = [Position() for _ in range(max(1, workers))]
            for batch in whole[:stop]:
                positions[batch["position"][0]] = Position(**batch["position"][1])
            again = list(islice(batches(rank, positions, stop), 5))
            assert again == whole[stop : stop + 5], (rank, stop)


def test_pictures_come_with_their_rows(files: str) -> None:
    for row, _ in islice(stream_of(files).lane(0, 1, Position()), 12):
        shown = [p for m in row["messages"] for p in m["content"] if p["type"] == "image"]
        assert len(shown) == (1, 0, 2)[int(row["id"][1:]) % 3]
        assert all(part["image"].read().startswith(b"\x89PNG") for part in shown)
        assert "file " in row["source"]


def test_too_few_rows_for_the_lanes(tmp_path: Path) -> None:
    stream = stream_of(write_files(tmp_path / "few", (2, 1)))
    with pytest.raises(DataError, match="fewer rows than the 4 workers"):
        next(stream.lane(3, 4, Position()))


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read"):
        stream_of("hf:nobody/has-this")
    Dataset.from_dict({"number": [1]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="none of the columns number has text"):
        stream_of(f"hf:{tmp_path}")
