"""The preflight finds what would stop a run, all of it at once, and leaves an earlier run alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import TUNINGS, make_world, run_config, write_rows
from typer.testing import CliRunner

from mllm import cli
from mllm.config import RunConfig, SourceSection, ValSection
from mllm.data.check import check_rows
from mllm.data.collator import Collator
from mllm.data.feature_store import FeatureStore
from mllm.errors import ConfigError
from mllm.training import preflight_report
from mllm.training.build import build_processor, open_mixture
from mllm.training.callbacks import known_lengths, length_line
from mllm.training.longest import LongestFirst
from mllm.training.preflight import preflight, table
from mllm.training.preflight_report import Check, Report, data_line, merge
from mllm.training.saving import amount
from mllm.training.train import train

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def spoilt(folder: Path) -> Path:
    """Rows with a picture that is cut off, one that is not there, and no answer; the rest is good."""
    path = write_rows(folder, 12)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    picture = folder / "r0-0.png"
    picture.write_bytes(picture.read_bytes()[:200])
    (folder / "r3-0.png").unlink()
    lines[5]["messages"] = lines[5]["messages"][:1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def over(config: RunConfig, path: Path, **changes: Any) -> RunConfig:
    data = {"path": [SourceSection(path=str(path))], "image_root": str(path.parent), **changes}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def test_every_bad_row_is_found_with_its_fault(world: Path, tmp_path: Path) -> None:
    config = over(run_config(world, tmp_path / "run", TUNINGS["llm"]), spoilt(tmp_path / "rows"))
    rows = open_mixture(config.data, 0)
    collator = Collator(build_processor(config.model), 200)
    found = check_rows(rows, collator, workers=2, keep=3, show=False)
    assert found.rows == 12
    assert [one["row"].rpartition("/")[2] for one in found.bad] == [
        "rows.jsonl:1 (id r0)", "rows.jsonl:4 (id r3)", "rows.jsonl:6 (id r5)",
    ]  # fmt: skip
    assert all(one["fault"] for one in found.bad)
    assert sum(found.faults.values()) == 3
    good = [n for n in range(12) if n not in (0, 3, 5)]
    length = {n: collator([rows[n]])["counts"][0].tokens for n in good}
    assert [length[n] for n in found.longest] == sorted(length.values())[::-1][:3]
    assert found.pictures == sum(collator([rows[n]])["counts"][0].views for n in good)
    halves = [check_rows(rows, collator, rank=rank, ranks=2, show=False) for rank in range(2)]
    assert [half.rows for half in halves] == [6, 6]
    assert sum(half.pictures for half in halves) == found.pictures
    assert sum(len(half.bad) for half in halves) == 3


def test_answers_without_text_are_counted_and_named(world: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "few", 8)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[7]["messages"][1]["content"][0]["text"] = " "
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = run_config(world, tmp_path / "run", TUNINGS["llm"])
    source = SourceSection(path=str(path), image_root=str(path.parent))
    data = config.data.model_copy(update={"path": [source]})
    rows, collator = open_mixture(data, 0), Collator(build_processor(config.model))
    found = check_rows(rows, collator, workers=1, show=False)
    assert (found.empty, found.first_empty, found.bad) == (1, f"{path}:8 (id r7)", [])
    lengths = known_lengths(None, rows, collator).lengths
    assert lengths is not None
    assert "; 1 answers without text, trained on their end token alone" in length_line(lengths, 8, None)


def test_a_row_that_is_drawn_often_is_looked_at_once(world: Path, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few", 3)
    config = run_config(world, tmp_path / "run", TUNINGS["llm"])
    sources = [
        SourceSection(path=str(p), image_root=str(p.parent)) for p in (world / "rows" / "rows.jsonl", few)
    ]
    data = config.data.model_copy(update={"path": sources, "mixing": "weights"})
    rows = open_mixture(data, 0)
    assert rows.counts[1] > 3
    found = check_rows(rows, Collator(build_processor(config.model)), show=False)
    assert found.rows == min(rows.counts[0], 16) + 3


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_good_run_passes_and_an_earlier_one_stays(world: Path, tmp_path: Path, packing: bool) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS["lora_all"], save_steps=1, max_steps=1)
    config = config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})
    output = train(config)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    report = preflight(config, show=False)
    assert report.passed, report
    assert [check.name for check in report.checks] == [
        "data",
        "model",
        "longest batch",
        "rehearsal and first batches",
    ]
    assert "16 rows" in report.checks[0].detail
    if not packing:
        assert "4 rows" in report.checks[2].detail
    written = output / "preflight.json"
    assert json.loads(written.read_text())["passed"] is True
    written.unlink()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert table(report).row_count == 4


def test_a_few_features_are_tried_and_stay_for_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all: that would take as long as the preflight is there to spare."""
    monkeypatch.setattr("mllm.training.feature_cache.BATCH", 3)
    config = run_config(world, tmp_path / "run", TUNINGS["connector"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"feature_cache": True})})
    pictures = len(list((world / "rows").glob("*.png")))
    for done in (0, 3):
        report = preflight(config, show=False)
        assert report.passed, report
        assert [check.name for check in report.checks][1:4] == ["model", "feature cache", "longest batch"]
        told = report.checks[2].detail
        assert told.startswith(f"{pictures - done} of {pictures} pictures are to be computed before step 1: ")
        assert f" {amount((pictures - done) * 16 * 32 * 4)}, about 0:00:0" in told
        folder = next((tmp_path / "run" / "feature_cache").iterdir())
        assert len(FeatureStore(folder, (16, 32), torch.float32)) == done + 3
    tuned = config.model_copy(update={"tune": config.tune.model_copy(update={"vision_encoder": "full"})})
    report = preflight(tuned, show=False)
    assert [check.passed for check in report.checks] == [True, True, False, None, None]
    assert "the vision encoder learns" in report.checks[2].detail


