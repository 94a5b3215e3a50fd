"""What is supervised: exactly the answers and their end tokens, whatever the tokenizer and the template."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from conftest import make_image_processor, make_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_styles import (
    ALL_TEMPLATES,
    NAMED_TEMPLATES,
    NUM_IMAGE_TOKENS,
    STYLES,
    build_processor,
    end_of_turn,
)
from transformers import AddedToken

from mllm.data.schema import Message, assistant, image_part, images_of, message_text, text_part, user
from mllm.data.tokens import IGNORE
from mllm.model import MllmProcessor

PICTURE = make_picture(size=(8, 8))
# What the template writes between an answer and its end token.
TAIL = {"plain": "\n", "llava_llama_2": " ", "mistral_instruct": " "}
# Templates in which an image has to stand between two answers, or nothing might; those without a system text.
NEEDS_IMAGES = ("plain", "caption", "bare")
NO_SYSTEM = (*NEEDS_IMAGES, "question_answer", "minigpt_v2", "cogvlm")
# Texts that break templates, masks and tokenizers; every style's own special tokens are among them.
HOSTILE = [
    *("</s>", "<s>", "<image>", "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|end_of_text|>"),
    *("<|end|>", "[SEP]", "[UNK]", "[INST]", " [/INST] ", "ASSISTANT: ", "<tool>", "<ima", "ge>", "</", "s>"),
    *("\ue0000\ue001", "\ue000", "{{ 7 * 6 }}", "{% endgeneration %}", "<0x41>", "BOS", "END"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "Yes", " Yes", "Yes ", "the cat.", "Is there a dog ?"),
    *("😀", "👩‍👩‍👧", "猫が二匹", "e\u0301", "שלום עולם", "مرحبا", "\u200b", "\u00a0", "\ufffd", "\x00"),
]
# U+2581 is how SentencePiece writes a space: no tokenizer of that style gives it back.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\u2581")
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.text(CHARACTERS, max_size=5), max_size=4).map("".join)


@st.composite
def conversations(draw: Any, template: str) -> list[Message]:
    """1-20 turns with 0-4 images anywhere in the user's messages, or in each."""
    turns = draw(st.integers(1, 3) | st.integers(1, 20))
    contents = [[text_part(text)] for text in draw(st.lists(TEXTS, min_size=turns, max_size=turns))]
    places = list(range(turns)) if template in NEEDS_IMAGES else []
    for turn in [*places, *draw(st.lists(st.integers(0, turns - 1), max_size=4))]:
        parts = contents[turn]
        at = draw(st.integers(0, len(parts)))
        parts[at:at] = [image_part(PICTURE), text_part(draw(TEXTS))]
    messages: list[Message] = []
    if template not in NO_SYSTEM and draw(st.booleans()):
        messages.append({"role": "system", "content": [text_part(draw(TEXTS))]})
    for parts in contents:
        messages += [{"role": "user", "content": parts}, assistant(draw(TEXTS))]
    return messages


@cache
def processor_of(style: str, template: str) -> MllmProcessor:
    return build_processor(style, template)


def supervised_spans(labels: list[int]) -> list[tuple[int, int]]:
    spans, at = [], 0
    for masked, group in groupby(labels, key=lambda label: label == IGNORE):
        length = len(list(group))
        if not masked:
            spans.append((at, at + length))
        at += length
    return spans


