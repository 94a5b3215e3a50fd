"""Every way of tuning on every part it is for: what learns, is saved, is merged, is refused."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    MORE_VISION_CONFIGS,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    make_language_model,
    make_model,
    make_picture,
    make_vision,
    mixed_conversations,
)
from peft import PeftModel
from pydantic import ValidationError
from runs import logits_of, make_rows
from test_tuning import mathematically_still, two_steps
from transformers import BartConfig, BartForConditionalGeneration

import mllm
from mllm.config import TuneSection
from mllm.data.collator import Collator
from mllm.data.schema import user
from mllm.errors import ConfigError
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.adapters import insert, is_adapter
from mllm.model.bottleneck import insert_bottlenecks, output_projections
from mllm.model.checkpoint import MANIFEST, save
from mllm.training.tuning import apply_tuning

PARTS = ("vision_encoder", "connector", "language_model")
MERGED = ("lora", "dora", "rslora", "ia3")
EVERYWHERE = [(part, mode) for part in PARTS for mode in ("full", *MERGED)]
KINDS = [
    *EVERYWHERE,
    ("vision_encoder", "adapter"),
    *(("language_model", mode) for mode in ("adapter", "prefix", "prompt")),
]
SETTINGS = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
    "prefix": {"length": 3},
    "prompt": {"length": 5},
    "adapter": {"size": 8},
}
USED = {"qlora": "lora", "dora": "lora", "rslora": "lora"}


def section(**parts: Any) -> TuneSection:
    """The tuning of the parts given; all others are frozen."""
    used = {USED.get(tuning, tuning) for tuning in parts.values() if isinstance(tuning, str)}
    settings = {name: SETTINGS[name] for name in SETTINGS if name in used}
    return TuneSection.model_validate({"connector": "frozen", **settings, **parts})


def tuned(vision: str = "clip", text: str = "llama", **parts: Any) -> tuple[Any, MllmProcessor]:
    """A model tuned so, all that was added to it being far from its start."""
    model, processor = make_model(vision, text=text)
    before = set(model.state_dict())
    apply_tuning(model, section(**parts))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.replace(".base_layer.", ".") not in before:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, processor


def batch_of(processor: MllmProcessor) -> dict[str, Any]:
    batch = Collator(processor)(make_rows(4))  # type: ignore[arg-type]
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def generated(model: MllmForConditionalGeneration, inputs: Any, **kwargs: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, **kwargs)[:, -12:]


def added_by(mode: str, name: str) -> bool:
    """Whether a tensor of this name is what a tuning adds."""
    of_lora = ("lora_A.default.weight", "lora_B.default.weight")
    ends: dict[str, tuple[str, ...]] = {
        "lora": of_lora,
        "rslora": of_lora,
        "dora": (*of_lora, "lora_magnitude_vector.default.weight"),
        "ia3": ("ia3_l.default",),
        "adapter": tuple(f"bottleneck.{layer}.{t}" for layer in ("up", "down") for t in ("weight", "bias")),
        "prefix": ("soft_prompt.encoder.embedding.weight",),
        "prompt": ("soft_prompt.encoder.embedding.weight",),
    }
    return mode == "full" or name.endswith(ends[mode])


@pytest.mark.parametrize(("part", "mode"), KINDS)
def test_exactly_the_declared_parameters_change(part: str, mode: str) -> None:
    model, processor = make_model()
    report = {r.part: r for r in apply_tuning(model, section(**{part: mode}))}[part]
    behind = ("vision_encoder.encoder.layers.2.", "vision_encoder.post_layernorm.")
    want = {
        name: p.numel()
        for name, p in model.named_parameters()
        if name.startswith(f"{part}.") and not name.startswith(behind) and added_by(mode, name)
    }
    assert want
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(want)
    assert report.trainable == sum(want.values())
    alive, changed = two_steps(model, batch_of(processor))
    assert alive <= set(want)
    assert changed <= set(want)
    assert {name for name in set(want) - changed if not mathematically_still(name)} == set()


@pytest.mark.parametrize(("part", "mode"), KINDS)
def test_a_saved_model_is_the_same_model(part: str, mode: str, tmp_path: Path) -> None:
    model, processor = tuned(**{part: mode})
    bare, _ = make_model()
    want = logits_of(model, processor)
    assert mode == "full" or (logits_of(bare, processor) - want).abs().max() > 1e-3
    again, its_processor = mllm.load(save(model, processor, tmp_path / "saved"))
    assert torch.equal(logits_of(again, its_processor), want)
    # And it is trained on, not started anew.
    apply_tuning(again, section(**{part: mode}))
    assert torch.equal(logits_of(again, its_processor), want)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize(("part", "mode"), KINDS)
def test_the_cache_and_the_batch_change_nothing(part: str, mode: str) -> None:
    model, processor = tuned(**{part: mode})
    prompts = mixed_conversations()
    together = processor(prompts, add_generation_prompt=True)
    cached = generated(model, together, use_cache=True)
    assert torch.equal(cached, generated(model, together, use_cache=False))
    for prompt, row in zip(prompts, cached, strict=True):
        assert torch.equal(generated(model, processor([prompt], add_generation_prompt=True))[0], row)


@pytest.mark.parametrize("text", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("mode", MERGED)
def test_merged_is_unmerged(mode: str, text: str) -> None:
    model, processor = tuned(text=text, **dict.fromkeys(PARTS, mode))
    bare, _ = make_model(text=text)
    want = logits_of(model, processor)
    assert (logits_of(bare, processor) - want).abs().max() > 1e-2
    apply_tuning(model, section(connector="full"))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in bare.named_parameters()}
    torch.testing.assert_close(logits_of(model, processor), want, atol=1e-5, rtol=1e-5)


def test_only_the_part_that_is_tuned_otherwise_is_merged() -> None:
    model, processor = tuned(vision_encoder="lora", language_model="dora")
    want = logits_of(model, processor)
    kept = {n: p.clone() for n, p in model.named_parameters() if n.startswith("vision") and is_adapter(n)}
    apply_tuning(model, section(vision_encoder="lora", language_model="lora"))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in kept.items())
    assert all(p.abs().max() == 0 for n, p in now.items() if n.startswith("language") and "lora_B" in n)
    torch.testing.assert_close(logits_of(model, processor), want, atol=1e-5, rtol=1e-5)


def test_ia3_scales_what_the_paper_scales() -> None:
    model, _ = tuned(language_model="ia3")
    names = {n.split(".layers.0.")[1] for n, p in model.named_parameters() if p.requires_grad and ".0." in n}
    assert names == {
        f"{at}.ia3_l.default" for at in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    inner = model.language_model.model.layers[0].mlp.down_proj
    assert inner.is_feedforward
    assert inner.ia3_l["default"].numel() == 64


def test_lora_may_be_on_chosen_layers_only(tmp_path: Path) -> None:
    lora = {**SETTINGS["lora"], "target_modules": ["q_proj", "v_proj"]}
    model, processor = tuned(language_model="lora", lora=lora)
    layers = {n.split(".lora_")[0].rpartition(".")[2] for n, p in model.named_parameters() if is_adapter(n)}
    assert layers == {"q_proj", "v_proj"}
    again, _ = mllm.load(save(model, processor, tmp_path / "saved"))
    apply_tuning(again, section(language_model="lora", lora=lora))
    assert all(p.abs().max() > 0 for n, p in again.named_parameters() if "lora_B" in n)
    apply_tuning(again, section(language_model="lora"))
    assert all(p.abs().max() == 0 for n, p in again.named_parameters() if "lora_B" in n)
    with pytest.raises(ConfigError, match="target_modules: connector has no linear layer called"):
        apply_tuning(again, section(connector="lora", lora=lora))


@pytest.mark.parametrize("mode", [*MERGED, "adapter"])
def test_gradient_checkpointing_changes_nothing(mode: str) -> None:
    model, processor = tuned(vision_encoder=mode, language_model=mode)
    batch = batch_of(processor)
    model.train()
    model(**batch).loss.backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch).loss.backward()
    assert want
    for name, gradient in want.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["lora", "adapter", "prefix"])
def test_a_copy_has_modules_of_its_own(mode: str) -> None:
    model, processor = tuned(language_model=mode)
    want = logits_of(model, processor)
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert torch.equal(logits_of(copy, processor), want)
    assert not torch.equal(logits_of(model, processor), want)


# -- PEFT reads what we write -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MERGED)
def test_the_adapter_folder_is_pefts(mode: str, tmp_path: Path) -> None:
    model, processor = tuned(vision_encoder=mode, language_model=mode)
    folder = save(model, processor, tmp_path / "saved")
    bare, _ = make_model()
    wrapped = PeftModel.from_pretrained(bare, folder / "adapter")
    assert torch.equal(logits_of(wrapped, processor), logits_of(model, processor))


def test_parts_adapted_in_different_ways_are_a_folder_each(tmp_path: Path) -> None:
    model, processor = tuned(vision_encoder="lora", connector="dora", language_model="ia3")
    folder = save(model, processor, tmp_path / "saved")
    want = logits_of(model, processor)
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == ["dora", "ia3", "lora"]
    assert torch.equal(logits_of(*mllm.load(folder)), want)
    bare: Any = make_model()[0]
    for kind in ("lora", "dora", "ia3"):
        bare = PeftModel.from_pretrained(bare, folder / "adapter" / kind).merge_and_unload()
    torch.testing.assert_close(logits_of(bare, processor), want, atol=1e-5, rtol=1e-5)


# -- bottleneck adapters ----------------------------------------------------------------------------

BEHIND = {
    "clip": ("self_attn.out_proj", "mlp.fc2"),
    "siglip": ("self_attn.out_proj", "mlp.fc2"),
    "dinov2": ("attention.o_proj", "mlp.fc2"),
    "dinov2_registers": ("attention.o_proj", "mlp.fc2"),
    "blip2": ("self_attn.projection", "mlp.fc2"),
    "instructblip": ("self_attn.projection", "mlp.fc2"),
    "siglip2": ("self_attn.out_proj", "mlp.fc2"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("self_attn.o_proj", "mlp.down_proj"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


def bottlenecks(model: Any) -> list[str]:
    names = [name for name, module in model.named_modules() if name.endswith(".bottleneck")]
    return [name.removesuffix(".bottleneck") for name in names]


REFUSED = {"t5": "no one list of", "bit": "no one list of", "resnet": "no one list of"}


def test_every_family_is_tried() -> None:
    assert {*BEHIND, *REFUSED} == {*VISION_CONFIGS, *MORE_VISION_CONFIGS, *TEXT_CONFIGS}


def part_of_family(family: str) -> Any:
    return make_language_model(family) if family in TEXT_CONFIGS else make_vision(family)


@pytest.mark.parametrize("family", REFUSED)
def test_layers_of_another_build_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=f"tune.x is 'adapter': .*{REFUSED[family]}"):
        insert(part_of_family(family), "x", {"type": "adapter", "size": 8, "placement": "houlsby"})


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", BEHIND)
def test_bottlenecks_stand_behind_the_output_projections(family: str, placement: str) -> None:
    module = part_of_family(family)
    insert(module, "part", {"type": "adapter", "size": 8, "placement": placement})
    ends = BEHIND[family] if placement == "houlsby" else BEHIND[family][1:]
    found, depth = bottlenecks(module), module.config.num_hidden_layers
    assert len(found) == depth * len(ends)
    assert all(sum(name.endswith(f".{end}") for name in found) == depth for end in ends)


def test_a_bottleneck_computes_what_the_paper_says_before_the_residual() -> None:
    model, _ = tuned(language_model="adapter")
    layer = model.language_model.model.layers[0]
    x = torch.randn(2, 7, 32)
    inputs = {"position_ids": torch.arange(7)[None].expand(2, -1), "attention_mask": None}
    cos_sin = model.language_model.model.rotary_emb(x, inputs["position_ids"])

    def plain(projection: Any, y: torch.Tensor) -> torch.Tensor:
        down, up = projection.bottleneck.down, projection.bottleneck.up
        inner = torch.nn.functional.gelu(y @ down.weight.T + down.bias)
        return y + inner @ up.weight.T + up.bias

    hooks = [(p, p._forward_hooks.copy()) for p in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    want = layer(x, position_embeddings=cos_sin, **inputs)
    for projection, _ in hooks:
        projection._forward_hooks.clear()
    attention = layer.self_attn(layer.input_layernorm(x), position_embeddings=cos_sin, **inputs)[0]
    middle = x + plain(layer.self_attn.o_proj, attention)
    forward = layer.mlp(layer.post_attention_layernorm(middle))
    torch.testing.assert_close(middle + plain(layer.mlp.down_proj, forward), want, atol=1e-6, rtol=1e-5)


def test_bottlenecks_start_near_identity() -> None:
    model, processor = make_model()
    want = logits_of(model, processor)
    apply_tuning(model, section(language_model="adapter", vision_encoder="adapter"))
    found = logits_of(model, processor)
    assert not torch.equal(found, want)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


# -- what does not go together ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"vision_encoder": "qlora"}, "only the language model is loaded in 4 bit; use 'lora'"),
        ({"connector": "prefix"}, "connector cannot be 'prefix': there is no sequence of text"),
        ({"vision_encoder": "prompt"}, "vision_encoder cannot be 'prompt': there is no sequence of text"),
        ({"fusion": "lora"}, "'frozen' or 'full'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_when_it_is_read(parts: dict[str, str], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        section(**parts)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"connector": "adapter"}, "tune.connector is 'adapter': .* no one list of transformer layers"),
        ({"language_model": "qlora"}, "is 'qlora', but is not in 4 bit; compose with quantization='nf4'"),
    ],
)
def test_a_part_without_a_place_for_it_is_refused(parts: dict[str, str], reason: str) -> None:
    model, _ = make_model()
    with pytest.raises(ConfigError, match=reason) as error:
        apply_tuning(model, section(**parts))
    assert "\n" not in str(error.value)


def test_layers_that_are_not_one_known_stack_are_refused() -> None:
    """BART's would have been found in its encoder alone."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
    part = BartForConditionalGeneration(BartConfig(vocab_size=50, **sizes))
    with pytest.raises(ConfigError, match="BartForConditionalGeneration has no one list"):
        insert_bottlenecks(part, "adapter", size=4, placement="houlsby")
    block = make_language_model("t5").encoder.block[0]
    with pytest.raises(ConfigError, match="T5Block is not attention followed by"):
        output_projections(block, width=32)


