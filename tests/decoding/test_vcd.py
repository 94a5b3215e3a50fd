"""VCD against two separate, uncached runs of the same model, for every model and mode."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)

from mllm.decoding import Sample, Vcd, generate
from mllm.decoding.contrastive import contrast
from mllm.decoding.noise import add_noise, noise_scales
from mllm.errors import ConfigError
from mllm.model import MllmConfig, MllmForConditionalGeneration

VOCAB, PATCHES, PAD, STEPS = 60, 4, 0, 7
IMAGE = -1  # in the rows below; each model has its own id for it


# ---------------------------------------------------------------- tiny models and inputs


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        initializer_range=0.4,
        initializer_factor=4.0,
    )


def _llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )


def _gpt2() -> GPT2Config:
    """Absolute positions: a left-padded row with positions not taken from its mask comes out wrong."""
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        tie_word_embeddings=False,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )


def _llava(text) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=_vision(),
        text_config=text,
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _ours(text) -> MllmForConditionalGeneration:
    config = MllmConfig(
        vision_config=_vision(),
        text_config=text,
        num_prefix_tokens=1,
        num_patches=PATCHES,
        num_image_tokens=PATCHES,
        vision_dim=16,
        pixel_shape=[3, 8, 8],
        image_token_id=VOCAB + 3,  # beyond the vocabulary
    )
    return MllmForConditionalGeneration(config)


MODELS: dict[str, Callable] = {
    "llava-llama": lambda: _llava(_llama()),
    "llava-gpt2": lambda: _llava(_gpt2()),
    "mllm-llama": lambda: _ours(_llama()),
    "mllm-gpt2": lambda: _ours(_gpt2()),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MODELS[request.param]().eval()
        # Weights that make answers depend on the image and on everything before.
        for name, weight in made.named_parameters():
            if weight.ndim > 1 and ("projector" in name or "connector" in name):
                torch.nn.init.normal_(weight, std=0.5)
    made.generation_config.pad_token_id = PAD
    return made


@pytest.fixture
def llava():
    torch.manual_seed(1)
    made = _llava(_llama()).eval()
    made.generation_config.pad_token_id = PAD
    return made


@dataclass
class Prompt:
    ids: list[int]
    images: Tensor  # [I, 3, 8, 8]


def prompts(*image_counts: int, seed: int = 0) -> list[Prompt]:
    """One prompt for each count, of different lengths, images in the midst of text."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = []
    for count in image_counts:
        ids = [draw.randrange(1, VOCAB - 1) for _ in range(draw.randrange(2, 9))]
        for _ in range(count):
            at = draw.randrange(len(ids)) if IMAGE not in ids else 0
            ids[at:at] = [IMAGE] * PATCHES
        rows.append(Prompt(ids, torch.randn(count, 3, 8, 8, generator=numbers)))
    return rows


def batch(model, rows: list[Prompt]) -> dict[str, Tensor | None]:
    """The left-padded batch of `rows`, as a processor makes it."""
    width = max(len(row.ids) for row in rows)
    ids, mask = [], []
    for row in rows:
        own = [model.config.image_token_id if i == IMAGE else i for i in row.ids]
        ids.append([PAD] * (width - len(own)) + own)
        mask.append([0] * (width - len(own)) + [1] * len(own))
    pixels = torch.cat([row.images for row in rows])
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "pixel_values": pixels if len(pixels) else None,
    }


class Recorder(LogitsProcessor):
    """Keeps the scores that it is shown, ahead of the warpers."""

    def __init__(self, rows: int):
        self.rows, self.seen = rows, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores[: self.rows].clone())
        return scores


