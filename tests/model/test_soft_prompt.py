"""Learned tokens in front of a sequence: PEFT's values, right with cache, padding and contrast."""

from typing import Any

import pytest
import torch
from conftest import make_image_processor, make_model, make_tokenizer, make_vision, mixed_conversations
from peft import PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config

from mllm.config import TuneSection
from mllm.decoding import generate
from mllm.errors import ConfigError
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.soft_prompt import SoftPrompt
from mllm.training.tuning import apply_tuning

FAMILIES = ["llama", "qwen2", "mistral", "phi", "opt", "gpt2"]
KINDS = {
    "prefix": {"length": 3},
    "prefix_hidden": {"length": 3, "hidden": 7},
    "prompt": {"length": 5},
    "prompt_random": {"length": 5, "init": "random"},
}
NEW = 14


def section(kind: str, **other: Any) -> TuneSection:
    mode = kind.split("_")[0]
    return TuneSection.model_validate(
        {"connector": "frozen", "language_model": mode, mode: KINDS[kind], **other}
    )


def tuned(kind: str, text: str = "llama", **kwargs: Any) -> tuple[Any, MllmProcessor]:
    """A model with learned tokens, far enough from their start to matter."""
    model, processor = make_model(text=text, **kwargs)
    apply_tuning(model, section(kind))
    with torch.no_grad():
        for parameter in model.language_model.soft_prompt.parameters():
            parameter.mul_(2)
    return model, processor


def generated(model: MllmForConditionalGeneration, inputs: Any, **kwargs: Any) -> torch.Tensor:
    return generate(model, inputs, max_new_tokens=NEW, min_new_tokens=NEW, **kwargs)


def labels_of(inputs: Any) -> torch.Tensor:
    ids = inputs["input_ids"]
    return ids.masked_fill(ids >= 296, -100)  # the placeholder is not in the vocabulary


def pefts_own(model: Any) -> PeftModelForCausalLM:
    """PEFT's wrapper around the bare language model, with the same learned tokens."""
    soft = model.language_model.soft_prompt
    settings: Any
    if soft.kind == "prefix":
        hidden = soft.encoder.transform[0].out_features if soft.encoder.prefix_projection else None
        settings = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=soft.length,
            prefix_projection=hidden is not None,
            encoder_hidden_size=hidden,  # type: ignore[arg-type]
        )
    else:
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=soft.length)
    wrapped = PeftModelForCausalLM(model.language_model, settings).eval()
    wrapped.prompt_encoder["default"].load_state_dict(soft.encoder.state_dict())
    return wrapped


