"""Shards: the rows and pictures that went in, by number; broken ones are named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_picture
from hypothesis import given
from hypothesis import strategies as st
from runs import write_rows
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from mllm.cli import app
from mllm.data import shard_writer, shards
from mllm.data.collator import Collator
from mllm.data.files import atomic_path
from mllm.data.images import image_size, load_image
from mllm.data.lengths import file_lengths
from mllm.data.mixture import Mixture
from mllm.data.rows import Rows, open_rows
from mllm.data.schema import images_of
from mllm.data.shard_writer import write_shards
from mllm.data.shards import expand_braces, index_path, scan, shard_index
from mllm.data.stored import FileSpan
from mllm.errors import ConfigError, DataError
from mllm.model import MllmProcessor


@pytest.fixture(scope="module")
def processor() -> MllmProcessor:
    return make_model()[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 23)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    write_shards(source, tmp_path / "shards", rows_per_shard=5, image_root=source.parent)
    return tmp_path / "shards"


def png(seed: int = 0) -> bytes:
    data = io.BytesIO()
    make_picture(seed).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5  # a time that only a PAX header can hold
            tar.addfile(member, io.BytesIO(data))
    return path


def batches(rows: Any, processor: MllmProcessor, workers: int = 0, size: int = 3) -> list[dict[str, Any]]:
    return list(DataLoader(rows, size, collate_fn=Collator(processor), num_workers=workers))


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    tensors = {name for name, value in one.items() if isinstance(value, torch.Tensor)}
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in tensors)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_batches_of_the_files(
    source: Path, folder: Path, processor: MllmProcessor, workers: int
) -> None:
    rows, again = open_rows(source, image_root=source.parent), open_rows(str(folder))
    assert [row["id"] for row in rows] == [row["id"] for row in again]
    wanted = batches(rows, processor)
    assert all(map(equal, wanted, batches(again, processor, workers)))
    assert any("pixel_values" in batch for batch in wanted)


def test_lengths_and_mixtures_take_shards(source: Path, folder: Path, processor: MllmProcessor) -> None:
    rows, again = open_rows(source, image_root=source.parent), open_rows(str(folder))
    wanted, found = (file_lengths(one, Collator(processor)) for one in (rows, again))
    assert found.tokens.tolist() == wanted.tokens.tolist()
    assert len(list(folder.glob("*.lengths-*.npy"))) == 1
    mixed = Mixture([rows, again], ["rows", "shards"], "weights", [1, 2])  # type: ignore[list-item]
    assert {mixed[i]["id"] for i in range(len(mixed))} == {row["id"] for row in rows}
    assert {entry["hashed"] for entry in mixed.record()} == {"content", "index"}


def test_references_are_small_and_hold_nothing_open(folder: Path) -> None:
    rows = open_rows(str(folder))
    (image,) = images_of(rows[0]["messages"])
    assert isinstance(image, FileSpan)
    assert len(pickle.dumps(image)) < 300
    assert pickle.loads(pickle.dumps(rows))[7] == rows[7]
    assert (load_image(image).height, load_image(image).width) == image_size(image)


def test_ways_to_name_shards(folder: Path, tmp_path: Path) -> None:
    named = [
        str(folder),
        f"{folder}/{{00000..00004}}.tar",
        f"{folder}/*.tar",
        f"{folder}/0000{{0,1,2,3,4}}.tar",
    ]
    assert [len(open_rows(name)) for name in named] == [23] * 4
    assert len(open_rows(f"{folder}/00001.tar")) == 5
    with pytest.raises(DataError, match=r"00005\.tar: there is no such shard"):
        open_rows(f"{folder}/{{00000..00005}}.tar")
    with pytest.raises(DataError, match=r"none-\*\.tar: there is no such shard"):
        open_rows(f"{folder}/none-*.tar")


@given(start=st.integers(0, 30), count=st.integers(1, 12), width=st.integers(2, 5))
def test_braces_count_and_keep_their_zeros(start: int, count: int, width: int) -> None:
    end = start + count - 1
    found = expand_braces(f"a-{{{start:0{width}d}..{end:0{width}d}}}.tar")
    assert found == [f"a-{number:0{width}d}.tar" for number in range(start, end + 1)]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]


@pytest.mark.parametrize(
    "options",
    [{"format": tarfile.USTAR_FORMAT}, {"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}],
)
def test_every_kind_of_header_is_read(tmp_path: Path, options: Any) -> None:
    long = "folder/" + "k" * 90 + "/" + "x" * 60
    members = {
        "a.json": json.dumps({"conversations": [{"from": "human", "value": "<image>\nhi"}]}).encode(),
        "a.jpg": png(),
        f"{long}.txt": b"a fox",
        f"{long}.png": png(1),
        "b.txt": "ein schöner Fuchs".encode(),
        "b.seg.webp": png(2),
    }
    path = write_tar(tmp_path / "a.tar", members, **options)
    with tarfile.open(path) as tar:
        wanted = [(member.name, member.offset_data, member.size) for member in tar]
    assert list(scan(path)) == wanted
    rows = open_rows(str(path), "coco_captions")
    assert [rows.where(i) for i in range(3)] == [f"{path}#{key}" for key in ("a", long, "b")]
    assert rows[2]["messages"][1]["content"][0]["text"] == "ein schöner Fuchs"
    assert images_of(rows[1]["messages"])[0].read() == png(1)


def test_samples_of_others(tmp_path: Path) -> None:
    """A downloader's .json beside the caption; names of pictures with folders; several pictures in order."""
    chat = {
        "conversations": [{"from": "human", "value": "<image><image>\nhi"}, {"from": "gpt", "value": "ho"}]
    }
    members = {
        "0.json": json.dumps({**chat, "image": ["coco/0.b.png", "coco/0.a.png"]}).encode(),
        "0.a.png": png(1),
        "0.b.png": png(2),
        "1.json": json.dumps(chat).encode(),
        "1.a.png": png(3),
        "1.b.png": png(4),
    }
    rows = open_rows(str(write_tar(tmp_path / "chat.tar", members)))
    assert [image.read() for image in images_of(rows[0]["messages"])] == [png(2), png(1)]
    assert [image.read() for image in images_of(rows[1]["messages"])] == [png(3), png(4)]
    assert rows[1]["id"] == "1"
    noted = {"2.json": b'{"url": "u", "caption": "c"}', "2.txt": b"a fox", "2.jpg": png(), "2.cls": b"7"}
    captions = open_rows(str(write_tar(tmp_path / "captions.tar", noted)))
    assert captions[0]["messages"][1]["content"][0]["text"] == "a fox"
    assert captions.left_out == {".cls": 1}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "no samples"),
        ({"a.jpg": b"x"}, "'a' has no .json and no .txt"),
        ({"a.txt": b"x", "b.txt": b"y", "a.jpg": b"z"}, "sample 'a' do not stand together"),
        ({"a.json": b"{}", "a.b.json": b"{}"}, "more than one .json"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        open_rows(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "images", "message"),
    [
        ({"image": "other.jpg"}, 1, "the row shows the image 'other.jpg', and stored with it are: a.0.png"),
        ({"image": ["a.0.png", "a.0.png"]}, 1, "the row shows the image 'a.0.png'"),
        ({"image": "a.0.png"}, 2, "does not show its image 'a.1.png'"),
    ],
)
def test_a_picture_is_neither_missing_nor_left_out(
    tmp_path: Path, row: dict[str, Any], images: int, message: str
) -> None:
    raw = {"conversations": [{"from": "human", "value": "<image>hi"}], **row}
    members = {"a.json": json.dumps(raw).encode()} | {f"a.{i}.png": png(i) for i in range(images)}
    with pytest.raises(DataError, match=message) as caught:
        open_rows(str(write_tar(tmp_path / "a.tar", members)))
    assert str(caught.value).startswith(f"{tmp_path / 'a.tar'}#a: ")


