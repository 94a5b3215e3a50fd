"""AnyRes: a large picture as a small view of the whole and, cut into tiles, a large one (LLaVA-NeXT).

    picture -> [base view, tile, tile, ...] -> encoder and connector, each M = side * side tokens
            -> base tokens, then the tiles as one grid, without the rows or columns that show padding
               only, a newline token behind every row

The sizes are plain integers, so that the processor counts the placeholders of a picture from its size
alone, and the model cuts the same grid by the same function.

`order` names whose reading of ambiguous cases to follow. `llava` is the original code, which published
checkpoints were trained with: pinpoints are (width, height). `hf` is transformers' LLaVA-NeXT, which
reads the same numbers as (height, width): a picture that fits into several pinpoints without being
scaled down takes the first of them, so that small pictures are tiled otherwise. It also rounds where the
original cuts off, which can move the unpadding by one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Any

import torch
from PIL import Image
from torch import nn

from mllm.errors import ConfigError
from mllm.model.configuration import MllmConfig
from mllm.model.connectors import CONNECTORS

ORDERS = ("llava", "hf")
# LLaVA-NeXT's, in tiles: (336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008).
DEFAULT_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

Size = tuple[int, int]  # (height, width), in pixels, tiles or tokens


@dataclass(frozen=True)
class AnyRes:
    """The geometry of one model's tiles.

    Attributes:
        tile: side of a tile in pixels.
        side: side of a tile in tokens.
        pinpoints: sizes in pixels that a picture may be laid on, the first of equals wins.
        order: `llava` or `hf`.
    """

    tile: int
    side: int
    pinpoints: tuple[Size, ...]
    order: str

    def canvas(self, size: Size) -> Size:
        """The pinpoint that keeps most of a picture's pixels; of those, the one that wastes least."""
        height, width = size

        def kept_and_waste(canvas: Size) -> tuple[int, int]:
            scale = min(canvas[1] / width, canvas[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas[0] * canvas[1]

        return max(self.pinpoints, key=kept_and_waste)

    def num_tiles(self, size: Size) -> int:
        """Views of a picture, the base included."""
        height, width = self.canvas(size)
        return 1 + (height // self.tile) * (width // self.tile)

    def padding(self, size: Size) -> Size:
        """Rows on either end, and columns on either side, of the tiles' token grid that show padding only."""
        rows, columns = (pixels // self.tile * self.side for pixels in self.canvas(size))
        height, width = size
        # This order of the operations is the original's; another one rounds otherwise.
        if width / height > columns / rows:
            return (rows - self._whole(height * (columns / width))) // 2, 0
        return 0, (columns - self._whole(width * (rows / height))) // 2

    def _whole(self, value: float) -> int:
        return int(round(value, 7)) if self.order == "hf" else int(value)

    def num_tokens(self, size: Size) -> int:
        """Soft tokens of a picture: the base's, those of the unpadded grid, and a newline a row."""
        rows, columns = (pixels // self.tile * self.side for pixels in self.canvas(size))
        top, left = self.padding(size)
        return self.side**2 + (rows - 2 * top) * (columns - 2 * left + 1)

    def views(self, picture: Image.Image) -> list[Image.Image]:
        """The base view, distorted to a square, then tiles, row by row, of the picture centred on black."""
        width, height = picture.size
        canvas_height, canvas_width = self.canvas((height, width))
        scale = min(canvas_width / width, canvas_height / height)
        # Bicubic, as Pillow's default is, in which the original resizes.
        inside = picture.resize(
            (min(ceil(width * scale), canvas_width), min(ceil(height * scale), canvas_height)),
            Image.Resampling.BICUBIC,
        )
        canvas = Image.new("RGB", (canvas_width, canvas_height))
        canvas.paste(inside, ((canvas_width - inside.width) // 2, (canvas_height - inside.height) // 2))
        base = picture.resize((self.tile, self.tile), Image.Resampling.BICUBIC)
        return [base] + [
            canvas.crop((x, y, x + self.tile, y + self.tile))
            for y in range(0, canvas_height, self.tile)
            for x in range(0, canvas_width, self.tile)
        ]

    def merge(self, soft: torch.Tensor, sizes: Sequence[Size], newline: torch.Tensor) -> torch.Tensor:
        """The tokens of all pictures in one row.

        Args:
            soft: [T, M, D], the connector's tokens of every view of every picture.
            sizes: (height, width) of each picture.
            newline: [D].

        Returns:
            [total, D], the sum of `num_tokens` over the pictures.

        Raises:
            ValueError: views and sizes do not belong together.
        """
        counts = [self.num_tiles(size) for size in sizes]
        if sum(counts) != len(soft):
            raise ValueError(f"{len(soft)} tiles where image_sizes {list(sizes)} need {sum(counts)}")
        merged = []
        for size, views in zip(sizes, soft.split(counts), strict=True):
            rows, columns = (pixels // self.tile for pixels in self.canvas(size))
            grid = views[1:].unflatten(1, (self.side, self.side)).unflatten(0, (rows, columns))
            grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [rows * side, columns * side, D]
            top, left = self.padding(size)
            grid = grid[top : grid.shape[0] - top, left : grid.shape[1] - left]  # [R, C, D]
            ends = newline.to(grid.dtype).expand(grid.shape[0], 1, -1)  # [R, 1, D]
            merged += [views[0], torch.cat([grid, ends], dim=1).flatten(0, 1)]
        return torch.cat(merged)


def build_tiling(settings: Mapping[str, Any], pixel_shape: Sequence[int], num_tokens: int) -> AnyRes:
    """The geometry that a configuration describes.

    Args:
        settings: `{"type": "anyres", "pinpoints": [[w, h], ...], "order": "llava"}`. Pinpoints are in
            pixels, (height, width) with the order `hf`; default: LLaVA-NeXT's five, for this tile size.
        pixel_shape: [C, H, W] of one view as the image processor gives it.
        num_tokens: M, soft tokens a view.

    Raises:
        ConfigError: unknown settings, views or tokens that form no square, pinpoints that are no
            multiples of the tile.
    """
    kind, order = settings.get("type"), settings.get("order", "llava")
    unknown = sorted(set(settings) - {"type", "pinpoints", "order"})
    if kind != "anyres" or order not in ORDERS or unknown:
        raise ConfigError(
            f"tiling: cannot use {dict(settings)}; the keys are type (anyres), pinpoints, order (llava or hf)"
        )
    _, tile, width = pixel_shape
    side = isqrt(num_tokens)
    if tile != width or side**2 != num_tokens:
        raise ConfigError(
            f"tiling: views of {tile} x {width} pixels with {num_tokens} tokens each; both must be square "
            "(no class token, a connector that keeps the grid)"
        )
    points = settings.get("pinpoints") or [[a * tile, b * tile] for a, b in DEFAULT_TILES]
    for point in points if isinstance(points, (list, tuple)) else [points]:
        pair = isinstance(point, (list, tuple)) and len(point) == 2
        if not pair or any(not isinstance(n, int) or n < 1 or n % tile for n in point):
            raise ConfigError(f"tiling: pinpoint {point} must be two multiples of {tile}, the view's size")
    pinpoints = tuple((a, b) if order == "hf" else (b, a) for a, b in points)
    return AnyRes(tile, side, pinpoints, order)


def tiling_of(config: MllmConfig) -> AnyRes | None:
    """The geometry of a model's tiles; None where it has none.

    Raises:
        ConfigError: see `build_tiling`; or the model has a deep fusion, which reads whole images, or a
            connector whose tokens are no grid.
    """
    if config.tiling is None:
        return None
    if config.fusion is not None:
        raise ConfigError("tiling and fusion exclude each other; leave one of them out")
    kind = config.connector["type"]
    if not CONNECTORS[kind].keeps_grid:
        able = ", ".join(name for name, connector in CONNECTORS.items() if connector.keeps_grid)
        raise ConfigError(f"tiling: the tokens of the connector {kind!r} are no grid; use one of {able}")
    return build_tiling(config.tiling, config.pixel_shape, config.num_image_tokens)


def make_newline(
    dim: int, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> nn.Parameter:
    """The token at the end of a row, with LLaVA's first values."""
    return nn.Parameter(torch.randn(dim, dtype=dtype, device=device) / dim**0.5)
