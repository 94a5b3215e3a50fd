"""Exact prompts of the named templates, LLaVA's own ids and labels, and what a bad template is told."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_picture
from tokenizer_styles import NAMED_TEMPLATES, STYLES, build_processor

from mllm.data.schema import Message, assistant, image_part, text_part, user
from mllm.data.templates import TEMPLATES, chat_template
from mllm.data.tokens import IGNORE
from mllm.errors import ConfigError, DataError
from mllm.model import MllmProcessor

PICTURE = make_picture(size=(8, 8))
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)
FIRST = [user("What is it?", PICTURE), assistant("A cat.")]
SECOND = [*FIRST, user("Sure?"), assistant("Yes.")]
TEXT_ONLY = [user("Hi"), assistant("Hello.")]
SYSTEM: Message = {"role": "system", "content": [text_part("Be brief.")]}


def rendered(processor: MllmProcessor, messages: list[Message]) -> str:
    return "".join(piece.text for piece in processor.pieces(messages))


# What `get_prompt` of LLaVA's conversation.py returns, with the BOS that its tokenizer puts in front.
@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        ("plain", FIRST, "<s><image>A cat.\n"),
        ("vicuna_v1", TEXT_ONLY, f"<s>{VICUNA} USER: Hi ASSISTANT: Hello.</s>"),
        ("vicuna_v1", FIRST, f"<s>{VICUNA} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"),
        (
            "vicuna_v1",
            SECOND,
            f"<s>{VICUNA} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>",
        ),
        ("vicuna_v1", [SYSTEM, *TEXT_ONLY], "<s>Be brief. USER: Hi ASSISTANT: Hello.</s>"),
        (
            "llava_llama_2",
            FIRST,
            f"<s>[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s>",
        ),
        (
            "llava_llama_2",
            SECOND,
            f"<s>[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s>"
            "<s>[INST] Sure? [/INST] Yes. </s>",
        ),
        (
            "llava_llama_2",
            [SYSTEM, *TEXT_ONLY],
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s>",
        ),
        ("mistral_instruct", FIRST, "<s>[INST] <image>\nWhat is it? [/INST] A cat. </s>"),
        (
            "mistral_instruct",
            SECOND,
            "<s>[INST] <image>\nWhat is it? [/INST] A cat. </s>[INST] Sure? [/INST] Yes. </s>",
        ),
        (
            "mistral_instruct",
            [SYSTEM, *TEXT_ONLY],
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s>",
        ),
    ],
)
def test_exact_text_with_a_llama_tokenizer(template: str, messages: list[Message], text: str) -> None:
    processor = build_processor("sp_legacy", template)
    assert rendered(processor, messages) == text
    supervised = "".join(piece.text for piece in processor.pieces(messages) if piece.supervised)
    answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
    end = {"plain": "\n", "vicuna_v1": "</s>"}.get(template, " </s>")
    assert supervised == "".join(answer + end for answer in answers)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (
            FIRST,
            "<|im_start|>system\nAnswer the questions.<|im_end|>"
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>"
            "<|im_start|>assistant\nA cat.<|im_end|>",
        ),
        (
            SECOND,
            "<|im_start|>system\nAnswer the questions.<|im_end|>"
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>"
            "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|>"
            "<|im_start|>assistant\nYes.<|im_end|>",
        ),
        (
            [SYSTEM, *TEXT_ONLY],
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|>"
            "<|im_start|>assistant\nHello.<|im_end|>",
        ),
    ],
)
def test_exact_text_of_chatml(messages: list[Message], text: str) -> None:
    processor = build_processor("bpe_bos", "chatml")
    assert rendered(processor, messages) == text
    assert processor.end_token == "<|im_end|>"
    tokenizer = processor.tokenizer
    assert processor.end_token_ids == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end_of_text|>"])
    # A vocabulary without ChatML's tokens ends turns with its own end token.
    assert rendered(build_processor("sp_bare", "chatml"), messages) == text.replace("<|im_end|>", "</s>")


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
def test_no_bos_where_the_tokenizer_writes_none(template: str) -> None:
    processor = build_processor("sp_bare", template)
    assert processor.tokenizer.bos_token == "<s>"
    assert "<s>" not in rendered(processor, SECOND[2:] if template != "plain" else FIRST)


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
def test_prompt_text_ends_where_the_answer_begins(template: str) -> None:
    processor = build_processor("sp_legacy", template)
    whole = rendered(processor, FIRST)
    assert processor.prompt_text(FIRST[:1]) == whole[: whole.index("A cat.")]


def test_images_stand_where_they_are_written() -> None:
    processor = build_processor("sp_legacy", "mistral_instruct")
    content = [text_part("a"), image_part(PICTURE), text_part("b"), image_part(PICTURE), image_part(PICTURE)]
    text = rendered(processor, [{"role": "user", "content": content}, assistant("c")])
    assert text == "<s>[INST] a<image>b<image><image> [/INST] c </s>"


# -- parity with LLaVA's tokenisation and masking ------------------------------------------------------


def llava_ids(prompt: str, tokenizer: Any, image_id: int) -> list[int]:
    """LLaVA's `tokenizer_image_token`: the texts around images are tokenised one by one, BOS kept once."""
    ids: list[int] = []
    for i, chunk in enumerate(prompt.split("<image>")):
        ids += [image_id] * (i > 0) + tokenizer(chunk)["input_ids"][min(i, 1) :]
    return ids


