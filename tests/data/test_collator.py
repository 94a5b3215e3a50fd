"""Training batches: padding, truncation by whole rounds, and rows that are refused by name."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
from conftest import make_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_styles import NUM_IMAGE_TOKENS, build_processor

from mllm.data.collator import Collator
from mllm.data.schema import Message, Row, assistant, text_part, user
from mllm.data.tokens import IGNORE
from mllm.errors import DataError
from mllm.model import MllmProcessor

PICTURE = make_picture(size=(8, 8))
SHORT: Row = {"id": "short", "messages": [user("a", PICTURE), assistant("b")]}
LONG: Row = {
    "id": "long",
    "messages": [
        *[user("one", PICTURE), assistant("first answer")],
        *[user("two", PICTURE, PICTURE), assistant("second")],
        *[user("three"), assistant("third </s> <image>")],
    ],
}
TEXT_ONLY: Row = {"id": "text", "messages": [user("hello world"), assistant("the quick brown fox")]}


@pytest.fixture(scope="module", params=["sp_legacy", "bpe"])
def processor(request: pytest.FixtureRequest) -> MllmProcessor:
    """One with a pad token of its own kind, and one that pads with its end token."""
    return build_processor(request.param, "vicuna_v1")


def test_rows_are_padded_on_the_right(processor: MllmProcessor) -> None:
    rows = [SHORT, LONG, TEXT_ONLY]
    batch = Collator(processor)(rows)
    encoded = [processor.encode(row["messages"]) for row in rows]
    width = max(len(row.input_ids) for row in encoded)
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].shape == (3, width)
        assert batch[name].dtype == torch.int64
    for i, row in enumerate(encoded):
        length = len(row.input_ids)
        assert batch["input_ids"][i, :length].tolist() == row.input_ids
        assert batch["labels"][i, :length].tolist() == row.labels
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (width - length)
        assert set(batch["input_ids"][i, length:].tolist()) <= {processor.tokenizer.pad_token_id}
        assert set(batch["labels"][i, length:].tolist()) <= {IGNORE}
        # The end token is learned, also where it is the padding.
        assert batch["labels"][i, length - 1] == processor.tokenizer.eos_token_id
    assert batch["row_ids"] == ["row short", "row long", "row text"]
    assert batch["dropped_turns"] == 0


def test_pixels_are_those_of_all_rows_in_order(processor: MllmProcessor) -> None:
    pictures = [make_picture(seed, (9, 7)) for seed in range(3)]
    rows: list[Row] = [
        {"id": "0", "messages": [user("a", pictures[0], pictures[1]), assistant("b")]},
        TEXT_ONLY,
        {"id": "2", "messages": [user("a"), assistant("b"), user("c", pictures[2]), assistant("d")]},
    ]
    batch = Collator(processor)(rows)
    assert torch.equal(batch["pixel_values"], processor.pixels(pictures))
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [2 * NUM_IMAGE_TOKENS, 0, NUM_IMAGE_TOKENS]
    assert "pixel_values" not in Collator(processor)([TEXT_ONLY])


def test_truncation_removes_whole_trailing_rounds(processor: MllmProcessor) -> None:
    lengths = [len(processor.encode(LONG["messages"][:stop]).input_ids) for stop in (2, 4, 6)]
    for max_length in range(lengths[0], lengths[2] + 2):
        kept = sum(length <= max_length for length in lengths)
        batch = Collator(processor, max_length)([LONG])
        expected = processor.encode(LONG["messages"][: 2 * kept])
        assert batch["input_ids"].tolist() == [expected.input_ids]
        assert batch["labels"].tolist() == [expected.labels]
        assert batch["dropped_turns"] == 6 - 2 * kept
        assert len(batch["pixel_values"]) == len(expected.images) == (1, 3, 3)[kept - 1]
    assert Collator(processor, lengths[1])([LONG, LONG])["dropped_turns"] == 4


def test_first_round_that_is_too_long_names_the_row_and_its_length(processor: MllmProcessor) -> None:
    system: Message = {"role": "system", "content": [text_part("Be brief.")]}
    for messages in (LONG["messages"], [system, *LONG["messages"]]):
        first = messages[: 3 if messages[0]["role"] == "system" else 2]
        needed = len(processor.encode(first).input_ids)
        row: Row = {"id": "7", "messages": messages}
        assert Collator(processor, needed)([row])["dropped_turns"] == 4
        with pytest.raises(DataError) as caught:
            Collator(processor, needed - 1)([SHORT, row] if needed > 200 else [row])
        assert f"row 7: the first round needs {needed} tokens and max_length is {needed - 1}" in str(
            caught.value
        )
        assert "\n" not in str(caught.value)


def test_errors_name_the_row_and_its_place(processor: MllmProcessor) -> None:
    row: Any = {"id": "9", "source": "data.jsonl:4", "messages": SHORT["messages"]}
    with pytest.raises(DataError, match=r"^data\.jsonl:4 \(id 9\): the first round needs"):
        Collator(processor, 5)([row])
    with pytest.raises(DataError, match=r"^row short: the last message must be an 'assistant' message"):
        Collator(processor)([{**SHORT, "messages": SHORT["messages"][:1]}])
    missing: Row = {"id": "x", "messages": [user("a", "/no/such/picture.jpg"), assistant("b")]}
    with pytest.raises(DataError, match=r"^row x: .*/no/such/picture\.jpg"):
        Collator(processor)([missing])


def test_a_row_with_nothing_supervised_is_refused() -> None:
    processor = build_processor("bpe", "vicuna_v1")
    processor.tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
        "{% generation %}{% if loop.length == 2 and loop.last %}{{ message['content'] }}{% endif %}"
        "{% endgeneration %}{% if loop.length > 2 or not loop.last %}{{ message['content'] }}{% endif %}"
        "{% endif %}{% endfor %}"
    )
    processor.set_template("tokenizer")
    assert Collator(processor)([TEXT_ONLY])["labels"].max() >= 0
    row: Row = {"id": "8", "messages": TEXT_ONLY["messages"] * 2}
    with pytest.raises(DataError, match=r"^row 8: nothing to learn, no token is supervised; remove the row"):
        Collator(processor)([row])
    # An empty answer, and a template that supervises no end token.
    row = {"id": "8", "messages": [user("a"), assistant("")]}
    with pytest.raises(DataError, match=r"^row 8: nothing to learn"):
        Collator(processor)([row])


def test_a_label_that_nothing_predicts_is_no_label() -> None:
    """The first token of a row is never predicted, so a row that supervises only that one teaches nothing."""
    processor = build_processor("bpe", "vicuna_v1")
    processor.chat_template = "{% generation %}{{ messages[-1]['content'][0]['text'] }}{% endgeneration %}"
    assert processor.encode([user(""), assistant("a")]).labels != [IGNORE]
    with pytest.raises(DataError, match="nothing to learn"):
        Collator(processor)([{"id": "1", "messages": [user(""), assistant("a")]}])


WORDS = st.lists(
    st.sampled_from(["the", "cat", " ", "\n", "<image>", "</s>", "<|endoftext|>", "猫", "😀", "ASSISTANT:"]),
    max_size=12,
).map("".join)
ROUNDS = st.lists(st.tuples(WORDS, WORDS, st.integers(0, 2)), min_size=1, max_size=6)


def test_a_row_of_a_thousand_rounds_is_shortened_in_a_few_tries(processor: MllmProcessor) -> None:
    messages = [message for i in range(1000) for message in (user(f"{i}"), assistant("b"))]
    limit = len(processor.encode(messages[:800]).input_ids)
    encode, tries = processor.encode, []
    counting = copy(processor)
    counting.encode = lambda *args: (tries.append(args), encode(*args))[1]  # type: ignore[method-assign]
    assert counting.encode_to_fit(messages, limit).dropped_turns == 1200
    assert len(tries) < 15


@pytest.mark.parametrize(
    "template", ["plain", "vicuna_v1", "llava_llama_2", "chatml", "own_parts", "own_chatml"]
)
@pytest.mark.parametrize("style", ["sp_legacy", "bpe", "bpe_bos"])
def test_any_max_length_gives_whole_rounds_or_an_error(style: str, template: str) -> None:
    processor = build_processor(style, template)

    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(ROUNDS, st.integers(1, 260))
    def check(rounds: list[tuple[str, str, int]], max_length: int) -> None:
        messages: list[Message] = []
        for question, answer, images in rounds:
            messages += [user(question, *[PICTURE] * images), assistant(answer)]
        first = len(processor.encode(messages[:2]).input_ids)
        collator, row = Collator(processor, max_length), {"id": "r", "messages": messages}
        if first > max_length:
            with pytest.raises(DataError, match=f"^row r: the first round needs {first} tokens"):
                collator([row])
            return
        try:
            batch = collator([row])
        except DataError as error:
            # `plain` without an image, a caption and BOS is one newline, which nothing predicts.
            if first > 1 or "row r: nothing to learn" not in str(error):
                raise
            return
        kept = messages[: len(messages) - batch["dropped_turns"]]
        whole = processor.encode(kept)
        assert len(kept) >= 2
        assert kept[-1]["role"] == "assistant"
        assert batch["input_ids"].tolist() == [whole.input_ids]
        assert batch["labels"].tolist() == [whole.labels]
        assert len(whole.input_ids) <= max_length
        if batch["dropped_turns"]:
            assert len(processor.encode(messages[: len(kept) + 2]).input_ids) > max_length
        placeholders = int((batch["input_ids"] == processor.image_token_id).sum())
        images = batch.get("pixel_values", [])
        assert placeholders == len(images) * NUM_IMAGE_TOKENS == len(whole.images) * NUM_IMAGE_TOKENS

    check()
