"""Real files, made here, one exact outcome each."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.data.images import MAX_PIXELS, image_size, load_image
from mllm.errors import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def two_pixels(mode: str = "RGB") -> Image.Image:
    """Red left, blue right: 2 x 1."""
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), RED)
    image.putpixel((1, 0), BLUE)
    return image.convert(mode)


def noise(size: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(image: Image.Image) -> list[tuple[int, int, int]]:
    assert image.mode == "RGB"
    return [tuple(p) for p in np.asarray(image).reshape(-1, 3).tolist()]


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "webp"])
def test_lossless_formats_keep_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    two_pixels().save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert pixels(load_image(path)) == [RED, BLUE]
    assert pixels(load_image(str(path))) == [RED, BLUE]


def test_jpeg_is_pillows_own_decode(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise().save(path, quality=90)
    assert np.array_equal(load_image(path), np.asarray(Image.open(path)))


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "a.png")
    assert pixels(load_image(tmp_path / "a.png")) == [GREEN]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    image = load_image(tmp_path / "a.jpg")
    assert image.size == (16, 16)
    assert np.abs(np.asarray(image).astype(int) - np.array(RED)).max() <= 3


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(0, 0, 0, 0), (0, 0, 255, 255), (0, 0, 0, 128)]):
        rgba.putpixel((x, 0), value)
    rgba.save(tmp_path / "rgba.png")
    assert pixels(load_image(tmp_path / "rgba.png")) == [WHITE, BLUE, (127, 127, 127)]

    la = Image.new("LA", (2, 1))
    la.putpixel((0, 0), (0, 0))
    la.putpixel((1, 0), (40, 255))
    la.save(tmp_path / "la.png")
    assert pixels(load_image(tmp_path / "la.png")) == [WHITE, (40, 40, 40)]


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=0)
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert pixels(load_image(tmp_path / "plain.png")) == [RED, BLUE]
    assert pixels(load_image(tmp_path / "clear.png")) == [WHITE, BLUE]
    assert pixels(load_image(tmp_path / "clear.gif")) == [WHITE, BLUE]


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    two_pixels().save(tmp_path / "a.png", transparency=RED)
    assert pixels(load_image(tmp_path / "a.png")) == [WHITE, BLUE]


def test_16_bit_png_keeps_the_high_byte(tmp_path: Path) -> None:
    values = np.array([[0x0000, 0x1234, 0x80FF, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "I;16"
    assert pixels(load_image(tmp_path / "a.png")) == [(v, v, v) for v in (0x00, 0x12, 0x80, 0xFF)]


def test_one_bit_and_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1").save(tmp_path / "b.png")
    assert pixels(load_image(tmp_path / "b.png")) == [(0, 0, 0), WHITE]
    Image.new("L", (1, 1), 77).save(tmp_path / "l.png")
    assert pixels(load_image(tmp_path / "l.png")) == [(77, 77, 77)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    corner = Image.new("RGB", (3, 2), WHITE)
    corner.putpixel((0, 0), RED)
    corner.putpixel((2, 0), BLUE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    corner.save(path, exif=exif)
    image = load_image(path)
    # Where the stored top-left (red) and top-right (blue) corners must be seen, from the EXIF standard.
    width, height = (3, 2) if orientation < 5 else (2, 3)
    left, right, top, bottom = 0, width - 1, 0, height - 1
    red, blue = {
        1: ((left, top), (right, top)),
        2: ((right, top), (left, top)),
        3: ((right, bottom), (left, bottom)),
        4: ((left, bottom), (right, bottom)),
        5: ((left, top), (left, bottom)),
        6: ((right, top), (right, bottom)),
        7: ((right, bottom), (right, top)),
        8: ((left, bottom), (left, top)),
    }[orientation]
    assert image.size == (width, height)
    assert image.getpixel(red) == RED
    assert image.getpixel(blue) == BLUE


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_the_size_is_that_of_the_loaded_image(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    noise().crop((0, 0, 30, 20)).save(path, exif=exif)
    for source in (path, Image.open(path)):
        assert image_size(source) == load_image(source).size[::-1]
    with pytest.raises(DataError, match=r"^f:1: image .* does not exist"):
        image_size(tmp_path / "b.jpg", "f:1")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says that the EXIF data are corrupt
def test_broken_exif_counts_as_upright(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert load_image(tmp_path / "a.jpg").size == (64, 64) == image_size(tmp_path / "a.jpg")


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), BLUE)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "a.tiff", save_all=True, append_images=[second])
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    for suffix in ("gif", "tiff", "png"):
        assert set(pixels(load_image(tmp_path / f"a.{suffix}"))) == {RED}


def test_image_in_memory_is_not_changed() -> None:
    rgba = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert set(pixels(load_image(rgba))) == {WHITE}
    assert rgba.mode == "RGBA"


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tiff", "webp"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise().save(path)
    data = path.read_bytes()
    load_image(path)
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError) as caught:
        load_image(path, "rows.jsonl:3 (id 7)")
    message = str(caught.value)
    assert message.startswith(f"rows.jsonl:3 (id 7): image '{path}' is ")
    assert "download it again" in message or "replace it" in message
    assert "\n" not in message


def test_truncated_jpeg_message(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    noise().save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"cut\.jpg' is damaged or truncated \(.*\); download it again"):
        load_image(path)


def one_bit_png(width: int, height: int) -> bytes:
    """A valid 1-bit PNG, made row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_pixel_bombs_are_refused_without_decoding(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(one_bit_png(20_000, 20_000))
    with pytest.raises(DataError, match=r"huge\.png' is larger than 89 megapixels; shrink it first"):
        load_image(path)
    # Between our limit and twice Pillow's, where Pillow would only warn.
    path.write_bytes(one_bit_png(10_000, 10_000))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match=r"10000 x 10000 pixels: it is larger than 89 megapixels"),
    ):
        load_image(path)


