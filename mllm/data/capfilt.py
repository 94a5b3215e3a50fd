"""CapFilt (BLIP, arXiv 2201.12086): cleaner captions for noisy image-text pairs.

    web pair -> captioner says what it sees -> filter scores both texts against the image
             -> the texts that fit are kept; human captions are kept always

Every score goes to `<output>.scores.jsonl` as it is made: a run that was cut off goes on from there, and
another threshold needs no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mllm.data.files import atomic_writer, sha256_of, track
from mllm.data.images import load_image
from mllm.data.pairs import pair_of
from mllm.data.rows import Rows
from mllm.data.schema import Row, assistant, user
from mllm.decoding import generate
from mllm.errors import ConfigError, DataError

Caption = Callable[[Sequence[Any], int], Sequence[str]]  # images, seed -> one text each
Score = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]  # images, texts -> chances that they fit


@dataclass
class Filtered:
    """What a run kept and dropped; `bad` are rows that are no pair or whose image cannot be read."""

    output: Path
    rows: int = 0
    web_kept: int = 0
    web_dropped: int = 0
    synthetic_kept: int = 0
    synthetic_dropped: int = 0
    human: int = 0
    bad: int = 0
    first_bad: str = ""
    resumed: int = 0


def capfilt(
    rows: Rows,
    output: str | os.PathLike[str],
    caption: Caption,
    score: Score,
    *,
    made_by: Mapping[str, Any],
    human: Rows | None = None,
    threshold: float = 0.5,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Filtered:
    """Write the web and the synthetic captions that fit their images, then all human rows.

    Args:
        rows: web pairs, one image and one caption each.
        output: JSON Lines file to write; where a caption comes from and its score stand in `provenance`.
        caption: the captioner.
        score: the filter.
        made_by: what captioner and filter are; scores of others are not taken up.
        human: rows that are kept as they are; paths relative to the same image root.
        threshold: least score of a caption that is kept.
        batch_size: images at a time; the captioner's draws depend on it.
        seed: of the captioner.
        progress: show a progress bar on the error stream.

    Raises:
        ConfigError: a setting out of its range, or `<output>.scores.jsonl` was made otherwise.
        DataError: nothing is kept.
    """
    output = Path(output)
    if output.is_dir() or (output.exists() and output.samefile(rows.path)):
        raise ConfigError(f"{output} is a folder or the file that is read; write to another file")
    if batch_size < 1 or not 0 <= threshold <= 1:
        raise ConfigError(
            f"batch size {batch_size}, threshold {threshold}; give one of at least 1, and one from 0 to 1"
        )
    settings = {
        "source": sha256_of(rows.path),
        "image_root": str(rows.image_root),
        "rows": len(rows),
        "batch_size": batch_size,
        "seed": seed,
        **made_by,
    }
    scores = output.with_name(f"{output.name}.scores.jsonl")
    done = Filtered(output, resumed=_resume(scores, settings, batch_size))
    with scores.open("a", encoding="utf-8") as file:
        starts = range(done.resumed, len(rows), batch_size)
        for start in track(starts, f"capfilt {rows.path.name}", len(starts), progress):
            batch = range(start, min(start + batch_size, len(rows)))
            for line in _scored([_opened(rows, i) for i in batch], caption, score, seed + start):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    with scores.open(encoding="utf-8") as lines, atomic_writer(output) as file:
        for i, text in enumerate(islice(lines, 1, None)):
            for kept in _kept(rows, i, json.loads(text), threshold, done):
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")
                done.rows += 1
        if done.bad == len(rows):
            scores.unlink()  # it holds no score
            raise DataError(f"{rows.path}: all {done.bad} rows are bad; the first: {done.first_bad}")
        if not done.rows:
            raise DataError(
                f"{rows.path}: no caption fits its image ({done.bad} rows are bad; the first: "
                f"{done.first_bad or '-'}); lower the threshold, or train the filter longer"
            )
        for row in map(human.as_written, range(len(human))) if human else ():
            file.write(json.dumps({**row, "provenance": {"capfilt": "human"}}, ensure_ascii=False) + "\n")
            done.human += 1
    done.rows += done.human
    return done


def _opened(rows: Rows, index: int) -> tuple[Any, str] | DataError:
    try:
        image, text = pair_of(rows[index])
        return load_image(image, rows.where(index)), text
    except DataError as error:
        return error


def _scored(
    pairs: Sequence[tuple[Any, str] | DataError], caption: Caption, score: Score, seed: int
) -> Iterator[dict[str, Any]]:
    """For each row its web caption's score, the synthetic caption and its score; or why it has none."""
    good = [pair for pair in pairs if not isinstance(pair, DataError)]
    images = [image for image, _ in good]
    texts = [text.strip() for text in caption(images, seed)] if images else []
    found = score(images * 2, [text for _, text in good] + texts) if images else []
    results = iter(zip(found, texts, found[len(good) :], strict=False))
    for pair in pairs:
        if isinstance(pair, DataError):
            yield {"bad": str(pair)}
            continue
        web, text, synthetic = next(results)
        # Nothing said is no caption, however well it fits.
        yield {"web": web, "caption": text, "synthetic": synthetic if text else -1.0}


