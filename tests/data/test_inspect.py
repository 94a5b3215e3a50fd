"""What `mllm data inspect` shows is what a model is trained on, token for token."""

from __future__ import annotations

import pytest
from conftest import make_picture
from rich.console import Console
from tokenizer_styles import ALL_TEMPLATES, NUM_IMAGE_TOKENS, STYLES, build_processor

from mllm.data.inspect import STYLES as COLOURS
from mllm.data.inspect import legend, row_panel, spans_as_json, token_spans
from mllm.data.schema import Row, assistant, user
from mllm.data.tokens import IGNORE
from mllm.errors import DataError
from mllm.model import MllmProcessor

PICTURE = make_picture(size=(8, 8))
ROW: Row = {
    "id": "42",
    "messages": [
        *[
            user("what is </s> in <image> this 😀 picture", PICTURE, PICTURE),
            assistant(" a cat, 猫 and é 👩‍👩‍👧"),
        ],
        *[user("sure?\n", PICTURE), assistant("")],
    ],
}
LOSSLESS = [name for name, style in STYLES.items() if style.lossless]


def collapsed(processor: MllmProcessor, ids: list[int]) -> list[int]:
    """The ids with one placeholder an image."""
    out: list[int] = []
    left = 0
    for token in ids:
        if token == processor.image_token_id and left:
            left -= 1
            continue
        left = NUM_IMAGE_TOKENS - 1 if token == processor.image_token_id else 0
        out.append(token)
    return out


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("style", STYLES)
def test_kinds_are_the_labels(style: str, template: str) -> None:
    processor = build_processor(style, template)
    row = processor.encode(ROW["messages"])
    spans = list(token_spans(processor, ROW))
    labels = [
        label
        for label, token in zip(row.labels, row.input_ids, strict=True)
        if token != processor.image_token_id
    ]
    kinds = [kind for kind, _ in spans if kind != "image"]
    assert kinds == ["masked" if label == IGNORE else "trained" for label in labels]
    assert [text for kind, text in spans if kind == "image"] == [f"<image x {NUM_IMAGE_TOKENS}>"] * 3
    tokens = collapsed(processor, row.input_ids)
    assert [kind == "image" for kind, _ in spans] == [token == processor.image_token_id for token in tokens]


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("style", LOSSLESS)
def test_spans_join_to_the_text_of_the_row(style: str, template: str) -> None:
    """Spaces and characters of several tokens included, which no token shows when decoded alone."""
    processor = build_processor(style, template)
    ids = collapsed(processor, processor.encode(ROW["messages"]).input_ids)
    joined = "".join("<image>" if kind == "image" else text for kind, text in token_spans(processor, ROW))
    assert joined == processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_trained_text_is_the_answers() -> None:
    processor = build_processor("sp_legacy", "vicuna_v1")
    trained = "".join(text for kind, text in token_spans(processor, ROW) if kind == "trained")
    # The space in front belongs to the answer's first token.
    assert trained == "  a cat, 猫 and é 👩‍👩‍👧</s></s>"


def test_removed_rounds_are_not_shown() -> None:
    processor = build_processor("bpe", "vicuna_v1")
    length = len(processor.encode(ROW["messages"][:2]).input_ids)
    first: Row = {"id": "42", "messages": ROW["messages"][:2]}
    assert list(token_spans(processor, ROW, length)) == list(token_spans(processor, first))
    with pytest.raises(DataError, match="row 42: the first round needs"):
        list(token_spans(processor, ROW, length - 1))


def test_panel_counts_and_shows_every_token() -> None:
    processor = build_processor("sp_legacy", "vicuna_v1")
    row = processor.encode(ROW["messages"])
    trained = sum(label != IGNORE for label in row.labels)
    image = 3 * NUM_IMAGE_TOKENS
    masked = len(row.labels) - trained - image
    panel = row_panel(processor, ROW)
    assert panel.title == "row 42"
    assert panel.subtitle == (f"{len(row.labels)} tokens: {trained} trained, {masked} masked, {image} image")
    console = Console(width=4000, color_system=None, record=True)
    with console.capture() as capture:
        console.print(panel)
    shown = capture.get()
    assert "USER: <image x 3>" in shown
    assert "ASSISTANT:  a cat, ··猫 and" in shown
    assert "↵" in shown
    styles = {str(span.style).removesuffix(" underline") for span in panel.renderable.spans}  # type: ignore[union-attr]
    assert styles == set(COLOURS.values())


def test_markup_in_a_row_is_shown_as_it_is() -> None:
    processor = build_processor("bpe", "vicuna_v1")
    row: Row = {"id": "1", "messages": [user("[bold]x[/bold] [/]"), assistant("[red]")]}
    console = Console(width=400, color_system=None)
    with console.capture() as capture:
        console.print(row_panel(processor, row))
    assert "[bold]x[/bold] [/] ASSISTANT: [red]" in capture.get()


def test_json_is_the_same_for_scripts() -> None:
    processor = build_processor("bpe", "vicuna_v1")
    shown = spans_as_json(processor, ROW)
    assert shown["id"] == "42"
    assert [(token["kind"], token["text"]) for token in shown["tokens"]] == list(token_spans(processor, ROW))


def test_legend_names_every_kind() -> None:
    assert all(kind in legend().plain for kind in COLOURS)
