"""Every vision encoder x connector x language model: cache, batches, saving; and how features are chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    TEXT_CONFIGS,
    VISION_CONFIGS,
    make_image_processor,
    make_language_model,
    make_model,
    make_picture,
    make_tokenizer,
    make_vision,
    mixed_conversations,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm
from mllm.data.schema import user
from mllm.errors import ConfigError
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.checkpoint import save
from mllm.model.connectors import CONNECTORS
from mllm.model.vision_encoder import patch_features

STEPS = 5
CAUSAL = [name for name in TEXT_CONFIGS if name != "t5"]
# Every encoder with every language model over one connector, and every connector with two of each.
CASES = [(v, c, t) for v in VISION_CONFIGS for c in ("linear", "mlp") for t in CAUSAL]
CASES += [(v, c, t) for v, t in (("clip", "llama"), ("siglip", "opt")) for c in list(CONNECTORS)[2:]]
Composed = tuple[MllmForConditionalGeneration, MllmProcessor]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def composed(request: pytest.FixtureRequest) -> Composed:
    return make_model(*request.param)


def greedy(
    model: MllmForConditionalGeneration, batch: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [B, T] and the logits [B, T, V] behind them; never stops early."""
    output = model.generate(
        **batch,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, dim=1)


def logits_of(model: MllmForConditionalGeneration, processor: MllmProcessor) -> torch.Tensor:
    with torch.no_grad():
        return model(**processor(mixed_conversations())).logits


# -- the matrix -------------------------------------------------------------------------------------


def test_the_matrix_is_the_one_promised() -> None:
    assert (len(CASES), len(CONNECTORS)) == (36 + 14, 9)


def test_cached_generation_is_uncached_generation(composed: Composed) -> None:
    model, processor = composed
    batch = processor(mixed_conversations())
    tokens, logits = greedy(model, batch)
    again, again_logits = greedy(model, batch, use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, again_logits, atol=1e-4, rtol=1e-5)


def test_a_batch_is_its_rows_one_by_one(composed: Composed) -> None:
    model, processor = composed
    conversations = mixed_conversations()
    tokens, logits = greedy(model, processor(conversations))
    for row, conversation in enumerate(conversations):
        single, single_logits = greedy(model, processor([conversation]))
        assert torch.equal(single[0], tokens[row]), row
        torch.testing.assert_close(single_logits[0], logits[row], atol=1e-4, rtol=1e-5)


def test_a_saved_model_is_the_same_model(composed: Composed, tmp_path: Path) -> None:
    model, processor = composed
    save(model, processor, tmp_path / "saved")
    loaded, loaded_processor = mllm.load(tmp_path / "saved")
    assert torch.equal(logits_of(model, processor), logits_of(loaded, loaded_processor))
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_pictures_and_words_both_matter(composed: Composed) -> None:
    """Without this, a model that ignores its input would pass everything above."""
    model, processor = composed

    def last(text: str, seed: int) -> torch.Tensor:
        with torch.no_grad():
            return model(**processor([[user(text, make_picture(seed))]])).logits[0, -1]

    assert (last("hello", 0) - last("hello", 1)).abs().max() > 1e-3
    assert (last("hello", 0) - last("world", 0)).abs().max() > 1e-3


# -- the ways of loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [MllmForConditionalGeneration, AutoModelForImageTextToText])
def test_hugging_face_ways_of_loading(factory: Any, tmp_path: Path) -> None:
    model, processor = make_model()
    model.save_pretrained(tmp_path / "hub")  # Hugging Face's own layout, without a manifest
    save(model, processor, tmp_path / "ours")
    loaded_processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(loaded_processor, MllmProcessor)
    want = logits_of(model, processor)
    for folder in ("hub", "ours"):
        loaded = factory.from_pretrained(tmp_path / folder)
        assert type(loaded) is MllmForConditionalGeneration
        assert not loaded.training
        assert torch.equal(want, logits_of(loaded, loaded_processor)), folder


def test_generation_settings_survive(tmp_path: Path) -> None:
    model, processor = make_model()
    save(model, processor, tmp_path / "saved")
    loaded, loaded_processor = mllm.load(tmp_path / "saved")
    assert loaded.generation_config.eos_token_id == processor.end_token_ids == loaded_processor.end_token_ids
    assert loaded.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    batch, loaded_batch = processor(mixed_conversations()), loaded_processor(mixed_conversations())
    assert {key: value.tolist() for key, value in batch.items()} == {
        key: value.tolist() for key, value in loaded_batch.items()
    }
    assert torch.equal(greedy(model, batch)[0], greedy(loaded, loaded_batch)[0])


# -- features ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "prefix"), [("clip", 1), ("dinov2", 1), ("siglip", 0)])
def test_the_class_token_goes_only_where_there_is_one(vision: str, prefix: int) -> None:
    model, _ = make_model(vision)
    assert (model.config.num_prefix_tokens, model.config.num_image_tokens) == (prefix, 16)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = model.vision_encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        assert hidden.shape[1] == 16 + prefix
        assert torch.equal(model.encode_images(pixels), model.connector(hidden[:, prefix:]))
    whole, _ = make_model(vision, vision_feature_select="full")
    assert (whole.config.num_prefix_tokens, whole.config.num_image_tokens) == (0, 16 + prefix)
    assert whole.encode_images(pixels).shape == (2, 16 + prefix, 32)