def _kept(
    rows: Rows, index: int, line: Mapping[str, Any], threshold: float, done: Filtered
) -> Iterator[dict[str, Any]]:
    """The row with its own caption, and with the synthetic one, where they fit; counts into `done`."""
    if "bad" in line:
        done.bad += 1
        done.first_bad = done.first_bad or line["bad"]
        return
    row = rows.as_written(index)
    synthetic: Row = {
        "id": f"{row['id']}-synthetic",
        "messages": [*row["messages"][:-1], assistant(line["caption"])],
    }
    for kind, candidate in (("web", row), ("synthetic", synthetic)):
        fits = line[kind] >= threshold
        counter = f"{kind}_{'kept' if fits else 'dropped'}"
        setattr(done, counter, getattr(done, counter) + 1)
        if fits:
            yield {**candidate, "provenance": {"capfilt": kind, "score": round(line[kind], 4)}}


def _resume(scores: Path, settings: Mapping[str, Any], batch_size: int) -> int:
    """Begin the scores' file, or cut it back to its last whole batch; returns the rows that it has."""
    scores.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(settings, sort_keys=True).encode() + b"\n"
    if not scores.exists():
        scores.write_bytes(head)
        return 0
    lines = scores.read_bytes().splitlines(keepends=True)
    if lines[:1] != [head]:
        raise ConfigError(
            f"{scores}: made from other rows, models or settings; restore them, or delete the file"
        )
    whole = sum(line.endswith(b"\n") for line in lines) - 1
    kept = whole if whole == settings["rows"] else whole - whole % batch_size
    os.truncate(scores, sum(map(len, lines[: kept + 1])))
    return kept


# -- our models as captioner and filter ---------------------------------------------------------------


def captioner(model: Any, processor: Any, prompt: str = "", max_new_tokens: int = 30) -> Caption:
    """A checkpoint of ours as captioner: nucleus sampling, as BLIP's (top_p 0.9)."""
    ends = set(processor.end_token_ids)

    def caption(images: Sequence[Any], seed: int) -> list[str]:
        inputs = processor([[user(prompt, image)] for image in images]).to(model.device)
        with torch.inference_mode():
            tokens = generate(model, inputs, "sample,top_p=0.9", max_new_tokens=max_new_tokens, seed=seed)
        rows = [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in tokens.tolist()]
        return [processor.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    return caption


def matcher(model: Any, processor: Any) -> Score:
    """A checkpoint of `pretrain_qformer` as filter: the chance of a match, by its ITM head."""
    if not hasattr(model, "itm_scores"):
        raise ConfigError(f"filter: a {type(model).__name__} does not match; give one of pretrain_qformer")

    def score(images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        inputs = processor(images=images, text=texts).to(model.device)
        with torch.inference_mode():
            return model.itm_scores(**inputs).float().softmax(-1)[:, 1].tolist()

    return score
