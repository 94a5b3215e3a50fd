"""The quickstart as a user runs it, and the bars it has to pass."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mllm.data.rows import open_rows
from mllm.model.checkpoint import read_manifest
from mllm.quickstart.run import COLUMNS, run

BACKBONES = Path(__file__).parents[2] / "mllm" / "quickstart" / "backbones"


def test_backbones_are_small() -> None:
    weights = list(BACKBONES.rglob("*.safetensors"))
    assert len(weights) == 2
    assert sum(path.stat().st_size for path in BACKBONES.rglob("*") if path.is_file()) < 10_000_000


def check_report(out: Path, page: Path) -> dict:
    report = json.loads((out / "report.json").read_text())
    assert set(report["pope"]) == set(COLUMNS)
    for column, numbers in report["pope"].items():
        assert numbers["runs"] == (5 if "sample" in column else 1)
        assert (numbers["accuracy_std"] is not None) == ("sample" in column)
    assert {"world", "align", "instruct", "pope", "ask", "report", "total"} == set(report["seconds"])
    html = page.read_text()
    assert not re.findall(r"""(?:src|href)=(?!["']?data:)""", html), "the page loads something from elsewhere"
    for numbers in report["pope"].values():
        assert f"{numbers['accuracy']:.3f}" in html
    assert html.count("<img") == 4  # three scenes and the loss
    return report


@pytest.mark.slow
def test_fast_quickstart_writes_everything(tmp_path: Path) -> None:
    page = run(tmp_path / "q", fast=True)
    report = check_report(tmp_path / "q", page)
    assert report["fast"]
    assert "Its numbers mean nothing" in page.read_text()
    assert len(open_rows(tmp_path / "q" / "world" / "align.json")) == 64
    manifest = read_manifest(tmp_path / "q" / "instruct")
    assert manifest["stage"] == "instruct"
    assert manifest["parent"]["path"] == str(tmp_path / "q" / "align")


@pytest.mark.slow
def test_quickstart_passes_its_bars(tmp_path: Path) -> None:
    report = check_report(tmp_path, run(tmp_path))
    assert report["pope"]["greedy"]["accuracy"] >= 0.90
    assert 0.40 <= report["blank_image"]["accuracy"] <= 0.60
