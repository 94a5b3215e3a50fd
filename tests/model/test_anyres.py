"""AnyRes geometry: the published token counts, the original's formulas, transformers' functions."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from conftest import make_image_processor, make_language_model, make_picture, make_tokenizer, make_vision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from mllm.errors import ConfigError
from mllm.model.anyres import AnyRes, build_tiling
from mllm.model.compose import compose

# As published for both; (width, height) in the original, (height, width) in transformers.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
quick = settings(max_examples=300, derandomize=True, deadline=None, database=None)


def clip_336(order: str = "llava") -> AnyRes:
    return build_tiling({"type": "anyres", "pinpoints": PINPOINTS, "order": order}, (3, 336, 336), 576)


def unpadded(tiling: AnyRes, size: tuple[int, int]) -> tuple[int, int]:
    top, left = tiling.padding(size)
    height, width = tiling.canvas(size)
    return height // 14 - 2 * top, width // 14 - 2 * left


# -- known values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "pinpoint", "grid", "tokens"),
    [
        ((1000, 500), (672, 336), (24, 48), 1752),
        ((1000, 1000), (672, 672), (48, 48), 2928),
        ((640, 480), (672, 672), (36, 48), 2340),
        ((480, 640), (672, 672), (48, 36), 2352),
        ((1333, 400), (1008, 336), (22, 72), 2182),
        ((333, 1111), (336, 1008), (72, 22), 2232),
        ((2000, 333), (1008, 336), (12, 72), 1452),
        ((300, 300), (336, 672), (24, 24), 1176),
        ((100, 37), (336, 672), (8, 24), 776),
    ],
)
def test_the_originals_token_counts(
    picture: tuple[int, int], pinpoint: tuple[int, int], grid: tuple[int, int], tokens: int
) -> None:
    """Made by running the original code on (width, height); the defaults are the published pinpoints."""
    width, height = picture
    default = build_tiling({"type": "anyres"}, (3, 336, 336), 576)
    assert default == clip_336()
    assert default.canvas((height, width)) == pinpoint[::-1]
    assert unpadded(default, (height, width)) == grid
    assert default.num_tokens((height, width)) == tokens


def test_the_two_readings_differ_on_small_pictures() -> None:
    assert (clip_336().num_tokens((37, 100)), clip_336("hf").num_tokens((37, 100))) == (776, 1458)


@pytest.mark.parametrize(("size", "llava", "hf"), [((110, 352), 1262, 1360), ((799, 376), 1826, 1876)])
def test_the_two_readings_differ_where_a_rounding_error_is_cut_off(
    size: tuple[int, int], llava: int, hf: int
) -> None:
    """110 * (48 / 352) is 15, but a little less in floating point."""
    assert clip_336().canvas(size) == clip_336("hf").canvas(size)
    assert (clip_336().num_tokens(size), clip_336("hf").num_tokens(size)) == (llava, hf)


# -- the original's formulas, step by step ----------------------------------------------------------


def reference_canvas(size: tuple[int, int], pinpoints: list[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of a picture and of the pinpoints: keep most, then waste least, the first wins."""
    best, best_kept, best_waste = (0, 0), -1, 0
    for canvas in pinpoints:
        shrink = min(canvas[1] / size[1], canvas[0] / size[0])
        kept = min(int(size[1] * shrink) * int(size[0] * shrink), size[0] * size[1])
        waste = canvas[0] * canvas[1] - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = canvas, kept, waste
    return best


