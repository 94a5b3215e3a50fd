"""A model answers a question file: one line a question in `predictions.jsonl`, and how in a sidecar.

    questions + images -> messages -> processor -> decoding.generate -> predictions.jsonl
                                                                      + predictions.jsonl.meta.json

Lines go to `predictions.jsonl.part`, which takes its name when all are there: a file of that name is
complete. A run that was cut off goes on where it stopped, if nothing in the sidecar differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval.records import Question, meta_path, read_meta, to_lines
from eval.tasks import pope
from mllm.data.files import write_atomic
from mllm.data.images import load_image
from mllm.data.schema import Message, user
from mllm.decoding import Decoder, describe, generate, parse_decode
from mllm.errors import ConfigError, DataError
from mllm.model.checkpoint import has_manifest, manifest_hash


def run(
    model: Any,
    processor: Any,
    questions: Path,
    image_root: Path,
    out: Path,
    *,
    decode: str | Decoder = "greedy",
    seed: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    prompt_style: str = "llava",
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    blank_images: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Answer every question and return `out`. Nothing is written before all images were found.

    Each batch is seeded by `seed` and its number, so that a run gives the same answers whether or not it
    was interrupted; with sampling they depend on `batch_size`, too.

    Args:
        model, processor: as `mllm.load` returns them.
        questions: question file (see `pope.load`).
        image_root: folder that the questions' image names are relative to.
        out: predictions file to write; `out` + `.meta.json` stands beside it.
        decode: `greedy`, `sample,temperature=0.7`, `vcd`, ... or a decoder.
        seed: seeds sampling.
        batch_size: questions a batch, in the order of the file.
        max_new_tokens: longest answer.
        prompt_style: what is put after the question, see `pope.PROMPT_SUFFIXES`.
        checkpoint: directory that the model was loaded from, for the record.
        identity: what the model is where it comes from no directory, in place of a hash of its weights.
        blank_images: show a plain picture in the processor's mean colour in place of every image, to see
            whether the model looks.
        overwrite: throw away what a run with other settings left at `out`.
        progress: show a progress bar on a terminal.

    Raises:
        DataError: a malformed question file, missing images, or a broken line in an interrupted run.
        ConfigError: a setting that makes no sense, or `out` was made with other settings.
    """
    out, image_root = Path(out), Path(image_root)
    decoder = parse_decode(decode)
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; use 1 or more")
    asked = pope.load(Path(questions))
    prompts = [pope.prompt(q.text, prompt_style) for q in asked]
    find_images(asked, image_root)
    model.eval()
    meta = {
        "task": "pope",
        "checkpoint": identity or _identity(model, checkpoint),
        "decode": describe(decoder),
        "seed": seed,
        "question_file": {
            "file": Path(questions).name,
            **dict(zip(("sha256", "known_as"), pope.identify(questions), strict=True)),
            "rows": len(asked),
        },
        "image_root": str(image_root.resolve()),
        "blank_images": blank_images,
        "prompt_style": prompt_style,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.device(model.device).type,
        "versions": _versions(),
    }
    part = out.with_name(out.name + ".part")
    if _prepare(out, part, meta, overwrite):
        return out
    done = _keep_whole_batches(part, asked, batch_size)
    with _bar(progress) as bar, open(part, "a", encoding="utf-8", newline="\n") as file:
        task = bar.add_task(out.name, total=len(asked), completed=done)
        for start in range(done, len(asked), batch_size):
            batch = slice(start, start + batch_size)
            pictures = _pictures(asked[batch], image_root, processor if blank_images else None)
            conversations = [
                [user(text, picture)] for text, picture in zip(prompts[batch], pictures, strict=True)
            ]
            answers = answer(
                model,
                processor,
                conversations,
                decoder,
                max_new_tokens,
                batch_seed(seed, start // batch_size),
            )
            sent = [processor.prompt_text(messages) for messages in conversations]
            file.write(to_lines(map(_record, asked[batch], sent, answers)))
            file.flush()
            os.fsync(file.fileno())
            bar.advance(task, len(answers))
    os.replace(part, out)
    return out


def answer(
    model: Any,
    processor: Any,
    conversations: Sequence[Sequence[Message]],
    decode: str | Decoder,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """One answer a conversation: text without special tokens, stripped as in LLaVA's and VCD's scripts."""
    inputs = processor(conversations).to(model.device)
    with torch.inference_mode():
        tokens = generate(model, inputs, decode, max_new_tokens=max_new_tokens, seed=seed)
    ends = set(processor.end_token_ids)
    answers = []
    for row in tokens.tolist():
        # Cut at the end token: what pads the row behind it need not be a special token.
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(processor.tokenizer.decode(row[:length], skip_special_tokens=True).strip())
    return answers


def find_images(questions: Sequence[Question], image_root: Path) -> None:
    """Raise unless the image of every question is a file under `image_root`.

    Raises:
        DataError: names the first missing file, its question, and how many are missing in all.
    """
    present = {name: (image_root / name).is_file() for name in {q.image for q in questions}}
    missing = next((q for q in questions if not present[q.image]), None)
    if missing is not None:
        raise DataError(
            f"{missing.where}: image {str(image_root / missing.image)!r} of question_id "
            f"{missing.question_id!r} is not there ({list(present.values()).count(False)} of {len(present)} "
            "images missing); fix the image root"
        )


def batch_seed(seed: int, batch: int) -> int:
    """Seed of one batch, below 2**63: neighbouring seeds and batches share no random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{batch}".encode()).digest()[:8], "big") >> 1


def _pictures(questions: Sequence[Question], root: Path, blank: Any) -> list[Image.Image]:
    """One picture a question; equal ones of a batch are read once. `blank`: processor, or None."""
    read: dict[str, Image.Image] = {}
    for question in questions:
        if question.image not in read:
            picture = load_image(root / question.image, question.where)
            if blank is not None:
                picture = Image.new("RGB", picture.size, blank.mean_colour)
            read[question.image] = picture
    return [read[question.image] for question in questions]


def _record(question: Question, sent: str, text: str) -> dict[str, Any]:
    row = {
        "question_id": question.question_id,
        "image": question.image,
        "prompt": sent,
        "question": question.text,
        "answer": text,
    }
    return row | {k: v for k in ("label", "category") if (v := getattr(question, k)) is not None}


# ------------------------------------------------------------------------------------------------ resume


def _prepare(out: Path, part: Path, meta: Mapping[str, Any], overwrite: bool) -> bool:
    """Write the sidecar, or compare with the one that is there; True where `out` is complete already."""
    try:
        before = read_meta(out)
    except DataError:
        if not overwrite:
            raise
        before = None
    if before is not None and not overwrite:
        if difference := _difference(before, meta):
            raise ConfigError(f"{out}: begun with other settings: {difference}; restore them or overwrite")
        return out.exists()
    if out.exists() and not overwrite:
        raise ConfigError(
            f"{out}: exists, and no {meta_path(out).name} says how it was made; overwrite to replace it"
        )
    # Old lines go before the new sidecar comes: at no time do they stand beside settings not theirs.
    meta_path(out).unlink(missing_ok=True)
    part.unlink(missing_ok=True)
    out.unlink(missing_ok=True)
    write_atomic(meta_path(out), json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    return False


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, in words; where a checkpoint lies does not matter, what it is does."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    for key in [*new, *old]:
        if key != "checkpoint.path" and old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
    return ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def _keep_whole_batches(part: Path, questions: Sequence[Question], batch_size: int) -> int:
    """Cut an interrupted file back to its last whole batch; returns the number of rows kept.

    A broken last line is what a kill leaves, and is dropped. A batch that is there in part is redone as
    a whole, because its random numbers belong to the whole batch.
    """
    if not part.exists():
        return 0
    lines = part.read_bytes().split(b"\n")[:-1]  # what follows the last newline is a broken line
    ends = [0]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{part}:{number}: not JSON; overwrite, or delete the file") from error
        found = row.get("question_id") if isinstance(row, dict) else None
        if number > len(questions) or found != questions[number - 1].question_id:
            raise DataError(
                f"{part}:{number}: does not answer the next question; overwrite, or delete the file"
            )
        ends.append(ends[-1] + len(line) + 1)
    kept = len(ends) - 1
    if kept < len(questions):
        kept -= kept % batch_size
    os.truncate(part, ends[kept])
    return kept


# ---------------------------------------------------------------------------------------------- the record


def _identity(model: Any, checkpoint: Path | None) -> dict[str, Any]:
    """What the model is: its checkpoint's manifest, or a hash of its weights where there is none."""
    if checkpoint is not None and has_manifest(checkpoint):
        return {"path": str(checkpoint), "manifest_sha256": manifest_hash(checkpoint)}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"path": None if checkpoint is None else str(checkpoint), "weights_sha256": digest.hexdigest()}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{p: version(p) for p in ("mllm", "torch", "transformers")}}


def _bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (wanted and console.is_terminal))