def test_nothing_is_reported(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker would show a run that never was."""
    config = run_config(world, tmp_path / "run", TUNINGS["connector"], report_to=["tensorboard"])
    seen = []

    def watched(config: RunConfig, **options: Any) -> Path:
        seen.append(config.train.report_to)
        return train(config, **options)

    monkeypatch.setattr("mllm.training.preflight.train", watched)
    assert preflight(config, show=False).passed
    assert seen == [[]]
    unknown = config.train.model_copy(update={"report_to": ["nothing"]})
    report = preflight(config.model_copy(update={"train": unknown}), show=False)
    assert "train.report_to" in report.checks[1].detail


def test_a_run_that_will_be_resumed_is_resumed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is left of its steps, beside the checkpoints that it has; also where no step is left."""
    options: dict[str, Any] = {"save_steps": 1, "save_total_limit": 2}
    train(run_config(world, tmp_path / "run", TUNINGS["connector"], max_steps=3, **options))
    needed = []

    def room(trainer: Any, folder: Path) -> None:
        needed.append((trainer.state.global_step, trainer.limit))

    monkeypatch.setattr("mllm.training.rehearsal._check_disk", room)
    for steps in (4, 3):
        options |= {"max_steps": steps, "resume": "auto"}
        report = preflight(run_config(world, tmp_path / "run", TUNINGS["connector"], **options), show=False)
        assert report.passed, report
    assert needed == [(3, 0), (3, 0)]
    options["learning_rate"] = 5e-4
    report = preflight(run_config(world, tmp_path / "run", TUNINGS["connector"], **options), show=False)
    assert "was trained with train.learning_rate=0.001, this run has 0.0005" in report.checks[1].detail


def test_faults_of_data_and_memory_are_told_together(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS["llm"])
    rows = open_mixture(config.data, 0)
    processor = build_processor(config.model)
    short = [row for row in rows if len(row["messages"]) == 2]
    limit = max(len(processor.encode(row["messages"]).input_ids) for row in short)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": limit})})

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setattr(LongestFirst, "on_train_begin", full)  # the machine has no GPU to fill
    report = preflight(config, show=False)
    passed = {check.name: check.passed for check in report.checks}
    assert passed == {
        "data": True,
        "model": True,
        "longest batch": False,
        "rehearsal and first batches": None,
    }
    assert "9.00 GiB were wanted" in report.checks[2].detail
    assert "of rows over data.max_length" in report.checks[0].detail
    assert not report.passed


def test_the_command_has_an_exit_code_and_json(world: Path, tmp_path: Path) -> None:
    good = run_config(world, tmp_path / "good", TUNINGS["connector"])
    bad = over(run_config(world, tmp_path / "bad", TUNINGS["connector"]), spoilt(tmp_path / "rows"))
    for config, code in ((good, 0), (bad, 1)):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)))
        result = CliRunner().invoke(cli.app, ["train", str(recipe), "--preflight", "--json"])
        assert result.exit_code == code, result.output
        found = json.loads(result.stdout)
        assert found["passed"] is (code == 0)
        assert len(found["data"]["bad"]) == 3 * code
        assert [check["passed"] for check in found["checks"]] == (
            [False, None, None, None] if code else [True] * 4
        )
        assert not (Path(config.train.output_dir) / "mllm_manifest.json").exists()
        assert not (Path(config.train.output_dir) / "preflight").exists()
        result = CliRunner().invoke(cli.app, ["data", "check", str(recipe), "--json"])
        assert result.exit_code == code, result.output
        assert json.loads(result.stdout) == found["data"]
        result = CliRunner().invoke(cli.app, ["data", "check", str(recipe), "--workers", "1"])
        assert result.exit_code == code
        assert f"bad: {3 * code}\n" in result.stdout
        assert result.stdout.count("rows.jsonl:") == 3 * code