@contextmanager
def forwards(model) -> Iterator[list[Tensor]]:
    """The last logits [rows, V] of every forward of `model` made inside."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda *call: seen.append(call[-1].logits[:, -1].clone()))
    try:
        yield seen
    finally:
        hook.remove()


# ---------------------------------------------------------------- the reference


def by_hand(model, rows, vcd: Vcd, steps: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Tokens and contrasted scores: each row and branch on its own, no padding, no cache.

    The cut is written over probabilities, the form of the paper: p < beta * max(p).
    """
    histories = [batch(model, [row])["input_ids"] for row in rows]
    generator = torch.Generator().manual_seed(seed)
    tokens, recorded = [], []
    for _ in range(steps):
        scores = torch.stack(
            [_scores(model, ids, row.images, vcd) for ids, row in zip(histories, rows, strict=True)]
        )
        recorded.append(scores.clone())
        if vcd.do_sample:
            scores = scores / vcd.temperature
            if vcd.top_k:
                scores[scores < scores.topk(vcd.top_k).values[:, -1:]] = -math.inf
            choice = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        else:
            choice = scores.argmax(-1)
        tokens.append(choice)
        histories = [torch.cat([h, c.view(1, 1)], 1) for h, c in zip(histories, choice, strict=True)]
    return torch.stack(tokens, 1), recorded


@torch.no_grad()
def _scores(model, ids: Tensor, images: Tensor, vcd: Vcd) -> Tensor:
    def last(pixels: Tensor) -> Tensor:
        given = {"pixel_values": pixels} if len(pixels) else {}
        return model(input_ids=ids, use_cache=False, **given).logits[0, -1]

    clean, noised = last(images), last(add_noise(images, vcd.noise_step, vcd.noise_seed))
    scores = clean + vcd.alpha * (clean - noised)
    p = clean.softmax(-1)
    scores[p < vcd.beta * p.max()] = -math.inf
    if model.config.image_token_id < VOCAB:
        scores[model.config.image_token_id] = -math.inf
    return scores


DECODES = {
    "greedy": Vcd(alpha=1.0, beta=0.1, noise_step=900),
    "sampled": Vcd(alpha=0.7, beta=0.02, noise_step=700, do_sample=True),
    "warped": Vcd(beta=0.01, noise_step=999, do_sample=True, temperature=1.7, top_k=5),
}


@pytest.mark.parametrize("decode", DECODES.values(), ids=DECODES)
def test_equals_two_separate_runs_at_every_step(model, decode):
    rows = prompts(1, 0, 3, 1)
    recorder = Recorder(len(rows))
    tokens = generate(
        model,
        batch(model, rows),
        decode,
        max_new_tokens=STEPS,
        seed=5,
        logits_processor=LogitsProcessorList([recorder]),
    )
    expected_tokens, expected_scores = by_hand(model, rows, decode, STEPS, seed=5)
    assert tokens.tolist() == expected_tokens.tolist()
    for seen, expected in zip(recorder.seen, expected_scores, strict=True):
        assert torch.equal(seen.isneginf(), expected.isneginf())
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-3)


def test_cache_equals_full_forward_in_both_branches(model):
    inputs = batch(model, prompts(2, 0, 1))
    runs = {}
    for use_cache in (True, False):
        with forwards(model) as logits:
            tokens = generate(model, inputs, "vcd,noise_step=900", max_new_tokens=STEPS, use_cache=use_cache)
        runs[use_cache] = tokens, torch.stack(logits)  # [T, 2B, V]
    assert torch.equal(runs[True][0], runs[False][0])
    torch.testing.assert_close(runs[True][1], runs[False][1], rtol=1e-4, atol=1e-3)


def test_one_forward_of_two_b_rows_a_step(model):
    with forwards(model) as logits:
        generate(model, batch(model, prompts(1, 2, 0)), "vcd", max_new_tokens=STEPS)
    assert [len(step) for step in logits] == [6] * STEPS


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}], ids=["plain", "penalty"])
def test_batch_of_four_equals_four_singles(model, options):
    if options and model.config.image_token_id >= VOCAB:
        pytest.skip("transformers' repetition penalty cannot hold ids beyond the vocabulary")
    rows = prompts(1, 0, 3, 2, seed=3)
    decode = "vcd,noise_step=900"
    together = generate(model, batch(model, rows), decode, max_new_tokens=STEPS, **options)
    for row, expected in zip(rows, together, strict=True):
        alone = generate(model, batch(model, [row]), decode, max_new_tokens=STEPS, **options)
        assert alone[0].tolist() == expected.tolist()


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_alpha_zero_equals_plain_generate(model, sampled):
    inputs = batch(model, prompts(1, 0, 2))
    warped = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20}
    hf = warped if sampled else {"do_sample": False}
    image = model.config.image_token_id
    torch.manual_seed(11)
    plain = model.generate(
        **{name: value for name, value in inputs.items() if value is not None},
        **hf,
        max_new_tokens=STEPS,
        suppress_tokens=[image] if image < VOCAB else None,
    )[:, inputs["input_ids"].shape[1] :]

    decode = Vcd(alpha=0.0, beta=0.5, **(warped if sampled else {}))
    assert generate(model, inputs, decode, max_new_tokens=STEPS, seed=11).tolist() == plain.tolist()
    decode = Sample(temperature=0.8, top_p=0.9, top_k=20) if sampled else "greedy"
    assert generate(model, inputs, decode, max_new_tokens=STEPS, seed=11).tolist() == plain.tolist()