@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts(kind: str, text: str) -> None:
    model, _ = tuned(kind, text)
    ids = torch.randint(3, 200, (2, 9))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        want = pefts_own(model)(input_ids=ids, attention_mask=mask).logits[:, -9:]
        bare = make_model(text=text)[0](input_ids=ids, attention_mask=mask).logits
    assert (found - bare).abs().max() > 1e-2
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_pefts(kind: str) -> None:
    model, _ = tuned(kind)
    ids = torch.randint(3, 200, (2, 9))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :4] = -100
    model.train()
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    want = pefts_own(model).train()
    want(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    for name, parameter in want.prompt_encoder["default"].named_parameters():
        own = model.language_model.soft_prompt.encoder.get_parameter(name).grad
        assert own.abs().max() > 0
        torch.testing.assert_close(own, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_cached_is_uncached_and_a_batch_is_its_rows(kind: str, text: str) -> None:
    model, processor = tuned(kind, text)
    prompts = mixed_conversations()
    inputs = processor(prompts, add_generation_prompt=True)
    assert (inputs["attention_mask"] == 0).any(), "the batch must be padded"
    cached = generated(model, inputs)
    assert torch.equal(cached, generated(model, inputs, use_cache=False))
    for prompt, row in zip(prompts, cached, strict=True):
        assert torch.equal(generated(model, processor([prompt], add_generation_prompt=True))[0], row)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_every_logit_of_a_padded_row_is_that_of_the_row_alone(kind: str) -> None:
    """Tokens may agree by chance; logits at every step of cached decoding do not."""
    model, processor = tuned(kind, "gpt2")
    prompts = mixed_conversations()
    batch = processor(prompts)
    ids = torch.randint(3, 200, (len(prompts), NEW))
    with torch.no_grad():
        rows = _decode(model, dict(batch), ids)
        for index, prompt in enumerate(prompts):
            alone = dict(processor([prompt]))
            torch.testing.assert_close(
                rows[index], _decode(model, alone, ids[index : index + 1])[0], atol=1e-5, rtol=1e-4
            )
            whole = {**alone, "input_ids": torch.cat([alone["input_ids"], ids[index : index + 1]], dim=1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            torch.testing.assert_close(model(**whole).logits[0, -NEW:], rows[index], atol=1e-5, rtol=1e-4)


def _decode(model: Any, inputs: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, NEW, V] after each of `ids` [B, NEW], fed one by one through the cache."""
    output = model(**inputs, use_cache=True)
    mask, logits = inputs["attention_mask"], []
    for token in ids.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        output = model(
            input_ids=token, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_contrastive_decoding_runs_and_without_contrast_is_greedy(kind: str) -> None:
    model, processor = tuned(kind)
    inputs = processor(mixed_conversations(), add_generation_prompt=True)
    greedy = generated(model, inputs)
    assert torch.equal(generated(model, inputs, decode="vcd,alpha=0"), greedy)
    contrasted = generated(model, inputs, decode="vcd,alpha=1,noise_step=900")
    assert torch.equal(
        generated(model, inputs, decode="vcd,alpha=1,noise_step=900", use_cache=False), contrasted
    )


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_the_logits_asked_for_are_those_of_the_sequence(kind: str) -> None:
    model, processor = tuned(kind)
    inputs = processor(mixed_conversations())
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        every = model(**inputs).logits
        assert every.shape[1] == length
        for keep in (1, 3, length, length + 4):
            torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, every[:, -keep:])
        at = torch.tensor([0, 2, length - 1])
        torch.testing.assert_close(model(**inputs, logits_to_keep=at).logits, every[:, at])


def test_no_mask_is_a_mask_of_ones() -> None:
    for kind in ("prefix", "prompt"):
        model, _ = tuned(kind, "gpt2")
        ids = torch.randint(3, 200, (2, 9))
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            assert torch.allclose(model(input_ids=ids).logits, want, atol=1e-6)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_cache_that_nobody_asked_for_is_not_handed_back(kind: str) -> None:
    model, processor = tuned(kind)
    inputs = processor(mixed_conversations())
    assert model(**inputs, use_cache=False).past_key_values is None
    assert model(**inputs, labels=labels_of(inputs)).past_key_values is None
    length = inputs["input_ids"].shape[1] + KINDS[kind]["length"]
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == length


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_mask_that_does_not_fit_the_cache_is_refused(kind: str) -> None:
    model, _ = tuned(kind)
    ids = torch.randint(3, 200, (1, 9))
    cache: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="does not fit 4 tokens after"):
        model(input_ids=ids[:, :4], attention_mask=torch.ones(1, 12), past_key_values=cache)
    model(input_ids=ids[:, :4], attention_mask=torch.ones(1, 13), past_key_values=cache)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_an_empty_cache_of_the_caller_is_used(name: str) -> None:
    """By its name up to transformers 5.23, and by that from 5.24 on, which its `generate` uses."""
    model, _ = tuned("prefix")
    cache = DynamicCache(config=model.language_model.config)
    ids = torch.randint(3, 200, (1, 9))
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **{name: cache})
    assert output.past_key_values is cache
    assert cache.get_seq_length() == 9 + 3


def test_a_prompt_trains_under_gradient_checkpointing_and_a_prefix_says_that_it_cannot() -> None:
    for kind in ("prompt", "prefix"):
        model, processor = tuned(kind)
        inputs = processor(mixed_conversations())
        model.train()
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        learned = model.language_model.soft_prompt.encoder.embedding.weight
        want, learned.grad = learned.grad, None
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if kind == "prefix":
            with pytest.raises(ConfigError, match="gradient_checkpointing=false"):
                model(**inputs, labels=labels_of(inputs))
            model.eval()(**inputs, labels=labels_of(inputs))
            continue
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        torch.testing.assert_close(learned.grad, want, atol=1e-6, rtol=1e-5)


def test_a_frozen_prefix_is_not_lost_under_gradient_checkpointing() -> None:
    model, processor = tuned("prefix")
    inputs = processor(mixed_conversations())
    apply_tuning(model, TuneSection(connector="full", language_model="frozen"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ConfigError, match="gradient_checkpointing=false"):
        model.train()(**inputs, labels=labels_of(inputs))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_learned_tokens_train_in_float32_beside_smaller_weights(kind: str) -> None:
    model, processor = tuned(kind)
    model.bfloat16()
    model.language_model.soft_prompt.float()
    inputs = processor(mixed_conversations())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
        assert torch.isfinite(model.language_model.soft_prompt.encoder.embedding.weight.grad).all()


def test_a_prompt_starts_from_the_vocabulary() -> None:
    model, _ = make_model()
    apply_tuning(model, section("prompt"))
    learned = model.language_model.soft_prompt.encoder.embedding.weight
    words = model.get_input_embeddings().weight
    assert all((words == token).all(dim=1).any() for token in learned)


def test_a_head_may_be_wider_than_its_share_of_the_model() -> None:
    """Gemma 2 gives the width of a head on its own, and lets some layers see a window only."""
    config = Gemma2Config(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=64,
    )
    language_model = AutoModelForCausalLM.from_config(config).eval()
    soft = SoftPrompt(language_model, "prefix", 3)
    assert soft.tokens(2, torch.float32).shape == (4, 2, 2, 3, 12)
    language_model.soft_prompt = soft
    model, processor = MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision(),
        language_model=language_model,
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
    )
    inputs = processor(mixed_conversations())
    assert torch.equal(generated(model, inputs), generated(model, inputs, use_cache=False))


# -- refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_an_encoder_decoder_is_refused(kind: str) -> None:
    model, _ = make_model(text="t5")
    with pytest.raises(ConfigError, match=f"tune.language_model is '{kind}'.*no decoder-only"):
        apply_tuning(model, section(kind))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_prefix_attention_is_refused(kind: str) -> None:
    model, _ = make_model()
    model.config.prefix_attention = True
    with pytest.raises(ConfigError, match="prefix attention makes its own mask"):
        apply_tuning(model, section(kind))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_fusion_is_refused(kind: str) -> None:
    model, _ = make_model()
    model.fusion = torch.nn.Identity()
    with pytest.raises(ConfigError, match="the fusion addresses tokens by their place"):
        apply_tuning(model, section(kind))