def test_rows_of_the_validation_are_checked_too(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS["llm"])
    bad = spoilt(tmp_path / "rows")
    for path, fault in ((bad, r"rows.jsonl:1 (id r0): image "), (tmp_path / "gone.json", "there is no such")):
        val = ValSection(path=str(path), image_root=str(bad.parent))
        report = preflight(config.model_copy(update={"val": val}), show=False)
        assert report.checks[1].name == "validation"
        assert not report.checks[1].passed
        assert fault in report.checks[1].detail
    with pytest.raises(ConfigError, match=r"val\.path: there is no '.*gone\.json'"):
        train(config.model_copy(update={"val": val}))


def test_ranks_make_one_report(world: Path, tmp_path: Path) -> None:
    """The faults of all, and the first rank that did not come so far; one that is silent is told."""
    config = over(run_config(world, tmp_path / "run", TUNINGS["llm"]), spoilt(tmp_path / "rows"))
    rows, collator = open_mixture(config.data, 0), Collator(build_processor(config.model))
    whole = check_rows(rows, collator, show=False)
    halves = [check_rows(rows, collator, rank=rank, ranks=2, show=False) for rank in range(2)]
    fine = [Check("model", True, "ok", 1.0), Check("model", False, "no GPU", 2.0)]
    reports = [
        Report.of([data_line(config, half, rank), fine[rank]], half) for rank, half in enumerate(halves)
    ]
    merged = merge(config, reports)
    assert merged.data is not None
    told = {key: merged.data[key] for key in ("rows", "pictures", "turns", "tokens", "faults")}
    assert told == {key: getattr(whole, key) for key in told}
    assert {one["row"]: one["fault"] for one in merged.data["bad"]} == {
        one["row"]: one["fault"] for one in whole.bad
    }
    assert "12 rows" in merged.checks[0].detail
    assert "3 bad rows" in merged.checks[0].detail
    assert merged.checks[1] == Check("model", False, "rank 1: no GPU", 2.0)
    assert merge(config, reports, [2]).checks[-1].detail.startswith("ranks 2 have not reported")
    reports[1] = Report([Check("data", False, "no such file", 0.0), fine[0]], None)
    merged = merge(config, reports)
    assert (merged.passed, merged.data) == (False, None)


def test_a_rank_that_failed_alone_tells_it_itself(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 waits for it within a collective, and takes no report."""
    monkeypatch.setattr(preflight_report, "WAIT_OF_FAILED", 0.2)
    config = run_config(world, tmp_path, TUNINGS["llm"])
    own = Report([Check("data", True, "fine", 1.0), Check("model", False, "no GPU", 1.0)], None)
    told = preflight_report.over_ranks(config, own, tmp_path, 1, 2)
    assert not told.of_all
    assert told.checks[1].detail == "rank 1: no GPU"
    assert json.loads((tmp_path / "preflight.json").read_text())["checks"][1]["detail"] == "rank 1: no GPU"
    assert not (tmp_path / "preflight.rank1.json").exists()


def test_a_place_that_cannot_be_written_is_told_first(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train.output_dir: .* is no folder that can be written"):
        preflight(run_config(world, tmp_path / "file", TUNINGS["llm"]), show=False)


@pytest.mark.slow
def test_two_ranks_under_deepspeed(world: Path, tmp_path: Path) -> None:
    config = run_config(
        world, tmp_path / "run", TUNINGS["llm"], deepspeed=str(REPOSITORY / "ds_configs" / "zero3.json")
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(REPOSITORY / "scripts" / "train.py"), str(recipe), "--preflight"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert report["passed"]
    assert report["data"]["rows"] == 16
    assert not list((tmp_path / "run").glob("preflight.rank*.json"))
    assert (done.stdout + done.stderr).count("Preflight") == 1
