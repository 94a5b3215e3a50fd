"""AnyRes from pictures to text: equal to transformers' LLaVA-NeXT, and sound on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    make_image_processor,
    make_language_model,
    make_model,
    make_picture,
    make_tokenizer,
    make_vision,
    mixed_conversations,
    save_parts,
)
from llava_names import our_name
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import mllm
from mllm.config import ModelSection
from mllm.data.collator import Collator
from mllm.data.schema import Message, Row, assistant, user
from mllm.decoding import generate
from mllm.errors import ConfigError, DataError
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.checkpoint import save
from mllm.training.build import build, build_processor

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
POINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
# (width, height): fitting several pinpoints, tall, wide, square, a tile, one pixel high or wide.
SIZES = [(37, 100), (100, 37), (333, 111), (111, 333), (20, 90), (90, 90), (32, 32), (70, 1), (1, 70), (9, 9)]
Pair = tuple[
    MllmForConditionalGeneration, MllmProcessor, LlavaNextForConditionalGeneration, LlavaNextProcessor
]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Ours in transformers' reading, and transformers' LLaVA-NeXT with ours' weights."""
    torch.manual_seed(0)
    model, processor = MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision("clip"),
        language_model=make_language_model("llama", vocab_size=320, scale=2.0),
        connector={"type": "mlp"},
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
        tiling={"type": "anyres", "pinpoints": POINTS, "order": "hf"},
    )
    theirs = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=model.config.vision_config,
            text_config=model.config.text_config,
            image_token_index=processor.image_token_id,
            image_grid_pinpoints=POINTS,
            projector_hidden_act="gelu",
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        )
    ).eval()
    ours = model.state_dict()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.copy_(ours[our_name(name)])
    assert len(theirs.state_dict()) == len(ours)
    theirs.generation_config = model.generation_config
    clip = make_image_processor()
    their_processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size=clip.size, crop_size=clip.crop_size, image_grid_pinpoints=POINTS),
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor, theirs, their_processor


def odd_conversations() -> list[list[Message]]:
    """Rows of every size above, with several images, with one, and with none."""
    pictures = [make_picture(seed, size) for seed, size in enumerate(SIZES)]
    return [
        [user("hello", *pictures[:3])],
        [user("the quick brown fox")],
        [user("compare", *pictures[3:5]), assistant("yes"), user("why?", pictures[5])],
        *[[user("a", picture)] for picture in pictures[6:]],
    ]


def training_rows() -> list[Row]:
    return [
        {"id": "a", "messages": [user("hello", make_picture(0, (37, 100))), assistant("the quick brown")]},
        {"id": "b", "messages": [user("hello"), assistant("world"), user("why"), assistant("fox")]},
        {
            "id": "c",
            "messages": [user("a", make_picture(1, (80, 9)), make_picture(2, (50, 60))), assistant("no")],
        },
    ]


def tensors_of(batch: Any) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


# -- parity -----------------------------------------------------------------------------------------


