"""Guarded image decoding: one file in, one RGB image or one clear error out.

Every image of the project is opened here, in training, evaluation and chat alike. What it decides:

- Transparency is laid over white. Dropping the alpha channel instead would show whatever colour
  lies under the transparent pixels, most often black under black text.
- The EXIF orientation is applied, so that the model sees what a viewer shows.
- 16-bit greyscale keeps its high byte, as Pillow does for 16-bit colour. 32-bit and float pixels
  are refused, because their range is not known.
- Of an animation or a multi-page file the first frame is taken. Colour profiles are ignored.
- Truncated files are refused. (They load grey from the cut on if a program sets Pillow's global
  `ImageFile.LOAD_TRUNCATED_IMAGES`; nothing here does.)
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from mllm.data.stored import REMOTE, STORED, Stored
from mllm.errors import DataError

# MPO, the multi-picture JPEG of some phones, is opened by the JPEG plugin.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# Just under the size at which Pillow itself starts to warn, so that this limit is met first.
MAX_PIXELS = 89_000_000

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders raise on damaged files of the formats above.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)

_T = TypeVar("_T")
Picture = str | PathLike[str] | Stored | Image.Image


def load_image(image: Picture, where: str = "") -> Image.Image:
    """Open one image as upright 8-bit RGB.

    Args:
        image: a path, a stored image, or a PIL image (which is left unchanged).
        where: the row that names the image (`file:line`), put in front of every message.

    Raises:
        DataError: the file is missing, a directory, empty, truncated, too large or of no known
            format.
    """
    return _read(image, where, _decode)


def image_size(image: Picture, where: str = "") -> tuple[int, int]:
    """(height, width) of what `load_image` gives; arguments and errors as there.

    A JPEG's is read from its header. Pillow turns a TIFF upright itself, and looks for a PNG's
    orientation behind its pixels: these and all others are decoded, so that the size is always right.
    """
    return _read(image, where, _upright_size)


def _read(image: Picture, where: str, get: Callable[[Image.Image, str], _T]) -> _T:
    """`get` of the checked, opened image and the name that errors call it by."""
    where = f"{where}: " if where else ""
    if isinstance(image, Image.Image):
        return get(image, f"{where}the image in memory")
    if not isinstance(image, (str, PathLike, *STORED)):
        raise DataError(f"{where}an image must be a path or a PIL image, found {type(image).__name__}")
    name = f"{where}image {str(image)!r}"
    place = _stored_bytes(image, name) if isinstance(image, STORED) else _file(image, name, where)
    try:
        opened = Image.open(place, formats=FORMATS)
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not a readable {', '.join(FORMATS)} file (another format, or a damaged header)"
            "; replace it, or convert it to JPEG or PNG"
        ) from None
    except Image.DecompressionBombError:
        raise DataError(f"{name} {_too_large()}") from None
    except PermissionError as error:
        raise DataError(f"{name} cannot be read ({_one_line(error)}); fix its permissions") from None
    except _DECODE_ERRORS as error:
        raise _damaged(name, error) from None
    with opened:
        return get(opened, name)


def _stored_bytes(image: Stored, name: str) -> BytesIO:
    try:
        data = image.read()
    except OSError as error:
        raise DataError(f"{name} cannot be read ({_one_line(error)}); fix the path") from None
    if not data:
        raise DataError(f"{name} is empty (0 bytes); download it again or remove the row")
    return BytesIO(data)


def _file(image: str | PathLike[str], name: str, where: str) -> Path:
    if str(image).startswith(REMOTE):
        raise DataError(f"{name[: len(where) + 80]} is not a file; download it and give the path of the file")
    path = Path(image)
    _check_file(path, name)
    return path


def _check_file(path: Path, name: str) -> None:
    try:
        if path.is_dir():
            raise DataError(f"{name} is a directory; give the path of an image file")
        if not path.exists():
            raise DataError(f"{name} does not exist; fix the path or the image root")
        if not path.is_file():
            raise DataError(f"{name} is not a regular file; give the path of an image file")
        if path.stat().st_size == 0:
            raise DataError(f"{name} is empty (0 bytes); download it again or remove the row")
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a null byte
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} cannot be read ({_one_line(error)}); fix the path") from None


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name} has no pixels ({width} x {height}); replace it")
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} has {width} x {height} pixels: it {_too_large()}")


def _upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    if image.format not in ("JPEG", "MPO"):
        width, height = _decode(image, name).size
        return height, width
    _check_size(image, name)
    width, height = image.size
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        image.load()
        return _transpose(_to_rgb(image, name), _orientation(image))
    except DataError:
        raise
    except _DECODE_ERRORS as error:
        raise _damaged(name, error) from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode to RGB, as the module's docstring says."""
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint16)
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(
            f"{name} has 32-bit pixels (mode {image.mode}) of unknown range; convert it to 8 bits a channel"
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; broken metadata do not make the pixels bad: they count as 1."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (*_DECODE_ERRORS, AttributeError, KeyError):
        return 1
    return value if isinstance(value, int) else 1


def _transpose(image: Image.Image, orientation: int) -> Image.Image:
    method = _TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)


def _damaged(name: str, error: BaseException) -> DataError:
    return DataError(
        f"{name} is damaged or truncated ({_one_line(error)}); download it again or remove the row"
    )


def _too_large() -> str:
    return f"is larger than {MAX_PIXELS // 1_000_000} megapixels; shrink it first"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