def test_contrast_changes_answers_about_images_only(model):
    rows = prompts(1, 2, 1, 0, seed=4)
    inputs = batch(model, rows)
    greedy = generate(model, inputs, "greedy", max_new_tokens=12)
    vcd = generate(model, inputs, "vcd,alpha=2,noise_step=999", max_new_tokens=12)
    assert (greedy[:3] != vcd[:3]).any(dim=1).sum() >= 2
    assert greedy[3].tolist() == vcd[3].tolist()  # text only: nothing to contrast with


def test_text_only_batch(model):
    inputs = batch(model, prompts(0, 0))
    assert inputs["pixel_values"] is None
    vcd = generate(model, inputs, "vcd", max_new_tokens=STEPS)
    assert vcd.tolist() == generate(model, inputs, "greedy", max_new_tokens=STEPS).tolist()


# ---------------------------------------------------------------- ends, seeds, streams, habits


def test_rows_end_at_different_times(model):
    inputs = batch(model, prompts(1, 0, 2, seed=6))
    free = generate(model, inputs, "vcd", max_new_tokens=STEPS).tolist()

    def lengths_if(ends: list[int]) -> list[int]:
        return [next((i for i, t in enumerate(row, 1) if t in ends), STEPS) for row in free]

    pairs = [[token, VOCAB - 2] for token in range(1, VOCAB - 2)]
    ends = max(pairs, key=lambda pair: len(set(lengths_if(pair))))
    lengths = lengths_if(ends)
    assert len(set(lengths)) > 1
    stopped = generate(model, inputs, "vcd", max_new_tokens=STEPS, eos_token_id=ends)
    assert stopped.shape[1] == max(lengths)
    for row, full, length in zip(stopped.tolist(), free, lengths, strict=True):
        assert row == full[:length] + [PAD] * (len(row) - length)


@pytest.mark.parametrize("decode", ["greedy", "vcd"])
def test_pads_with_the_end_token_where_there_is_no_padding_token(llava, decode):
    llava.generation_config.pad_token_id = None
    inputs = batch(llava, prompts(1, 0, 2, seed=6))
    end = generate(llava, inputs, decode, max_new_tokens=1)[0].item()
    tokens = generate(llava, inputs, decode, max_new_tokens=4, eos_token_id=end)
    assert tokens[0].tolist() == [end] * tokens.shape[1]
    assert tokens.shape[1] > 1


def test_stopping_criteria_see_the_clean_rows(llava):
    class AfterTwo(StoppingCriteria):
        shapes: list[tuple[int, ...]] = []  # noqa: RUF012

        def __call__(self, input_ids, scores, **kwargs):
            self.shapes.append(tuple(input_ids.shape))
            return torch.full((len(input_ids),), len(self.shapes) == 2)

    inputs = batch(llava, prompts(1, 1))
    tokens = generate(llava, inputs, "vcd", stopping_criteria=[AfterTwo()])
    assert tokens.shape == (2, 2)
    assert [rows for rows, _ in AfterTwo.shapes] == [2, 2]


@pytest.mark.parametrize("decode", ["sample", "vcd,do_sample=true,beta=0"])
def test_seed_fixes_the_draw_and_leaves_the_global_state(llava, decode):
    inputs = batch(llava, prompts(1, 0))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(llava, inputs, decode, max_new_tokens=STEPS, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generate(llava, inputs, decode, max_new_tokens=STEPS, seed=1), first)
    assert not torch.equal(generate(llava, inputs, decode, max_new_tokens=STEPS, seed=2), first)
    generate(llava, inputs, decode, max_new_tokens=STEPS)
    assert not torch.equal(torch.get_rng_state(), before)  # without a seed: the global stream


