"""Micro-batches: every row once, equal steps on every rank, the same global batches however divided."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.data.lengths import Lengths
from mllm.data.sampler import MicroBatches
from mllm.errors import ConfigError


def make_lengths(rows: int, text_share: float = 0.3, seed: int = 0) -> Lengths:
    """Rows of uneven length, a share of them without an image."""
    rng = np.random.default_rng(seed)
    views = (rng.random(rows) >= text_share).astype(np.int32)
    words = np.clip(rng.lognormal(5, 0.8, rows), 8, 1400).astype(np.int32)
    return Lengths(tokens=words + 576 * views, labels=words // 2, views=views)


def flops_of(lengths: Lengths) -> np.ndarray:
    """As of a 7B model: linear in tokens, pictures and labels, and a little of the square."""
    tokens = lengths.tokens.astype(float)
    return 38.9 * tokens + 0.0008 * tokens**2 + 366 * lengths.views + 0.8 * lengths.labels


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[Lengths, dict[str, Any]]:
    ranks = draw(st.integers(1, 5))
    rows = draw(st.integers(ranks, 90))
    lengths = make_lengths(rows, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
    options = {
        "ranks": ranks,
        "batch_size": draw(st.integers(1, 5)),
        "accumulation": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 5)),
        "flops": draw(st.sampled_from([None, flops_of])),
        "by_modality": draw(st.booleans()),
    }
    return lengths, options


def of_all_ranks(lengths: Lengths, epoch: int = 0, **options: Any) -> list[list[list[int]]]:
    """[rank][micro-step] -> rows."""
    samplers = [MicroBatches(lengths, rank=rank, **options) for rank in range(options["ranks"])]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert {len(list(sampler)) for sampler in samplers} == {len(samplers[0])}
    return [[list(rows) for rows in sampler] for sampler in samplers]


@settings(max_examples=300, deadline=None)
@given(settings_of())
def test_every_row_once_and_ranks_in_step(case: tuple[Lengths, dict[str, Any]]) -> None:
    lengths, options = case
    ranks = of_all_ranks(lengths, **options)
    assert sorted(row for steps in ranks for rows in steps for row in rows) == list(range(len(lengths)))
    assert all(rows for steps in ranks for rows in steps), "a rank has nothing to do"
    assert ranks == of_all_ranks(lengths, **options), "the order is not the seed's"


@settings(max_examples=100, deadline=None)
@given(settings_of())
def test_a_step_learns_from_the_same_rows_however_it_is_divided(case: tuple[Lengths, dict[str, Any]]) -> None:
    lengths, options = case
    by_rows = of_all_ranks(lengths, **{**options, "flops": None})
    by_flops = of_all_ranks(lengths, **{**options, "flops": flops_of})
    accumulation = options["accumulation"]
    for start in range(0, len(by_rows[0]), accumulation):
        step = slice(start, start + accumulation)
        learnt = [
            sorted(row for steps in ranks for rows in steps[step] for row in rows)
            for ranks in (by_rows, by_flops)
        ]
        assert learnt[0] == learnt[1]


def test_without_grouping_the_order_is_that_of_the_trainer() -> None:
    sampler = MicroBatches(make_lengths(64), 4, 2, ranks=2, seed=7)
    sampler.set_epoch(3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(7 + 3))
    assert np.concatenate(list(sampler.global_batches())).tolist() == order.tolist()


@settings(max_examples=60, deadline=None)
@given(settings_of())
def test_division_by_rows_keeps_to_the_batch_size(case: tuple[Lengths, dict[str, Any]]) -> None:
    lengths, options = case
    size = options["batch_size"]
    sampler = MicroBatches(lengths, **{**options, "flops": None})
    full = size * options["accumulation"] * options["ranks"]
    for batch in sampler.global_batches():
        rows = [len(rows) for step in sampler.divide(batch) for rows in step]
        if len(batch) == full:
            assert rows == [size] * len(rows)
        # Only where fewer rows than ranks were left over may a batch be larger, by one row.
        assert max(rows) <= size + 1
        assert max(rows) - min(rows) <= 1


def test_steps_are_of_one_modality_but_for_what_is_left_over() -> None:
    lengths = make_lengths(1000, 0.4)
    sampler = MicroBatches(lengths, 4, 2, ranks=4, by_modality=True)
    kinds = [set(lengths.views[batch].tolist()) for batch in sampler.global_batches()]
    assert len(kinds) == 32
    assert all(len(kind) == 1 for kind in kinds[:-2])
    early = [kind.pop() for kind in kinds[:15]]
    assert set(early) == {0, 1}, "modalities must not come one after the other"


def test_epochs_differ() -> None:
    sampler = MicroBatches(make_lengths(50), 4)
    first = [list(rows) for rows in sampler]
    sampler.set_epoch(1)
    assert [list(rows) for rows in sampler] != first


@pytest.mark.parametrize("accumulation", [1, 4])
def test_packs_cost_the_same_on_every_rank(accumulation: int) -> None:
    lengths = make_lengths(2048)
    flops = flops_of(lengths)
    sampler = MicroBatches(lengths, 16 // accumulation, accumulation, ranks=8, flops=flops_of)
    for batch in sampler.global_batches():
        work = np.array([[flops[pack].sum() for pack in step] for step in sampler.divide(batch)])
        total = work.sum(0)  # [ranks]
        assert total.mean() / total.max() > 0.985
        # Ranks wait for each other in every micro-step where weights are gathered (ZeRO-3).
        assert work.mean() * len(work) / work.max(1).sum() > 0.97


def test_exchanges_even_out_what_placing_the_longest_first_leaves() -> None:
    # Graham's worst case for three: the longest first gives 11, 8, 8.
    lengths = Lengths(np.array([5, 5, 4, 4, 3, 3, 3]), np.ones(7, int), np.zeros(7, int))
    sampler = MicroBatches(lengths, 7, ranks=3, flops=lambda lengths: lengths.tokens.astype(float))
    (step,) = sampler.divide(np.arange(7))
    assert sorted(lengths.tokens[pack].sum() for pack in step) == [9, 9, 9]


def test_too_few_rows_for_the_ranks() -> None:
    with pytest.raises(ConfigError, match="3 rows for 4 ranks"):
        MicroBatches(make_lengths(3), 2, ranks=4)