@pytest.mark.parametrize("cut", [300, 511, 1024, -10240])
def test_a_shard_that_is_cut_off_is_named(folder: Path, cut: int) -> None:
    path = folder / "00001.tar"
    index_path(path).unlink()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"00001\.tar: (the shard is cut off|not a readable, uncompressed)"):
        open_rows(str(folder))


def test_a_damaged_picture_names_its_shard(folder: Path, processor: MllmProcessor) -> None:
    rows = open_rows(str(folder))
    (image,) = images_of(rows[0]["messages"])
    data = bytearray(Path(image.path).read_bytes())
    data[image.offset + 60 : image.offset + image.size] = bytes(image.size - 60)
    Path(image.path).write_bytes(data)
    with pytest.raises(DataError, match=r"00000\.tar has changed since it was opened"):
        rows[0]
    row = open_rows(str(folder))[0]
    with pytest.raises(DataError, match=r"00000\.tar#000000000 \(id r0\): .*#000000000\.0\.png' is damaged"):
        Collator(processor)([row])


def test_an_index_is_kept_until_its_shard_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "00002.tar"
    monkeypatch.setattr(shards, "scan", lambda _: pytest.fail("scanned, though the index is kept"))
    assert len(shard_index(path)) == 5
    monkeypatch.undo()
    write_tar(path, {"z.txt": b"a fox", "z.png": png()})
    assert [name for name, _, _ in shard_index(path).members(0)] == ["z.txt", "z.png"]


