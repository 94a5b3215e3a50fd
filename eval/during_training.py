"""A slice of a benchmark, asked of a model that is being trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.records import read_rows
from eval.run import find_images, run
from eval.score import score
from eval.tasks import pope
from mllm.config import EvalSection
from mllm.data.files import write_atomic
from mllm.decoding import parse_decode
from mllm.errors import DataError

NUMBERS = ("accuracy", "f1", "yes_ratio", "mean_accuracy", "mean_f1", "mean_yes_ratio", "unparsed", "n")


class Asker:
    """Asks POPE questions; what `mllm.training` is handed for a recipe's section `eval`."""

    def check(self, section: EvalSection) -> None:
        """Raise `DataError` where questions, labels or images are not there."""
        questions = pope.load(Path(section.questions))[: section.rows]
        if without := [question.where for question in questions if question.label is None]:
            raise DataError(
                f"{without[0]}: field 'label' is missing; eval.questions needs a file with labels"
            )
        find_images(questions, Path(section.image_root))
        parse_decode(section.decode)

    def ask(
        self, model: Any, processor: Any, section: EvalSection, folder: Path, identity: Mapping[str, Any]
    ) -> dict[str, float]:
        """Answer the first `section.rows` questions and score them.

        Args:
            model, processor: the model as it is.
            section: which questions, and how they are answered.
            folder: gets the questions, `predictions.jsonl` with its sidecar, and `score.json`.
            identity: what the model is, for the record.

        Returns:
            The numbers of POPE's official rule.

        Raises:
            DataError: a malformed question file, or images that are not there.
            ConfigError: settings that make no sense.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for _, row in read_rows(Path(section.questions))][: section.rows]
        questions = folder / f"{Path(section.questions).stem}.jsonl"  # its name says which split it is
        write_atomic(questions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        predictions = run(
            model,
            processor,
            questions,
            Path(section.image_root),
            folder / "predictions.jsonl",
            decode=section.decode,
            batch_size=section.batch_size,
            max_new_tokens=section.max_new_tokens,
            identity=identity,
            overwrite=True,
            progress=False,
        )
        result = score(predictions, questions)
        write_atomic(folder / "score.json", json.dumps(result, indent=1) + "\n")
        return {name: result[name] for name in NUMBERS if name in result}