def test_the_limit_holds_if_pillows_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "huge.png"
    path.write_bytes(one_bit_png(20_000, 20_000))
    with pytest.raises(DataError, match="larger than 89 megapixels"):
        load_image(path)
    assert MAX_PIXELS < 20_000 * 20_000


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: None, "does not exist; fix the path or the image root"),
        (lambda p: p.mkdir(), "is a directory; give the path of an image file"),
        (lambda p: p.write_bytes(b""), "is empty (0 bytes); download it again or remove the row"),
        (lambda p: p.write_text("hello, not a photo"), "is not a readable JPEG, PNG, WEBP"),
        (
            lambda p: p.write_bytes(b"<svg xmlns='http://x.org/'/>"),
            "is not a readable",
        ),
        (
            lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "is not a re",
        ),
        (
            lambda p: Image.fromarray(np.ones((2, 2), np.float32)).save(p, format="TIFF"),
            "has 32-bit pixels (mode F) of unknown range; convert it to 8 bits a channel",
        ),
    ],
)
def test_files_that_are_no_images(tmp_path: Path, make, expected: str) -> None:
    path = tmp_path / "a.jpg"
    make(path)
    with pytest.raises(DataError) as caught:
        load_image(path, "d.json: element 4")
    assert str(caught.value).startswith(f"d.json: element 4: image '{path}' {expected}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://example.org/a.jpg", "is not a file; download it"),
        ("a\0b.jpg", "a"),
        ("x" * 5000, "cannot be read"),
        (3, "must be a path or a PIL image, found int"),
        (None, "must be a path or a PIL image, found NoneType"),
    ],
)
def test_values_that_are_no_paths(value, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        load_image(value)
    assert expected in str(caught.value)


def test_one_damaged_header_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise().save(path)
    data = bytearray(path.read_bytes())
    data[18] ^= 0xFF  # inside IHDR: its checksum no longer holds
    path.write_bytes(bytes(data))
    with pytest.raises(DataError) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tiff", "webp"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged metadata and huge sizes
def test_random_damage_gives_an_image_or_one_clear_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise(16).save(path)
    data, rng = path.read_bytes(), np.random.default_rng(1)
    outcomes = []
    for _ in range(100):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged))
        outcomes.append(outcome(path))
    assert "refused" in outcomes
    assert set(outcomes) <= {"RGB", "refused"}  # PNG notices any change: all are refused


def outcome(path: Path) -> str:
    try:
        return load_image(path).mode
    except DataError as error:
        return "refused" if "\n" not in str(error) else str(error)
