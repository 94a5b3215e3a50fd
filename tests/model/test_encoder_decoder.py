"""T5-like language models: the encoder reads image and prompt, the decoder writes the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    TEXT_CONFIGS,
    make_image_processor,
    make_picture,
    make_tokenizer,
    make_vision,
    mixed_conversations,
)
from runs import TUNINGS, make_world, run_config
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config

import mllm
from mllm.data.collator import Collator
from mllm.data.schema import Row, assistant, user
from mllm.data.tokens import IGNORE
from mllm.decoding import generate
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.checkpoint import save
from mllm.model.language_model import build_language_model
from mllm.training.build import build
from mllm.training.metrics import read_metrics
from mllm.training.train import train

Composed = tuple[MllmForConditionalGeneration, MllmProcessor]
STEPS: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
ROWS: list[Row] = [
    {"id": "0", "messages": [user("hello", make_picture(0)), assistant("the quick fox")]},
    {"id": "1", "messages": [user("a longer question"), assistant("no"), user("why?"), assistant("so")]},
    {"id": "2", "messages": [user("hello", make_picture(1), make_picture(2)), assistant("a")]},
]


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """One that ends every text with `</s>`, as T5's does."""
    tokenizer = make_tokenizer()
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    return tokenizer


def make_t5(feed_forward: str = "gated-gelu", tied: bool = True, **kwargs: Any) -> Composed:
    """A tiny composition; `tied=False` has a head of its own, as every published Flan-T5."""
    torch.manual_seed(0)
    tokenizer = closing_tokenizer()
    config = TEXT_CONFIGS["t5"](len(tokenizer)).to_dict()
    for derived in ("dense_act_fn", "is_gated_act", "scale_decoder_outputs"):
        del config[derived]
    # The first T5 scales hidden states before the head, later ones do not; the configuration tells by this.
    config |= {"feed_forward_proj": feed_forward, "tie_word_embeddings": feed_forward == "relu"}
    text = build_language_model(T5Config(**config))
    with torch.no_grad():
        for parameter in text.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    if not tied:
        text.lm_head.weight = torch.nn.Parameter(torch.randn_like(text.shared.weight))
    return MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision(),
        language_model=text,
        tokenizer=tokenizer,
        image_processor=make_image_processor(),
        **kwargs,
    )


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def composed(request: pytest.FixtureRequest) -> Composed:
    return make_t5(request.param)


def batch_of(processor: MllmProcessor, rows: list[Row]) -> dict[str, Any]:
    batch = Collator(processor)(rows)
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


# -- against T5 itself ------------------------------------------------------------------------------


def test_text_alone_is_what_t5_computes(composed: Composed) -> None:
    model, processor = composed
    batch = batch_of(processor, [ROWS[1], {"id": "x", "messages": [user("fox"), assistant("the brown fox")]}])
    with torch.no_grad():
        ours, theirs = model(**batch), model.language_model(**batch)
    assert theirs.logits.std() > 1e-2
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.loss, theirs.loss)
    # Over several micro-batches, the Trainer says how many labels there are.
    halved = model(**batch, num_items_in_batch=2 * int((batch["labels"] != IGNORE).sum())).loss
    torch.testing.assert_close(2 * halved, theirs.loss)
    prompt = processor([[user("hello world")], [user("the quick brown fox")]])
    settings = {**STEPS, "suppress_tokens": None}
    theirs_new = model.language_model.generate(**prompt, **settings)
    assert torch.equal(model.generate(**prompt, **settings), theirs_new)


def test_images_go_into_the_encoder(composed: Composed) -> None:
    """Greedy tokens and scores are those of T5 given the same embeddings by hand."""
    model, processor = composed
    batch = processor(mixed_conversations())
    with torch.no_grad():
        soft = model.connector(
            model.vision_encoder(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        )
        is_image = batch["input_ids"] == processor.image_token_id
        embeds = model.language_model.shared(batch["input_ids"].masked_fill(is_image, 0))
        for (row, column), token in zip(is_image.nonzero().tolist(), soft.flatten(0, 1), strict=True):
            embeds[row, column] = token
    scores: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    want = model.language_model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], **STEPS, **scores
    )
    found = model.generate(**batch, **STEPS, **scores)
    assert torch.equal(found.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)
    assert torch.equal(generate(model, batch, max_new_tokens=5, min_new_tokens=5), want.sequences[:, 1:])


# -- training ---------------------------------------------------------------------------------------


