"""Several scored runs in one table: mean and spread over seeds, and decoding side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from mllm.errors import ConfigError, DataError

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
MIN_SEEDS = 5

# Column -> the columns that must stand beside it. Contrastive decoding also sharpens the distribution, so
# a gain over sampling alone says little: the greedy column shows what plain sharpening would have given.
COLUMNS = {
    "greedy": (),
    "sample": (),
    "vcd_greedy": ("greedy",),
    "vcd_sample": ("greedy", "sample"),
}


def summarise(results: Sequence[Mapping[str, Any]], min_runs: int = MIN_SEEDS) -> dict[str, Any]:
    """Mean and sample standard deviation (n - 1) of the metrics of runs that differ in their seed only.

    Args:
        results: what `eval.score.score` returns for one split, or metrics of `pope.score`.
        min_runs: fewer runs are refused; 1 is right for greedy decoding, which has nothing to vary.

    Returns:
        `{"runs": int, metric: {"mean": float, "std": float | None}}`; std is None for a single run.

    Raises:
        ConfigError: too few runs.
        DataError: runs over different questions, or the same seed twice.
    """
    if len(results) < max(1, min_runs):
        raise ConfigError(
            f"{len(results)} runs are too few for a mean and a spread; run {max(1, min_runs)} seeds"
        )
    if missing := [m for m in METRICS if any(m not in r for r in results)]:
        raise DataError(f"a result has no {missing[0]!r}; summarise results of one split each")
    for name, found in (
        ("numbers of questions", {r.get("n") for r in results}),
        ("question files", {(r.get("questions") or {}).get("sha256") for r in results}),
        ("scoring rules", {r.get("rule") for r in results}),
    ):
        if len(found) > 1:
            raise DataError(f"the runs have different {name}; summarise runs that differ in their seed only")
    seeds = [r["run"]["seed"] for r in results if r.get("run") and "seed" in r["run"]]
    if len(set(seeds)) != len(seeds):
        raise DataError(f"the seeds {sorted(seeds)} are not all different; give every run its own")
    summary: dict[str, Any] = {"runs": len(results)}
    for metric in METRICS:
        values = [float(r[metric]) for r in results]
        summary[metric] = {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}
    return summary


def four_columns(
    runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], min_seeds: int = MIN_SEEDS
) -> dict[str, dict[str, Any]]:
    """The table that says whether VCD helped: greedy, sampled, VCD greedy, VCD sampled, over the splits.

    Args:
        runs: `{column: {split: [result, ...]}}`; a greedy column has one result a split, a sampled one
            `min_seeds` or more, in the same order of seeds in every split.
        min_seeds: least runs of a sampled column.

    Returns:
        `{column: {"accuracy", "f1", "yes_ratio" (means over splits and runs), "accuracy_std" (over the
        runs' means over splits; None for one run), "runs", "splits": {split: {...}}}}`.

    Raises:
        ConfigError: an unknown column, too few runs, or a VCD column without its baselines.
        DataError: columns over different splits or questions, or splits of different numbers of runs.
    """
    if not runs:
        raise ConfigError(f"there are no runs; give at least one column of {', '.join(COLUMNS)}")
    for column in runs:
        if column not in COLUMNS:
            raise ConfigError(f"column {column!r} is unknown; use {', '.join(COLUMNS)}")
        if missing := [base for base in COLUMNS[column] if base not in runs]:
            raise ConfigError(
                f"column {column!r} needs {' and '.join(missing)} beside it; run the baseline too"
            )
    first = next(iter(runs))
    questions = {split: _asked(results) for split, results in runs[first].items()}
    table = {}
    for column, splits in runs.items():
        if {split: _asked(results) for split, results in splits.items()} != questions:
            raise DataError(f"columns {first!r} and {column!r} are over different splits or questions")
        table[column] = _column(splits, min_seeds if "sample" in column else 1)
    return table


def _column(splits: Mapping[str, Sequence[Mapping[str, Any]]], min_runs: int) -> dict[str, Any]:
    counts = {len(results) for results in splits.values()}
    if len(counts) != 1:
        raise DataError(f"the splits have {sorted(counts)} runs; give every split the same seeds")
    runs = counts.pop()
    by_split = {split: summarise(results, min_runs) for split, results in splits.items()}
    accuracy = [fmean(results[i]["accuracy"] for results in splits.values()) for i in range(runs)]
    return {
        "runs": runs,
        "accuracy": fmean(accuracy),
        "accuracy_std": stdev(accuracy) if runs > 1 else None,
        "f1": fmean(s["f1"]["mean"] for s in by_split.values()),
        "yes_ratio": fmean(s["yes_ratio"]["mean"] for s in by_split.values()),
        "splits": {
            split: {
                "n": splits[split][0]["n"],
                **{metric: s[metric]["mean"] for metric in METRICS},
                "accuracy_std": s["accuracy"]["std"],
            }
            for split, s in by_split.items()
        },
    }


def _asked(results: Sequence[Mapping[str, Any]]) -> Any:
    """What was asked, as far as the results tell: a hash, or at least a number."""
    return {((r.get("questions") or {}).get("sha256"), r.get("n")) for r in results}
