"""Lengths measured when they are asked for: the same as all at once, none twice, none without need."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_model
from runs import TUNINGS, make_world, run_config, write_rows

from mllm.config import RunConfig
from mllm.data.collator import Collator
from mllm.data.lengths import lengths_file, mixture_lengths
from mllm.data.lengths_on_demand import LengthsOnDemand
from mllm.data.mixture import Cap, Mixture
from mllm.data.rows import open_rows
from mllm.data.sampler import MicroBatches
from mllm.errors import DataError
from mllm.model import MllmProcessor
from mllm.training import batches
from mllm.training.metrics import read_metrics
from mllm.training.train import train


@pytest.fixture(scope="module")
def processor() -> MllmProcessor:
    return make_model()[1]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the rows stand that were tokenised, in order."""
    found: list[str] = []
    encode = Collator.encode
    monkeypatch.setattr(
        Collator, "encode", lambda self, row: (found.append(row["source"]), encode(self, row))[1]
    )
    return found


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    """Twelve rows twice over, and four of twelve."""
    made: Any = [
        open_rows(write_rows(tmp_path / name, 12), image_root=tmp_path / name) for name in ("a", "b")
    ]
    return Mixture(made, ["a", "b"], "concat", None, 0, [None, Cap(4)], [2, 1])


def test_they_are_those_of_all_rows_and_none_is_measured_twice(
    mixture: Mixture, processor: MllmProcessor, encoded: list[str]
) -> None:
    collator = Collator(processor, max_length=200)
    lengths, other_rank = LengthsOnDemand(mixture, collator), LengthsOnDemand(mixture, collator)
    assert encoded == []
    order = np.random.default_rng(0).permutation(len(mixture))
    first, rest = order[:5], order[5:]
    drawn = {mixture[int(row)]["source"] for row in first}
    found = [lengths.take(first)]
    assert sorted(encoded) == sorted(drawn)
    found += [other_rank.take(rest)]
    assert len(encoded) == len(set(encoded)) == 16
    LengthsOnDemand(mixture, collator).take(order)  # of a later run
    assert len(encoded) == 16
    wanted = mixture_lengths(mixture, collator)
    for rows, sizes in zip((first, rest), found, strict=True):
        for name, values in vars(wanted).items():
            np.testing.assert_array_equal(getattr(sizes, name), values[rows], name)


def test_a_complete_count_is_read_and_a_broken_off_one_goes_on(
    mixture: Mixture, processor: MllmProcessor, encoded: list[str]
) -> None:
    collator = Collator(processor)
    rows: Any = mixture.datasets[0]
    alone = Mixture([rows], ["a"])
    some = LengthsOnDemand(alone, collator).take(np.arange(12))
    assert len(encoded) == 12
    wanted = mixture_lengths(alone, collator, workers=0)  # goes on from what is there: nothing is missing
    assert len(encoded) == 12
    assert lengths_file(rows, collator).is_file()
    assert LengthsOnDemand(alone, collator).take(np.arange(12)).tokens.tolist() == wanted.tokens.tolist()
    assert some.tokens.tolist() == wanted.tokens.tolist()
    assert len(encoded) == 12
    assert not list(rows.path.parent.glob("*.part"))


def test_a_folder_that_cannot_be_written(
    mixture: Mixture,
    processor: MllmProcessor,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refused)
    lengths = LengthsOnDemand(mixture, Collator(processor))
    wanted = lengths.take(np.arange(6)).tokens
    measured = len(encoded)
    assert lengths.take(np.arange(6)).tokens.tolist() == wanted.tolist()
    assert len(encoded) == measured, "what one process knows it measures once"
    assert "lengths of rows are not kept in" in caplog.text
    rows: Any = mixture.datasets[0]
    assert not list(rows.path.parent.glob("*.lengths-*"))
    assert (mixture_lengths(mixture, Collator(processor)).take(np.arange(6)).tokens == wanted).all()


def test_a_full_disk_costs_time_and_no_run(
    mixture: Mixture,
    processor: MllmProcessor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lengths = LengthsOnDemand(mixture, Collator(processor))
    wanted = lengths.take(np.arange(6)).tokens.tolist()

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    assert (lengths.take(np.arange(len(mixture))).tokens > 0).all()
    assert lengths.take(np.arange(6)).tokens.tolist() == wanted
    assert "no longer kept" in caplog.text


def test_a_resumed_run_measures_no_row_of_the_steps_behind_it(
    mixture: Mixture, processor: MllmProcessor, encoded: list[str]
) -> None:
    lengths = LengthsOnDemand(mixture, Collator(processor))
    batches = MicroBatches(lengths, 2, 2, flops=lambda sizes: sizes.tokens.astype(float))
    later = list(batches)[4:]  # as accelerate skips: it goes through all, and looks at none
    assert encoded == []
    assert [row for rows in later for row in pickle.loads(pickle.dumps(rows))] == [
        row for r in later for row in r
    ]
    assert 0 < len(encoded) <= 20


def test_a_row_that_cannot_be_trained_on_is_named(mixture: Mixture, processor: MllmProcessor) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:10 \(id \w+\): .*needs \d+ tokens"):
        LengthsOnDemand(mixture, Collator(processor, max_length=10)).take(np.arange(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_set_is_packed_as_it_comes_with_the_losses_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    world = make_world(tmp_path / "world")
    options: dict[str, Any] = {"max_steps": 6, "per_device_batch_size": 2, "gradient_accumulation_steps": 2}
    losses = []
    for name, ahead in (("at once", 100), ("on demand", 0)):
        monkeypatch.setattr(batches, "MEASURED_AHEAD", ahead)
        config = run_config(world, tmp_path / name, TUNINGS["all"], num_workers=workers, **options)
        made = config.model_dump(exclude_unset=True)
        output = train(RunConfig.model_validate({**made, "data": {**made["data"], "packing": True}}))
        losses.append([line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line])
        for kept in (world / "rows").glob("*.lengths-*"):
            kept.unlink()
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