def test_same_ids_and_pixels(pair: Pair) -> None:
    _, processor, _, theirs = pair
    theirs.tokenizer.padding_side = "left"
    conversations = odd_conversations()
    ours = processor(conversations)
    images = [p["image"] for c in conversations for m in c for p in m["content"] if p["type"] == "image"]
    batch = theirs(
        text=[processor.prompt_text(conversation) for conversation in conversations],
        images=images,
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(ours["input_ids"], batch["input_ids"])
    assert torch.equal(ours["attention_mask"], batch["attention_mask"])
    assert torch.equal(ours["image_sizes"], batch["image_sizes"])
    counts = [processor.tiles.num_tiles(size) for size in ours["image_sizes"].tolist()]
    assert len(set(counts)) > 2
    for mine, other in zip(ours["pixel_values"].split(counts), batch["pixel_values"], strict=True):
        assert torch.equal(mine, other[: len(mine)])
        assert not other[len(mine) :].any()


def test_same_logits(pair: Pair) -> None:
    model, processor, theirs, _ = pair
    for rows in ([odd_conversations()[0]], odd_conversations()):
        batch = processor(rows)
        with torch.no_grad():
            mine, other = model(**batch).logits, theirs(**batch).logits
        seen = batch["attention_mask"].bool()
        assert mine[seen].std() > 0.1
        torch.testing.assert_close(mine[seen], other[seen], **TOLERANCE)


def test_same_loss_and_gradients(pair: Pair) -> None:
    model, processor, theirs, _ = pair
    batch = tensors_of(Collator(processor)(training_rows()))
    model.zero_grad()
    theirs.zero_grad()
    mine, other = model(**batch).loss, theirs(**batch).loss
    torch.testing.assert_close(mine, other, **TOLERANCE)
    mine.backward()
    other.backward()
    parameters = dict(model.named_parameters())
    assert parameters["connector.image_newline"].grad.abs().max() > 1e-6
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert parameters[our_name(name)].grad is None, name
        else:
            torch.testing.assert_close(parameters[our_name(name)].grad, parameter.grad, **TOLERANCE)


def test_same_text(pair: Pair) -> None:
    model, processor, theirs, _ = pair
    batch = processor(odd_conversations())
    mine = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(mine, theirs.generate(**batch, max_new_tokens=12, do_sample=False))
    assert len({tuple(row) for row in mine[:, batch["input_ids"].shape[1] :].tolist()}) > 1


# -- on its own -------------------------------------------------------------------------------------


def make_tiled(**kwargs: Any) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    return make_model(tiling={"type": "anyres"}, **kwargs)


@pytest.fixture(scope="module")
def tiled() -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    return make_tiled()


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_batch_and_cache(vision: str) -> None:
    model, processor = make_tiled(vision=vision)
    conversations = odd_conversations()
    batch = processor(conversations)
    cached = generate(model, batch, "greedy", max_new_tokens=6)
    assert torch.equal(cached, generate(model, batch, "greedy", max_new_tokens=6, use_cache=False))
    for row, messages in zip(cached, conversations, strict=True):
        single = generate(model, processor([messages]), "greedy", max_new_tokens=6)[0]
        assert torch.equal(row[: len(single)], single)


def test_vcd(tiled: Any) -> None:
    model, processor = tiled
    batch = processor(odd_conversations())
    greedy = generate(model, batch, "greedy", max_new_tokens=6)
    assert torch.equal(generate(model, batch, "vcd,alpha=0", max_new_tokens=6), greedy)
    contrasted = generate(model, batch, "vcd", max_new_tokens=6)
    assert not torch.equal(contrasted, greedy)
    for row, messages in zip(contrasted, odd_conversations(), strict=True):
        single = generate(model, processor([messages]), "vcd", max_new_tokens=6)[0]
        assert torch.equal(row[: len(single)], single)


@pytest.mark.parametrize("tiling", [{"type": "anyres"}, None])
def test_beams_see_the_pictures_of_their_row(tiling: Any) -> None:
    """Transformers repeats every picture by itself, which mixes up those of a row with several."""
    model, processor = make_model(tiling=tiling)
    batch = processor(odd_conversations())
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 6}
    with torch.no_grad():
        embeds, _ = model.embed(**{key: value for key, value in batch.items() if key != "attention_mask"})
    seen = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
    assert torch.equal(model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :], seen)


def test_all_of_a_picture_is_seen(tiled: Any) -> None:
    """A change in the last tile alone changes the answer's logits."""
    model, processor = tiled
    batch = processor([[user("hello", make_picture(0, (90, 90)))]])
    other = {key: value.clone() for key, value in batch.items()}
    other["pixel_values"][-1] = 0
    with torch.no_grad():
        assert (model(**batch).logits[0, -1] - model(**other).logits[0, -1]).abs().max() > 1e-3


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, processor = make_model(tiling={"type": "anyres", "pinpoints": POINTS[::-1], "order": "hf"})
    save(model, processor, tmp_path / "saved")
    loaded, loaded_processor = mllm.load(tmp_path / "saved")
    assert loaded_processor.tiles == processor.tiles == loaded.tiling == model.tiling
    assert torch.equal(loaded.connector.image_newline, model.connector.image_newline)
    batch, again = processor(odd_conversations()), loaded_processor(odd_conversations())
    assert batch.keys() == again.keys() == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**again).logits)


def test_without_tiling_there_is_no_newline() -> None:
    model, processor = make_model()
    assert not any("newline" in name for name in model.state_dict())
    assert "image_sizes" not in processor(mixed_conversations())