def test_noise_seed_reaches_the_scores(llava):
    inputs = batch(llava, prompts(1))
    scores = []
    for seed in (0, 0, 1):
        recorder = Recorder(1)
        decode, options = Vcd(noise_seed=seed, beta=0.0), {"logits_processor": [recorder]}
        generate(llava, inputs, decode, max_new_tokens=1, **options)
        scores.append(recorder.seen[0])
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("decode", ["greedy", "sample", "vcd", "vcd,do_sample=true"])
def test_habits_of_the_model_do_not_count(llava, decode):
    inputs = batch(llava, prompts(1, 2))
    expected = generate(llava, inputs, decode, max_new_tokens=STEPS, seed=3)
    habits = {
        "do_sample": True,
        "temperature": 0.1,
        "top_p": 0.2,
        "top_k": 2,
        "min_p": 0.5,
        "num_beams": 3,
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "max_length": 4096,
        "min_new_tokens": 30,
        "suppress_tokens": expected.flatten().tolist(),
    }
    llava.generation_config.update(**habits)
    assert torch.equal(generate(llava, inputs, decode, max_new_tokens=STEPS, seed=3), expected)
    assert {name: getattr(llava.generation_config, name) for name in habits} == habits


@pytest.mark.parametrize("decode", ["greedy", "vcd"])
def test_image_token_is_never_answered(llava, decode):
    image = llava.config.image_token_id
    inputs = batch(llava, prompts(1))
    recorder = Recorder(1)
    generate(llava, inputs, decode, max_new_tokens=2, logits_processor=[recorder])
    assert torch.stack(recorder.seen)[..., image].isneginf().all()
    both = {"suppress_tokens": [5], "logits_processor": [recorder]}
    generate(llava, inputs, decode, max_new_tokens=1, **both)
    assert recorder.seen[-1][0, [5, image]].isneginf().all()


