"""Mixtures: every row where rows are joined, the declared shares where they are drawn."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.config import DataSection
from mllm.data.lengths import Lengths
from mllm.data.mixture import Cap, Mixture, shares
from mllm.data.sampler import MicroBatches
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


def drawn_from(rows: Mixture) -> list[Counter[int]]:
    """Of each data set, how often each of its rows comes."""
    found: list[Counter[int]] = [Counter() for _ in rows.names]
    for k, i in (rows[i] for i in range(len(rows))):
        found[k][i] += 1
    return found


@settings(deadline=None)
@given(sizes=sizes_of, seed=st.integers(0, 9), data=st.data())
def test_epochs_and_caps_say_how_often_each_row_comes(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    epochs = data.draw(st.lists(st.sampled_from([1, 2, 2.5, 3]), min_size=len(sizes), max_size=len(sizes)))
    caps = data.draw(
        st.lists(
            st.one_of(st.none(), st.builds(Cap, st.integers(1, 70), st.just(False), st.booleans())),
            min_size=len(sizes),
            max_size=len(sizes),
        )
    )
    rows = mixture(sizes, "concat", None, seed, caps, epochs)
    for k, (size, cap, times) in enumerate(zip(sizes, caps, epochs, strict=True)):
        drawn = drawn_from(rows)[k]
        used = size if cap is None else min(size, int(cap.amount))
        assert len(drawn) == used
        assert sum(drawn.values()) == rows.counts[k] == round(used * times)
        assert max(drawn.values()) - min(drawn.values()) <= 1
        assert rows.passes[k] == rows.counts[k] / used
        if cap is not None and cap.first:
            assert max(drawn) < used


@pytest.mark.parametrize(
    ("text", "cap", "kept"),
    [
        (3, Cap(3), 3),
        ("25%", Cap(25, percent=True), 10),
        ("first:3", Cap(3, first=True), 3),
        ("first:2.5%", Cap(2.5, percent=True, first=True), 1),
        ("100%", Cap(100, percent=True), 40),
    ],
)
def test_caps_as_a_recipe_writes_them(text: int | str, cap: Cap, kept: int) -> None:
    assert Cap.parse(text) == cap
    chosen = cap.choose(40, (0,))
    assert (40 if chosen is None else len(set(chosen.tolist()))) == kept
    if cap.first and chosen is not None:
        assert chosen.tolist() == list(range(kept))


def test_a_capped_draw_is_the_seeds() -> None:
    first, again, other = (mixture([90, 50], "concat", None, seed, [Cap(9), None]) for seed in (3, 3, 4))
    assert drawn_from(first) == drawn_from(again) != drawn_from(other)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=5), share=st.floats(0.02, 0.9))
def test_a_replayed_set_has_its_share_of_all(sizes: list[int], share: float) -> None:
    rows = mixture(sizes, replay=share)
    *others, general = rows.counts
    assert others == sizes[:-1]  # the set is added, nothing gives way to it
    assert abs(general - share * len(rows)) <= 1
    replayed = drawn_from(rows)[-1]
    assert max(replayed.values()) - (min(replayed.values()) if len(replayed) == sizes[-1] else 0) <= max(
        1, general // sizes[-1] + 1
    )


@settings(deadline=None, max_examples=60)
@given(
    sizes=sizes_of,
    mixing=st.sampled_from(["concat", "sqrt"]),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    ranks=st.integers(1, 4),
    epoch=st.integers(0, 2),
    packed=st.booleans(),
    by_modality=st.booleans(),
)
def test_ranks_divide_a_mixture(
    sizes: list[int],
    mixing: str,
    batch: int,
    accumulation: int,
    ranks: int,
    epoch: int,
    packed: bool,
    by_modality: bool,
) -> None:
    """Every place of the mixture once an epoch over all ranks, and as many micro-batches for each of them."""
    if sum(sizes) < ranks or (
        mixing != "concat" and min(shares(sizes, "sqrt", [1] * len(sizes))) * sum(sizes) < 1
    ):
        return
    rows = mixture(sizes, mixing)
    tokens = np.random.default_rng(0).integers(1, 99, len(rows))
    lengths = Lengths(tokens, tokens // 2, rows.source % 2)
    flops = (lambda lengths: lengths.tokens.astype(float)) if packed else None
    found = []
    for rank in range(ranks):
        batches = MicroBatches(lengths, batch, accumulation, ranks, rank, 0, flops, by_modality)
        batches.set_epoch(epoch)
        found.append([list(rows) for rows in batches])
    assert {len(of_rank) for of_rank in found} == {len(batches)}
    assert all(micro for of_rank in found for micro in of_rank)
    assert Counter(i for of_rank in found for micro in of_rank for i in micro) == Counter(range(len(rows)))


def test_the_section_data_says_it_all() -> None:
    section = DataSection.model_validate(
        {
            "path": [{"path": "a.json", "max_rows": "first:10%", "epochs": 2}, "b.json"],
            "replay": {"path": "c.json", "share": 0.1, "max_rows": 500},
            "image_root": "photos",
        }
    )
    first, second, replayed = section.sources
    assert (first.cap, first.epochs) == (Cap(10, percent=True, first=True), 2)
    assert (second.cap, replayed.cap, replayed.image_root) == (None, Cap(500), "photos")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": [{"path": "a", "max_rows": "ten"}]}, "'ten' is no number of rows; write 3000"),
        ({"path": [{"path": "a", "max_rows": 0}]}, "'?0'? is no number of rows"),
        ({"path": [{"path": "a", "max_rows": "120%"}]}, "is no number of rows"),
        (
            {"path": [{"path": "a", "epochs": 2}, "b"], "mixing": "sqrt"},
            "epochs of a data set are for mixing",
        ),
        ({"path": "a", "replay": {"path": "b", "share": 1.0}}, "less than 1"),
    ],
)
def test_what_a_mixture_cannot_be(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSection.model_validate(data)
