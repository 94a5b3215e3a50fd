"""Data sets of Hugging Face's library by row number: from their folders, in their usual columns."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model, make_picture, save_parts
from datasets import Dataset, DatasetDict, Features, Image, List, Value, disable_progress_bars
from runs import make_rows
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from mllm.cli import app
from mllm.data.collator import Collator
from mllm.data.hf import parse_hf
from mllm.data.images import image_size, load_image
from mllm.data.rows import open_rows
from mllm.data.schema import images_of, message_text
from mllm.data.stored import ImageBytes
from mllm.data.streaming import RowStream
from mllm.errors import ConfigError, DataError, MllmError

TURNS = List({"from": Value("string"), "value": Value("string")})


@pytest.fixture(scope="module", autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def chats(count: int = 6) -> Dataset:
    """LLaVA's conversations with their pictures beside them, as those on the Hub are."""
    rows: dict[str, list[Any]] = {"id": [], "conversations": [], "image": [], "data_source": []}
    for i in range(count):
        shown = i % 3 > 0
        question = {"from": "human", "value": ("<image>\n" if shown else "") + f"what is {i}?"}
        rows["id"].append(f"r{i}")
        rows["conversations"].append([question, {"from": "gpt", "value": "a fox"}])
        rows["image"].append(make_picture(i) if shown else None)
        rows["data_source"].append("drawn")
    features = {
        "id": Value("string"),
        "conversations": TURNS,
        "image": Image(),
        "data_source": Value("string"),
    }
    return Dataset.from_dict(rows, features=Features(features))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows in every kind of local data set."""
    root = tmp_path_factory.mktemp("sets")
    data = chats()
    data.save_to_disk(root / "saved")
    DatasetDict({"train": data, "test": chats(2)}).save_to_disk(root / "splits")
    (root / "parquet").mkdir()
    data.select(range(4)).to_parquet(root / "parquet" / "train-0.parquet")
    data.select([4, 5]).to_parquet(root / "parquet" / "train-1.parquet")
    chats(2).to_parquet(root / "parquet" / "test-0.parquet")
    return {name: f"hf:{root / name}" for name in ("saved", "splits", "parquet")}


@pytest.mark.parametrize("name", ["saved", "splits", "parquet"])
def test_rows_and_pictures_of_a_local_set(places: dict[str, str], name: str) -> None:
    rows = open_rows(places[name])
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(6)]
    for i, row in enumerate(rows):
        assert message_text(row["messages"][0]).endswith(f"what is {i}?")
        pictures = [load_image(image) for image in images_of(row["messages"])]
        assert [p.tobytes() for p in pictures] == ([make_picture(i).tobytes()] if i % 3 else [])
    assert rows.where(5).endswith(f"{name}:train row 5")
    assert len(pickle.dumps(rows[0])) < 1000
    assert rows.hashed == "fingerprint"


def test_a_split_is_named_behind_a_colon(places: dict[str, str]) -> None:
    assert [len(open_rows(f"{places[name]}:test")) for name in ("splits", "parquet")] == [2, 2]
    assert open_rows(places["splits"]).identity() != open_rows(f"{places['splits']}:test").identity()
    with pytest.raises(ConfigError, match="has the splits train, test; name one"):
        open_rows(f"{places['splits']}:none")
    with pytest.raises(ConfigError, match="no file's name begins with 'none'"):
        open_rows(f"{places['parquet']}:none")
    assert str(parse_hf("hf:org/name:part:test[:10%]".replace(":10%", "10%"))) == "hf:org/name:part:test[10%]"


def test_workers_load_what_one_process_loads(places: dict[str, str]) -> None:
    collator: Any = Collator(make_model()[1])
    rows: Any = open_rows(places["saved"])
    alone, shared = (
        list(DataLoader(rows, 2, collate_fn=collator, num_workers=workers)) for workers in (0, 2)
    )
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one if isinstance(one[k], torch.Tensor))


def test_messages_with_their_images_in_a_column(tmp_path: Path) -> None:
    wanted = make_rows(6)
    given = [
        {
            "messages": [
                {
                    "role": m["role"],
                    "content": [{"type": p["type"], "text": p.get("text")} for p in m["content"]],
                }
                for m in row["messages"]
            ],
            "images": images_of(row["messages"]),
        }
        for row in wanted
    ]
    content = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": content})
    data = Dataset.from_list(given, features=Features({"messages": messages, "images": List(Image())}))
    data.save_to_disk(tmp_path / "a")
    rows = open_rows(f"hf:{tmp_path / 'a'}")
    for row, original in zip(rows, wanted, strict=True):
        found = [load_image(image).tobytes() for image in images_of(row["messages"])]
        assert found == [image.tobytes() for image in images_of(original["messages"])]
        assert list(map(message_text, row["messages"])) == list(map(message_text, original["messages"]))
    given[1]["images"] = [make_picture()]
    Dataset.from_list(given, features=data.features).save_to_disk(tmp_path / "b")
    with pytest.raises(DataError, match=r"b:train row 1: the row does not show its image 'images 0'"):
        open_rows(f"hf:{tmp_path / 'b'}")[1]


def test_texts_as_the_cauldron_has_them_and_captions(tmp_path: Path) -> None:
    pair = {"user": "which?", "assistant": "the fox", "source": "x"}
    texts = {"images": [[make_picture(0), make_picture(1)]], "texts": [[pair, pair]]}
    Dataset.from_dict(texts).cast_column("images", List(Image())).save_to_disk(tmp_path / "a")
    (row,) = open_rows(f"hf:{tmp_path / 'a'}")
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
    assert [p["type"] for p in row["messages"][0]["content"]] == ["image", "text"] * 2 + ["text"]
    captions = {"image": ["photo.png"], "caption": ["a fox"]}
    Dataset.from_dict(captions).to_parquet(tmp_path / "captions.parquet")
    (caption,) = open_rows(f"hf:{tmp_path / 'captions.parquet'}", image_root=tmp_path)
    assert images_of(caption["messages"]) == [str(tmp_path / "photo.png")]


def test_a_damaged_picture_names_its_row(tmp_path: Path) -> None:
    data = {"image": [{"bytes": b"\x89PNG\r\n\x1a\nrubbish", "path": None}], "caption": ["a fox"]}
    Dataset.from_dict(data, features=Features({"image": Image(), "caption": Value("string")})).save_to_disk(
        tmp_path / "a"
    )
    row = open_rows(f"hf:{tmp_path / 'a'}")[0]
    (image,) = images_of(row["messages"])
    assert isinstance(image, ImageBytes)
    with pytest.raises(DataError, match=r"a:train row 0 image 0' is"):
        load_image(image)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("train.jsonl", b'{"id": 1, "caption": "a"}\n{"id": 2, "capt', "cannot be read (JSON parse error"),
        ("train.jsonl", b'{"id": 1, "caption": "caf\xe9"}', "cannot be read ('utf-8' codec can't decode"),
        ("train.parquet", b"PAR1 cut off", "cannot be read (Parquet magic bytes not found"),
    ],
)
def test_a_damaged_file_is_one_line(
    tmp_path: Path, name: str, content: bytes, fault: str, streaming: bool
) -> None:
    (tmp_path / name).write_bytes(content)

    def read() -> Any:
        if streaming:
            return list(RowStream(f"hf:{tmp_path}", "coco_captions", None, 4, 0).once())
        return list(open_rows(f"hf:{tmp_path}", "coco_captions"))

    with pytest.raises(MllmError, match=f"^hf:.* {re.escape(fault)}"):
        read()


def test_compressed_lines_and_bare_bytes_are_read(tmp_path: Path) -> None:
    rows = [{"id": i, "image": "a.jpg", "caption": f"cat {i}"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert [row["id"] for row in open_rows(f"hf:{tmp_path}")] == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"the file is compressed \(gzip\); unpack it, or read it as hf:PATH"):
        open_rows(tmp_path / "train.jsonl.gz")
    picture = BytesIO()
    make_picture(0, (8, 6)).save(picture, "PNG")
    path = tmp_path / "b.parquet"
    Dataset.from_list([{"image": picture.getvalue(), "caption": "cat"}]).to_parquet(path)
    (image,) = images_of(open_rows(f"hf:{path}")[0]["messages"])
    assert image_size(image) == (6, 8)
    with pytest.raises(DataError, match="the file is a parquet file; read it as hf:PATH"):
        open_rows(path)


def test_what_the_hub_notes_beside_the_rows_is_no_data(tmp_path: Path) -> None:
    Dataset.from_list([{"image": "a.jpg", "caption": "cat"}]).to_parquet(tmp_path / "train-0.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert len(open_rows(f"hf:{tmp_path}")) == 1


def test_a_split_of_a_set_without_splits_is_refused(tmp_path: Path) -> None:
    """It would be the training rows under another name."""
    Dataset.from_list([{"image": "a.jpg", "caption": "cat"}]).save_to_disk(tmp_path / "saved")
    assert len(open_rows(f"hf:{tmp_path / 'saved'}")) == 1
    with pytest.raises(ConfigError, match="saved without splits; leave 'test' out"):
        open_rows(f"hf:{tmp_path / 'saved'}:test")


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no parquet, arrow or JSON files"):
        open_rows(f"hf:{tmp_path}")
    with pytest.raises(ConfigError, match="write hf:PLACE, hf:PLACE:SPLIT"):
        open_rows("hf:a:b:c:d")
    with pytest.raises(ConfigError, match=r"hf:nobody/none:train cannot be read"):
        open_rows("hf:nobody/none")


def test_the_commands_show_a_stream(places: dict[str, str], tmp_path: Path) -> None:
    parts = save_parts(tmp_path / "parts")
    recipe = {
        "stage": "instruct",
        "model": {**parts, "template": "vicuna_v1"},
        "data": {"path": places["parquet"], "streaming": True},
        "train": {"output_dir": str(tmp_path / "out"), "max_steps": 7},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    shown = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "r.yaml"), "-n", "6", "--json"])
    assert shown.exit_code == 0, shown.output
    assert len(shown.stdout.strip().splitlines()) == 6
    explained = CliRunner().invoke(app, ["explain", str(tmp_path / "r.yaml")])
    assert explained.exit_code == 0, explained.output
    assert "is read as a stream" in " ".join(explained.stdout.split())
