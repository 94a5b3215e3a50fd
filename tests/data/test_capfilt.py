"""CapFilt: what is kept, what is counted, and that a cut run ends as a whole one does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import make_image_processor, make_model, make_picture, make_vision
from pairs import bert_tokenizer
from typer.testing import CliRunner

from mllm.cli import app
from mllm.data.capfilt import Filtered, capfilt, matcher
from mllm.data.rows import Rows, open_rows
from mllm.data.schema import assistant, user
from mllm.errors import ConfigError, DataError
from mllm.model import save
from mllm.model.pretraining.compose import compose_qformer_pretraining


def write(path: Path, captions: Sequence[str]) -> Rows:
    """A picture a caption; picture i is of width 20 + i, so that the tests' models can tell which it is."""
    lines = []
    for i, caption in enumerate(captions):
        make_picture(i, (20 + i, 16)).save(path.parent / f"{i}.png")
        lines.append(json.dumps({"id": f"r{i}", "messages": [user("", f"{i}.png"), assistant(caption)]}))
    path.write_text("\n".join(lines) + "\n")
    return open_rows(path, image_root=path.parent)


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return write(tmp_path / "web.jsonl", [f"web {i}" for i in range(10)])


class Models:
    """A captioner that names the picture, and a filter that knows which captions are good."""

    def __init__(self, good: set[str], fail_after: int = 99):
        self.good, self.left, self.calls = good, fail_after, 0

    def caption(self, images: Sequence[Any], seed: int) -> list[str]:
        self.calls += 1
        if self.calls > self.left:
            raise KeyboardInterrupt
        return ["" if image.width == 23 else f" seen {image.width - 20} ({seed})" for image in images]

    def score(self, images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        assert len(images) == len(texts)
        for image, text in zip(images, texts, strict=True):  # every text with its own image
            assert not text or text.split()[1] == str(image.width - 20)
        return [0.9 if text.split("(")[0].strip() in self.good else 0.2 for text in texts]


def run(rows: Rows, out: Path, models: Models, **options: Any) -> Filtered:
    return capfilt(
        rows,
        out,
        models.caption,
        models.score,
        made_by={"models": 1},
        batch_size=4,
        progress=False,
        **options,
    )


def kept(out: Path) -> list[tuple[str, str, str]]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return [(r["id"], r["messages"][1]["content"][0]["text"], r["provenance"]["capfilt"]) for r in found]


GOOD = {"web 1", "seen 1", "web 2", "seen 5", ""}


def test_what_fits_is_kept_and_every_drop_is_counted(rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "6.png").write_bytes(b"no picture")
    (tmp_path / "h").mkdir()
    human = write(tmp_path / "h" / "human.jsonl", ["by hand"])
    done = run(rows, tmp_path / "out.jsonl", Models(GOOD), human=human, seed=100)
    assert kept(tmp_path / "out.jsonl") == [
        ("r1", "web 1", "web"),
        ("r1-synthetic", "seen 1 (100)", "synthetic"),
        ("r2", "web 2", "web"),
        ("r5-synthetic", "seen 5 (104)", "synthetic"),
        ("r0", "by hand", "human"),
    ]
    assert (done.rows, done.web_kept, done.web_dropped, done.human, done.bad) == (5, 2, 7, 1, 1)
    assert (done.synthetic_kept, done.synthetic_dropped) == (2, 7)
    assert "6.png" in done.first_bad
    again = open_rows(tmp_path / "out.jsonl", image_root=tmp_path)
    assert again[1]["messages"][0]["content"][0]["image"] == str(tmp_path / "1.png")


@pytest.mark.parametrize("broken", [b"", b'{"web": 0.9, "capt'])
def test_a_cut_run_ends_as_a_whole_one_does(rows: Rows, tmp_path: Path, broken: bytes) -> None:
    run(rows, tmp_path / "whole.jsonl", Models(GOOD))
    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(rows, cut, Models(GOOD, fail_after=2))
    assert not cut.exists()
    with (tmp_path / "cut.jsonl.scores.jsonl").open("ab") as file:
        file.write(broken)
    models = Models(GOOD)
    assert run(rows, cut, models).resumed == 8
    assert models.calls == 1
    for suffix in ("", ".scores.jsonl"):
        whole, ours = (tmp_path / f"{name}.jsonl{suffix}" for name in ("whole", "cut"))
        assert ours.read_bytes() == whole.read_bytes()


def test_another_threshold_needs_no_model_and_other_settings_are_refused(rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(rows, out, Models(GOOD))
    done = run(rows, out, Models(GOOD, fail_after=0), threshold=0.0)
    assert (done.web_kept, done.synthetic_kept, done.synthetic_dropped) == (10, 9, 1)  # one is empty
    with pytest.raises(ConfigError, match="restore them, or delete the file"):
        run(rows, out, Models(GOOD), seed=1)
    with pytest.raises(DataError, match="no caption fits its image"):
        run(rows, out, Models(GOOD), threshold=0.95)
    assert len(kept(out)) == 19  # what was there stays


def test_checkpoints_of_ours_from_the_command_line(rows: Rows, tmp_path: Path) -> None:
    save(*make_model(template="plain"), tmp_path / "captioner")
    qformer = {"num_queries": 4, "width": 32, "layers": 2, "heads": 4, "intermediate": 64}
    judge = compose_qformer_pretraining(
        make_vision(), bert_tokenizer(), qformer, image_processor=make_image_processor(), embed_dim=16
    )
    save(*judge, tmp_path / "judge")
    out = tmp_path / "clean.jsonl"
    command = [
        *("data", "capfilt", str(rows.path), str(out), "--image-root", str(tmp_path), "--json"),
        *("--captioner", str(tmp_path / "captioner"), "--filter", str(tmp_path / "judge")),
    ]
    result = CliRunner().invoke(app, [*command, "--threshold", "0"], catch_exceptions=False)
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["web_kept"] == 10
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    images = [rows[i]["messages"][0]["content"][0]["image"] for i in range(10)]
    expected = matcher(*judge)(images, [f"web {i}" for i in range(10)])
    found = [line["provenance"]["score"] for line in lines if line["provenance"]["capfilt"] == "web"]
    assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigError, match="give one of pretrain_qformer"):
        matcher(*make_model())
