"""Show rows exactly as a model will be trained on them: every token trained, masked or image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.text import Text

from mllm.data.collator import Collator, name_of
from mllm.data.schema import Row
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
    encoded = Collator(processor, max_length).encode(row)
    left_of_image = 0
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if token == processor.image_token_id:
            if left_of_image == 0:
                left_of_image = processor.num_image_tokens
                yield "image", f"<image x {processor.num_image_tokens}>"
            left_of_image -= 1
        else:
            yield ("masked" if label == IGNORE else "trained"), processor.tokenizer.decode([token])


def row_panel(processor: MllmProcessor, row: Row, max_length: int | None = None) -> Panel:
    """One row as a coloured panel; alternate tokens are underlined, so that their borders show."""
    text = Text()
    counts: dict[str, int] = dict.fromkeys(STYLES, 0)
    for i, (kind, piece) in enumerate(token_spans(processor, row, max_length)):
        counts[kind] += processor.num_image_tokens if kind == "image" else 1
        # A newline is shown and kept, or two lines of a template would look like one.
        shown = piece.replace("\n", "\u21b5\n") or "\u00b7"
        text.append(shown, style=STYLES[kind] + (" underline" if i % 2 else ""))
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