def llava_labels(prompt: str, separator: str, tokenizer: Any, image_id: int) -> list[int]:
    """LLaVA's `preprocess_v1` and `preprocess_llama_2`: masks by the lengths of re-tokenised rounds."""
    labels = llava_ids(prompt, tokenizer, image_id)
    total, at = len(labels), 1
    labels[0] = IGNORE
    for text in prompt.split("</s>")[:-1]:
        instruction = text.split(separator)[0] + separator
        # One for BOS, one for the space that the answer's first token carries.
        length = len(llava_ids(instruction, tokenizer, image_id)) - 2
        labels[at : at + length] = [IGNORE] * length
        at += len(llava_ids(text, tokenizer, image_id))
    assert at == total, "LLaVA itself would drop this row"
    return labels


@pytest.mark.parametrize("style", ["sp_legacy", "sp_new"])
@pytest.mark.parametrize("messages", [FIRST, SECOND, TEXT_ONLY, [*TEXT_ONLY, *TEXT_ONLY, *SECOND]])
def test_vicuna_ids_and_labels_are_llavas(style: str, messages: list[Message]) -> None:
    processor = build_processor(style, "vicuna_v1")
    processor.num_image_tokens = 1
    prompt = rendered(processor, messages).removeprefix("<s>")
    row = processor.encode(messages)
    image_id = processor.image_token_id
    assert row.input_ids == llava_ids(prompt, processor.tokenizer, image_id)
    # Its lengths fit later rounds of the newer tokenizers for some vocabularies only.
    if style == "sp_legacy" or len(messages) == 2:
        assert row.labels == llava_labels(prompt, " ASSISTANT: ", processor.tokenizer, image_id)


def test_supervised_vicuna_tokens_are_the_answers_with_its_leading_space() -> None:
    processor = build_processor("sp_legacy", "vicuna_v1")
    row = processor.encode([user("What is it?", PICTURE), assistant("the world")])
    labels = [label for label in row.labels if label != IGNORE]
    assert processor.tokenizer.convert_ids_to_tokens(labels) == ["\u2581the", "\u2581world", "</s>"]
    tokens = processor.tokenizer.convert_ids_to_tokens(row.input_ids)
    after = tokens[len(tokens) - tokens[::-1].index("<image>") :]
    assert after[:2] == ["\u2581", "<0x0A>"], "a space stands between an image and its newline"
    assert tokens[1] == "\u2581A"


@pytest.mark.parametrize("style", ["sp_legacy", "sp_new"])
@pytest.mark.parametrize("template", ["llava_llama_2", "mistral_instruct"])
def test_inst_ids_and_labels_are_llavas(template: str, style: str) -> None:
    processor = build_processor(style, template)
    processor.num_image_tokens = 1
    prompt = rendered(processor, FIRST).removeprefix("<s>")
    row = processor.encode(FIRST)
    image_id = processor.image_token_id
    assert row.input_ids == llava_ids(prompt, processor.tokenizer, image_id)
    assert row.labels == llava_labels(prompt, "[/INST] ", processor.tokenizer, image_id)


