"""Exactly what is declared trains: every combination of frozen, full and LoRA over the three parts."""

import io
from itertools import product
from typing import Any

import pytest
import torch
from conftest import VISION_CONFIGS, make_model
from rich.console import Console
from runs import make_rows, tune

from mllm.config import TuneSection
from mllm.data.collator import Collator
from mllm.errors import ConfigError
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.adapters import is_adapter
from mllm.model.language_model import decoder_layers
from mllm.training.tuning import PartReport, apply_tuning, tuning_table, upcast_trained

PARTS = ("vision_encoder", "connector", "language_model")
COMBINATIONS = [c for c in product(("frozen", "full", "lora"), repeat=3) if set(c) != {"frozen"}]
WITH_CHECKPOINTING = [
    ("frozen", "full", "frozen"),
    ("lora", "lora", "lora"),
    ("full", "frozen", "full"),
    ("lora", "frozen", "frozen"),
    ("frozen", "lora", "full"),
]


def section(*parts: str) -> TuneSection:
    return TuneSection.model_validate(tune(*parts))


def batch_of(processor: MllmProcessor) -> dict[str, Any]:
    batch = Collator(processor)(make_rows(4))  # type: ignore[arg-type]
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def tuned(parts: tuple[str, str, str], vision: str = "clip") -> tuple[MllmForConditionalGeneration, Any]:
    model, processor = make_model(vision)
    apply_tuning(model, section(*parts))
    return model, processor


def two_steps(model: MllmForConditionalGeneration, batch: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Names that had a gradient that is not zero, and names whose tensor changed, in two steps of Adam.

    Two, because a LoRA layer's A has no gradient before its B has moved from zero; Adam, because its steps
    are of one size however small the gradient.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-20)
    alive: set[str] = set()
    model.zero_grad()
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        alive |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    return alive, {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def declared(model: MllmForConditionalGeneration, parts: tuple[str, str, str]) -> set[str]:
    """What must learn, by the declaration alone: names, and CLIP's layers in front of the feature layer."""
    names = set()
    for part, tuning in zip(PARTS, parts, strict=True):
        for name, _ in model.named_parameters():
            behind = part == "vision_encoder" and (".layers.2." in name or "post_layernorm" in name)
            if name.startswith(f"{part}.") and not behind:
                names |= {name} if tuning == "full" or (tuning == "lora" and is_adapter(name)) else set()
    return names


def mathematically_still(name: str) -> bool:
    """A key's bias adds the same to every score of a query, and the softmax takes it away again."""
    return name.startswith("vision_encoder.") and name.endswith("k_proj.bias")


def check(parts: tuple[str, str, str], model: MllmForConditionalGeneration, batch: dict[str, Any]) -> None:
    want = declared(model, parts)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == want
    alive, changed = two_steps(model, batch)
    assert alive <= want
    assert changed <= want, "something frozen has moved"
    assert {name for name in want - changed if not mathematically_still(name)} == set()


@pytest.mark.parametrize("parts", COMBINATIONS, ids="-".join)
def test_exactly_the_declared_parameters_change(parts: tuple[str, str, str]) -> None:
    assert len(COMBINATIONS) == 26
    model, processor = tuned(parts)
    check(parts, model, batch_of(processor))


@pytest.mark.parametrize("parts", WITH_CHECKPOINTING, ids="-".join)
def test_gradient_checkpointing_changes_nothing(parts: tuple[str, str, str]) -> None:
    model, processor = tuned(parts)
    batch = batch_of(processor)
    model.train()
    model(**batch).loss.backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.language_model.modules())
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if want[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, want[name], atol=1e-6, rtol=1e-5)
    check(parts, model, batch)


def test_nothing_to_train_is_refused() -> None:
    model, _ = make_model()
    with pytest.raises(ConfigError, match="nothing is trained: every part is 'frozen'"):
        apply_tuning(model, section("frozen", "frozen", "frozen"))


def test_a_part_without_a_single_reachable_parameter_is_refused() -> None:
    """Feature layer 0 is the embedding: no linear layer lies in front of it, so LoRA cannot learn."""
    model, _ = make_model(vision_feature_layer=0)
    with pytest.raises(ConfigError, match=r"tune.vision_encoder is 'lora'.*vision_feature_layer"):
        apply_tuning(model, section("lora", "full", "frozen"))


