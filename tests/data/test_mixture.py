"""Mixtures: every row where rows are joined, the declared shares where they are drawn."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.data.mixture import Mixture, shares
from mllm.errors import ConfigError

sizes_of = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def mixture(sizes: list[int], *args: object, **kwargs: object) -> Mixture:
    sets = [[(k, i) for i in range(size)] for k, size in enumerate(sizes)]
    return Mixture(sets, [f"set {k}" for k in range(len(sizes))], *args, **kwargs)  # type: ignore[arg-type]


@given(sizes=sizes_of)
def test_joined_sets_give_every_row_once(sizes: list[int]) -> None:
    rows = mixture(sizes)
    assert [rows[i] for i in range(len(rows))] == [(k, i) for k, n in enumerate(sizes) for i in range(n)]


@settings(deadline=None)
@given(sizes=sizes_of, seed=st.integers(0, 9), data=st.data())
def test_drawn_shares_are_the_declared_ones(sizes: list[int], seed: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    for mixing in ("sqrt", "weights"):
        want = shares(sizes, mixing, weights) * sum(sizes)  # type: ignore[arg-type]
        if min(want) < 1:
            continue
        rows = mixture(sizes, mixing, weights, seed)
        drawn = Counter(rows[i] for i in range(len(rows)))
        assert sum(drawn.values()) == sum(sizes) == len(rows)
        for k, size in enumerate(sizes):
            times = [drawn[(k, i)] for i in range(size)]
            assert abs(sum(times) - want[k]) < 1
            assert max(times) - min(times) <= 1, "a row comes again before another came at all"


def test_instructblip_shares() -> None:
    assert np.allclose(shares([100, 400, 900], "sqrt", [1, 1, 1]), [1 / 6, 2 / 6, 3 / 6])


def test_a_draw_depends_on_its_seed_alone() -> None:
    first, again, other = (mixture([50, 7], "sqrt", None, seed) for seed in (3, 3, 4))
    assert [first[i] for i in range(57)] == [again[i] for i in range(57)]
    assert [first[i] for i in range(57)] != [other[i] for i in range(57)]


def test_bad_sets_are_named() -> None:
    with pytest.raises(ConfigError, match="set 1 has no rows"):
        mixture([3, 0])
    with pytest.raises(ConfigError, match=r"set 0 has weight -1"):
        mixture([3, 2], "weights", [-1, 1])
    with pytest.raises(ConfigError, match="set 1 would give none of 12 rows; raise its weight"):
        mixture([10, 2], "weights", [1, 0.001])
    with pytest.raises(ConfigError, match="concat takes every row once"):
        mixture([3, 2], "concat", [1, 2])
