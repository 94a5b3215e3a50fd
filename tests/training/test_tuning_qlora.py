"""QLoRA: the language model's base in 4 bit, adapters on it; saved, loaded, continued and merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vision, mixed_conversations
from runs import logits_of, make_world, run_config, tune
from test_tuning import two_steps
from test_tuning_modes import batch_of, generated

import mllm
from mllm.config import TuneSection
from mllm.errors import ConfigError
from mllm.model.adapters import is_adapter
from mllm.model.checkpoint import MANIFEST, origin_of, save
from mllm.model.compose import compose
from mllm.training.build import build
from mllm.training.train import train
from mllm.training.tuning import apply_tuning

pytest.importorskip("bitsandbytes")
QLORA = ("frozen", "full", "qlora")
STAGE_1 = ("frozen", "full", "frozen")
WITH_QLORA = TuneSection(language_model="qlora")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(text: str) -> Path:
        if text not in made:
            made[text] = make_world(tmp_path_factory.mktemp(text), text=text)
        return made[text]

    return get


def tuned(world: Path, *parts: str, dtype: str = "float32", **init: Any) -> tuple[Any, Any]:
    """A model built and tuned as a run would, its adapters far from their start."""
    config = run_config(world, world / "none", parts or QLORA)  # type: ignore[arg-type]
    section = config.model.model_copy(update={"dtype": dtype, **init})
    model, processor = build(section, config.tune)
    apply_tuning(model, config.tune)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model, processor


def section(*parts: str) -> TuneSection:
    return TuneSection.model_validate(tune(*parts))


@pytest.mark.parametrize("text", ["llama", "gpt2", "opt"])
def test_only_the_linear_layers_of_the_language_model_are_in_4_bit(worlds: Any, text: str) -> None:
    model, processor = tuned(worlds(text))
    packed = {n for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed
    assert {name.split(".", 1)[0] for name in packed} == {"language_model"}
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    assert {name.removesuffix(".base_layer.weight") for name in packed} == adapted
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32
    alive, changed = two_steps(model, batch_of(processor))
    want = {n for n, _ in model.named_parameters() if is_adapter(n) or n.startswith("connector.")}
    assert alive == changed == want
    model.load_state_dict(model.state_dict())  # with every key, as DeepSpeed loads


def test_a_packed_weight_is_counted_as_what_it_was(worlds: Any) -> None:
    config = run_config(worlds("llama"), Path("none"), QLORA)
    packed = apply_tuning(build(config.model, config.tune)[0], config.tune)[2]
    dense = apply_tuning(build(config.model)[0], section("frozen", "full", "lora"))[2]
    assert (packed.total, packed.trainable) == (dense.total, dense.trainable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_about_what_the_whole_one_does(worlds: Any, dtype: str) -> None:
    """4 bit of weights leave some 10 % of error; a wrong scale or order would leave more than 100 %."""
    config = run_config(worlds("llama"), Path("none"), QLORA)
    plain = config.model.model_copy(update={"dtype": dtype})
    whole, _ = build(plain)
    packed, _ = build(plain, config.tune)
    ids = torch.randint(3, 200, (2, 9))
    want, found = (m(input_ids=ids).logits.float() for m in (whole, packed))
    assert 0 < (found - want).norm() < 0.4 * want.norm()


@pytest.mark.parametrize("text", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_is_the_same_model(worlds: Any, tmp_path: Path, text: str, dtype: str) -> None:
    model, processor = tuned(worlds(text), dtype=dtype)
    want = logits_of(model, processor)
    folder = save(model, processor, tmp_path / "saved")
    manifest = json.loads((folder / MANIFEST).read_text())
    base = manifest["base"]["language_model"]
    assert (base["quantization"], base["dtype"]) == ("nf4", dtype)
    assert not any(name.startswith("language_model.") for name in manifest["weights"])
    again, processor = mllm.load(folder)
    assert torch.equal(logits_of(again, processor), want)
    assert any(p.dtype == torch.uint8 for p in again.parameters())
    inputs = processor(mixed_conversations(), add_generation_prompt=True)
    assert torch.equal(generated(again, inputs), generated(again, inputs, use_cache=False))


@pytest.mark.parametrize("text", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("after", ["frozen", "full", "lora"])
def test_merged_it_is_a_whole_model_that_computes_the_same(
    worlds: Any, tmp_path: Path, text: str, after: str
) -> None:
    model, processor = tuned(worlds(text))
    want = logits_of(model, processor)
    apply_tuning(model, section("frozen", "full", after))
    torch.testing.assert_close(logits_of(model, processor), want, atol=1e-5, rtol=1e-5)
    assert all(p.is_floating_point() for p in model.parameters())
    assert "language_model" not in origin_of(model).base
    again, processor = mllm.load(save(model, processor, tmp_path / "merged"))
    torch.testing.assert_close(logits_of(again, processor), want, atol=1e-5, rtol=1e-5)


def test_two_stages_of_a_recipe_and_a_third_that_goes_on(worlds: Any, tmp_path: Path) -> None:
    world = worlds("llama")
    first = train(run_config(world, tmp_path / "first", STAGE_1))
    second = train(run_config(world, tmp_path / "second", QLORA, {"init_from": str(first)}))
    third = train(run_config(world, tmp_path / "third", QLORA, {"init_from": str(second)}, max_steps=1))
    connector, adapters = [], []
    for folder in (first, second, third):
        manifest = json.loads((folder / MANIFEST).read_text())
        connector.append({entry["sum"] for entry in manifest["weights"].values()})
        adapters.append({entry["sum"] for entry in manifest["adapter"].values()})
    assert connector[0] != connector[1] != connector[2]
    assert not adapters[0]
    assert adapters[1] != adapters[2]
    model, _ = build(
        run_config(world, tmp_path / "x", QLORA, {"init_from": str(second)}).model, section(*QLORA)
    )
    before = {n: p.clone() for n, p in model.named_parameters() if is_adapter(n)}
    apply_tuning(model, section(*QLORA))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if is_adapter(n))


@pytest.mark.parametrize("tuning", [("frozen", "full", "full"), ("frozen", "full", "lora")])
def test_a_language_model_that_was_trained_is_not_put_in_4_bit(
    worlds: Any, tmp_path: Path, tuning: tuple[str, str, str]
) -> None:
    world = worlds("llama")
    first = train(run_config(world, tmp_path / "first", tuning, max_steps=1))
    with pytest.raises(ConfigError, match=r"its language model was trained .*; tune it as 'lora', or export"):
        train(run_config(world, tmp_path / "second", QLORA, {"init_from": str(first)}))


def test_experts_start_as_what_the_layers_in_4_bit_compute(worlds: Any) -> None:
    section = run_config(worlds("llama"), Path("none"), QLORA).model
    fusion, connector = {"type": "visual_expert"}, {"type": "glu", "intermediate": 32}
    model, _ = build(section.model_copy(update={"fusion": fusion, "connector": connector}), TuneSection())
    packed, _ = build(section.model_copy(update={"fusion": fusion, "connector": connector}), WITH_QLORA)
    layer = packed.language_model.model.layers[0].mlp.down_proj
    assert layer.weight.dtype == torch.uint8
    expert = packed.fusion.experts[0]["mlp_down_proj"]
    x = torch.randn(5, expert.in_features)
    with torch.no_grad():
        for handle in packed.fusion._handles:  # without them the layer takes any input
            handle.remove()
        torch.testing.assert_close(expert(x), layer(x), atol=1e-5, rtol=1e-5)
    assert not torch.equal(expert.weight, model.fusion.experts[0]["mlp_down_proj"].weight)


def test_a_gpu_does_not_part_it_from_the_rest(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would load a model in 4 bit onto the GPU at once, and the other parts are not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = run_config(worlds("llama"), Path("none"), QLORA)
    model, _ = build(config.model, config.tune)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_an_object_is_not_put_in_4_bit(worlds: Any) -> None:
    with pytest.raises(ConfigError, match="only a directory or Hub name can be loaded in 4 bit"):
        compose(make_vision(), make_vision(), quantization="nf4")


def test_a_packed_weight_cannot_be_an_exception(worlds: Any) -> None:
    config = run_config(worlds("llama"), Path("none"), QLORA)
    model, _ = build(config.model, config.tune)
    overrides = {"language_model.model.layers.0": "full"}
    with pytest.raises(ConfigError, match="is in 4 bit and cannot be trained"):
        apply_tuning(model, config.tune.model_copy(update={"overrides": overrides}))