def check_labels(style: str, template: str, messages: list[Message]) -> None:
    processor = processor_of(style, template)
    tokenizer = processor.tokenizer
    row = processor.encode(messages)
    answers = [message_text(message) for message in messages if message["role"] == "assistant"]
    images = images_of(messages)

    assert len(row.labels) == len(row.input_ids)
    assert row.images == images
    assert row.input_ids.count(processor.image_token_id) == len(images) * NUM_IMAGE_TOKENS
    assert all(label in (IGNORE, token) for token, label in zip(row.input_ids, row.labels, strict=True))

    def alone(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    end = "" if template == "plain" else end_of_turn(tokenizer, template)
    texts = [answer + TAIL.get(template, "") for answer in answers]
    # WordPiece has no newline, so the end of a caption is not there either.
    kept = [turn for turn, text in enumerate(texts) if end or alone(text)]
    spans = supervised_spans(row.labels)
    assert len(spans) == len(kept)
    special = [tokenizer.bos_token, tokenizer.eos_token, end, "<image>"]
    forbidden = {tokenizer.convert_tokens_to_ids(token) for token in special if token}
    for (start, stop), turn in zip(spans, kept, strict=True):
        ids, text = row.input_ids[start:stop], texts[turn]
        if end:
            assert ids[-1] == tokenizer.convert_tokens_to_ids(end)
        content = ids[: len(ids) - bool(end)]
        assert not forbidden.intersection(content), "an answer was parsed for special tokens"
        if STYLES[style].lossless:
            prefix = STYLES[style].prefix if text else ""
            decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert decoded == prefix + text + end
        else:
            assert content == alone(text)

    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for at in {0, len(kept) // 2, len(kept) - 1} if kept else ():
        prompt = processor.encode(messages[: users[kept[at]] + 1], open_answer=True).input_ids
        assert prompt == row.input_ids[: spans[at][0]]
    batch = processor([messages[:-1]])
    prompt = batch["input_ids"][0].tolist()
    assert prompt == row.input_ids[: len(prompt)]
    assert all(label != IGNORE for label in row.labels[len(prompt) : len(prompt) + 1])
    assert len(batch.get("pixel_values", [])) == len(images)


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("style", STYLES)
def test_supervised_ids_are_exactly_answers_and_end_tokens(style: str, template: str) -> None:
    @settings(max_examples=20, derandomize=True, deadline=None, database=None)
    @given(conversations(template))
    def check(messages: list[Message]) -> None:
        check_labels(style, template, messages)

    check()


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("style", STYLES)
def test_every_hostile_text_as_question_and_as_answer(style: str, template: str) -> None:
    for start in range(0, len(HOSTILE), 12):
        messages: list[Message] = []
        for i, text in enumerate(["", *HOSTILE[start : start + 12]]):
            images = [PICTURE] if template in NEEDS_IMAGES or i in (0, 3) else []
            messages += [user(text, *images), assistant(text)]
        check_labels(style, template, messages)


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("style", ["bpe", "bpe_bos", "sp_bare"])
def test_ids_are_the_rendered_text(style: str, template: str) -> None:
    """Nothing of a question is lost; only tokenizers that change no space can show it."""
    processor = processor_of(style, template)
    messages = [
        user(" a\n </s> <image> 😀 ", PICTURE),
        assistant(" b "),
        user("\tc </s>", PICTURE),
        assistant(""),
    ]
    ids = processor.encode(messages).input_ids
    text = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    rendered = "".join(piece.text for piece in processor.pieces(messages))
    assert text.replace("<image>" * NUM_IMAGE_TOKENS, "<image>") == rendered


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("style", [style for style in STYLES if style != "sp_python"])
def test_a_saved_processor_gives_the_same_ids(style: str, template: str, tmp_path: Path) -> None:
    processor = processor_of(style, template)
    processor.save_pretrained(tmp_path)
    MllmProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    loaded = MllmProcessor.from_pretrained(tmp_path / "again")
    messages = [user("what </s> is <image> this", PICTURE), assistant(" a cat "), user("b"), assistant("")]
    first, second = processor.encode(messages), loaded.encode(messages)
    assert (first.input_ids, first.labels) == (second.input_ids, second.labels)
    for name in ("content_parts", "end_token", "end_token_ids", "image_token_id", "num_image_tokens"):
        assert getattr(loaded, name) == getattr(processor, name)
    assert type(loaded.tokenizer) is type(processor.tokenizer)


@pytest.mark.parametrize("style", STYLES)
def test_plain_without_images_keeps_answers_apart(style: str) -> None:
    """Nothing stands between two captions, and still neither changes the tokens of the other."""
    processor = processor_of(style, "plain")
    messages = [user("a"), assistant("one two"), user("b"), assistant("three")]
    prompt = processor.encode(messages[:-1], open_answer=True)
    row = processor.encode(messages)
    assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    caption = processor.encode([user("c"), assistant("three")])
    assert row.input_ids[len(prompt.input_ids) :] == [label for label in caption.labels if label != IGNORE]


@pytest.mark.parametrize("style", STYLES)
def test_special_token_split_over_two_parts_is_not_parsed(style: str) -> None:
    processor = processor_of(style, "vicuna_v1")
    content = [text_part("<ima"), text_part("ge> and "), text_part(processor.tokenizer.eos_token[:-1])]
    content.append(text_part(processor.tokenizer.eos_token[-1]))
    row = processor.encode([{"role": "user", "content": content}, assistant("b")])
    assert processor.image_token_id not in row.input_ids
    assert row.input_ids.count(processor.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
@pytest.mark.parametrize("style", STYLES)
def test_text_prompts_are_tokenised_as_conversations_are(style: str, template: str) -> None:
    processor = processor_of(style, template)
    messages = [user("what is this", PICTURE)]
    by_text = processor(text=processor.prompt_text(messages), images=[PICTURE])
    assert by_text["input_ids"].tolist() == processor([messages])["input_ids"].tolist()


def test_a_marker_that_is_there_but_not_special_is_not_parsed_in_a_question() -> None:
    tokenizer = STYLES["bpe"].build()
    tokenizer.add_tokens([AddedToken("<image>", special=False)])
    processor = MllmProcessor(make_image_processor(), tokenizer, num_image_tokens=NUM_IMAGE_TOKENS)
    processor.set_template("vicuna_v1")
    row = processor.encode([user("what is <image>", PICTURE), assistant("<image>")])
    assert row.input_ids.count(processor.image_token_id) == NUM_IMAGE_TOKENS


def test_styles_are_what_their_names_say() -> None:
    """The property above is only worth as much as the tokenizers differ."""
    first = {style: make_tokens(style, "hello") for style in STYLES}
    assert first["sp_legacy"][0] == first["sp_new"][0] == first["sp_python"][0] == "\u2581hello"
    assert first["sp_bare"][0][0] == "h"
    assert first["bpe_prefix"][0][0] == "\u0120"
    assert first["bpe"][0][0] == first["wordpiece"][0][0] == "h"
    assert "\u2581world" in make_tokens("sp_legacy", "</s>world")[-1]
    assert "\u2581" not in "".join(make_tokens("sp_new", "</s>world"))
    bos = {style for style in STYLES if adds_bos(style)}
    assert bos == {"sp_legacy", "sp_new", "bpe_bos"}
    padded = [processor_of(style, "vicuna_v1").tokenizer for style in STYLES]
    assert sum(tokenizer.pad_token == tokenizer.eos_token for tokenizer in padded) >= 3
    assert "[UNK]" in make_tokens("wordpiece", "😀")
    assert "<0xF0>" in make_tokens("sp_legacy", "😀")


def make_tokens(style: str, text: str) -> list[str]:
    tokenizer = STYLES[style].build()
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]))


def adds_bos(style: str) -> bool:
    tokenizer = STYLES[style].build()
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("style", STYLES)
def test_ids_of_a_text_are_those_of_the_tokenizers_own_call(style: str) -> None:
    """It is gone around for speed; what another call has set stays out of it."""
    processor = build_processor(style, "vicuna_v1")
    tokenizer, pieces = processor.tokenizer, processor.piece_tokenizer
    for text in HOSTILE:
        for parse in (True, False):
            options = {"add_special_tokens": False, "split_special_tokens": not parse}
            expected = list(tokenizer(text, **options)["input_ids"])
            tokenizer(["a", "the quick brown fox"], padding=True, truncation=True, max_length=2)
            assert pieces._encode(text, parse) == expected, (text, parse)