@pytest.mark.parametrize("style", ["sp_legacy", "sp_new"])
def test_plain_is_llavas(style: str) -> None:
    """LLaVA masks BOS and the image; caption and newline are supervised, and there is no end token."""
    processor = build_processor(style, "plain")
    processor.num_image_tokens = 1
    row = processor.encode(FIRST)
    ids = llava_ids("<image>A cat.\n", processor.tokenizer, processor.image_token_id)
    assert row.input_ids == ids
    assert row.labels == [IGNORE, IGNORE, *ids[2:]]
    assert processor.tokenizer.eos_token_id not in row.input_ids
    assert processor.end_token_ids == [processor.tokenizer.eos_token_id]


# -- refusals ------------------------------------------------------------------------------------------


def own(template: str, style: str = "bpe_bos") -> MllmProcessor:
    processor = build_processor(style, "vicuna_v1")
    processor.tokenizer.chat_template = template
    processor.set_template("tokenizer")
    return processor


STRINGS = "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}"


def test_unknown_template_lists_the_names() -> None:
    with pytest.raises(ConfigError, match="unknown template 'vicuna'") as caught:
        build_processor("bpe", "vicuna")
    assert all(name in str(caught.value) for name in (*TEMPLATES, "tokenizer"))


def test_tokenizer_without_a_template_names_those_there_are() -> None:
    processor = build_processor("bpe", "vicuna_v1")
    processor.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="this tokenizer has none; use plain, caption, bare"):
        processor.set_template("tokenizer")


@pytest.mark.parametrize("template", [*NAMED_TEMPLATES, "tokenizer"])
def test_tokenizer_without_an_end_token_is_refused(template: str) -> None:
    tokenizer = STYLES["bpe_bos"].build()
    tokenizer.eos_token = None
    tokenizer.chat_template = STRINGS
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        chat_template(template, tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}" + STRINGS + "{% endfor %}{% if %}", "refuses this conversation"),
        ("{{ raise_exception('only lists') }}", "only lists"),
        ("{{ messages[0]['content'] }}{{ eos_token }}", "no place for this assistant text"),
        ("{% for message in messages | reverse %}" + STRINGS + "{% endfor %}", "repeats or reorders"),
        (STRINGS.replace("message", "messages[0]") * 2, "repeats or reorders"),
        (
            "{% for message in messages %}" + STRINGS[:-15] + "{% endfor %}",
            "ends an answer with no special token",
        ),
        (
            "{% generation %}{% for message in messages %}" + STRINGS + "{% endfor %}{% endgeneration %}"
            "{% for message in messages %}{% endfor %}",
            None,
        ),
        (
            "{% for message in messages %}" + STRINGS + "{% generation %}{% endgeneration %}{% endfor %}",
            "marks nothing as supervised",
        ),
    ],
)
def test_templates_that_cannot_be_used(template: str, reason: str | None) -> None:
    if reason is None:  # a mark around everything: only the answer behind the question can be meant
        processor = own(template)
        with pytest.raises(DataError, match="marks a user's message as supervised"):
            processor.encode(SECOND)
    else:
        with pytest.raises(ConfigError, match=reason) as caught:
            own(template)
        assert "\n" not in str(caught.value)


def test_template_without_a_place_for_a_system_text() -> None:
    processor = own("{% for message in messages if message['role'] != 'system' %}" + STRINGS + "{% endfor %}")
    with pytest.raises(DataError, match=r"no place for this system text: 'Be brief\.'"):
        processor.encode([SYSTEM, *TEXT_ONLY])
    with pytest.raises(DataError, match=r"no place for this system text: 'Be brief\.'"):
        build_processor("sp_legacy", "plain").encode([SYSTEM, *FIRST])


