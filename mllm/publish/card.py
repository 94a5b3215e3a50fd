"""A checkpoint's README.md: a Hugging Face model card made from the run's records, and from nothing else."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mllm.data.files import write_atomic
from mllm.errors import CheckpointError, ConfigError
from mllm.model.checkpoint import MANIFEST, has_manifest
from mllm.publish.evaluation import as_results, columns, read_scores
from mllm.publish.records import Facts, metadata_bases, read_facts
from mllm.publish.secrets import redact

CARD = "README.md"
# The end of a card of ours; without the hash, or with another than the text has, a person has written in it.
_SEAL = re.compile(r"\n<!-- written by mllm card ([0-9a-f]{16}) -->\n$")
_log = logging.getLogger(__name__)
# By the model type in `config.json`.
PIPELINES = {"mllm": "image-text-to-text", "mllm_dual_encoder": "zero-shot-image-classification"}


def write_card(checkpoint: str | Path, evaluations: Sequence[str | Path] = (), force: bool = False) -> Path:
    """Write a checkpoint's `README.md`.

    Args:
        checkpoint: a checkpoint directory.
        evaluations: files of `mllm eval score` about this checkpoint.
        force: replace a card that a person has written or changed.

    Raises:
        CheckpointError: no checkpoint.
        ConfigError: there is such a card.
        DataError: an evaluation is of another model.
    """
    path = Path(checkpoint)
    if not has_manifest(path):
        raise CheckpointError(f"{path}: no {MANIFEST} here; give the directory of a checkpoint saved by mllm")
    if not force and is_somebodys(path / CARD):
        raise ConfigError(f"{path / CARD} was written or changed by hand; --force replaces it")
    text = compose_card(path, [Path(file) for file in evaluations])
    write_atomic(path / CARD, text)
    return path / CARD


def write_card_after_training(checkpoint: Path) -> None:
    """The card of a run that has ended; one that a person has changed stays.

    By then the model is saved: a card that cannot be written is told of, and costs the run nothing.
    """
    try:
        if is_somebodys(checkpoint / CARD):
            _log.warning("%s was changed by hand and stays as it is; mllm card --force replaces it", CARD)
        else:
            write_card(checkpoint)
    # A full disk, a record that cannot be read or lacks something, a template engine that is not installed.
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        _log.warning("the model is saved, its card is not (%s); write it with: mllm card %s", why, checkpoint)


def is_somebodys(card: Path) -> bool:
    """Whether there is a card that a person has written or changed."""
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8")
    seal = _SEAL.search(text)
    return seal is None or seal[1] != _hash(text[: seal.start()])


def compose_card(path: Path, evaluations: Sequence[Path] = ()) -> str:
    """The card's text."""
    facts = read_facts(path)
    # Merging changes nothing about what a model answers, so that scores of its source are its own.
    made_by = {facts.manifest, *([facts.ancestors[0].manifest] if facts.merged else [])}
    scores = read_scores(evaluations, made_by)
    title = facts.card.title or path.resolve().name
    data = ModelCardData(
        license=facts.card.license,
        language=facts.card.languages or None,
        library_name="mllm",
        pipeline_tag=PIPELINES.get(facts.kind),
        base_model=metadata_bases(path, facts.card) or None,
        datasets=facts.card.datasets or None,
        tags=["multimodal", *facts.card.tags],
        model_name=title if scores else None,
        eval_results=as_results(scores) or None,
    )
    template = files("mllm.publish") / "card.md.jinja"
    card = ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        title=title,
        facts=facts,
        scores=scores,
        metrics=columns(scores),
        limits=limits(facts, bool(scores)),
        place=path.resolve().name,
    )
    text = redact(str(card)).rstrip() + "\n"
    return f"{text}\n<!-- written by mllm card {_hash(text)} -->\n"


def limits(facts: Facts, evaluated: bool) -> list[str]:
    """What a reader must not expect, as far as it follows from the records."""
    found = []
    if not evaluated:
        found.append("No evaluation was given to this card: how well the model answers is not known from it.")
    if facts.stage == "align":
        found.append(
            "This is the alignment stage: it has learnt to caption, and has not been taught instructions."
        )
    if facts.stage in ("pretrain_vision", "pretrain_qformer"):
        found.append("This is a pretraining stage: it compares images and texts, and does not answer.")
    if unknown := [file["path"] for file in facts.data if not file["license"]]:
        found.append(f"The recipe gives no licence for {len(unknown)} of {len(facts.data)} data files.")
    if facts.card.license is None:
        found.append("The recipe gives no licence for these weights; that of the base models and data holds.")
    if facts.code.get("changed"):
        found.append("The code differed from its commit when the run began.")
    if missing := [one for one in facts.ancestors if one.stage is None]:
        found.append(f"An earlier checkpoint ({missing[0].path}) was not at hand when this card was written.")
    if facts.kind == "mllm":
        found.append("Like all models of this kind it may describe what is not in the picture.")
    return found


def _hash(text: Any) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
