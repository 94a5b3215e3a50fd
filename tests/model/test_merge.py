"""`mllm merge`: a checkpoint without adapters that computes what the one with adapters does."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    make_image_processor,
    make_language_model,
    make_model,
    make_vision,
    mixed_conversations,
    save_parts,
    scale_weights,
)
from pairs import bert_tokenizer
from runs import logits_of, make_world, run_config, tune

import mllm
from mllm import cli
from mllm.config import TuneSection
from mllm.errors import CheckpointError, ConfigError
from mllm.model.adapters import is_adapter
from mllm.model.checkpoint import MANIFEST, manifest_hash, read_manifest, save
from mllm.model.compose import compose
from mllm.model.convert import export_stock, merge_checkpoint
from mllm.model.convert import merge as merging
from mllm.model.pretraining.compose import compose_qformer_pretraining
from mllm.training.train import train
from mllm.training.tuning import apply_tuning

SETTINGS = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "prefix": {"length": 3}, "adapter": {"size": 8}}
USED = {"qlora": "lora", "dora": "lora", "rslora": "lora"}
KINDS = ("lora", "rslora", "dora", "ia3", "qlora")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def tuned(parts: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a checkpoint whose parts are tuned so, far from their start."""

    def make(dtype: torch.dtype = torch.float32, **tunings: str) -> Path:
        if "qlora" in tunings.values():
            pytest.importorskip("bitsandbytes")
        quantization = "nf4" if "qlora" in tunings.values() else None
        model, processor = compose(**parts, dtype=dtype, quantization=quantization)
        used = {USED.get(kind, kind) for kind in tunings.values()} & set(SETTINGS)
        settings: Any = {name: SETTINGS[name] for name in used}
        apply_tuning(model, TuneSection(**{"connector": "frozen", **tunings}, **settings))  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_adapter(name) or ".soft_prompt." in name or ".bottleneck." in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return save(model, processor, tmp_path / "tuned", record={"stage": "instruct", "step": 3})

    return make


def generated(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(mixed_conversations())
    return model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(kind: str, tuned: Any, tmp_path: Path) -> None:
    others = {} if kind == "qlora" else {"vision_encoder": kind, "connector": kind}
    folder = tuned(language_model=kind, **others)
    found = merge_checkpoint(folder, tmp_path / "merged")
    assert found.merged == {**others, "language_model": kind}
    assert found.proof.answered > 0
    assert found.rounding <= 1e-5
    before, after = mllm.load(folder), mllm.load(tmp_path / "merged")
    assert not any(is_adapter(name) for name, _ in after[0].named_parameters())
    assert not (tmp_path / "merged" / "adapter").exists()
    torch.testing.assert_close(logits_of(*after), logits_of(*before), atol=1e-5, rtol=1e-5)
    assert torch.equal(generated(*after), generated(*before))


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_in_16_bit_it_is_rounded_once(kind: str, tuned: Any, tmp_path: Path) -> None:
    folder = tuned(torch.bfloat16, language_model=kind)
    found = merge_checkpoint(folder, tmp_path / "merged")
    assert (found.dtype, found.proof.difference < 1e-5) == ("bfloat16", True)
    assert 1e-5 < found.rounding <= found.allowed
    exact = merge_checkpoint(folder, tmp_path / "exact", dtype="float32")
    assert (exact.dtype, exact.rounding <= 1e-5) == ("float32", True)
    rounded, whole = mllm.load(tmp_path / "merged")[0], mllm.load(tmp_path / "exact")[0]
    for name, weight in rounded.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name).to(weight.dtype)), name


def test_a_part_that_changed_needs_no_base_and_the_others_keep_theirs(
    tuned: Any, parts: dict[str, str], tmp_path: Path
) -> None:
    folder = tuned(language_model="lora")
    merge_checkpoint(folder, tmp_path / "merged")
    manifest = read_manifest(tmp_path / "merged")
    assert manifest["base"].keys() == {"vision_encoder"}
    assert manifest["parent"] == {"path": str(folder), "manifest": manifest_hash(folder)}
    assert (manifest["stage"], manifest["step"], manifest["merged"]) == (
        "instruct",
        3,
        {"language_model": "lora"},
    )
    assert manifest["adapter"] == {}
    merge_checkpoint(folder, tmp_path / "whole", whole=True)
    assert read_manifest(tmp_path / "whole")["base"] == {}
    want = logits_of(*mllm.load(folder))
    moved = Path(parts["vision_encoder"]).with_name("gone")
    shutil.move(parts["vision_encoder"], moved)
    try:
        assert torch.allclose(logits_of(*mllm.load(tmp_path / "whole")), want, atol=1e-5)
        with pytest.raises(CheckpointError, match="needs its base model"):
            merge_checkpoint(folder, tmp_path / "other")
        assert not (tmp_path / "other").exists()
        merge_checkpoint(folder, tmp_path / "other", base={"vision_encoder": moved})
    finally:
        shutil.move(moved, parts["vision_encoder"])