def test_a_connector_without_linear_layers_is_refused() -> None:
    model, _ = make_model()
    model.connector = torch.nn.Conv1d(4, 4, 1)
    with pytest.raises(ConfigError, match=r"tune\.connector is 'ia3', but it has no linear layer to adapt"):
        apply_tuning(model, section(connector="ia3"))


@pytest.mark.parametrize("mode", ["adapter", "prefix", "prompt"])
def test_what_cannot_be_merged_is_kept_or_refused(mode: str, tmp_path: Path) -> None:
    model, processor = tuned(language_model=mode)
    want = logits_of(model, processor)
    model, processor = mllm.load(save(model, processor, tmp_path / "saved"))
    others = {"full", "lora", "adapter", "prefix", "prompt"} - {mode}
    for other in sorted(others):
        with pytest.raises(
            ConfigError, match=f"{mode!r}.*cannot be merged into weights; tune it as {mode!r}"
        ):
            apply_tuning(model, section(language_model=other))
    changed = {"size": 9} if mode == "adapter" else {"length": 9}
    with pytest.raises(ConfigError, match="cannot be merged"):
        apply_tuning(model, section(language_model=mode, **{mode: changed}))
    apply_tuning(model, section(connector="full"))  # frozen, it stays
    assert torch.equal(logits_of(model, processor), want)
    again, processor = mllm.load(save(model, processor, tmp_path / "again"))
    assert torch.equal(logits_of(again, processor), want)