def reference_unpad(rows: int, columns: int, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Which rows and columns stay, in the original's arithmetic."""
    height, width = size
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        return list(range(rows))[cut : rows - cut], list(range(columns))
    cut = (columns - int(width * (rows / height))) // 2
    return list(range(rows)), list(range(columns))[cut : columns - cut]


@quick
@given(SIZES)
@example((1, 3000))
@example((3000, 1))
def test_the_grid_is_the_originals(size: tuple[int, int]) -> None:
    tiling = clip_336()
    canvas = reference_canvas(size, [(h, w) for w, h in PINPOINTS])
    assert tiling.canvas(size) == canvas
    assert tiling.num_tiles(size) == 1 + canvas[0] * canvas[1] // 336**2
    rows, columns = reference_unpad(canvas[0] // 14, canvas[1] // 14, size)
    assert unpadded(tiling, size) == (len(rows), len(columns))
    assert tiling.num_tokens(size) == 576 + len(rows) * (len(columns) + 1)


def reference_merge(views: torch.Tensor, tiling: AnyRes, size: tuple[int, int]) -> torch.Tensor:
    """Base tokens, then row by row the token of each place, newlines as minus one; loops only."""
    height, width = tiling.canvas(size)
    rows, columns = reference_unpad(
        height // tiling.tile * tiling.side, width // tiling.tile * tiling.side, size
    )
    out = list(views[0])
    for row in rows:
        for column in columns:
            (tile_row, y), (tile_column, x) = divmod(row, tiling.side), divmod(column, tiling.side)
            tile = 1 + tile_row * (width // tiling.tile) + tile_column
            out.append(views[tile, y * tiling.side + x])
        out.append(torch.full_like(views[0, 0], -1))
    return torch.stack(out)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3))
def test_merged_tokens_stand_where_they_must(sizes: list[tuple[int, int]]) -> None:
    tiling = build_tiling({"type": "anyres"}, (3, 32, 32), 16)
    counts = [tiling.num_tiles(size) for size in sizes]
    views = torch.arange(sum(counts) * 16 * 2, dtype=torch.float32).reshape(-1, 16, 2)
    merged = tiling.merge(views, sizes, torch.full((2,), -1.0))
    parts = [reference_merge(own, tiling, size) for own, size in zip(views.split(counts), sizes, strict=True)]
    assert torch.equal(merged, torch.cat(parts))
    assert [len(part) for part in parts] == [tiling.num_tokens(size) for size in sizes]


def test_views_and_sizes_that_do_not_belong_together() -> None:
    tiling = build_tiling({"type": "anyres"}, (3, 32, 32), 16)
    with pytest.raises(ValueError, match=r"4 tiles where image_sizes \[\(20, 20\)\] need 3"):
        tiling.merge(torch.zeros(4, 16, 2), [(20, 20)], torch.zeros(2))


# -- transformers' functions ------------------------------------------------------------------------


@quick
@given(SIZES)
@example((1, 3000))
@example((3000, 1))
@example((110, 352))
def test_the_grid_is_transformers(size: tuple[int, int]) -> None:
    tiling = clip_336("hf")
    assert tiling.canvas(size) == select_best_resolution(size, PINPOINTS)
    assert tiling.num_tiles(size) == image_size_to_num_patches(size, PINPOINTS, 336)
    rows, columns = (24 * tiles for tiles in get_anyres_image_grid_shape(size, PINPOINTS, 336))
    kept = unpad_image(torch.empty(1, rows, columns, device="meta"), size).shape[1:]
    assert unpadded(tiling, size) == tuple(kept)


@pytest.mark.parametrize(
    "size", [(37, 100), (100, 37), (333, 111), (111, 333), (32, 32), (64, 64), (90, 90), (1, 70), (70, 1)]
)
def test_views_are_transformers(size: tuple[int, int]) -> None:
    clip = make_image_processor()
    points = [[a * 32, b * 32] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    theirs = LlavaNextImageProcessorPil(size=clip.size, crop_size=clip.crop_size, image_grid_pinpoints=points)
    picture = make_picture(0, size)
    tiling = build_tiling({"type": "anyres", "order": "hf"}, (3, 32, 32), 16)
    mine = clip(images=tiling.views(picture), return_tensors="pt")["pixel_values"]
    other = theirs(images=[picture], return_tensors="pt")
    assert torch.equal(mine, other["pixel_values"][0])
    assert other["image_sizes"].tolist() == [[size[1], size[0]]]


def test_the_picture_lies_centred_on_black() -> None:
    tiling = build_tiling({"type": "anyres", "pinpoints": [[64, 32]]}, (3, 32, 32), 16)
    picture = make_picture(0, (20, 30))
    width = ceil(20 * 32 / 30)
    base, *tiles = tiling.views(picture)
    canvas = np.concatenate([np.asarray(tile) for tile in tiles], axis=1)
    left = (64 - width) // 2
    assert np.array_equal(canvas[:, left : left + width], np.asarray(picture.resize((width, 32))))
    assert not canvas[:, :left].any()
    assert not canvas[:, left + width :].any()
    assert np.array_equal(np.asarray(base), np.asarray(picture.resize((32, 32))))


# -- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shape", "tokens", "problem"),
    [
        ({"type": "grid"}, (3, 32, 32), 16, "type .anyres., pinpoints, order"),
        ({"type": "anyres", "order": "hw"}, (3, 32, 32), 16, "llava or hf"),
        ({"type": "anyres", "points": []}, (3, 32, 32), 16, "cannot use"),
        ({"type": "anyres"}, (3, 32, 32), 17, "17 tokens each; both must be square"),
        ({"type": "anyres"}, (3, 32, 48), 16, "32 x 48 pixels"),
        ({"type": "anyres", "pinpoints": [[32, 64], [64, 40]]}, (3, 32, 32), 16, r"\[64, 40\] must be two"),
        ({"type": "anyres", "pinpoints": [[32]]}, (3, 32, 32), 16, r"\[32\] must be two multiples of 32"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, shape: tuple, tokens: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        build_tiling(settings, shape, tokens)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("connector", "settings"),
    [
        ("concat_linear", {}),  # strips of four patches: as many tokens as a square has, but none
        ("resampler", {"num_latents": 4, "depth": 1}),
        ("qformer", {"num_queries": 4, "width": 32, "layers": 1, "heads": 4, "intermediate": 32}),
        ("glu", {"intermediate": 32}),
    ],
)
def test_tokens_that_are_no_grid_are_refused(connector: str, settings: dict) -> None:
    with pytest.raises(ConfigError, match="are no grid; use one of linear, mlp, pixel_shuffle"):
        compose(
            make_vision(),
            make_language_model(),
            {"type": connector, **settings},
            tokenizer=make_tokenizer(),
            image_processor=make_image_processor(),
            tiling={"type": "anyres"},
        )
