"""Lengths of rows: those of the batches, known again without tokenising, measured again when they change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_picture
from PIL import Image
from ranks import on_ranks
from runs import write_rows

from mllm.data import lengths as lengths_module
from mllm.data.collator import Collator
from mllm.data.lengths import Lengths, Ranks, file_lengths, measure, mixture_lengths
from mllm.data.mixture import Cap, Mixture
from mllm.data.rows import Rows, open_rows
from mllm.data.tokens import IGNORE
from mllm.errors import DataError
from mllm.model import MllmProcessor


@pytest.fixture(scope="module")
def processor() -> MllmProcessor:
    return make_model()[1]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return open_rows(write_rows(tmp_path / "rows", 12), image_root=tmp_path / "rows")


def assert_equal(one: Lengths, two: Lengths) -> None:
    for name in ("tokens", "labels", "views"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), name)


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_are_those_of_the_batches(rows: Rows, processor: MllmProcessor, workers: int) -> None:
    collator = Collator(processor, max_length=200)  # the last row loses a round
    found = measure(rows, collator, workers)
    batches = [collator([row]) for row in rows]
    assert sum(batch["dropped_turns"] for batch in batches)
    assert found.tokens.tolist() == [batch["input_ids"].shape[1] for batch in batches]
    assert found.labels.tolist() == [int((batch["labels"] != IGNORE).sum()) for batch in batches]
    assert found.views.tolist() == [len(batch.get("pixel_values", ())) for batch in batches]


def test_tiles_are_counted_without_reading_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = {"type": "anyres", "pinpoints": [[32, 64], [64, 32], [64, 64]]}
    _, processor = make_model(tiling=tiling)
    make_picture(0, (120, 30)).save(tmp_path / "wide.jpg")
    (tmp_path / "a.jsonl").write_text(
        '{"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "image": "wide.jpg"}]}, '
        '{"role": "assistant", "content": [{"type": "text", "text": "fox"}]}]}\n'
    )
    rows = open_rows(tmp_path / "a.jsonl", image_root=tmp_path)
    batch = Collator(processor)([rows[0]])
    # Of other formats than JPEG the size is not always in the header.
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("a picture was decoded"))
    found = measure(rows, Collator(processor))
    assert found.views.tolist() == [len(batch["pixel_values"])] != [1]
    assert found.tokens.tolist() == [batch["input_ids"].shape[1]]


def test_known_lengths_are_read_again(
    rows: Rows, processor: MllmProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = file_lengths(rows, Collator(processor))
    monkeypatch.setattr(lengths_module, "measure", lambda *_: pytest.fail("measured twice"))
    assert_equal(first, file_lengths(rows, Collator(processor)))
    with pytest.raises(pytest.fail.Exception):
        file_lengths(rows, Collator(processor, max_length=200))


def test_lengths_that_were_copied_in_part_are_measured_again(rows: Rows, processor: MllmProcessor) -> None:
    first = file_lengths(rows, Collator(processor))
    (kept,) = rows.path.parent.glob("*.npy")
    whole = kept.read_bytes()
    for size in (0, 40, len(whole) - 4):
        kept.write_bytes(whole[:size])
        assert_equal(file_lengths(rows, Collator(processor)), first)
        assert kept.read_bytes() == whole


def test_another_template_or_other_data_are_measured_anew(rows: Rows, processor: MllmProcessor) -> None:
    first = file_lengths(rows, Collator(processor))
    other = make_model(template="plain")[1]
    assert (file_lengths(rows, Collator(other)).tokens < first.tokens).all()
    lines = rows.path.read_text().splitlines()
    rows.path.write_text("\n".join(reversed(lines)) + "\n")
    turned = open_rows(rows.path, image_root=rows.image_root)
    assert file_lengths(turned, Collator(processor)).tokens.tolist() == first.tokens[::-1].tolist()


def test_a_mixture_has_the_lengths_of_the_rows_drawn(
    rows: Rows, processor: MllmProcessor, tmp_path: Path
) -> None:
    last = tmp_path / "last.jsonl"
    last.write_text("\n".join(rows.path.read_text().splitlines()[-4:]))
    fewer = open_rows(last, image_root=rows.image_root)
    files: Any = [rows, fewer]
    mixture = Mixture(files, ["rows", "fewer"], "weights", [1.0, 3.0])
    collator = Collator(processor)
    found = mixture_lengths(mixture, collator)
    assert found.tokens.tolist() == [len(collator.encode(mixture[i]).input_ids) for i in range(len(mixture))]


def measure_on(rank: int, world: int, rows: Rows) -> Any:
    """On a rank, in a process of its own: lengths and rows measured by then, twice; a bad row's error."""

    def gather(own: list[Any]) -> list[Any]:
        found: list[Any] = [None] * world
        torch.distributed.all_gather_object(found, own[0])
        return found

    lengths_module.CHUNK = 2
    measured: list[int] = []
    sizes = lengths_module.sizes_of
    lengths_module.sizes_of = lambda *args: (measured.append(1), sizes(*args))[1]
    processor, ranks, found = make_model()[1], Ranks(rank, world, gather), []
    for _ in range(2):
        found.append((file_lengths(rows, Collator(processor, 500), ranks=ranks), len(measured)))
    try:
        file_lengths(rows, Collator(processor, 10), ranks=ranks)
    except DataError as error:
        return found, str(error)