def test_an_index_that_was_copied_in_part_is_made_again(folder: Path, tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(next(folder.glob("*.tar")).read_bytes())
    rows = list(open_rows(shard))
    whole = index_path(shard).read_bytes()
    for size in (0, 100, len(whole) - 4):
        index_path(shard).write_bytes(whole[:size])
        assert list(open_rows(shard)) == rows


def test_the_identity_is_that_of_the_members(source: Path, folder: Path, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "same", rows_per_shard=5, image_root=source.parent, workers=2)
    first, same = open_rows(str(folder)), open_rows(str(tmp_path / "same"))
    assert (folder / "00003.tar").read_bytes() == (tmp_path / "same" / "00003.tar").read_bytes()
    assert first.identity() == same.identity() != open_rows(f"{folder}/{{00000..00003}}.tar").identity()


def test_writing_goes_on_where_it_was_broken_off(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "out", shard_writer._add

    def break_off(tar: Any, rows: Rows, number: int) -> int:
        if number == 13:
            raise KeyboardInterrupt
        return add(tar, rows, number)

    options: Any = {"rows_per_shard": 5, "image_root": source.parent}
    monkeypatch.setattr(shard_writer, "_add", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, out, **options)
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    monkeypatch.undo()
    done = write_shards(source, out, **options)
    assert (done.found, done.written, done.rows) == (2, 3, 23)
    assert len(open_rows(str(out))) == 23
    with pytest.raises(ConfigError, match="shards of other rows, or of another size"):
        write_shards(source, out, **{**options, "rows_per_shard": 6})


def test_a_bad_picture_is_found_when_it_is_written(source: Path, tmp_path: Path) -> None:
    row = {"id": "x", "conversations": [{"from": "human", "value": "<image>"}], "image": "none.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*none\.png' does not exist"):
        write_shards(tmp_path / "rows.jsonl", tmp_path / "out", image_root=tmp_path, workers=1)


def test_the_command(source: Path, tmp_path: Path) -> None:
    told = ["data", "shard", str(source), str(tmp_path / "out"), "--image-root", str(source.parent)]
    result = CliRunner().invoke(app, [*told, "--rows-per-shard", "10", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["written"] == 3
    assert len(open_rows(str(tmp_path / "out"))) == 23


def test_two_may_write_one_index(tmp_path: Path) -> None:
    """As on two machines, where the processes have the same number."""
    with atomic_path(tmp_path / "index") as first, atomic_path(tmp_path / "index") as second:
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "index").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