def test_it_learns_an_answer_and_ends_it() -> None:
    model, processor = make_t5()
    batch = batch_of(processor, ROWS[:1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    missing = [name for name, p in model.connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert loss < 1e-2
    tokens = generate(model, processor([ROWS[0]["messages"][:-1]]), max_new_tokens=20)[0]
    assert tokens.tolist() == batch["labels"][0].tolist()
    assert tokens[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(tokens, skip_special_tokens=True) == "the quick fox"


def test_a_training_batch_is_its_rows_one_by_one(composed: Composed) -> None:
    model, processor = composed
    batch = batch_of(processor, ROWS)
    assert len(batch["labels"]) == 4  # the second row has two answers
    with torch.no_grad():
        together, losses = model(**batch), []
        for row in ROWS:
            alone = batch_of(processor, [row])
            losses += [model(**alone).loss * (alone["labels"] != IGNORE).sum()]
        torch.testing.assert_close(together.loss * (batch["labels"] != IGNORE).sum(), sum(losses))


def test_a_batch_of_text_alone_reaches_the_connector_in_training(composed: Composed) -> None:
    model, processor = composed
    model.train()
    model(**batch_of(processor, [ROWS[1]])).loss.backward()
    assert all(p.grad is not None for p in model.connector.parameters())
    model.zero_grad()
    model.eval()


def test_a_stage_of_training(tmp_path: Path) -> None:
    """Through recipe, Trainer and checkpoint; accumulation does not change the loss of a step."""
    world = make_world(tmp_path / "world", text="t5")
    losses = []
    for size in (8, 2):
        config = run_config(
            world,
            tmp_path / f"run{size}",
            TUNINGS["connector"],
            per_device_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=2,
        )
        output = train(config)
        losses.append([line["loss"] for line in read_metrics(output) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    before = dict(build(config.model)[0].named_parameters())
    after = dict(mllm.load(output)[0].named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("connector.")}


# -- generation -------------------------------------------------------------------------------------


def test_cache_batch_and_padding_change_nothing(composed: Composed) -> None:
    model, processor = composed
    conversations = mixed_conversations()
    batch = processor(conversations)
    assert batch["attention_mask"][:, 0].all()  # an encoder's batch is padded on the right
    tokens = model.generate(**batch, **STEPS)
    assert torch.equal(tokens, model.generate(**batch, **STEPS, use_cache=False))
    for row, conversation in enumerate(conversations):
        assert torch.equal(model.generate(**processor([conversation]), **STEPS)[0], tokens[row])
    lengths = batch["attention_mask"].sum(1).tolist()
    left = dict(batch)
    for name in ("input_ids", "attention_mask"):
        rows = zip(batch[name], lengths, strict=True)
        left[name] = torch.stack([row.roll(len(row) - length) for row, length in rows])
    assert torch.equal(model.generate(**left, **STEPS), tokens)


@pytest.mark.parametrize("decode", ["greedy", "sample,temperature=0.7", "vcd", "vcd,do_sample=true"])
def test_every_decoder_works(composed: Composed, decode: str) -> None:
    model, processor = composed
    batch = processor(mixed_conversations())
    first = generate(model, batch, decode, max_new_tokens=5, min_new_tokens=5, seed=1)
    assert first.shape == (4, 5)
    again = generate(model, batch, decode, max_new_tokens=5, min_new_tokens=5, seed=1, use_cache=False)
    assert torch.equal(first, again)


def test_beams_are_those_of_t5(composed: Composed) -> None:
    model, processor = composed
    batch = processor(mixed_conversations())
    with torch.no_grad():
        embeds, _ = model.embed(batch["input_ids"], batch["pixel_values"])
    beams = {"num_beams": 3, "max_new_tokens": 5}
    want = model.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        generation_config=model.generation_config,
        **beams,
    )
    assert torch.equal(model.generate(**batch, **beams), want)


def test_pictures_and_words_both_matter(composed: Composed) -> None:
    model, processor = composed

    def first(text: str, seed: int) -> torch.Tensor:
        with torch.no_grad():
            return model(**processor([[user(text, make_picture(seed))]])).logits[0, -1]

    assert (first("hello", 0) - first("hello", 1)).abs().max() > 1e-3
    assert (first("hello", 0) - first("world", 0)).abs().max() > 1e-3


def test_a_prompt_of_nothing_but_an_image() -> None:
    model, processor = make_t5(template="caption")
    prompt = processor([[user("ignored", make_picture(0))]])
    image, end = processor.image_token_id, processor.tokenizer.eos_token_id
    assert prompt["input_ids"].tolist() == [[image] * model.config.num_image_tokens + [end]]
    assert generate(model, prompt, max_new_tokens=3, min_new_tokens=3).shape == (1, 3)


# -- saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_model(tied: bool, tmp_path: Path) -> None:
    model, processor = make_t5(tied=tied)
    save(model, processor, tmp_path / "saved")
    loaded, loaded_processor = mllm.load(tmp_path / "saved")
    assert loaded_processor.encoder_decoder
    batch, again = batch_of(processor, ROWS), batch_of(loaded_processor, ROWS)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**again).logits)
    language = loaded.language_model
    assert (language.lm_head.weight is language.shared.weight) == tied
    prompt = processor(mixed_conversations())
    assert torch.equal(generate(model, prompt), generate(loaded, loaded_processor(mixed_conversations())))
