"""Scores for a model card, taken only from an evaluation of this very checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

from mllm.errors import DataError

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@dataclass(frozen=True)
class Score:
    """One row of the card's table: a split under one rule."""

    task: str
    split: str
    rule: str
    n: int
    metrics: dict[str, float]
    decoding: str
    questions: str


def read_scores(files: Sequence[Path], made_by: Collection[str]) -> list[Score]:
    """The scores in files that `mllm eval score --json` or `--out` wrote.

    Args:
        files: the files.
        made_by: hashes of manifests that count as this model.

    Raises:
        DataError: no such file, or of another model, or one that does not say which.
    """
    return [score for file in files for score in _scores(file, made_by)]


def _scores(file: Path, made_by: Collection[str]) -> list[Score]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        splits, rule = found["splits"], found["rule"]
        rows = {split: rules[rule] for split, rules in splits.items()}
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: no result of 'mllm eval score --json'") from error
    run = found.get("run") or {}
    model = (run.get("checkpoint") or {}).get("manifest_sha256")
    if model not in made_by:
        known = f"a model with manifest {model[:12]}" if model else "a model that it does not name"
        raise DataError(f"{file}: is about {known}, not about this checkpoint; evaluate this one")
    decode = run.get("decode", "unknown")
    seen = ", blank images" if run.get("blank_images") else ""
    return [
        Score(
            task=str(found.get("task", "unknown")),
            split=split + seen,
            rule=str(rule),
            n=int(row["n"]),
            metrics={name: float(row[name]) for name in METRICS if name in row},
            decoding=decode if isinstance(decode, str) else json.dumps(decode),
            questions=str((found.get("questions") or {}).get("sha256", "unknown")),
        )
        for split, row in rows.items()
    ]


def as_results(scores: Sequence[Score]) -> list[EvalResult]:
    """The scores as the Hub's metadata has them."""
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=score.task,
            dataset_name=f"{score.task.upper()} ({score.split})",
            dataset_args={"questions_sha256": score.questions},
            metric_type=name,
            metric_value=round(value, 4),
            metric_name=f"{name}, {score.rule} rule",
        )
        for score in scores
        for name, value in score.metrics.items()
    ]


def columns(scores: Sequence[Score]) -> list[str]:
    """Metrics that any score has, in their usual order."""
    found: set[str] = set()
    for score in scores:
        found |= set(score.metrics)
    return [name for name in METRICS if name in found]