def test_register_tokens_are_dropped_too() -> None:
    from transformers import AutoModel, Dinov2WithRegistersConfig

    config = Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_register_tokens=3,
    )
    model, _ = MllmForConditionalGeneration.from_components(
        vision_encoder=AutoModel.from_config(config),
        language_model=make_language_model(),
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
    )
    assert (model.config.num_prefix_tokens, model.config.num_image_tokens) == (4, 16)


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_last_means_after_the_final_norm(vision: str) -> None:
    encoder = make_vision(vision)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        output = encoder(pixel_values=pixels, output_hidden_states=True)
        last = patch_features(encoder, pixels, "last", 0)
        assert torch.equal(last, output.last_hidden_state)
        assert torch.equal(patch_features(encoder, pixels, 1, 0), output.hidden_states[1])
        norm = {"siglip": "post_layernorm", "dinov2": "layernorm"}.get(vision)
        if norm:
            by_hand = getattr(encoder, norm)(output.hidden_states[-1])
            torch.testing.assert_close(last, by_hand)
            assert (last - output.hidden_states[-1]).abs().max() > 1e-3


def test_the_picture_size_need_not_be_the_configured_one() -> None:
    """DINOv2 was trained at 518 and is used at 224: the number of tokens follows the pixels."""
    processor = make_image_processor()
    processor.size, processor.crop_size = {"shortest_edge": 48}, {"height": 48, "width": 48}
    model, mllm_processor = MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision("dinov2"),
        language_model=make_language_model(),
        tokenizer=make_tokenizer(),
        image_processor=processor,
    )
    assert model.config.num_image_tokens == 36 == mllm_processor.num_image_tokens
    assert logits_of(model, mllm_processor).isfinite().all()


# -- placeholders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_the_placeholder_may_lie_beyond_the_vocabulary(inside: bool) -> None:
    size = len(make_tokenizer()) + (8 if inside else 0)
    language_model = make_language_model(vocab_size=size)
    model, processor = MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision(),
        language_model=language_model,
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
    )
    token = model.config.image_token_id
    assert (token < size) == inside
    assert model.get_input_embeddings().weight.shape[0] == size, "the vocabulary must not be resized"
    before = logits_of(model, processor)
    if inside:
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = 1e3  # never looked up
        assert torch.equal(before, logits_of(model, processor))
        with torch.no_grad():
            model.language_model.lm_head.weight[token] = 100 * model.language_model.lm_head.weight[5]
        new, _ = greedy(model, processor(mixed_conversations()))
        assert token not in new


@pytest.mark.parametrize(("change", "problem"), [(-1, "31 image placeholders"), (1, "33 image placeholders")])
def test_a_wrong_number_of_placeholders_raises(change: int, problem: str) -> None:
    model, processor = make_model()
    batch = processor([[user("compare", make_picture(0), make_picture(1))]])
    token = torch.full((1, 1), model.config.image_token_id)
    ids = batch["input_ids"]
    if change > 0:
        ids = torch.cat([ids, token], dim=1)
    else:
        first = (ids[0] == token.item()).nonzero()[0].item()
        ids = torch.cat([ids[:, :first], ids[:, first + 1 :]], dim=1)
    with pytest.raises(ValueError, match=f"{problem} for 2 images"):
        model(input_ids=ids, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="placeholders, but no pixel_values"):
        model(input_ids=ids)


def test_pixels_without_placeholders_raise() -> None:
    model, processor = make_model()
    with pytest.raises(ValueError, match="0 image placeholders for 1 images"):
        model(**processor([[user("hello")]]), pixel_values=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("settings", [{}, {"tiling": {"type": "anyres"}}])
def test_no_images_are_like_none_given(settings: dict[str, Any]) -> None:
    model, processor = make_model(**settings)
    batch = dict(processor([mixed_conversations()[1]]))
    none = {"pixel_values": torch.zeros(0, *model.config.pixel_shape), "image_sizes": torch.zeros(0, 2)}
    for mode in (model.eval(), model.train()):
        assert torch.equal(mode(**batch, **none).logits, mode(**batch).logits)


def test_a_feature_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="vision_feature_layer is -9, but there are 4; use -4 to 3"):
        make_model(vision_feature_layer=-9)


def test_padding_on_either_side_does_not_move_a_row() -> None:
    """GPT-2 has learnt positions, so a shifted row shows."""
    model, processor = make_model(text="gpt2")
    ids = processor([[user("hello", make_picture(0))]])["input_ids"]
    pixels = processor([[user("hello", make_picture(0))]])["pixel_values"]
    filler, zeros = torch.full((1, 7), processor.tokenizer.pad_token_id), torch.zeros(1, 7, dtype=torch.long)
    ones = torch.ones_like(ids)
    with torch.no_grad():
        alone = model(input_ids=ids, pixel_values=pixels).logits[0]
        left = model(
            input_ids=torch.cat([filler, ids], 1),
            attention_mask=torch.cat([zeros, ones], 1),
            pixel_values=pixels,
        ).logits[0, 7:]
        right = model(
            input_ids=torch.cat([ids, filler], 1),
            attention_mask=torch.cat([ones, zeros], 1),
            pixel_values=pixels,
        ).logits[0, :-7]
    torch.testing.assert_close(left, alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(right, alone, atol=1e-4, rtol=1e-5)


# -- composing --------------------------------------------------------------------------------------


def test_an_unknown_connector_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown connector type 'mpl'; use one of linear, mlp"):
        make_model(connector="mpl")


def test_an_unknown_connector_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"connector 'mlp'.*'width'"):
        MllmForConditionalGeneration.from_components(
            vision_encoder=make_vision(),
            language_model=make_language_model(),
            tokenizer=make_tokenizer(),
            image_processor=make_image_processor(),
            connector={"type": "mlp", "width": 3},
        )


def test_depth_of_the_mlp() -> None:
    model, _ = MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision(),
        language_model=make_language_model(),
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
        connector={"type": "mlp", "depth": 3},
    )
    assert [tuple(p.shape) for p in model.connector.parameters()] == [(32, 32), (32,)] * 3