# -- what the loss does not reach -------------------------------------------------------------------


class TwoBranches(torch.nn.Module):
    """A connector with a branch that is never called and one whose gradient is zero."""

    reads_text = False

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(32, 32)
        self.idle = torch.nn.Linear(32, 32)
        self.gate = torch.nn.Parameter(torch.zeros(1))
        self.gated = torch.nn.Linear(32, 32)

    def forward(self, features: torch.Tensor, *text: Any) -> torch.Tensor:
        return self.proj(features) + self.gate * self.gated(features)


def test_an_idle_branch_of_any_part_is_frozen_and_a_zero_gradient_is_not_idle() -> None:
    model, processor = make_model()
    model.connector = TwoBranches()
    report = apply_tuning(model, section(connector="full"))[1]
    assert report.unused == 32 * 32 + 32
    learns = {name for name, p in model.connector.named_parameters() if p.requires_grad}
    assert learns == {"proj.weight", "proj.bias", "gate", "gated.weight", "gated.bias"}
    model.train()
    model(**batch_of(processor)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("connector", ["qformer", "instruct_qformer"])
def test_whatever_of_a_qformer_trains_gets_a_gradient(connector: str) -> None:
    """The last layer computes what text tokens become, and nobody reads it: those gradients are zero."""
    model, processor = make_model(connector=connector)
    apply_tuning(model, section(connector="full"))
    model.train()
    model(**batch_of(processor)).loss.backward()
    for name, parameter in model.connector.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_manifest_tells_what_was_inserted(tmp_path: Path) -> None:
    model, processor = tuned(vision_encoder="adapter", language_model="prompt")
    folder = save(model, processor, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["inserted"] == {
        "vision_encoder": {"type": "adapter", "size": 8, "placement": "houlsby"},
        "language_model": {"type": "prompt", "length": 5, "init": "vocab"},
    }
    names = json.loads((folder / MANIFEST).read_text())["weights"]
    assert "language_model.soft_prompt.encoder.embedding.weight" in names
    assert sum(".bottleneck." in name for name in names) == 3 * 2 * 4
    pictures = processor([[user("hello", make_picture(0))]])
    assert torch.isfinite(mllm.load(folder)[0](**pictures).logits).all()
