"""Show rows exactly as a model will be trained on them: every token trained, masked or image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.text import Text

from mllm.data.collator import Collator
from mllm.data.schema import Row, name_of
from mllm.data.tokens import IGNORE

if TYPE_CHECKING:
    from mllm.model.processing import MllmProcessor

STYLES = {"trained": "bold green", "masked": "dim", "image": "bold magenta"}


def token_spans(
    processor: MllmProcessor, row: Row, max_length: int | None = None
) -> Iterator[tuple[str, str]]:
    """(kind, text) of every token of a row; the placeholders of one image are one span.

    Args:
        processor: of the model to be trained.
        row: the row.
        max_length: as in training, so that removed rounds are not shown.
    """
    ids, labels, counts = _tokens(processor, row, max_length)
    image_tokens, left_of_image = iter(counts), 0
    for token, label, text in zip(ids, labels, token_texts(processor.tokenizer, ids), strict=True):
        if token == processor.image_token_id:
            if left_of_image == 0:
                left_of_image = next(image_tokens)
                yield "image", f"<image x {left_of_image}>"
            left_of_image -= 1
        else:
            yield ("masked" if label == IGNORE else "trained"), text


def _tokens(
    processor: MllmProcessor, row: Row, max_length: int | None
) -> tuple[list[int], list[int], list[int]]:
    """Ids, labels and tokens an image; for an encoder-decoder, each answer behind its prompt."""
    ids, labels, counts = [], [], []
    for example in Collator(processor, max_length).examples(row):
        ids += example.input_ids
        if processor.encoder_decoder:
            labels += [IGNORE] * len(example.input_ids)
            ids += example.labels
        labels += example.labels
        counts += example.image_tokens
    return ids, labels, counts


def token_texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """What each token adds to the text before it.

    A token decoded alone may lose its space (SentencePiece), so it is decoded behind the ones before it;
    a character of several tokens is given to the last of them.
    """
    before, start = 0, 0  # of the last finished characters, and of those that come now
    for stop in range(1, len(ids) + 1):
        old = _decode(tokenizer, ids[before:start])
        new = _decode(tokenizer, ids[before:stop])
        # An unfinished character ends in a replacement character; none has more than four bytes.
        if new.endswith("\ufffd") and stop < len(ids) and stop - start < 4:
            yield ""
            continue
        yield new[len(old) :] if new.startswith(old) else _decode(tokenizer, ids[start:stop])
        before, start = start, stop


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""


def row_panel(processor: MllmProcessor, row: Row, max_length: int | None = None) -> Panel:
    """One row as a coloured panel; alternate tokens are underlined, so that their borders show."""
    text = Text()
    counts: dict[str, int] = dict.fromkeys(STYLES, 0)
    for i, (kind, piece) in enumerate(token_spans(processor, row, max_length)):
        counts[kind] += kind != "image"
        # A newline is shown and kept, or two lines of a template would look like one.
        shown = piece.replace("\n", "\u21b5\n") or "\u00b7"
        text.append(shown, style=STYLES[kind] + (" underline" if i % 2 else ""))
    counts["image"] = sum(_tokens(processor, row, max_length)[2])
    total = sum(counts.values())
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return Panel(text, title=name_of(row), subtitle=f"{total} tokens: {summary}", title_align="left")


def legend() -> Text:
    """What the colours mean."""
    text = Text("tokens: ")
    for kind, style in STYLES.items():
        text.append(f" {kind} ", style=style)
    return text


def spans_as_json(processor: MllmProcessor, row: Row, max_length: int | None = None) -> dict[str, Any]:
    """The same for scripts."""
    tokens = [{"kind": kind, "text": text} for kind, text in token_spans(processor, row, max_length)]
    return {"id": row["id"], "tokens": tokens}
