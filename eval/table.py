"""A score result as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

METRICS = {"accuracy": "acc", "precision": "prec", "recall": "recall", "f1": "F1", "yes_ratio": "yes"}


def score_table(result: Mapping[str, Any]) -> Group:
    """Every split under every rule, the means, and the notes of `eval.score.score`."""
    known = result["questions"].get("known_as")
    table = Table(title=f"POPE, {known or result['questions']['file']}", title_justify="left", box=SIMPLE)
    table.add_column("split", no_wrap=True)
    table.add_column("rule", no_wrap=True)
    for column in (*METRICS.values(), "n", "unparsed"):
        table.add_column(column, justify="right", no_wrap=True)
    for split, rules in result["splits"].items():
        for rule, metrics in rules.items():
            numbers = [f"{metrics[name]:.4f}" for name in METRICS]
            table.add_row(split, rule, *numbers, f"{metrics['n']:,}", f"{metrics['unparsed']:,}")
    lines = [Text(f"note: {note}", style="dim") for note in result["notes"]]
    if "mean_f1" in result:
        lines.insert(0, Text(f"mean F1 (LLaVA's POPE) {result['mean_f1']:.4f}"))
        lines.insert(1, Text(f"mean accuracy {result['mean_accuracy']:.4f}"))
    if interval := result.get("accuracy_ci95"):
        lines.insert(0, Text(f"accuracy, 95 % interval: {interval[0]:.4f} to {interval[1]:.4f}"))
    return Group(table, *lines)