def test_template_that_drops_some_questions() -> None:
    processor = own(
        "{% for message in messages %}{% if loop.index0 != 2 %}" + STRINGS + "{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"no place for this user text: 'Sure\?'"):
        processor.encode(SECOND)


def test_template_that_drops_an_image() -> None:
    texts = "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    processor = own(
        "{% for message in messages %}{% if loop.first %}<image>{% endif %}"
        + texts
        + "{{ eos_token }}{% endfor %}"
    )
    assert processor.encode(FIRST).images == [PICTURE]
    with pytest.raises(DataError, match="renders 1 image markers for 2 images"):
        processor.encode([user("x", PICTURE, PICTURE), assistant("y")])
    with pytest.raises(DataError, match="renders 1 image markers for 0 images"):
        processor.encode(TEXT_ONLY)


def test_last_role_and_order_of_roles() -> None:
    processor = build_processor("bpe", "vicuna_v1")
    with pytest.raises(DataError, match="last message must be an 'assistant' message, found 'user'"):
        processor.encode(FIRST[:1])
    with pytest.raises(DataError, match="last message must be a 'user' message, found 'assistant'"):
        processor.encode(FIRST, open_answer=True)
    with pytest.raises(DataError, match="last message must be a 'user' message"):
        processor([FIRST])
    for order in ([assistant("a"), user("b")], [user("a"), user("b")], [user("a"), SYSTEM], [SYSTEM], []):
        with pytest.raises(DataError, match=r"messages\[|no 'user' message"):
            processor.encode(order)
        with pytest.raises(DataError, match=r"messages\[|no 'user' message"):
            processor.encode_to_fit(order, 100)


def test_id_beyond_the_embeddings_names_the_token() -> None:
    processor = build_processor("bpe", "vicuna_v1", vocab_size=len(STYLES["bpe"].build()))
    assert processor.image_token_id >= processor.vocab_size, "the marker itself needs no embedding"
    assert processor.encode(FIRST).images
    processor.tokenizer.add_tokens(["<point>"])
    with pytest.raises(DataError, match=r"'<point>' has id \d+, but the language model has \d+ embeddings"):
        processor.encode([user("a <point>", PICTURE), assistant("b")])


def test_a_processor_without_a_template_says_so() -> None:
    processor = build_processor("bpe", "vicuna_v1")
    processor.chat_template = None
    with pytest.raises(ConfigError, match="no chat template; call set_template"):
        processor.encode(FIRST)


def test_a_token_may_be_spelt_like_a_placeholder_of_the_template() -> None:
    tokenizer = STYLES["bpe_bos"].build()
    tokenizer.add_special_tokens({"eos_token": "<END_OF_TURN BOS>"})
    assert "{{ '<END_OF_TURN BOS>' }}" in chat_template("vicuna_v1", tokenizer)


def test_an_end_token_that_is_special_but_has_no_name() -> None:
    """Phi: `<|end|>` is an added special token, the tokenizer's end token is another."""
    processor = build_processor("bpe_strip", "own_chatml")
    assert processor.end_token == "<|im_end|>"
    assert "<|im_end|>" not in processor.tokenizer.special_tokens_map.values()


def test_marks_that_include_the_role_do_not_supervise_it() -> None:
    processor = build_processor("bpe", "own_wide_generation")
    supervised = [piece.text for piece in processor.pieces(TEXT_ONLY) if piece.supervised]
    assert supervised == ["Hello.", "<|endoftext|>"]


@pytest.mark.parametrize("mark", ["{%- generation %}", "{% generation -%}", "{%generation%}"])
def test_a_mark_in_any_spelling_is_a_mark(mark: str) -> None:
    processor = own(
        "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
        + mark
        + "{{ message['content'] + eos_token + '.' }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}"
    )
    supervised = "".join(piece.text for piece in processor.pieces(TEXT_ONLY) if piece.supervised)
    assert supervised == "Hello.<|end_of_text|>."


def test_an_answer_that_starts_with_a_space_is_not_one_without() -> None:
    for style in ("sp_legacy", "sp_new", "bpe_prefix", "sp_python", "bpe"):
        processor = build_processor(style, "vicuna_v1")
        with_space, without = (processor.encode([user("a"), assistant(text)]) for text in (" b", "b"))
        assert with_space.labels != without.labels, style
