"""One processor for training, evaluation and chat: the same ids and the same pixels everywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_image_processor, make_model, make_picture, make_tokenizer, mixed_conversations
from PIL import Image

import mllm
from mllm.data.collator import Collator
from mllm.data.schema import Message, assistant, user
from mllm.data.templates import TEMPLATES
from mllm.errors import ConfigError, DataError
from mllm.model import MllmProcessor
from mllm.model.checkpoint import save
from mllm.model.processing import pad_to_square

TOKENS = 16


@pytest.fixture(params=TEMPLATES)
def processor(request: pytest.FixtureRequest) -> MllmProcessor:
    return make_processor(request.param)


def make_processor(template: str = "vicuna_v1", **kwargs: Any) -> MllmProcessor:
    made = MllmProcessor(make_image_processor(), make_tokenizer(), num_image_tokens=TOKENS, **kwargs)
    made.set_template(template)
    return made


def conversation() -> list[Message]:
    return [user("hello", make_picture(0)), assistant("fox"), user("why", make_picture(1))]


# -- batches ----------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_left(processor: MllmProcessor) -> None:
    rows = [row for row in mixed_conversations() if processor.prompt_text(row)]
    batch = processor(rows)
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        own = processor.encode(row, open_answer=True).input_ids
        assert ids[mask.bool()].tolist() == own
        assert mask.tolist() == [0] * (len(ids) - len(own)) + [1] * len(own)
        assert ids[~mask.bool()].unique().tolist() in ([], [processor.tokenizer.pad_token_id])
    placeholders = (batch["input_ids"] == processor.image_token_id).sum()
    assert placeholders == TOKENS * len(batch["pixel_values"])


def test_pixels_stand_in_the_order_of_the_rows() -> None:
    processor = make_processor()
    pictures = [make_picture(seed) for seed in range(3)]
    batch = processor([[user("a", pictures[0])], [user("b")], [user("c", pictures[1], pictures[2])]])
    assert torch.equal(batch["pixel_values"], processor.pixels(pictures))


def test_text_alone_has_no_pixels() -> None:
    assert set(make_processor()([[user("hello")]])) == {"input_ids", "attention_mask"}


def test_a_prompt_is_the_start_of_what_was_trained(processor: MllmProcessor) -> None:
    """The prompt's ids, followed by the answer's, are the ids of training."""
    whole = processor.encode([*conversation(), assistant("the quick brown fox")])
    prompt = processor.encode(conversation(), open_answer=True)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    rest = whole.labels[len(prompt.labels) :]
    assert rest[0] != -100
    assert "the quick brown fox" in processor.tokenizer.decode([token for token in rest if token != -100])


def test_prompt_text_is_what_the_ids_say(processor: MllmProcessor) -> None:
    text = processor.prompt_text(conversation())
    assert text.count("<image>") == 2
    ids = processor.encode(conversation(), open_answer=True).input_ids
    once = [t for i, t in enumerate(ids) if t != processor.image_token_id or ids[i - 1] != t]
    # `plain` renders both pictures side by side only if no text stands between them.
    assert processor.tokenizer.decode(once) == text or text.endswith("<image>")


def test_hugging_faces_way_of_calling_is_the_same() -> None:
    processor = make_processor()
    rows = mixed_conversations()
    images = [part["image"] for row in rows for m in row for part in m["content"] if part["type"] == "image"]
    ours = processor(rows)
    theirs = processor(text=[processor.prompt_text(row) for row in rows], images=images)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    one = processor(text=processor.prompt_text(rows[0]), images=images[0])
    assert all(torch.equal(one[key], processor(rows[:1])[key]) for key in one)


# -- the same everywhere ----------------------------------------------------------------------------


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
def test_a_saved_processor_is_the_same_one(tmp_path: Path, aspect: Any, template: str) -> None:
    model, processor = make_model(template=template, image_aspect_ratio=aspect)
    save(model, processor, tmp_path / "saved")
    loaded = mllm.load(tmp_path / "saved")[1]
    for name in (
        "num_image_tokens",
        "vocab_size",
        "image_aspect_ratio",
        "content_parts",
        "end_token",
        "end_token_ids",
        "image_token_id",
        "chat_template",
    ):
        assert getattr(loaded, name) == getattr(processor, name), name
    for row in mixed_conversations():
        assert loaded.prompt_text(row) == processor.prompt_text(row)
    ours, theirs = processor(mixed_conversations()), loaded(mixed_conversations())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_training_and_evaluation_see_the_same_pixels(tmp_path: Path, aspect: Any) -> None:
    processor = make_processor(image_aspect_ratio=aspect)
    make_picture(3, (70, 30)).save(tmp_path / "a.png")
    from_path, from_image = str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")
    asked = processor([[user("hello", from_path)]])["pixel_values"]
    row = {"id": "a", "messages": [user("hello", from_path), assistant("fox")]}
    trained = Collator(processor)([row])["pixel_values"]  # type: ignore[list-item]
    assert torch.equal(asked, trained)
    assert torch.equal(asked, processor([[user("hello", from_image)]])["pixel_values"])
    assert torch.equal(asked, processor.pixels([from_path]))


def test_every_kind_of_picture_becomes_three_channels() -> None:
    processor = make_processor(image_aspect_ratio="pad")
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        assert processor.pixels([make_picture().convert(mode)]).shape == (1, 3, 32, 32)


# -- padding to a square ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "corner"), [((4, 2), (0, 1)), ((2, 4), (1, 0)), ((5, 2), (0, 1)), ((2, 5), (1, 0))]
)
def test_pad_to_square(size: tuple[int, int], corner: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (9, 8, 7))
    padded = pad_to_square(image, (1, 2, 3))
    assert padded.size == (max(size), max(size))
    assert padded.crop((*corner, corner[0] + size[0], corner[1] + size[1])).tobytes() == image.tobytes()
    assert sum(pixel == (1, 2, 3) for pixel in zip(*[iter(padded.tobytes())] * 3, strict=True)) == (
        max(size) ** 2 - size[0] * size[1]
    )


def test_a_square_is_left_alone() -> None:
    image = make_picture(0, (6, 6))
    assert pad_to_square(image, (0, 0, 0)) is image


def test_the_padding_has_the_mean_colour() -> None:
    assert make_processor().mean_colour == (122, 116, 104)  # CLIP's, as LLaVA rounds it


# -- fitting ----------------------------------------------------------------------------------------


def test_whole_rounds_are_removed_from_the_end() -> None:
    processor = make_processor()
    rounds = [[user(f"question {n}"), assistant(f"answer {n}")] for n in range(4)]
    messages = [message for pair in rounds for message in pair]
    lengths = [len(processor.encode(messages[: 2 * n]).input_ids) for n in range(1, 5)]
    for limit in range(lengths[0], lengths[-1] + 2):
        row = processor.encode_to_fit(messages, limit)
        kept = max(n for n in range(4) if lengths[n] <= limit) + 1
        assert row.input_ids == processor.encode(messages[: 2 * kept]).input_ids
        assert row.dropped_turns == 2 * (4 - kept)
    with pytest.raises(DataError, match=f"needs {lengths[0]} tokens and max_length is {lengths[0] - 1}"):
        processor.encode_to_fit(messages, lengths[0] - 1)
    assert processor.encode_to_fit(messages, None).dropped_turns == 0


def test_pictures_of_removed_rounds_go_with_them() -> None:
    processor = make_processor()
    messages = [user("a", make_picture(0)), assistant("b"), user("c", make_picture(1)), assistant("d")]
    limit = len(processor.encode(messages[:2]).input_ids)
    row = processor.encode_to_fit(messages, limit)
    assert len(row.images) == 1
    assert row.input_ids.count(processor.image_token_id) == TOKENS


# -- mistakes ---------------------------------------------------------------------------------------


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    processor = make_processor(vocab_size=100)
    with pytest.raises(DataError, match=r"has id \d+, but the language model has 100 embeddings") as error:
        processor.encode([user("hello"), assistant("fox")])
    assert "\n" not in str(error.value)


def test_the_placeholder_itself_may_lie_beyond_the_vocabulary() -> None:
    processor = make_processor(vocab_size=len(make_tokenizer()))
    assert processor.image_token_id >= len(make_tokenizer())
    processor.encode([user("hello", make_picture(0)), assistant("fox")])


def test_an_unknown_aspect_ratio_is_refused() -> None:
    with pytest.raises(ConfigError, match="'crop'; use 'square' or 'pad'"):
        make_processor(image_aspect_ratio="crop")


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown template 'vicuna'; use plain, caption, bare"):
        make_processor("vicuna")


@pytest.mark.parametrize(
    ("messages", "open_answer", "problem"),
    [
        ([user("a")], False, "must be an 'assistant' message, found 'user'"),
        ([user("a"), assistant("b")], True, "must be a 'user' message, found 'assistant'"),
    ],
)
def test_the_last_message_must_fit_the_use(messages: list[Message], open_answer: bool, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        make_processor().encode(messages, open_answer=open_answer)


def test_a_user_cannot_add_a_picture_or_end_a_turn_by_typing() -> None:
    processor = make_processor()
    ids = processor.encode([user("say <image> and </s> now", make_picture(0))], open_answer=True).input_ids
    assert ids.count(processor.image_token_id) == TOKENS
    assert processor.tokenizer.eos_token_id not in ids


def test_a_batch_without_a_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="at least one conversation"):
        make_processor()([])
    # `plain` shows the picture only, and this tokenizer writes nothing in front of it.
    with pytest.raises(DataError, match="no tokens"):
        make_processor("plain")([[user("a")]])