def test_text_alone_reaches_every_part(tiled: Any) -> None:
    """Or a rank without images waits for ever; the gradients are there, and zero."""
    model, processor = tiled
    model.zero_grad()
    batch = tensors_of(Collator(processor)(training_rows()[1:2]))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    plain = model(**batch).loss
    model.train()
    try:
        loss = model(**batch).loss
        loss.backward()
    finally:
        model.eval()
    torch.testing.assert_close(loss, plain)
    for name, parameter in model.connector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_training_batches(tiled: Any, tmp_path: Path) -> None:
    model, processor = tiled
    rows = training_rows()
    make_picture(0, (37, 100)).save(tmp_path / "a.jpg", exif=rotated())
    upright: Row = {"id": "d", "messages": [user("x", str(tmp_path / "a.jpg")), assistant("y")]}
    batch = Collator(processor)([*rows, upright])
    assert batch["image_sizes"].tolist() == [[100, 37], [9, 80], [60, 50], [37, 100]]
    counts = [processor.tiles.num_tokens(size) for size in batch["image_sizes"].tolist()]
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [counts[0], 0, counts[1] + counts[2], counts[3]]
    with torch.no_grad():
        assert model(**tensors_of(batch)).loss.isfinite()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_rows_are_cut_by_their_real_length(tiled: Any) -> None:
    _, processor = tiled
    messages = [user("a", make_picture(0, (64, 64))), assistant("b")] * 2
    one, two = (len(processor.encode(messages[:n]).input_ids) for n in (2, 4))
    assert one > processor.tiles.num_tokens((64, 64)) == 16 + 8 * 9
    assert Collator(processor, two)([{"id": "r", "messages": messages}])["dropped_turns"] == 0
    short = Collator(processor, two - 1)([{"id": "r", "messages": messages}])
    assert short["input_ids"].shape == (1, one)
    assert len(short["image_sizes"]) == 1
    with pytest.raises(DataError, match=f"first round needs {one} tokens"):
        Collator(processor, one - 1)([{"id": "r", "messages": messages}])


def test_hugging_faces_way_of_calling(tiled: Any) -> None:
    _, processor = tiled
    rows = odd_conversations()
    images = [p["image"] for row in rows for m in row for p in m["content"] if p["type"] == "image"]
    ours = processor(rows)
    theirs = processor(text=[processor.prompt_text(row) for row in rows], images=images)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(DataError, match="10 image markers for 9 images"):
        processor(text=[processor.prompt_text(row) for row in rows], images=images[1:])


# -- recipes ----------------------------------------------------------------------------------------


def test_a_second_stage_may_begin_to_tile(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    model, processor = build(ModelSection(**parts))
    save(model, processor, tmp_path / "stage1")
    section = ModelSection(init_from=str(tmp_path / "stage1"), tiling={"type": "anyres"})
    model, processor = build(section)
    assert isinstance(model.connector.image_newline, torch.nn.Parameter)
    assert model.tiling == processor.tiles == build_processor(section).tiles is not None
    save(model, processor, tmp_path / "stage2")
    loaded, loaded_processor = build(ModelSection(init_from=str(tmp_path / "stage2")))
    batch = loaded_processor(odd_conversations())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    # From the start gives the same model but for the newline's random values.
    direct, _ = build(ModelSection(**parts, tiling={"type": "anyres"}))
    assert direct.state_dict().keys() == loaded.state_dict().keys()


# -- mistakes ---------------------------------------------------------------------------------------


def test_mistakes_are_told(tiled: Any) -> None:
    model, processor = tiled
    batch = processor([[user("hello", make_picture(0, (90, 90)))]])
    sizes = batch.pop("image_sizes")
    with pytest.raises(ValueError, match="give image_sizes"):
        model(**batch)
    with pytest.raises(ValueError, match=r"5 tiles where image_sizes \[\[9, 9\]\] need 3"):
        model(**batch, image_sizes=sizes * 0 + 9)
    batch["input_ids"] = torch.cat([batch["input_ids"], batch["input_ids"][:, :1] * 0], dim=1)
    batch["input_ids"][0, -1] = processor.image_token_id
    batch.pop("attention_mask")
    with pytest.raises(ValueError, match="89 image placeholders for 1 images with 88 tokens"):
        model(**batch, image_sizes=sizes)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"vision_feature_select": "full"}, "17 tokens each; both must be square"),
        ({"tiling": {"type": "anyres", "pinpoints": [[40, 32]]}}, r"pinpoint \[40, 32\]"),
    ],
)
def test_what_cannot_be_tiled_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_model(**{"tiling": {"type": "anyres"}, **settings})


def test_padding_to_a_square_is_refused() -> None:
    _, processor = make_tiled(image_aspect_ratio="pad")
    with pytest.raises(ConfigError, match="leave image_aspect_ratio out"):
        processor(odd_conversations())