def test_another_base_is_one_line(
    tuned: Any, parts: dict[str, str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = tuned(language_model="lora")
    torch.manual_seed(5)
    shutil.copytree(parts["language_model"], tmp_path / "other")
    make_language_model().save_pretrained(tmp_path / "other")
    place = f"language_model={tmp_path / 'other'}"
    arguments = ["mllm", "merge", str(folder), str(tmp_path / "merged"), "--base", place]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert "is not the one this checkpoint was trained on" in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_refused_by_name_or_kept(tuned: Any, tmp_path: Path) -> None:
    folder = tuned(language_model="prefix")
    with pytest.raises(ConfigError, match="language_model is tuned as 'prefix', which no weight can take up"):
        merge_checkpoint(folder, tmp_path / "merged")
    shutil.rmtree(folder)
    folder = tuned(language_model="prefix", vision_encoder="lora")
    found = merge_checkpoint(folder, tmp_path / "merged")
    assert (found.merged, found.kept) == ({"vision_encoder": "lora"}, {"language_model": "prefix"})
    want = logits_of(*mllm.load(folder))
    assert torch.allclose(logits_of(*mllm.load(tmp_path / "merged")), want, atol=1e-5)
    with pytest.raises(ConfigError, match="nothing else to merge"):
        merge_checkpoint(tmp_path / "merged", tmp_path / "again")


def test_a_wrong_merge_writes_nothing(tuned: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tuned(language_model="lora")

    def scaled(module: Any) -> set[str]:
        changed = real(module)
        with torch.no_grad():
            module.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.01)
        return changed

    real = merging.merge_adapters
    monkeypatch.setattr(merging, "merge_adapters", scaled)
    with pytest.raises(CheckpointError, match="do not compute the same"):
        merge_checkpoint(folder, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]


def test_the_command_on_an_intermediate_checkpoint_and_the_export_of_what_it_writes(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    world = make_world(tmp_path / "world")
    config = run_config(world, tmp_path / "run", tune("lora", "full", "lora"), max_steps=2, save_steps=1)
    train(config)
    source = tmp_path / "run" / "checkpoint-1"
    monkeypatch.setattr(sys, "argv", ["mllm", "merge", str(source), str(tmp_path / "merged"), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["merged"] == {"vision_encoder": "lora", "language_model": "lora"}
    assert said["proof"]["difference"] <= 1e-5
    manifest = json.loads((tmp_path / "merged" / MANIFEST).read_text())
    assert (manifest["step"], manifest["base"]) == (1, {})
    assert "optimizer.pt" not in {path.name for path in (tmp_path / "merged").iterdir()}
    assert export_stock(tmp_path / "merged", tmp_path / "stock").difference <= 1e-5


@pytest.mark.parametrize("text", ["gpt2", "opt", "t5"])
def test_every_family_of_language_models(text: str, tmp_path: Path) -> None:
    model, processor = make_model(text=text)
    if text == "t5":  # its attention has no scale, so that large weights make large errors of small ones
        scale_weights(model.language_model, 0.25)
    apply_tuning(model, TuneSection(language_model="dora", connector="frozen", lora=SETTINGS["lora"]))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    found = merge_checkpoint(save(model, processor, tmp_path / "tuned"), tmp_path / "merged")
    assert (found.merged, found.rounding <= 1e-5) == ({"language_model": "dora"}, True)


def test_a_model_of_a_stage_on_pairs_by_its_probe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    qformer = {
        "num_queries": 5,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "intermediate": 64,
        "max_positions": 60,
    }
    model, processor = compose_qformer_pretraining(
        make_vision(), bert_tokenizer(), qformer, image_processor=make_image_processor(), embed_dim=16
    )
    apply_tuning(model, TuneSection(vision_encoder="lora", lora=SETTINGS["lora"]))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    found = merge_checkpoint(save(model, processor, tmp_path / "tuned"), tmp_path / "merged")
    assert (found.merged, found.rounding <= 1e-5) == ({"vision_encoder": "lora"}, True)
