"""Prefix attention: the prompt sees itself whole, answers are causal, in training as in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    IMAGE_SIZE,
    TEXT_CONFIGS,
    make_image_processor,
    make_model,
    make_picture,
    make_tokenizer,
    mixed_conversations,
)
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from mllm.data.collator import Collator
from mllm.data.schema import Row, assistant, user
from mllm.data.tokens import IGNORE
from mllm.decoding import generate
from mllm.errors import ConfigError
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.language_model import build_language_model
from mllm.model.vision_encoder import build_vision_encoder

CAUSAL = [name for name in TEXT_CONFIGS if name != "t5"]
Composed = tuple[MllmForConditionalGeneration, MllmProcessor]
ROWS: list[Row] = [
    {"id": "0", "messages": [user("hello", make_picture(0)), assistant("the quick fox")]},
    {"id": "1", "messages": [user("a longer question"), assistant("no"), user("why?"), assistant("so")]},
    {"id": "2", "messages": [user("hello", make_picture(1), make_picture(2)), assistant("a")]},
]


@pytest.fixture(scope="module", params=CAUSAL)
def composed(request: pytest.FixtureRequest) -> Composed:
    return make_model(text=request.param, attention="prefix")


def batch_of(processor: MllmProcessor, rows: list[Row]) -> dict[str, Any]:
    batch = Collator(processor)(rows)
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def logits(model: MllmForConditionalGeneration, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).logits


def test_what_sees_what(composed: Composed) -> None:
    """Changing token j changes exactly the logits that may look at it."""
    model, processor = composed
    batch = batch_of(processor, ROWS[:1])
    before = logits(model, batch)
    length = before.shape[1]
    answer = int((batch["labels"][0] != IGNORE).nonzero()[0])
    text = int((batch["input_ids"][0] == processor.image_token_id).nonzero()[-1]) + 1
    for changed in (0, text, answer - 1, answer, length - 1):
        other = dict(batch, input_ids=batch["input_ids"].clone())
        other["input_ids"][0, changed] = (batch["input_ids"][0, changed] + 7) % 200 + 3
        moved = (logits(model, other) - before).abs().amax(-1)[0] > 1e-6  # [S]
        expected = torch.arange(length) >= (0 if changed < answer else changed)
        assert torch.equal(moved, expected), changed


def test_a_training_batch_is_its_rows_one_by_one(composed: Composed) -> None:
    model, processor = composed
    batch = batch_of(processor, ROWS)
    together = logits(model, batch)
    for i, row in enumerate(ROWS):
        alone = logits(model, batch_of(processor, [row]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_training_and_generation_see_the_same_prompt(composed: Composed) -> None:
    model, processor = composed
    for row in (ROWS[0], ROWS[2]):
        batch = batch_of(processor, [row])
        answer = int((batch["labels"][0] != IGNORE).nonzero()[0])
        prompt = processor([row["messages"][:-1]])
        assert prompt["input_ids"].tolist() == batch["input_ids"][:, :answer].tolist()
        torch.testing.assert_close(
            logits(model, prompt)[0], logits(model, batch)[0, :answer], atol=1e-4, rtol=1e-4
        )


def test_cached_generation_is_uncached_generation(composed: Composed) -> None:
    model, processor = composed
    batch = processor(mixed_conversations())  # left-padded
    steps: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    scores: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**batch, **steps, **scores)
    uncached = model.generate(**batch, **steps, **scores, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)
    for row, conversation in enumerate(mixed_conversations()):
        single = model.generate(**processor([conversation]), **steps)[0, -5:]
        assert torch.equal(single, cached.sequences[row, -5:])
    for decode in ("greedy", "vcd"):
        assert torch.equal(
            generate(model, batch, decode, max_new_tokens=5),
            generate(model, batch, decode, max_new_tokens=5, use_cache=False),
        )


@pytest.mark.parametrize("text", ["llama", "opt"])
def test_no_mask_is_a_mask_of_ones(text: str) -> None:
    model, processor = make_model(text=text, attention="prefix")
    batch = dict(processor([mixed_conversations()[0]]))
    want = logits(model, batch)
    assert torch.equal(batch.pop("attention_mask"), torch.ones_like(batch["input_ids"]))
    assert torch.equal(logits(model, batch), want)


def test_eager_attention_computes_the_same() -> None:
    model, processor = make_model(attention="prefix")
    batch = batch_of(processor, ROWS)
    real = batch["attention_mask"].bool()
    before = logits(model, batch)
    model.language_model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, batch)[real], before[real], atol=1e-4, rtol=1e-4)


def test_without_it_the_prompt_is_causal() -> None:
    prefix, processor = make_model(attention="prefix")
    causal, _ = make_model()
    batch = processor([mixed_conversations()[0]])
    assert (logits(prefix, batch)[:, 0] - logits(causal, batch)[:, 0]).abs().max() > 1e-3
    assert (prefix.config.prefix_attention, causal.config.prefix_attention) == (True, False)


# -- PaliGemma --------------------------------------------------------------------------------------


def test_paligemma_computes_the_same() -> None:
    tokenizer = make_tokenizer()
    text = GemmaConfig(
        vocab_size=len(tokenizer) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=32,
        vision_use_head=False,
    )
    model, processor = MllmForConditionalGeneration.from_components(
        vision_encoder=build_vision_encoder(vision),
        language_model=build_language_model(text),
        connector="linear",
        tokenizer=tokenizer,
        image_processor=make_image_processor(),
        vision_feature_layer="last",
        attention="prefix",
    )
    config = PaliGemmaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        projection_dim=32,
        image_token_index=processor.image_token_id,
    )
    pali = PaliGemmaForConditionalGeneration(config).eval()
    pali.model.vision_tower.load_state_dict(model.vision_encoder.state_dict())
    pali.model.language_model.load_state_dict(model.language_model.model.state_dict())
    pali.tie_weights()
    ours = dict(model.connector.named_parameters())
    assert len(ours) == 2
    with torch.no_grad():
        for name, parameter in pali.model.multi_modal_projector.linear.named_parameters():
            parameter.copy_(next(p for key, p in ours.items() if key.endswith(name)))

    batch = batch_of(processor, [ROWS[0], ROWS[2]])
    real = batch["attention_mask"].bool()
    types = ((batch["labels"] != IGNORE).cumsum(-1) > 0).long()
    labels = batch.pop("labels")
    with torch.no_grad():
        want = pali(**batch, token_type_ids=types)
        found = model(**batch, labels=labels)
    assert want.logits.std() > 1e-2
    assert (want.logits - found.logits)[real].abs().max() <= 1e-5

    prompt = processor(mixed_conversations()[:1])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": None}
    assert torch.equal(
        model.generate(**prompt, **settings),
        pali.generate(**prompt, token_type_ids=torch.zeros_like(prompt["input_ids"]), **settings),
    )


# -- what is refused --------------------------------------------------------------------------------


def test_what_takes_no_such_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="'both'; use 'causal' or 'prefix'"):
        make_model(attention="both")
    with pytest.raises(ConfigError, match="needs a causal language model, found 't5'"):
        make_model(text="t5", attention="prefix")
    model, processor = make_model(attention="prefix")
    prompt = processor(mixed_conversations())
    with pytest.raises(ConfigError, match="static cache"):
        model.generate(**prompt, max_new_tokens=2, cache_implementation="static")
    model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"'flash_attention_2'.*use attn_implementation 'sdpa'"):
        model(**prompt)