@pytest.mark.slow
def test_ranks_measure_a_part_each(rows: Rows, processor: MllmProcessor, tmp_path: Path) -> None:
    wanted = measure(rows, Collator(processor, 500))
    one, other = on_ranks(measure_on, 2, tmp_path, rows)
    for found, error in (one, other):
        assert [measured for _, measured in found] == [6, 6], "half of the rows, and none a second time"
        for lengths, _ in found:
            assert_equal(lengths, wanted)
        assert "needs" in error
        assert error == one[1]  # no rank waits for one that has stopped


def test_a_count_that_was_broken_off_goes_on(
    rows: Rows, processor: MllmProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = measure(rows, Collator(processor))
    monkeypatch.setattr(lengths_module, "CHUNK", 4)
    encode, encoded = Collator.encode, []

    def encode_until(limit: int) -> Any:
        def stops(self: Collator, row: Any) -> Any:
            if len(encoded) == limit:
                raise KeyboardInterrupt
            encoded.append(row["id"])
            return encode(self, row)

        return stops

    monkeypatch.setattr(Collator, "encode", encode_until(9))
    with pytest.raises(KeyboardInterrupt):
        file_lengths(rows, Collator(processor))
    (part,) = rows.path.parent.glob("*.part")
    monkeypatch.setattr(Collator, "encode", encode_until(13))
    # Torn inside a row of the second chunk, as by a power failure: that chunk is measured again.
    part.write_bytes(part.read_bytes()[: 32 * 6 + 7])
    with pytest.raises(KeyboardInterrupt):
        file_lengths(rows, Collator(processor))
    assert encoded == [row["id"] for row in [*rows[:9], *rows[4:8]]]
    monkeypatch.setattr(Collator, "encode", encode_until(17))
    assert_equal(file_lengths(rows, Collator(processor)), wanted)
    assert encoded[13:] == [row["id"] for row in rows[8:]]
    assert not list(rows.path.parent.glob("*.part"))


def test_only_what_a_cap_leaves_is_measured(
    rows: Rows, processor: MllmProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = Mixture([rows, rows], ["a", "b"], "concat", None, 0, [Cap(4), None], [2, 1])  # type: ignore[list-item]
    collator = Collator(processor)
    wanted = [len(collator.encode(mixture[i]).input_ids) for i in range(len(mixture))]
    measured: list[int] = []
    measure = lengths_module.measure
    monkeypatch.setattr(
        lengths_module, "measure", lambda rows, *rest: (measured.append(len(rows)), measure(rows, *rest))[1]
    )
    assert mixture_lengths(mixture, collator).tokens.tolist() == wanted
    assert measured == [4, 12]
    assert mixture_lengths(mixture, collator).tokens.tolist() == wanted
    assert measured == [4, 12], "known lengths were measured again"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_trained_on_is_named(rows: Rows, processor: MllmProcessor, workers: int) -> None:
    with pytest.raises(DataError, match=r"^\S*rows.jsonl:1 \(id r0\): .*needs \d+ tokens") as caught:
        measure(rows, Collator(processor, max_length=10), workers)
    assert "\n" not in str(caught.value)
