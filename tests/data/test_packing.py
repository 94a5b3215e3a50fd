"""Packs: loss and gradients of the padded batch, no row bearing on another, a clear no where that fails."""

from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIGS, make_model, make_picture, mixed_conversations
from runs import WORDS, make_rows
from torch import Tensor

from mllm.data.collator import Collator
from mllm.data.packing import PackingCollator, check_packing, try_packing
from mllm.data.schema import Row, assistant, user
from mllm.data.tokens import IGNORE
from mllm.errors import ConfigError
from mllm.model.soft_prompt import insert_soft_prompt

PACKABLE = ["llama", "qwen2", "phi", "mistral", "gpt2"]
CASES = [(text, attention) for text in PACKABLE for attention in ("packed", "sdpa", "eager")]


def make_row(answer: str, question: str, *pictures: Any) -> Row:
    return {"id": answer, "messages": [user(question, *pictures), assistant(answer)]}


def run(model: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Output and gradients."""
    model.zero_grad()
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    output = model(**tensors, **options)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_like_padded(model: Any, processor: Any, rows: list[Row]) -> None:
    padded = Collator(processor)(rows)
    packed = PackingCollator(processor)(rows)
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    supervised = (packed["labels"][:, 1:] != IGNORE).sum()
    assert supervised == (padded["labels"][:, 1:] != IGNORE).sum()
    want, want_grads = run(model, padded)
    got, got_grads = run(model, packed)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
    assert got_grads.keys() == want_grads.keys()
    # Some gradients are zero but for rounding (the bias of keys), so they have no scale of their own.
    largest = max(float(grad.abs().max()) for grad in want_grads.values())
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(("text", "attention"), [*CASES, ("opt", "packed")])
def test_loss_and_gradients_are_those_of_the_padded_batch(text: str, attention: str) -> None:
    model, processor = make_model(text=text)
    model.language_model.set_attn_implementation(attention)
    assert_like_padded(model, processor, make_rows(6))


@pytest.mark.parametrize("connector", ["resampler", "qformer", "instruct_qformer", "pixel_shuffle"])
def test_connectors(connector: str) -> None:
    model, processor = make_model(connector=connector)
    assert_like_padded(model, processor, make_rows(4))


def test_tiles() -> None:
    model, processor = make_model(tiling={"type": "anyres", "pinpoints": [[32, 64], [64, 32], [64, 64]]})
    wide, tall = make_picture(0, (90, 30)), make_picture(1, (30, 40))
    rows = [
        make_row("fox", "what", wide),
        make_row("the quick brown fox", "who"),
        make_row("a", "what", tall),
    ]
    assert_like_padded(model, processor, rows)


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_sliding_window_counts_from_the_start_of_a_row(attention: str) -> None:
    model, processor = make_model(text="mistral")
    model.language_model.set_attn_implementation(attention)
    model.language_model.config.sliding_window = 8
    assert_like_padded(model, processor, make_rows(4))


def test_base_text_supervised_from_its_first_token() -> None:
    """Where a row's first token is supervised, it is not predicted from the row before."""
    model, processor = make_model(template="plain")
    rows = [make_row("fox", ""), make_row("a hello", "")]
    packed = PackingCollator(processor)(rows)
    starts = packed["position_ids"] == 0
    assert starts.sum() == 2
    assert (packed["labels"][starts] == IGNORE).all()
    assert (Collator(processor)(rows)["labels"][:, 0] != IGNORE).all(), "the case is not tested"
    assert_like_padded(model, processor, rows)


@pytest.mark.parametrize(("text", "attention"), [*CASES, ("opt", "packed")])
def test_a_neighbour_does_not_bear_on_a_row(text: str, attention: str) -> None:
    model, processor = make_model(text=text)
    model.language_model.set_attn_implementation(attention)
    before, row, behind = (make_row(WORDS[i], "what", make_picture(i)) for i in range(3))
    pack = PackingCollator(processor)
    starts = pack([before])["input_ids"].shape[1], pack([before, row])["input_ids"].shape[1]
    outputs = []
    for others in (0, 50):  # other words and other pictures of the same length
        batch = pack([before, row, behind])
        outside = torch.ones_like(batch["labels"], dtype=torch.bool)
        outside[:, starts[0] : starts[1]] = False
        image = batch["input_ids"] == processor.image_token_id
        batch["input_ids"][outside & ~image] += others
        batch["input_ids"].masked_fill_(outside & ~image & (batch["input_ids"] >= 256), 9)
        if others:
            batch["pixel_values"][[0, 2]] = batch["pixel_values"][[2, 0]] * 3
            batch["labels"][outside] = IGNORE
        output, _ = run(model, batch)
        outputs.append(output.logits[0])
    inside = slice(*starts)
    assert torch.equal(outputs[0][inside], outputs[1][inside])
    assert not torch.allclose(outputs[0][: starts[0]], outputs[1][: starts[0]]), "nothing was changed"
    assert not torch.allclose(outputs[0][starts[1] :], outputs[1][starts[1] :]), "nothing was changed"


@pytest.mark.parametrize("text", [name for name in TEXT_CONFIGS if name != "t5"])
def test_language_models_are_tried(text: str) -> None:
    model, _ = make_model(text=text)
    model.train()
    check_packing(model)
    if text in PACKABLE:
        try_packing(model)
    else:
        with pytest.raises(ConfigError, match=r"OPTForCausalLM .*'sdpa' lets the rows"):
            try_packing(model)
    assert model.training


def test_packed_attention_without_packs_is_that_of_sdpa() -> None:
    """Padding on either side, and generation with a cache, also of several tokens at once."""
    model, processor = make_model()
    prompts = processor(mixed_conversations())
    batch = {k: v for k, v in Collator(processor)(make_rows(4)).items() if isinstance(v, Tensor)}
    ids = torch.arange(12)[None]
    found = []
    for attention in ("sdpa", "packed"):
        model.language_model.set_attn_implementation(attention)
        cached = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        outputs = [model(input_ids=ids[:, 5:], past_key_values=cached).logits, model(**batch).logits]
        found.append([*outputs, model.generate(**prompts, max_new_tokens=4, do_sample=False)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_small_leak_is_found() -> None:
    model, _ = make_model()

    def leak(module: Any, inputs: Any, output: Any) -> None:
        output.logits += 1e-5 * output.logits[:, :1]

    model.language_model.register_forward_hook(leak)
    with pytest.raises(ConfigError, match="see each other"):
        try_packing(model)


def test_positions_that_do_not_start_again_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_model(text="gpt2")
    forward = model.language_model.transformer.wpe.forward
    monkeypatch.setattr(
        model.language_model.transformer.wpe,
        "forward",
        lambda ids: forward(torch.arange(ids.shape[1])[None]),
    )
    with pytest.raises(ConfigError, match="counts their positions on"):
        try_packing(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"text": "t5"}, "encoder-decoder"),
        ({"fusion": {"type": "gated_cross_attention", "every": 1}, "connector": "resampler"}, "deep fusion"),
        ({"attention": "prefix"}, "prefix attention"),
    ],
)
def test_what_cannot_be_packed_is_refused(options: dict[str, Any], reason: str) -> None:
    model, _ = make_model(**options)
    with pytest.raises(ConfigError, match=f"data.packing cannot be used here: .*{reason}.*packing=false"):
        check_packing(model)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_soft_prompts_are_refused(kind: str) -> None:
    model, _ = make_model()
    insert_soft_prompt(model.language_model, kind, length=3)
    with pytest.raises(ConfigError, match="learned tokens stand in front"):
        check_packing(model)