class Listener:
    """A streamer, as transformers calls it."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("decode", ["greedy", "sample", "vcd", "vcd,do_sample=true"])
def test_streams_the_prompt_then_each_token(model, decode):
    inputs, listener = batch(model, prompts(1)), Listener()
    tokens = generate(model, inputs, decode, max_new_tokens=STEPS, seed=0, streamer=listener)
    prompt, *heard = listener.heard
    assert torch.equal(prompt, inputs["input_ids"])
    assert [token.tolist() for token in heard] == [[token] for token in tokens[0].tolist()]
    assert listener.ended == 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("decode", "option", "reason"),
    [
        ("vcd", {"num_beams": 4}, "beams"),
        ("greedy", {"num_beams": 4}, "beams"),
        ("vcd", {"assistant_model": "any"}, "assisted"),
        ("vcd", {"prompt_lookup_num_tokens": 3}, "assisted"),
        ("vcd", {"penalty_alpha": 0.6}, "another decoder"),
        ("vcd", {"dola_layers": "high"}, "another decoder"),
        ("sample", {"temperature": 0.5}, "decode='sample,temperature=0.7'"),
        ("vcd", {"past_key_values": "any"}, "clean branch only"),
        ("vcd", {"guidance_scale": 2.0}, "second contrast"),
        ("greedy", {"return_dict_in_generate": True}, "only the new tokens"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(llava, decode, option, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        generate(llava, batch(llava, prompts(1)), decode, **option)
    assert next(iter(option)) in str(error.value)
    assert "\n" not in str(error.value)


def test_inputs_that_hide_the_image_are_refused(llava):
    inputs = batch(llava, prompts(1))
    with pytest.raises(ConfigError, match="inputs_embeds"):
        generate(llava, inputs | {"inputs_embeds": torch.zeros(1, 1, 32)}, "vcd")
    flat = inputs["pixel_values"].flatten(1)
    with pytest.raises(ConfigError, match=r"\[1, 192\]"):
        generate(llava, inputs | {"pixel_values": flat}, "vcd")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(llava, inputs, "vcd", max_new_tokens=0)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("step", "keep", "spread"),
    [
        (0, 0.99999, 0.0047),
        (100, 0.9983, 0.0584),
        (200, 0.9939, 0.1105),
        (300, 0.9810, 0.1941),
        (400, 0.9449, 0.3275),
        (500, 0.8630, 0.5052),
        (600, 0.7342, 0.6789),
        (700, 0.5927, 0.8054),
        (800, 0.4670, 0.8843),
        (900, 0.3649, 0.9311),
        (999, 0.2850, 0.9585),
    ],
)
def test_noise_schedule_is_the_official_one(step, keep, spread):
    assert [scale.item() for scale in noise_scales(step)] == pytest.approx([keep, spread], abs=6e-5)


def test_noise_is_a_fixed_standard_normal_draw_per_image():
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noised = add_noise(images, 500, seed=7)
    drawn = (noised - 0.8630 * images) / 0.5052
    assert drawn.mean().item() == pytest.approx(0, abs=0.02)
    assert drawn.std().item() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(drawn.flatten(1)) - torch.eye(3)
    assert correlation.abs().max() < 0.05

    assert torch.equal(add_noise(images, 500, seed=7), noised)
    assert not torch.equal(add_noise(images, 500, seed=8), noised)
    order = [2, 0, 1]
    assert torch.equal(add_noise(images[order], 500, seed=7), noised[order])
    assert torch.equal(add_noise(images[1:2], 500, seed=7), noised[1:2])


def test_noise_keeps_type_and_input():
    images = torch.randn(2, 3, 4, 4).to(torch.bfloat16).transpose(2, 3)
    before = images.clone()
    noised = add_noise(images, 999, seed=0)
    assert (noised.dtype, noised.shape) == (torch.bfloat16, images.shape)
    assert torch.equal(images, before)
    # The sum is made in fp32 and rounded once.
    assert torch.equal(noised, add_noise(images.float(), 999, seed=0).bfloat16())
    assert add_noise(images[:0], 999, seed=0).shape == (0, 3, 4, 4)


# ---------------------------------------------------------------- contrast


def test_contrast_golden():
    clean, noised = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.ones(4)
    assert contrast(clean, noised, 1.0, 0.1).tolist() == [3.0, 1.0, -1.0, -math.inf]
    assert contrast(clean, noised, 0.0, 1.0).tolist() == clean.tolist()


def test_contrast_turns_the_choice():
    """What the noised image says as loudly is not due to the image: token 1 wins over token 0."""
    clean, noised = torch.tensor([2.0, 1.8, 1.0]), torch.tensor([2.0, 0.5, -5.0])
    assert clean.argmax() == 0
    assert contrast(clean, noised, 1.0, 0.5).argmax() == 1  # token 2 is cut: implausible
    assert contrast(clean, noised, 1.0, 0.1).argmax() == 2


LOGITS = st.lists(st.floats(-40, 40, width=32), min_size=6, max_size=6)
PAIRS = st.tuples(LOGITS, LOGITS).map(lambda pair: torch.tensor(pair, dtype=torch.float32))
ALPHAS = st.floats(0.01, 5)
BETAS = st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(PAIRS, ALPHAS, BETAS, BETAS)
def test_contrast_properties(pair, alpha, beta, other):
    clean, noised = pair
    scores = contrast(clean, noised, alpha, beta)
    assert torch.isfinite(scores[clean.argmax()])
    assert not scores.isnan().any()
    # A higher beta cuts at least as much; 1 leaves the maximum alone, 0 cuts nothing.
    low, high = (contrast(clean, noised, alpha, b).isneginf() for b in sorted((beta, other)))
    assert not (low & ~high).any()
    one, zero = (contrast(clean, noised, alpha, b) for b in (1.0, 0.0))
    assert torch.equal(torch.isfinite(one), clean == clean.max())
    assert torch.isfinite(zero).all()
    # Equal branches have no contrast, and a shift of all noised logits changes no preference.
    kept = torch.isfinite(scores)
    torch.testing.assert_close(contrast(clean, clean, alpha, beta)[kept], clean[kept])
    shifted = contrast(clean, noised + 3, alpha, beta)
    torch.testing.assert_close(shifted[kept], scores[kept] - 3 * alpha, rtol=1e-4, atol=1e-3)


def test_ruled_out_tokens_stay_out():
    clean = torch.tensor([1.0, -math.inf, 0.5])
    for beta in (0.0, 0.1):
        scores = contrast(clean, clean, 1.0, beta)
        assert scores.tolist() == [1.0, -math.inf, 0.5]
