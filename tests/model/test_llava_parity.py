"""The same weights in transformers' own LLaVA give the same ids, pixels, logits, loss, gradients and text."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    IMAGE_SIZE,
    make_image_processor,
    make_language_model,
    make_picture,
    make_tokenizer,
    make_vision,
    mixed_conversations,
)
from llava_names import our_name
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mllm.data.collator import Collator
from mllm.data.schema import assistant, user
from mllm.model import MllmForConditionalGeneration, MllmProcessor

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = [(50, 40), (40, 50), (33, 80), (80, 33), (32, 32), (31, 64), (7, 90)]
Pair = tuple[MllmForConditionalGeneration, MllmProcessor, LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module", params=[-2, -1], ids=["layer-2", "layer-1"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Ours, and transformers' LLaVA with ours' weights; its placeholder must lie inside the vocabulary."""
    torch.manual_seed(0)
    model, processor = MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision("clip"),
        # Unscaled weights: logits stay of order one, where 1e-5 is a tight bound in float32.
        language_model=make_language_model("llama", vocab_size=320, scale=2.0),
        connector={"type": "mlp"},
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
        vision_feature_layer=request.param,
    )
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=model.config.vision_config,
            text_config=model.config.text_config,
            image_token_index=processor.image_token_id,
            projector_hidden_act="gelu",
            vision_feature_select_strategy="default",
            vision_feature_layer=request.param,
        )
    ).eval()
    ours = model.state_dict()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.copy_(ours[our_name(name)])
    theirs.generation_config = model.generation_config
    their_processor = LlavaProcessor(
        make_image_processor(),
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor, theirs, their_processor


def training_batch(processor: MllmProcessor) -> dict[str, Any]:
    rows = [
        {"id": "a", "messages": [user("hello", make_picture(0)), assistant("the quick brown fox")]},
        {"id": "b", "messages": [user("hello"), assistant("world"), user("why"), assistant("fox")]},
        {"id": "c", "messages": [user("a", make_picture(1), make_picture(2)), assistant("no")]},
    ]
    batch = Collator(processor)(rows)
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def test_same_ids(pair: Pair) -> None:
    _, processor, _, theirs = pair
    conversations = mixed_conversations()
    theirs.tokenizer.padding_side = "left"
    ours = processor(conversations)
    images = [[p["image"] for m in c for p in m["content"] if p["type"] == "image"] for c in conversations]
    batch = theirs(
        text=[processor.prompt_text(conversation) for conversation in conversations],
        images=[image for row in images for image in row],
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(ours["input_ids"], batch["input_ids"])
    assert torch.equal(ours["attention_mask"], batch["attention_mask"])
    assert torch.equal(ours["pixel_values"], batch["pixel_values"])


def test_same_logits(pair: Pair) -> None:
    model, processor, theirs, _ = pair
    batch = processor(mixed_conversations())
    with torch.no_grad():
        mine, other = model(**batch).logits, theirs(**batch).logits
        single = processor(mixed_conversations()[:1])
        torch.testing.assert_close(model(**single).logits, theirs(**single).logits, **TOLERANCE)
    seen = batch["attention_mask"].bool()
    assert mine[seen].std() > 0.1
    torch.testing.assert_close(mine[seen], other[seen], **TOLERANCE)


def test_same_loss_and_gradients(pair: Pair) -> None:
    model, processor, theirs, _ = pair
    batch = training_batch(processor)
    model.zero_grad()
    theirs.zero_grad()
    mine, other = model(**batch).loss, theirs(**batch).loss
    torch.testing.assert_close(mine, other, **TOLERANCE)
    mine.backward()
    other.backward()
    parameters = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert parameters[our_name(name)].grad is None, name
        else:
            torch.testing.assert_close(parameters[our_name(name)].grad, parameter.grad, **TOLERANCE)


def test_same_loss_when_normalised_by_a_given_count(pair: Pair) -> None:
    model, processor, theirs, _ = pair
    batch = training_batch(processor)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch, num_items_in_batch=77).loss,
            theirs(**batch, num_items_in_batch=77).loss,
            **TOLERANCE,
        )
        count = int((batch["labels"][:, 1:] != -100).sum())
        torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss, model(**batch).loss)


def test_same_text(pair: Pair) -> None:
    model, processor, theirs, _ = pair
    batch = processor(mixed_conversations())
    mine = model.generate(**batch, max_new_tokens=12, do_sample=False)
    other = theirs.generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(mine, other)
    new = mine[:, batch["input_ids"].shape[1] :]
    assert len({tuple(row) for row in new.tolist()}) > 1
    assert processor.tokenizer.batch_decode(new) == processor.tokenizer.batch_decode(
        other[:, batch["input_ids"].shape[1] :]
    )


# -- pixels -----------------------------------------------------------------------------------------


def pixels_of(processor: MllmProcessor, aspect: Any, size: tuple[int, int]) -> torch.Tensor:
    processor.image_aspect_ratio = aspect
    try:
        return processor.pixels([make_picture(5, size)])
    finally:
        processor.image_aspect_ratio = "square"


def expand_by_hand(image: Image.Image, mean: list[float]) -> Image.Image:
    """LLaVA-1.5's padding, written anew on arrays."""
    array = np.asarray(image)
    height, width = array.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(value * 255) for value in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = array
    return Image.fromarray(square)


@pytest.mark.parametrize("size", SIZES)
def test_square_is_clips_own_preprocessing(pair: Pair, size: tuple[int, int]) -> None:
    _, processor, _, theirs = pair
    ours = pixels_of(processor, "square", size)
    reference = theirs.image_processor(images=[make_picture(5, size)], return_tensors="pt")["pixel_values"]
    assert ours.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("size", SIZES)
def test_pad_is_llavas_padding(pair: Pair, size: tuple[int, int]) -> None:
    _, processor, _, _ = pair
    ours = pixels_of(processor, "pad", size)
    clip = make_image_processor()
    expanded = expand_by_hand(make_picture(5, size), clip.image_mean)
    assert torch.equal(ours, clip(images=[expanded], return_tensors="pt")["pixel_values"])
    llava = LlavaImageProcessorPil(size=clip.size, crop_size=clip.crop_size, do_pad=True)
    assert torch.equal(ours, llava(images=[make_picture(5, size)], return_tensors="pt")["pixel_values"])
    if size[0] != size[1]:
        assert not torch.equal(ours, pixels_of(processor, "square", size))
