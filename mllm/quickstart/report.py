"""The quickstart's report: one self-contained page, and what it says about VCD."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from eval.records import read_rows
from eval.tasks.pope import SPLITS, official_says_yes
from mllm import __version__

TITLES = {
    "greedy": "greedy",
    "sample": "sampled",
    "vcd_greedy": "VCD greedy",
    "vcd_sample": "VCD sampled",
}


def compare_columns(pope: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """Does VCD help, against the baseline that is decoded alike?

    Greedy runs answer the same questions once each, so they are compared question by question, with the
    normal 95 % interval of a paired difference of shares. Sampled runs are compared by their means over
    the seeds, with the interval from their standard deviations.
    """
    better, worse, n = _paired(folder, seed, "greedy", "vcd_greedy")
    change = (better - worse) / n
    margin = 1.96 * math.sqrt(max(better + worse - (better - worse) ** 2 / n, 0)) / n
    plain, contrasted = pope["sample"], pope["vcd_sample"]
    sampled = contrasted["accuracy"] - plain["accuracy"]
    spread = 1.96 * math.sqrt(
        plain["accuracy_std"] ** 2 / plain["runs"] + contrasted["accuracy_std"] ** 2 / contrasted["runs"]
    )
    pairs = {
        "vcd_greedy_minus_greedy": {"change": change, "low": change - margin, "high": change + margin},
        "vcd_sample_minus_sample": {"change": sampled, "low": sampled - spread, "high": sampled + spread},
    }
    sentences = [
        _sentence("greedy decoding", pairs["vcd_greedy_minus_greedy"]),
        _sentence("sampling", pairs["vcd_sample_minus_sample"]),
        _against_greedy(pope),
    ]
    return {**pairs, "sentences": sentences}


def _paired(folder: Path, seed: int, first: str, second: str) -> tuple[int, int, int]:
    """(only the second right, only the first right, questions) over all splits."""
    better = worse = n = 0
    for split in SPLITS:
        pairs = zip(*(_right(folder / f"{c}.{split}.{seed}.jsonl") for c in (first, second)), strict=True)
        for one, other in pairs:
            better, worse, n = better + (other and not one), worse + (one and not other), n + 1
    return better, worse, n


def _right(predictions: Path) -> list[bool]:
    rows = (row for _, row in read_rows(predictions))
    return [official_says_yes(row["answer"], row["label"]) == (row["label"] == "yes") for row in rows]


def _sentence(what: str, pair: dict[str, float]) -> str:
    change, low, high = (100 * pair[key] for key in ("change", "low", "high"))
    numbers = f"{change:+.1f} points of accuracy, 95 % interval {low:+.1f} to {high:+.1f}"
    if low > 0:
        return f"With {what}, VCD helped here: {numbers}."
    if high < 0:
        return f"With {what}, VCD hurt here: {numbers}."
    return f"With {what}, no effect of VCD is shown here: {numbers}."


def _against_greedy(pope: dict[str, Any]) -> str:
    best = max(pope, key=lambda column: pope[column]["accuracy"])
    if pope[best]["accuracy"] == pope["greedy"]["accuracy"]:
        return "None of the four is more accurate than plain greedy decoding."
    return (
        f"The most accurate of the four is {TITLES[best]}; plain greedy has {pope['greedy']['accuracy']:.3f}."
    )


def write_report(result: dict[str, Any], out: Path) -> Path:
    """Write `report.html`: pictures are inside it, nothing is loaded from elsewhere."""
    environment = Environment(
        loader=PackageLoader("mllm.quickstart", "."), autoescape=select_autoescape(default_for_string=True)
    )
    page = environment.get_template("report.html.jinja").render(
        result=result,
        titles=TITLES,
        splits=SPLITS,
        picture=lambda path: _data_uri(out / path),
        says_yes_or_no=lambda text: text.strip().rstrip(".").lower() in ("yes", "no"),
        same=lambda a, b: a.strip().rstrip(".").lower() == b.strip().rstrip(".").lower(),
        version=__version__,
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
