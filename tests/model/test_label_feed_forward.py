"""The last feed-forward at the labels alone; `test_label_head.py` has losses and gradients unchanged."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import MORE_TEXT_CONFIGS, TEXT_CONFIGS, make_language_model, make_model
from runs import make_rows
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FuyuConfig,
    Gemma2Config,
    MixtralConfig,
    Qwen2MoeConfig,
)

from mllm.data.collator import Collator
from mllm.data.tokens import IGNORE
from mllm.model.adapters import insert
from mllm.model.label_feed_forward import label_feed_forward
from mllm.training.recompute import checkpoint_selectively

SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
NONE_OF_ITS_OWN = ("opt", "t5")


def batch_of(processor: Any) -> dict[str, Any]:
    return {k: v for k, v in Collator(processor)(make_rows(5)).items() if isinstance(v, torch.Tensor)}


def rows_seen(module: nn.Module) -> list[int]:
    """A list that notes with how many positions a module is called."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("text", [*TEXT_CONFIGS, *MORE_TEXT_CONFIGS])
def test_it_sees_the_labelled_positions_alone(text: str) -> None:
    model, processor = make_model(text=text)
    if text in NONE_OF_ITS_OWN:
        assert model.label_feed_forward is None
        return
    batch = batch_of(processor)
    assert model.label_feed_forward is not None
    seen = rows_seen(model.label_feed_forward.module)
    model.train()(**batch)
    model.eval()(**batch)
    assert seen == [int((batch["labels"] != IGNORE).sum()), batch["labels"].numel()]


@pytest.mark.parametrize("config", [Gemma2Config(head_dim=8, **SMALL), BloomConfig(**SMALL)])
def test_what_is_left_out_is_read_by_no_loss(config: Any) -> None:
    """A norm behind the feed-forward; a module that adds the residual stream itself, and is let be."""
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(config)
    hooks = label_feed_forward(language_model)
    assert (hooks is None) == isinstance(config, BloomConfig)
    if hooks is None:
        return
    embeds = torch.randn(2, 7, 32, requires_grad=True)
    places = torch.tensor([3, 11])
    want = language_model(inputs_embeds=embeds).logits.flatten(0, 1)[places]
    with hooks.only_at(places, 14):
        got = language_model(inputs_embeds=embeds).logits.flatten(0, 1)[places]
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(logits.square().sum(), embeds)[0] for logits in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("config", [MixtralConfig(**SMALL), Qwen2MoeConfig(num_experts=2, **SMALL)])
def test_experts_see_all_positions(config: Any) -> None:
    """Their router may balance over them."""
    assert label_feed_forward(AutoModelForCausalLM.from_config(config)) is None


def test_a_model_without_a_list_of_its_layers_is_let_be() -> None:
    assert label_feed_forward(AutoModelForCausalLM.from_config(FuyuConfig(text_config={**SMALL}))) is None


def test_learned_tokens_in_front_are_counted_by_no_label() -> None:
    language_model: Any = make_language_model("llama")
    insert(language_model, "language_model", {"type": "prompt", "length": 2})
    assert label_feed_forward(language_model) is None


def test_recomputed_layers_choose_as_before() -> None:
    """The backward pass runs the inside of a layer when the forward pass is over."""
    gradients = []
    for recompute in (None, checkpoint_selectively, lambda model: model.gradient_checkpointing_enable()):
        model, processor = make_model()
        if recompute is not None:
            recompute(model)
        seen = rows_seen(model.label_feed_forward.module)  # type: ignore[union-attr]
        batch = batch_of(processor)
        model.train()(**batch).loss.backward()
        labelled = int((batch["labels"] != IGNORE).sum())
        assert seen == [labelled] * (1 if recompute is None else 2)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_nothing_is_chosen_outside_of_a_call() -> None:
    """A language model called alone computes all, and so does a model asked for its hidden states."""
    model, processor = make_model()
    batch = batch_of(processor)
    embeds = model.embed(batch["input_ids"], batch["pixel_values"])[0]
    want = model.language_model(inputs_embeds=embeds).logits
    model.train()(**batch)
    assert torch.equal(model.language_model(inputs_embeds=embeds).logits, want)
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, model.eval()(**batch, output_hidden_states=True).hidden_states[-1])
    with pytest.raises(ValueError, match="placeholders"):
        model.train()(input_ids=batch["input_ids"], labels=batch["labels"])
    assert torch.equal(model.language_model(inputs_embeds=embeds).logits, want)


def test_parts_tied_again_and_copies_have_one_set_of_hooks() -> None:
    model, processor = make_model()
    model.connect()
    assert len(model.label_feed_forward.module._forward_hooks) == 1  # type: ignore[union-attr]
    copied = deepcopy(model)
    batch = batch_of(processor)
    seen = [rows_seen(m.label_feed_forward.module) for m in (model, copied)]  # type: ignore[union-attr]
    losses = [m.train()(**batch).loss for m in (copied, model)]
    assert torch.equal(*losses)
    assert seen == [[int((batch["labels"] != IGNORE).sum())]] * 2
