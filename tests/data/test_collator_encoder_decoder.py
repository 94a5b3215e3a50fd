"""Rows for a language model with an encoder: prompts and answers apart, one example an answer."""

from __future__ import annotations

import pytest
import torch
from conftest import make_image_processor, make_picture
from tokenizer_styles import NUM_IMAGE_TOKENS, build_processor
from tokenizers.processors import TemplateProcessing
from transformers import T5Tokenizer

from mllm.data.collator import Collator
from mllm.data.inspect import token_spans
from mllm.data.schema import Row, assistant, user
from mllm.data.tokens import IGNORE
from mllm.errors import DataError
from mllm.model import MllmProcessor

PICTURE, OTHER = make_picture(size=(8, 8)), make_picture(1, (8, 8))
TALK: Row = {
    "id": "talk",
    "messages": [
        *[user("one", PICTURE), assistant("first answer")],
        *[user("two", OTHER), assistant("second </s> <image>")],
    ],
}
SHORT: Row = {"id": "short", "messages": [user("a"), assistant("b")]}


@pytest.fixture(params=["vicuna_v1", "plain", "caption"])
def processor(request: pytest.FixtureRequest) -> MllmProcessor:
    """One whose tokenizer ends every text with `</s>`, as T5's does."""
    processor = build_processor("bpe", request.param)
    tokenizer = processor.tokenizer
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[end]
    )
    processor.encoder_decoder = True
    return processor


def test_a_conversation_is_one_example_an_answer(processor: MllmProcessor) -> None:
    batch = Collator(processor)([TALK, SHORT])
    assert batch["row_ids"] == ["row talk", "row talk", "row short"]
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert len(batch["labels"]) == 3
    messages = [TALK["messages"][:1], TALK["messages"][:3], SHORT["messages"][:1]]
    answers = ["first answer", "second </s> <image>", "b"]
    for i, (prompt, answer) in enumerate(zip(messages, answers, strict=True)):
        length = int(batch["attention_mask"][i].sum())
        ids = batch["input_ids"][i, :length].tolist()
        # What the encoder learns with is what it is asked with.
        assert ids == processor.encode(prompt, open_answer=True).input_ids
        assert ids[-1] == processor.tokenizer.eos_token_id
        labels = [label for label in batch["labels"][i].tolist() if label != IGNORE]
        assert labels[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(labels[:-1]).strip() == answer
        assert labels[:-1].count(processor.tokenizer.eos_token_id) == 0
    # Images are repeated with the history that shows them.
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1) // NUM_IMAGE_TOKENS
    assert placeholders.tolist() == [1, 2, 0]
    assert torch.equal(batch["pixel_values"], processor.pixels([PICTURE, PICTURE, OTHER]))


def test_truncation_counts_both_sides_and_drops_whole_rounds(processor: MllmProcessor) -> None:
    def size(stop: int) -> int:
        row = processor.encode(TALK["messages"][:stop])
        return len(row.input_ids) + len(row.labels)

    assert len(Collator(processor, size(4))([TALK])["labels"]) == 2
    for limit in (size(4) - 1, size(2)):
        batch = Collator(processor, limit)([TALK])
        assert (len(batch["labels"]), batch["dropped_turns"]) == (1, 2)
    with pytest.raises(DataError, match=f"row talk: the first round needs {size(2)} tokens"):
        Collator(processor, size(2) - 1)([TALK])


def test_only_tokenizers_that_close_texts_close_prompts() -> None:
    processor = build_processor("bpe", "vicuna_v1")
    end = processor.tokenizer.eos_token_id
    causal = processor.encode(SHORT["messages"][:1], open_answer=True).input_ids
    processor.encoder_decoder = True
    assert processor.closing == []
    assert processor.encode(SHORT["messages"][:1], open_answer=True).input_ids == causal
    assert processor.encode(SHORT["messages"]).labels[-1] == end


def test_t5_reads_and_writes_what_lavis_gives_it() -> None:
    """BLIP-2: encoder [queries; tokenizer(text_input)], decoder tokenizer(text_output), both with `</s>`."""
    words = [(f"\u2581{word}", -2.0) for word in ("what", "is", "this", "a", "dog", "Question")]
    letters = [(letter, -4.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyzA?:."]
    specials = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    tokenizer = T5Tokenizer(vocab=specials + words + letters, extra_ids=0)
    text_input, text_output = "Question: what is this? Answer:", "a dog."
    want = [list(tokenizer(text)["input_ids"]) for text in (text_input, "", text_output)]
    processor = MllmProcessor(make_image_processor(), tokenizer, num_image_tokens=3, encoder_decoder=True)
    queries = [processor.image_token_id] * 3
    row: Row = {"id": "0", "messages": [user("what is this?", PICTURE), assistant(text_output)]}
    for template, encoder in (("question_answer", want[0]), ("caption", want[1])):
        processor.set_template(template)
        batch = Collator(processor)([row])
        assert batch["input_ids"].tolist() == [queries + encoder]
        assert batch["labels"].tolist() == [want[2]]
    prompt = processor(text=f"<image>{text_input}", images=[PICTURE])
    assert prompt["input_ids"].tolist() == [queries + want[0]]


def test_inspection_shows_prompts_and_answers(processor: MllmProcessor) -> None:
    spans = list(token_spans(processor, TALK))
    trained = "".join(text for kind, text in spans if kind == "trained")
    batch = Collator(processor)([TALK])
    assert trained.count("answer") == 1
    assert sum(kind == "trained" for kind, _ in spans) == int((batch["labels"] != IGNORE).sum())
    assert [text for kind, text in spans if kind == "image"] == [f"<image x {NUM_IMAGE_TOKENS}>"] * 3