@pytest.mark.parametrize("vision", VISION_CONFIGS)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("layer", [-2, 1, "last"])
def test_what_the_loss_cannot_reach_is_frozen_and_reported(vision: str, tuning: str, layer: Any) -> None:
    model, processor = make_model(vision, vision_feature_layer=layer)
    report = apply_tuning(model, section(tuning, "frozen", "frozen"))[0]
    model.train()
    model(**batch_of(processor)).loss.backward()
    parameters = dict(model.vision_encoder.named_parameters())
    for name, parameter in parameters.items():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    candidates = {n: p for n, p in parameters.items() if tuning == "full" or is_adapter(n)}
    unused = sum(p.numel() for p in candidates.values() if not p.requires_grad)
    assert report.unused == unused
    assert report.trainable == sum(p.numel() for p in candidates.values()) - unused
    assert (unused > 0) == (layer != "last" or _pooled(vision, tuning))


def _pooled(vision: str, tuning: str) -> bool:
    """Whether something lies behind `last_hidden_state`: pooling, or DINOv2's mask token."""
    return {"clip": tuning == "full", "siglip": True, "dinov2": tuning == "full"}[vision]


def test_lora_is_on_every_linear_layer_but_the_head() -> None:
    model, _ = tuned(("lora", "lora", "lora"))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if is_adapter(name)}
    assert not any("lm_head" in name for name in adapted)
    for layer in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert f"language_model.model.layers.0.{layer}" in adapted
    assert {"connector.layers.0", "connector.layers.2"} <= adapted
    assert sum(name.startswith("vision_encoder.") for name in adapted) == 3 * 6
    assert sum(name.startswith("language_model.") for name in adapted) == 2 * 7


@pytest.mark.parametrize("text", ["gpt2", "opt"])
def test_lora_leaves_a_tied_head_alone(text: str) -> None:
    model, processor = make_model(text=text)
    apply_tuning(model, section("frozen", "frozen", "lora"))
    adapted = {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert adapted
    assert not any("lm_head" in n or "wte" in n or "embed" in n for n in adapted)
    alive, changed = two_steps(model, batch_of(processor))
    assert changed == alive == adapted


def test_a_frozen_part_uses_no_dropout() -> None:
    model, _ = tuned(("frozen", "full", "lora"))
    model.train()
    assert not model.vision_encoder.training
    assert model.connector.training
    assert model.language_model.training


@pytest.mark.parametrize(("text", "times"), [("llama", 2), ("gpt2", 2), ("opt", 1)])
def test_a_frozen_language_model_is_recomputed_without_dropout(text: str, times: int) -> None:
    """GPT-2 has dropout in modules; OPT's layers have it in themselves, and are not recomputed."""
    model, processor = make_model(text=text)
    apply_tuning(model, section("frozen", "full", "frozen"))
    batch = batch_of(processor)
    want = model(**batch).loss
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[Any] = []
    inside: Any = next(decoder_layers(model.language_model)[0].children())
    inside.register_forward_hook(lambda *_: calls.append(1))
    loss = model.train()(**batch).loss
    loss.backward()
    assert len(calls) == times
    torch.testing.assert_close(loss, want)
    assert not any(layer.training for layer in decoder_layers(model.eval().language_model))


def test_what_is_trained_is_float32_and_what_is_frozen_stays_small() -> None:
    model, processor = make_model()
    model.bfloat16()
    declaration = section("lora", "full", "frozen")
    apply_tuning(model, declaration)
    upcast_trained(model, declaration)
    for name, parameter in model.named_parameters():
        want = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == want, name
    assert torch.isfinite(model(**batch_of(processor)).loss)


def test_a_second_tuning_replaces_the_first() -> None:
    model, processor = make_model()
    batch = batch_of(processor)
    for parts in (("full", "full", "full"), ("lora", "frozen", "lora"), ("frozen", "full", "frozen")):
        apply_tuning(model, section(*parts))
        check(parts, model, batch)


def test_the_table_lists_every_part() -> None:
    model, _ = make_model()
    reports = apply_tuning(model, section("full", "frozen", "lora"))
    assert [report.part for report in reports] == list(PARTS)
    screen = io.StringIO()
    rates = {"vision_encoder": 2e-6, "connector": 1e-3, "language_model": 2e-4}
    Console(file=screen, width=140).print(tuning_table(reports, rates))
    lines = {part: next(x for x in screen.getvalue().splitlines() if part in x) for part in PARTS}
    assert "full (8,608 the loss does not reach)" in lines["vision_encoder"]
    assert "2e-06" in lines["vision_encoder"]
    assert "frozen" in lines["connector"]
    assert "0.001" not in lines["connector"], "a frozen part has no learning rate"
    assert "lora" in lines["language_model"]
    assert "0.0002" in lines["language_model"]
    language = reports[2]
    assert language == PartReport("language_model", "lora", 4096, language.total, 0)
    assert f"{language.trainable:,}" in lines["language_model"]
