"""Readers, lazy rows and conversion: exact texts, exact messages, nothing parsed before its time."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mllm.data import sources
from mllm.data.collator import Collator
from mllm.data.convert import convert
from mllm.data.images import load_image
from mllm.data.readers import CAPTION_QUESTIONS, READERS, read_llava, read_sharegpt
from mllm.data.rows import open_rows
from mllm.data.schema import assistant, check_row, image_part, images_of, text_part, user
from mllm.errors import DataError

COCO = Path(os.environ.get("MLLM_TEST_DATA", Path(__file__).parents[3] / "shared/data"), "coco_tiny")
needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason=f"no real COCO data at {COCO}")


def turn(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def llava(*values: str, image: Any = None, id: Any = "r1") -> dict[str, Any]:
    turns = [turn("gpt" if i % 2 else "human", value) for i, value in enumerate(values)]
    return {"id": id, "conversations": turns} | ({} if image is None else {"image": image})


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_list(path: Path, rows: list[Any], indent: int | None = 1) -> Path:
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    return path


# --- What a good row becomes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("<image>\nWhat is this?", [image_part("a.jpg"), text_part("\nWhat is this?")]),
        ("What is this?\n<image>", [text_part("What is this?\n"), image_part("a.jpg")]),
        ("<image>", [image_part("a.jpg")]),
        ("Look: <image> here", [text_part("Look: "), image_part("a.jpg"), text_part(" here")]),
    ],
)
def test_llava_keeps_the_place_of_the_image(value: str, content: list[Any]) -> None:
    row = read_llava(llava(value, "A cat.", image="a.jpg"), "f:1")
    assert row == {
        "id": "r1",
        "messages": [{"role": "user", "content": content}, assistant("A cat.")],
    }


def test_llava_with_several_images_over_turns() -> None:
    raw = llava("<image><image>\nCompare.", "Same.", "And <image>?", "", image=["a", "b", "c"], id=7)
    row = read_llava(raw, "f:1")
    assert row["id"] == "7"
    assert row["messages"][0]["content"] == [
        image_part("a"),
        image_part("b"),
        text_part("\nCompare."),
    ]
    assert row["messages"][2]["content"] == [text_part("And "), image_part("c"), text_part("?")]
    assert row["messages"][3]["content"] == [text_part("")]


def test_llava_without_image_and_with_system_turn() -> None:
    raw = llava("Hi", "Hello") | {"image": None, "model": "any extra field is ignored"}
    raw["conversations"].insert(0, turn("system", "Be kind."))
    roles = [message["role"] for message in read_llava(raw, "f:1")["messages"]]
    assert roles == ["system", "user", "assistant"]


def test_sharegpt_drops_leading_answers() -> None:
    turns = [turn("system", "s"), turn("gpt", "lost"), turn("human", "q<image>"), turn("gpt", "a")]
    row = read_sharegpt({"id": "1", "images": ["a.jpg"], "conversations": turns}, "f:1")
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == [text_part("q"), image_part("a.jpg")]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    pieces=st.lists(st.lists(texts, min_size=1, max_size=4), min_size=1, max_size=5),
    answers=st.lists(texts, min_size=5, max_size=5),
    data=st.data(),
)
def test_texts_and_images_are_kept_exactly(pieces, answers, data) -> None:
    values, images = [], []
    for question, answer in zip(pieces, answers, strict=False):
        values += ["<image>".join(question), answer]
        images += [f"{len(images) + i}.jpg" for i in range(len(question) - 1)]
    if any("<image>" in text for text in [*answers, *(t for q in pieces for t in q)]):
        return
    image = data.draw(st.sampled_from([images, *images[:1]])) if len(images) == 1 else images
    row = read_llava(llava(*values, image=image or None), "f:1")
    assert check_row(row, "f:1") == row
    assert [p["image"] for m in row["messages"] for p in m["content"] if p["type"] == "image"] == images
    written = [
        "".join(p["text"] if p["type"] == "text" else "<image>" for p in m["content"])
        for m in row["messages"]
    ]
    assert written == values


# --- Malformed rows and their messages -------------------------------------------------------------

BAD_LLAVA = [
    ([1], "f:1: a row must be a JSON object, found list"),
    ({"id": {}}, "f:1: field 'id' must be a string or a whole number, found {}"),
    ({"id": True}, "f:1: field 'id' must be a string or a whole number, found True"),
    ({"id": 3}, "f:1 (id 3): field 'conversations' must be a non-empty list of turns"),
    (
        {"id": 3, "conversations": []},
        "f:1 (id 3): field 'conversations' must be a non-empty list of turns",
    ),
    (
        {"id": 3, "conversations": "hi"},
        "f:1 (id 3): field 'conversations' must be a non-empty list of turns",
    ),
    (
        {"conversations": ["hi"]},
        "f:1: conversations[0] must be an object with 'from' and 'value', found 'hi'",
    ),
    (
        {"conversations": [turn("bot", "hi")]},
        "f:1: conversations[0].from is 'bot'; use 'human', 'gpt' or 'system'",
    ),
    (
        {"conversations": [{"value": "hi"}]},
        "f:1: conversations[0].from is None; use 'human', 'gpt' or 'system'",
    ),
    (
        {"conversations": [turn("human", "hi"), turn("gpt", 5)]},
        "f:1: conversations[1].value must be a string, found 5",
    ),
    (
        {"conversations": [turn("gpt", "hi")]},
        "f:1: conversations[0].from is 'gpt' where 'human' must stand; "
        "after an optional 'system', 'human' and 'gpt' speak in turn, 'human' first",
    ),
    (
        {"conversations": [turn("human", "a"), turn("human", "b")]},
        "f:1: conversations[1].from is 'human' where 'gpt' must stand; "
        "after an optional 'system', 'human' and 'gpt' speak in turn, 'human' first",
    ),
    (
        {"conversations": [turn("human", "a"), turn("gpt", "b"), turn("system", "c")]},
        "f:1: conversations[2].from is 'system' where 'human' must stand; "
        "after an optional 'system', 'human' and 'gpt' speak in turn, 'human' first",
    ),
    (
        {"conversations": [turn("system", "a")]},
        "f:1: there is no 'human' turn in 'conversations'; add one",
    ),
    (
        llava("What?", "A.", image="a.jpg"),
        "f:1 (id r1): 0 '<image>' in the 'human' turns of 'conversations' for 1 images in 'image'; "
        "write '<image>\\n' where it belongs, e.g. at the start of the first 'human' turn",
    ),
    (
        llava("<image>What?", "A."),
        "f:1 (id r1): 1 '<image>' in the 'human' turns of 'conversations' for 0 images in 'image'; "
        "add the field 'image', or remove '<image>' from the text",
    ),
    (
        llava("<image>What?", "A.", "<image>", "B", image=["a", "b", "c"]),
        "f:1 (id r1): 2 '<image>' in the 'human' turns of 'conversations' for 3 images in 'image'; "
        "write '<image>' once for each image",
    ),
    (
        llava("<image><image>What?", "A.", image="a.jpg"),
        "f:1 (id r1): 2 '<image>' in the 'human' turns of 'conversations' for 1 images in 'image'; "
        "write '<image>' once for each image",
    ),
    (
        llava("What?", "A <image>.", image="a.jpg"),
        "f:1 (id r1): conversations[1].value holds '<image>', but images belong to 'human' turns; "
        "move or remove it",
    ),
    (
        llava("<image>", "A", image=""),
        "f:1 (id r1): field 'image' must be a path or a list of paths, found ''; "
        "leave it out of a text-only row",
    ),
    (
        llava("<image>", "A", image=5),
        "f:1 (id r1): field 'image' must be a path or a list of paths, found 5; "
        "leave it out of a text-only row",
    ),
    (
        llava("<image>", "A", image=["a", None]),
        "f:1 (id r1): field 'image' must be a path or a list of paths, found ['a', None]; "
        "leave it out of a text-only row",
    ),
    (
        llava("<image>", "A", image={"path": "x" * 90}),
        "f:1 (id r1): field 'image' must be a path or a list of paths, found "
        f"{{'path': '{'x' * 47}...; leave it out of a text-only row",
    ),
    (
        llava("<image>", "A") | {"images": ["a.jpg"]},
        "f:1 (id r1): field 'images' is not LLaVA's; name it 'image', or read the file as sharegpt",
    ),
]

BAD_OTHER = [
    ("messages", "hi", "f:1: a row must be a JSON object, found str"),
    (
        "messages",
        {"id": "a", "messages": [assistant("x")]},
        "f:1 (id a): messages[0].role is 'assistant' where 'user' must stand; order messages as an "
        "optional 'system', then 'user' and 'assistant' in turn",
    ),
    (
        "messages",
        {"id": "a", "messages": [user("x")], "image": "a.jpg"},
        "f:1 (id a): unknown field 'image'; a row has 'id' and 'messages'",
    ),
    (
        "sharegpt",
        {"id": "a", "conversations": [turn("gpt", "x")]},
        "f:1 (id a): conversations[0].from is 'gpt' where 'human' must stand; "
        "after an optional 'system', 'human' and 'gpt' speak in turn, 'human' first",
    ),
    (
        "sharegpt",
        {"conversations": []},
        "f:1: field 'conversations' must be a non-empty list of turns",
    ),
    ("coco_captions", {"id": 1, "caption": "x"}, "f:1 (id 1): field 'image' must be one path"),
    (
        "coco_captions",
        {"id": 1, "image": "a", "caption": " \n"},
        "f:1 (id 1): field 'caption' must be a non-empty string; write one or remove the row",
    ),
]


@pytest.mark.parametrize(("format", "raw", "message"), [("llava", *case) for case in BAD_LLAVA] + BAD_OTHER)
def test_malformed_rows(format: str, raw: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        READERS[format](raw, "f:1")
    assert str(caught.value) == message


def test_there_are_enough_malformed_rows() -> None:
    assert len(BAD_LLAVA) + len(BAD_OTHER) >= 30


# --- Files -----------------------------------------------------------------------------------------

GOOD = [llava(f'<image>\nQ{i} {{["\\', f"A{i}, ]}}", image=f"{i}.jpg", id=i) for i in range(5)]


@pytest.mark.parametrize("layout", ["lines", "list", "one-line list", "bom", "blank lines", "crlf"])
def test_every_layout_gives_the_same_rows(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "data.json"
    lines = [json.dumps(row) for row in GOOD]
    text = {
        "lines": "\n".join(lines),
        "list": json.dumps(GOOD, indent=2),
        "one-line list": json.dumps(GOOD, separators=(",", ":")),
        "bom": "\ufeff" + "\n".join(lines),
        "blank lines": "\n\n" + "\n  \n".join(lines) + "\n\n",
        "crlf": "\r\n".join(lines) + "\r\n",
    }[layout]
    path.write_text(text, encoding="utf-8", newline="")
    rows = open_rows(path, image_root=tmp_path)
    assert len(rows) == 5
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[-1] == rows[4]
    assert rows[1:3] == [rows[1], rows[2]]
    assert rows[2]["messages"][0]["content"] == [
        image_part(str(tmp_path / "2.jpg")),
        text_part('\nQ2 {["\\'),
    ]
    with pytest.raises(IndexError):
        rows[5]


def test_where_names_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(GOOD[0])}\n\n{json.dumps(GOOD[1])}\n", encoding="utf-8")
    rows = open_rows(path)
    assert [rows.where(i) for i in range(2)] == [f"{path}:2", f"{path}:4"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    values=st.lists(st.dictionaries(st.text('\\"[]{},a', max_size=5), json_values), max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_list_scan_finds_what_json_finds(tmp_path, values, indent, ascii_only, chunk) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(sources, "_CHUNK", chunk)
        spans = sources._scan_list(file, path)
    data = path.read_bytes()
    assert [json.loads(data[start:end]) for start, end in spans.tolist()] == values


def test_cut_off_list_is_refused_at_once(tmp_path: Path) -> None:
    path = write_list(tmp_path / "a.json", GOOD)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError) as caught:
        open_rows(path)
    assert str(caught.value) == (
        f"{path}: the list ends inside element 4; the file is cut off: copy or download it again"
    )


@pytest.mark.parametrize("as_list", [False, True])
def test_only_touched_rows_are_parsed(tmp_path: Path, as_list: bool) -> None:
    """A row that is not JSON does no harm until it is asked for."""
    lines = [json.dumps(row) for row in GOOD]
    lines[3] = '{"id": 3, "conversations": oops}'
    path = tmp_path / "a.json"
    path.write_text(f"[{','.join(lines)}]" if as_list else "\n".join(lines), encoding="utf-8")
    rows = open_rows(path)
    assert [rows[i]["id"] for i in (0, 1, 2, 4)] == ["0", "1", "2", "4"]
    where = f"{path}: element 3" if as_list else f"{path}:4"
    with pytest.raises(DataError) as caught:
        rows[3]
    assert str(caught.value) == f"{where}: not valid JSON (Expecting value, column 28); fix it there"


def test_memory_does_not_grow_with_row_size(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [llava("q" * 20_000, "a", id=i) for i in range(200)])
    size = len(pickle.dumps(open_rows(path)))
    assert path.stat().st_size > 4_000_000
    assert size < 200 * 24 + 2_000


def read_ids(rows, indices: list[int], queue) -> None:
    queue.put([rows[i]["id"] for i in indices])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_rows_work_in_worker_processes(tmp_path: Path, method: str) -> None:
    rows = open_rows(write_lines(tmp_path / "a.jsonl", GOOD))
    assert rows[0]["id"] == "0"
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=read_ids, args=(rows, indices, queue)) for indices in ([1, 3], [0, 4])]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(found) == [["0", "4"], ["1", "3"]]


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", GOOD)
    rows = pickle.loads(pickle.dumps(open_rows(path)))
    write_lines(path, GOOD[1:])
    with pytest.raises(DataError, match=r"a\.jsonl has changed since it was opened; start again"):
        rows[0]
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl is gone"):
        rows[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; a data set needs at least one row"),
        (b" \n\n", "the file is empty; a data set needs at least one row"),
        (b"[]", "there are no rows in the file; a data set needs at least one"),
        (b"[ \n ]", "there are no rows in the file; a data set needs at least one"),
        (
            b'{"images": [], "annotations": []}',
            "there are no rows in the file; a data set needs at least one",
        ),
        (
            b'{\n "foo": 1\n}',
            "neither rows nor COCO captions: write one JSON object a line, a JSON list of objects, "
            "or an object with 'images' and 'annotations'",
        ),
    ],
)
def test_files_without_rows(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_rows(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"foo": 1, "bar": 2}\n', ":1: the format cannot be told from the first row (fields bar, foo)"),
        (b"[3, 4]", ": element 0: the format cannot be told from the first row (int)"),
        (b'{"messages": [}\n{}', ":1: not valid JSON (Expecting value, column 15); fix it there"),
        (b'{"a": "\xff\xfe"}\n', ":1: not UTF-8 text (invalid start byte); save it as UTF-8"),
        (b'{"messages": "\\ud800"}', ":1: not UTF-8 text (surrogates not allowed); save it as UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"\n{}", ":1: not readable JSON"),
    ],
)
def test_first_rows_that_tell_nothing(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_rows(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_wrong_paths_and_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file; fix the path"):
        open_rows(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot be read"):
        open_rows(tmp_path)
    with pytest.raises(DataError, match="unknown data format 'lava'; use one of auto, messages, llava"):
        open_rows(tmp_path, "lava")


def test_missing_image_is_found_when_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", GOOD[:2])
    (tmp_path / "1.jpg").touch()
    assert open_rows(path, image_root=tmp_path)[0]["id"] == "0"
    rows = open_rows(path, image_root=tmp_path, check_images=True)
    assert rows[1]["id"] == "1"
    with pytest.raises(DataError) as caught:
        rows[0]
    assert str(caught.value) == (
        f"{path}:1 (id 0): field 'image': file '{tmp_path / '0.jpg'}' does not exist; "
        "fix the path or the image root"
    )


def test_absolute_image_paths_stay(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [llava("<image>", "A", image="/data/a.jpg")])
    assert open_rows(path, image_root=tmp_path)[0]["messages"][0]["content"] == [image_part("/data/a.jpg")]


def test_image_of_our_schema_must_be_a_path(tmp_path: Path) -> None:
    row = {"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}
    with pytest.raises(DataError, match=r"a\.jsonl:1 \(id a\): field 'image' must be a path, found '3'"):
        open_rows(write_lines(tmp_path / "a.jsonl", [row]))[0]


# --- COCO captions ---------------------------------------------------------------------------------


def coco(captions: list[tuple[Any, Any]], images: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in images],
        "annotations": [
            {"id": 10 + n, "image_id": image_id, "caption": caption}
            for n, (image_id, caption) in enumerate(captions)
        ],
    }


@pytest.mark.parametrize("indent", [None, 2])
def test_coco_captions(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(coco([(1, " A cat. \n"), (1, "Cat"), (2, "Dog")]), indent=indent))
    rows = open_rows(path)
    assert [row["id"] for row in rows] == ["10", "11", "12"]
    image, question = rows[0]["messages"][0]["content"]
    assert image == image_part("1.jpg")
    assert question["text"].removeprefix("\n") in CAPTION_QUESTIONS
    assert rows[0]["messages"][1] == assistant("A cat.")
    per_image = open_rows(path, "coco_captions", per="image")
    assert [(row["id"], row["messages"][1]) for row in per_image] == [
        ("1", assistant("A cat.")),
        ("2", assistant("Dog")),
    ]
    with pytest.raises(DataError, match="this is a coco_captions file, not llava; name that format"):
        open_rows(path, "llava")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (coco([(3, "x")]), "annotations[0].image_id 3 is not in 'images'; add that image"),
        (coco([([], "x")]), "annotations[0].image_id [] is not in 'images'; add that image"),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]},
            "annotations[0] has no 'caption'; give a captions file, or read instances as coco_boxes",
        ),
        ({"images": [{"id": 1}], "annotations": []}, "images[0] must have an 'id' and a 'file_name'"),
        ({"images": {}, "annotations": []}, "field 'images' must be a list"),
    ],
)
def test_malformed_coco(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError) as caught:
        open_rows(path)
    assert str(caught.value) == f"{path}: {message}"


def test_empty_caption_is_named(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(coco([(1, "ok"), (2, "")])))
    with pytest.raises(DataError, match=r"captions\.json: caption 1 \(id 11\): field 'caption' must be"):
        open_rows(path)[1]


# --- Conversion ------------------------------------------------------------------------------------


def without_place(row: Any) -> dict[str, Any]:
    """A row without the file and line it came from."""
    assert row["source"]
    return {key: value for key, value in row.items() if key != "source"}


@pytest.mark.parametrize("as_list", [False, True])
def test_conversion_round_trip(tmp_path: Path, as_list: bool) -> None:
    source = (write_list if as_list else write_lines)(tmp_path / "a.json", GOOD)
    output = tmp_path / "deep" / "out.jsonl"
    done = convert(source, output)
    assert (done.rows, done.images, done.bad) == (5, 5, 0)
    assert [without_place(row) for row in open_rows(output)] == [
        without_place(row) for row in open_rows(source)
    ]
    assert [p.name for p in output.parent.iterdir()] == ["out.jsonl"]
    again = tmp_path / "again.jsonl"
    convert(output, again, format="messages")
    assert again.read_bytes() == output.read_bytes()


def test_conversion_error_leaves_nothing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*GOOD, {"id": 9}])
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.jsonl").write_text("old")
    for name in ("old.jsonl", "new.jsonl"):
        with pytest.raises(DataError, match=r"a\.jsonl:6 \(id 9\): field 'conversations' must be"):
            convert(source, out / name)
    assert [p.name for p in out.iterdir()] == ["old.jsonl"]
    assert (out / "old.jsonl").read_text() == "old"


def test_skipped_rows_are_counted_with_reasons(tmp_path: Path) -> None:
    bad = [llava("<image>", "A", id=7), {"id": 8}, llava("<image>", "A", id="a b")]
    source = write_lines(tmp_path / "a.jsonl", [*GOOD, *bad])
    done = convert(source, tmp_path / "out.jsonl", on_error="skip", max_bad=0.4)
    assert (done.rows, done.bad) == (5, 3)
    assert done.first_bad.startswith(f"{source}:6 (id 7): 1 '<image>' in the 'human' turns")
    assert sorted(done.reasons.values()) == [1, 2]
    assert json.loads(json.dumps(asdict(done), default=str))["reasons"] == done.reasons
    assert done.reasons["field 'conversations' must be a non-empty list of turns"] == 1
    with pytest.raises(DataError, match=r"3 of 8 rows are bad, more than the share max_bad=0.3 allows"):
        convert(source, tmp_path / "none.jsonl", on_error="skip", max_bad=0.3)
    assert not (tmp_path / "none.jsonl").exists()


def test_rows_that_training_refuses_are_bad_and_empty_answers_are_counted(tmp_path: Path) -> None:
    talks = [["A", "b"], ["A"], ["A", "b", "A"], ["A", " "], ["A", "", "A", "b", "A", " "]]
    source = write_lines(tmp_path / "a.jsonl", [llava(*talk, id=i) for i, talk in enumerate(talks)])
    done = convert(source, tmp_path / "out.jsonl", on_error="skip", max_bad=1)
    assert (done.rows, done.bad, list(done.reasons.values())) == (3, 2, [2])
    assert done.first_bad.startswith(f"{source}:2 (id 1): the last message must be an 'assistant' message")
    assert (done.empty_answers, done.first_empty) == (3, f"{source}:4 (id 3)")
    processor = make_model()[1]
    for row in open_rows(source):
        if row["id"] in ("0", "3", "4"):
            Collator(processor)([row])
        else:
            with pytest.raises(DataError) as caught:
                Collator(processor)([row])
            assert re.sub(r".*\): ", "", str(caught.value)) in done.reasons


def test_an_address_is_no_path_under_the_image_root(tmp_path: Path) -> None:
    row = llava("<image>", "A", image="https://a.b/c.jpg")
    rows = open_rows(write_lines(tmp_path / "a.jsonl", [row]), image_root=tmp_path)
    with pytest.raises(DataError, match=r"'https://a\.b/c\.jpg' is not a file; download it"):
        load_image(images_of(rows[0]["messages"])[0])


def test_missing_images_count_as_one_reason(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "3.jpg").touch()
    options = {"image_root": tmp_path, "check_images": True}
    done = convert(source, tmp_path / "out.jsonl", on_error="skip", max_bad=1, **options)
    assert done.rows == 1
    assert list(done.reasons.values()) == [4]
    with pytest.raises(DataError, match=r"a\.jsonl:1 \(id 0\): field 'image': file .* does not exist"):
        convert(source, tmp_path / "out2.jsonl", **options)


def test_output_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Whoever has the old file open keeps on reading the old file."""
    source = write_lines(tmp_path / "a.jsonl", GOOD)
    output = write_lines(tmp_path / "out.jsonl", ["old"])
    with output.open() as reader:
        convert(source, output)
        assert reader.read() == '"old"\n'
    assert len(open_rows(output)) == 5


def test_output_must_not_be_the_source(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match="is the file that is read; write to another"):
        convert(source, tmp_path / "." / "a.jsonl")


@needs_coco
def test_real_captions(tmp_path: Path) -> None:
    source = COCO / "annotations" / "captions_train2017.json"
    output = tmp_path / "align.jsonl"
    done = convert(source, output, image_root=COCO / "train2017", check_images=True)
    assert (done.rows, done.images) == (250, 250)
    rows = open_rows(output, image_root=COCO / "train2017", check_images=True)
    assert len({row["id"] for row in rows}) == 250
    assert len(open_rows(source, per="image")) == 50
