"""Predictions and questions in, metrics out. No model, no GPU, no torch: repeatable anywhere.

    predictions.jsonl + questions -> pairs, checked -> every rule side by side -> one JSON-able dict

The official POPE scripts pair answers and labels by position and drop what is left over without a word.
Here a pair that does not belong together is an error.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, Literal

from eval.records import Prediction, Question, read_meta, read_predictions
from eval.tasks import pope
from mllm.data.files import sha256_of
from mllm.errors import ConfigError, DataError

Match = Literal["auto", "id", "order"]


def score(
    predictions: Path,
    questions: Path,
    rule: str = "official",
    *,
    annotations: Path | None = None,
    match: Match = "auto",
    answer_field: str | None = None,
) -> dict[str, Any]:
    """Score one predictions file against one question file.

    A question file whose rows have a `category` (LLaVA's `llava_pope_test.jsonl`) is scored category by
    category; where its rows have no `label`, `annotations` is the directory that holds the three
    `coco_pope_{category}.json`, paired by position within the category as LLaVA does (by image and object
    where the numbers differ).

    Args:
        predictions: ours, LLaVA's, VCD's or POPE's format (see `read_predictions`).
        questions: the question file.
        rule: whose numbers go to the top of the result; all rules are in `splits`.
        annotations: directory of label files for a question file without labels.
        match: `id`, `order`, or `auto`: by id where the predictions have ids, else by order.
        answer_field: the predictions' field that holds the answer, where it cannot be told.

    Returns:
        `rule`, the chosen rule's metrics (for categories: `mean_f1`, which LLaVA calls "POPE", and
        `mean_accuracy`), `splits` = `{split: {rule: metrics}}`, `notes`, and the provenance: `questions`,
        `predictions`, `run` (the predictions' `.meta.json`, or None) and `versions`.

    Raises:
        DataError: a malformed file, or predictions that are not the answers to these questions.
        ConfigError: an unknown rule or match.
    """
    predictions, questions = Path(predictions), Path(questions)
    if rule not in pope.RULES:
        raise ConfigError(f"rule {rule!r} is unknown; use one of {', '.join(pope.RULES)}")
    asked = pope.load(questions)
    label_files: dict[str, Path] = {}
    notes: list[str] = []
    if any(q.label is None for q in asked):
        asked, label_files, notes = _with_labels(asked, questions, annotations)
    given = read_predictions(predictions, answer_field)
    pairs, remarks = pair(asked, given, predictions, match)
    notes += remarks

    digest, known_as = pope.identify(questions)
    meta = read_meta(predictions)
    recorded = ((meta or {}).get("question_file") or {}).get("sha256")
    if recorded not in (None, digest):
        notes.append("the predictions were made from another copy of the question file (SHA-256 differs)")
    default = split_name(known_as or questions.stem)
    splits = {
        name: _all_rules([(q, p) for q, p in pairs if (q.category or default) == name])
        for name in dict.fromkeys(q.category or default for q in asked)
    }
    top = next(iter(splits.values()))[rule] if len(splits) == 1 else means(splits, rule)
    return {
        "task": "pope",
        "rule": rule,
        **top,
        "splits": splits,
        "notes": [*notes, *top.get("notes", [])],
        "questions": {
            "file": questions.name,
            "sha256": digest,
            "known_as": known_as,
            "rows": len(asked),
            "label_files": {name: _label_file(path) for name, path in label_files.items()},
        },
        "predictions": {
            "file": predictions.name,
            "sha256": sha256_of(predictions),
            "rows": len(given),
        },
        "run": meta,
        "versions": {"python": platform.python_version(), "mllm": version("mllm")},
    }


def means(splits: Mapping[str, Mapping[str, Mapping[str, Any]]], rule: str = "official") -> dict[str, Any]:
    """Both means of several splits under one rule: LLaVA reports that of F1, VCD tables show accuracy.

    Args:
        splits: `{split: {rule: metrics}}`; for files scored one by one, merge their `splits`.
        rule: which rule's metrics.
    """
    rows = [rules[rule] for rules in splits.values()]
    return {
        "n": sum(row["n"] for row in rows),
        "mean_accuracy": sum(row["accuracy"] for row in rows) / len(rows),
        "mean_f1": sum(row["f1"] for row in rows) / len(rows),
        "mean_yes_ratio": sum(row["yes_ratio"] for row in rows) / len(rows),
        "unparsed": sum(row["unparsed"] for row in rows),
        "notes": [f"{name}: {note}" for name, rules in splits.items() for note in rules[rule]["notes"]],
    }


def pair(
    questions: Sequence[Question], predictions: Sequence[Prediction], file: Path, match: Match = "auto"
) -> tuple[list[tuple[Question, Prediction]], list[str]]:
    """Pair every question with its one answer; returns the pairs in the questions' order, and notes.

    By id where the predictions have ids, else by order. In both ways the object asked about and the
    image must agree where the prediction tells them: the three official files share their ids, so that
    answers to one would otherwise be scored on another in silence.

    Raises:
        DataError: different lengths, an id that is missing, unknown or used twice, or a pair whose
            questions or images differ.
        ConfigError: an unknown `match`, or `id` for predictions without ids.
    """
    if match not in ("auto", "id", "order"):
        raise ConfigError(f"match {match!r} is unknown; use auto, id or order")
    has_ids = predictions[0].question_id is not None
    if match == "id" and not has_ids:
        raise ConfigError(f"{file}: match is 'id' but the rows have no 'question_id'; use order")
    notes: list[str] = []
    by_id = _by_id(questions, predictions) if has_ids and match != "order" else None
    if len(questions) != len(predictions):
        raise DataError(
            f"{file}: {len(predictions)} predictions for {len(questions)} questions; "
            "answer every question once (a run that was cut off can be resumed)"
        )
    if by_id is not None:
        pairs = [(q, by_id[str(q.question_id)]) for q in questions]
        if any(p is not given for (_, p), given in zip(pairs, predictions, strict=True)):
            notes.append("the order of the predictions differs from the questions'; they were matched by id")
    else:
        pairs = list(zip(questions, predictions, strict=True))
        if has_ids and any(str(q.question_id) != str(p.question_id) for q, p in pairs):
            notes.append("question ids of predictions and questions differ; matched by order, as asked")
        if not has_ids:
            notes.append("the predictions have no ids; they were matched by order")
    for question, prediction in pairs:
        _check_same(question, prediction)
    if all(p.answer == q.text for q, p in pairs):
        raise DataError(f"{predictions[0].where}: the answers are the questions; name the answer's field")
    return pairs, notes


def split_name(name: str) -> str:
    """`random`, `popular` or `adversarial` where a file's name has the word, else `all`."""
    return next((split for split in pope.SPLITS if split in name.lower()), "all")


def _by_id(questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, Prediction]:
    known = {str(q.question_id) for q in questions}
    by_id: dict[str, Prediction] = {}
    for p in predictions:
        key = str(p.question_id)
        if key not in known:
            raise DataError(
                f"{p.where}: question_id {p.question_id!r} is not in the question file; "
                "give the question file that these predictions answer"
            )
        if key in by_id:
            raise DataError(f"{p.where}: question_id {p.question_id!r} is answered at {by_id[key].where} too")
        by_id[key] = p
    missing = next((q for q in questions if str(q.question_id) not in by_id), None)
    if missing is not None:
        raise DataError(
            f"{missing.where}: question_id {missing.question_id!r} has no prediction "
            f"({len(predictions)} predictions for {len(questions)} questions); answer every question once"
        )
    return by_id


def _check_same(question: Question, prediction: Prediction) -> None:
    wanted, found = pope.asked_object(question.text), pope.asked_object(prediction.question or "")
    if wanted and found and wanted != found:
        raise DataError(
            f"{prediction.where}: is about {found!r}, but {question.where} asks about {wanted!r}; "
            "these files do not belong together"
        )
    images = (PurePath(question.image).name, PurePath(prediction.image or question.image).name)
    if images[0] != images[1]:
        raise DataError(
            f"{prediction.where}: is about image {images[1]!r}, but {question.where} about {images[0]!r}; "
            "these files do not belong together"
        )


def _with_labels(
    questions: Sequence[Question], file: Path, directory: Path | None
) -> tuple[list[Question], dict[str, Path], list[str]]:
    """Fill in the labels from `coco_pope_{category}.json`; returns the questions, the files, and notes."""
    if directory is None:
        raise DataError(
            f"{file}: the rows have no 'label'; give the directory of coco_pope_*.json (annotations)"
        )
    labels: dict[int | str, str] = {}
    paths: dict[str, Path] = {}
    notes: list[str] = []
    for category in dict.fromkeys(q.category or "" for q in questions):
        path = paths[category] = Path(directory) / f"coco_pope_{category}.json"
        rows, asked = pope.load(path), [q for q in questions if (q.category or "") == category]
        if len(rows) != len(asked):
            # LLaVA asks 2910 of the 3000 random questions: numbering differs, what is asked does not.
            rows = _same_questions(rows, asked, path)
            notes.append(f"{category}: labels of {path.name} were matched by image and object, not by order")
        for row, question in zip(rows, asked, strict=True):
            if row.label is None:
                raise DataError(f"{row.where}: field 'label' must be 'yes' or 'no', found None")
            _check_same(question, Prediction("", question=row.text, image=row.image, where=row.where))
            labels[question.question_id] = row.label
    return [replace(q, label=labels[q.question_id]) for q in questions], paths, notes


def _same_questions(rows: Sequence[Question], asked: Sequence[Question], path: Path) -> list[Question]:
    """For each question the row of the label file that asks about the same object in the same image."""
    known = {(row.image, pope.asked_object(row.text)): row for row in rows}
    found = []
    for question in asked:
        row = known.get((question.image, pope.asked_object(question.text)))
        if row is None:
            raise DataError(
                f"{path}: {len(rows)} labels for {len(asked)} questions, and none for {question.where}; "
                "use the label files that the question file was made from"
            )
        found.append(row)
    return found


def _all_rules(pairs: Sequence[tuple[Question, Prediction]]) -> dict[str, dict[str, Any]]:
    labels = [str(q.label) for q, _ in pairs]
    answers = [p.answer for _, p in pairs]
    return {rule: pope.score(labels, answers, rule) for rule in pope.RULES}


def _label_file(path: Path) -> dict[str, Any]:
    digest, known_as = pope.identify(path)
    return {"file": path.name, "sha256": digest, "known_as": known_as}
