"""The stages before alignment: recipes that train, save, resume, and hand on what they made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_image_processor, make_picture, make_vision, save_parts
from pairs import CAPTIONS, bert_tokenizer, clip_tokenizer
from transformers import AutoConfig, BertModel, Blip2VisionConfig, Blip2VisionModel

from mllm.config import RunConfig
from mllm.data.pairs import PairCollator, pair_of
from mllm.data.schema import Row, assistant, user
from mllm.errors import CheckpointError, ConfigError, DataError
from mllm.model import load
from mllm.model.parts import load_vision_encoder
from mllm.model.pretraining.compose import compose_dual_encoder
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.training.metrics import read_metrics
from mllm.training.train import train

REPOSITORY = Path(__file__).parents[2]
QFORMER = {"num_queries": 4, "width": 32, "layers": 2, "heads": 4, "intermediate": 64, "dropout": 0.0}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"model_type": "clip_text_model", **WIDTH, "max_position_embeddings": 16}
# SigLIP's pools the last place, padding or not; all encoders here are new.
SIGLIP = {
    "vision_encoder": {"model_type": "siglip_vision_model", **WIDTH, "image_size": 32, "patch_size": 8},
    "text_encoder": {"model_type": "siglip_text_model", **WIDTH, "projection_size": 32},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models, two tokenizers, and fourteen captioned pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("world")
    save_parts(folder)
    bert_tokenizer().save_pretrained(folder / "bert")
    clip_tokenizer().save_pretrained(folder / "text")
    rows = []
    for i in range(14):
        make_picture(i).save(folder / f"{i}.png")
        rows.append(
            {"id": f"r{i}", "messages": [user("", f"{i}.png"), assistant(f"{CAPTIONS[i % 4]} {i % 6}")]}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(
    world: Path, out: Path, stage: str, model: dict[str, Any], tuning: dict[str, Any], **train: Any
) -> dict[str, Any]:
    """A few steps; a constant rate, so that a shorter run is a longer one's start."""
    options = {
        "output_dir": str(out),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "per_device_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        **train,
    }
    data = {"path": str(world / "rows.jsonl"), "image_root": str(world)}
    return {"stage": stage, "model": model, "tune": tuning, "data": data, "train": options}


def run(
    world: Path,
    out: Path,
    stage: str,
    model: dict[str, Any],
    tuning: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Train by such a recipe."""
    return train(RunConfig.model_validate(recipe(world, out, stage, model, tuning or {}, **more)))


def qformer_model(world: Path) -> dict[str, Any]:
    return {
        "vision_encoder": str(world / "vision"),
        "tokenizer": str(world / "bert"),
        "connector": {"type": "qformer", **QFORMER},
        "vision_feature_layer": "last",
        "vision_feature_select": "full",
        "pretraining": {"embed_dim": 16, "max_text_length": 12},
    }


def vision_model(world: Path, objective: str = "clip") -> dict[str, Any]:
    return {
        "vision_encoder": str(world / "vision"),
        "text_encoder": TEXT,
        "tokenizer": str(world / "text"),
        "pretraining": {"objective": objective, "embed_dim": 16, "max_text_length": 12},
    }


LN_TRAINED = {"overrides": {"vision_encoder.post_layernorm": "full"}, "vision_encoder": "frozen"}


@pytest.fixture(scope="module")
def stage0(world: Path) -> Path:
    """A Q-Former pretrained for three steps behind a frozen encoder."""
    return run(world, world / "stage0", "pretrain_qformer", qformer_model(world))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load(path)[0].state_dict()


# -- training ---------------------------------------------------------------------------------------


def test_a_stream_of_pairs(world: Path, tmp_path: Path) -> None:
    """Pairs have no lengths to measure; a row has one picture and one caption."""
    lines = [{"caption": f"{CAPTIONS[i % 4]} {i % 6}", "image": str(world / f"{i}.png")} for i in range(14)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = recipe(world, tmp_path / "run", "pretrain_vision", vision_model(world), {})
    made["data"] = {"path": f"hf:{tmp_path / 'train.jsonl'}", "streaming": True}
    made["tune"] = LN_TRAINED
    output = train(RunConfig.model_validate(made))
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line] == [1, 2, 3]


def test_qformer_stage_trains_all_but_the_encoder(world: Path, stage0: Path) -> None:
    lines = [line for line in read_metrics(stage0 / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        parts = [line[f"loss/{name}"] for name in ("itc", "itm", "itg")]
        assert min(parts) > 0
        assert line["loss"] == pytest.approx(sum(parts), abs=1e-3)
    model, _ = load(stage0)
    before = load_vision_encoder(world / "vision").state_dict()
    for name, tensor in model.vision_encoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    saved = json.loads((stage0 / "mllm_manifest.json").read_text())
    assert saved["stage"] == "pretrain_qformer"
    assert {name.split(".")[0] for name in saved["weights"]} == {"connector", "heads"}


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_vision_stage_hands_on_an_encoder(world: Path, tmp_path: Path, objective: str) -> None:
    """Another recipe can name the folder: weights and preprocessing are what the stage left."""
    section = vision_model(world, objective)
    if objective == "siglip":
        section |= {**SIGLIP, "image_processor": str(world / "vision")}
    out = run(world, tmp_path / "v", "pretrain_vision", section, {"vision_encoder": "full"})
    model, _ = load(out)
    encoder = load_vision_encoder(out / "vision_encoder")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, model.vision_encoder.state_dict()[name])
    assert (encoder.post_layernorm.weight - 1).abs().max() > 1e-4
    assert (model.heads.bias is None) == (objective == "clip")
    parts = {
        "vision_encoder": str(out / "vision_encoder"),
        "language_model": str(world / "language"),
        "template": "plain",
    }
    aligned = run(world, tmp_path / "a", "align", parts, max_steps=1)
    assert torch.equal(
        tensors(aligned)["vision_encoder.post_layernorm.weight"], encoder.post_layernorm.weight
    )


@pytest.mark.parametrize("stage", ["pretrain_qformer", "pretrain_vision"])
def test_a_resumed_run_ends_where_the_whole_one_does(world: Path, tmp_path: Path, stage: str) -> None:
    vision = stage == "pretrain_vision"
    model = vision_model(world) if vision else qformer_model(world)
    tuning = {"vision_encoder": "full" if vision else "frozen"}
    whole = run(world, tmp_path / "whole", stage, model, tuning, max_steps=4, save_steps=2)
    run(world, tmp_path / "cut", stage, model, tuning, max_steps=2, save_steps=2)
    resumed = run(world, tmp_path / "cut", stage, model, tuning, max_steps=4, save_steps=2, resume=True)
    ours, theirs = tensors(whole), tensors(resumed)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("stage", ["pretrain_qformer", "pretrain_vision"])
def test_two_ranks_of_four_train_as_one_of_eight(world: Path, tmp_path: Path, stage: str) -> None:
    """Through Trainer and DDP: negatives, losses and gradients are those of the global batch."""
    model = vision_model(world, "siglip") if stage == "pretrain_vision" else qformer_model(world)
    one = run(
        world,
        tmp_path / "one",
        stage,
        model,
        {"vision_encoder": "full"},
        per_device_batch_size=8,
        max_steps=2,
    )
    two = recipe(world, tmp_path / "two", stage, model, {"vision_encoder": "full"}, max_steps=2)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(REPOSITORY / "scripts" / "train.py"), str(tmp_path / "two.yaml")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    single, double = (read_metrics(path / "metrics.jsonl") for path in (one, tmp_path / "two"))
    for left, right in zip(single, double, strict=True):
        for key in left:
            if key.startswith(("loss", "grad_norm")):
                assert right[key] == pytest.approx(left[key], rel=1e-4), key
    ours, theirs = tensors(one), tensors(tmp_path / "two")
    far = max((tensor - theirs[name]).abs().max().item() for name, tensor in ours.items())
    assert far < 1e-4


def test_a_half_precision_encoder_with_a_trained_norm(world: Path, tmp_path: Path) -> None:
    """BLIP-2's setting: the frozen encoder in bf16, its last norm trained in float32 and taken along."""
    bert = {"model_type": "bert", **WIDTH, "vocab_size": len(bert_tokenizer())}
    BertModel(AutoConfig.for_model(**bert)).save_pretrained(world / "bert")
    blip2 = Blip2VisionConfig(**WIDTH, image_size=32, patch_size=8, initializer_range=0.1)
    Blip2VisionModel(blip2).save_pretrained(tmp_path / "eva")
    make_image_processor().save_pretrained(tmp_path / "eva")
    common = {"vision_encoder": str(tmp_path / "eva"), "dtype": "bfloat16"}
    model = qformer_model(world) | common | {"text_encoder": str(world / "bert")}
    stage0 = run(world, tmp_path / "s", "pretrain_qformer", model, LN_TRAINED, bf16=True)
    name = "vision_encoder.post_layernorm.weight"
    trained = tensors(stage0)[name]
    assert trained.dtype == torch.float32
    assert (trained - 1).abs().max() > 1e-4
    align = align_model(world, stage0) | common
    out = run(world, tmp_path / "a", "align", align, LN_TRAINED, max_steps=1, bf16=True, learning_rate=1e-9)
    torch.testing.assert_close(tensors(out)[name], trained, rtol=0, atol=1e-6)


def test_an_encoder_of_another_stage_is_refused(world: Path, tmp_path: Path, stage0: Path) -> None:
    with pytest.raises(CheckpointError, match="QFormerForPretraining, this stage goes on with a DualEncoder"):
        run(world, tmp_path / "x", "pretrain_vision", {"init_from": str(stage0)})


def test_a_stage_goes_on_from_its_own_checkpoint(world: Path, tmp_path: Path, stage0: Path) -> None:
    out = run(world, tmp_path / "x", "pretrain_qformer", {"init_from": str(stage0)}, max_steps=1)
    assert json.loads((out / "mllm_manifest.json").read_text())["parent"]["path"] == str(stage0)


@pytest.mark.parametrize(
    ("stage", "model", "message"),
    [
        ("pretrain_vision", {"vision_encoder": "v"}, "both model.vision_encoder and model.text_encoder"),
        ("pretrain_qformer", {"vision_encoder": "v"}, "both model.vision_encoder and model.tokenizer"),
        ("instruct", {"init_from": "c", "connector_from": "d"}, "model.connector_from is decided by"),
        (
            "pretrain_vision",
            {"init_from": "c", "connector_from": "d"},
            "connector_from means nothing in the stage",
        ),
    ],
)
def test_what_a_stage_lacks_is_said(stage: str, model: dict[str, str], message: str) -> None:
    rest = {"data": {"path": "p"}, "train": {"output_dir": "o"}}
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        RunConfig.model_validate({"stage": stage, "model": model, **rest})


# -- pairs ------------------------------------------------------------------------------------------


def test_pairs_are_padded_alike_and_a_row_that_is_none_is_named() -> None:
    processor = PairProcessor(make_image_processor(), bert_tokenizer(), max_text_length=9)
    good: Row = {"id": "g", "messages": [user("say", make_picture(0)), assistant(" a cat ")]}
    assert pair_of(good)[1] == "a cat"
    batch = PairCollator(processor)([good, good])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 9)
    assert batch["attention_mask"][0].tolist() == [1] * 4 + [0] * 5
    for messages in ([user("a"), assistant("b")], [user("a", make_picture(0)), assistant(" ")]):
        with pytest.raises(DataError, match=r"row bad: .* a pair is one image and one caption"):
            PairCollator(processor)([good, {"id": "bad", "messages": messages}])
    with pytest.raises(DataError, match=r"row lost: image 'no\.png' does not exist"):
        PairCollator(processor)([{"id": "lost", "messages": [user("a", "no.png"), assistant("b")]}])


def test_a_text_encoder_that_does_not_hear_the_text_is_refused() -> None:
    """CLIP pools at the end token; where the tokenizer writes another, it would pool at the first."""
    others = {"tokenizer": clip_tokenizer(), "image_processor": make_image_processor()}
    with pytest.raises(ConfigError, match="which the tokenizer does not write"):
        compose_dual_encoder(make_vision(), {**TEXT, "eos_token_id": 1}, max_text_length=12, **others)
    with pytest.raises(ConfigError, match="max_text_length is 32, but the text encoder has 16 positions"):
        compose_dual_encoder(make_vision(), TEXT, **others)
    gpt = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    with pytest.raises(ConfigError, match="no pooled output"):
        compose_dual_encoder(make_vision(), gpt, **others)


# -- what alignment takes over ----------------------------------------------------------------------


def align_model(world: Path, source: Path, **connector: Any) -> dict[str, Any]:
    return {
        "vision_encoder": str(world / "vision"),
        "language_model": str(world / "language"),
        "connector": {"type": "qformer", **QFORMER, **connector},
        "connector_from": str(source),
        "vision_feature_layer": "last",
        "vision_feature_select": "full",
        "template": "plain",
    }


def test_alignment_starts_from_the_pretrained_qformer(
    world: Path, tmp_path: Path, stage0: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frozen = {"connector": "full", "overrides": {"connector.qformer": "frozen", "connector.query": "frozen"}}
    out = run(world, tmp_path / "a", "align", align_model(world, stage0), frozen, max_steps=1)
    before, after = tensors(stage0), tensors(out)
    kept = [name for name in after if name.startswith("connector.") and ".proj." not in name]
    assert len(kept) > 40
    for name in kept:
        assert torch.equal(after[name], before[name]), name
    message = next(record.getMessage() for record in caplog.records if "not used" in record.getMessage())
    assert "connector.qformer.layers.*.text_mlp.up" in message
    assert "heads.itm_head" in message


def test_an_instruction_aware_connector_takes_the_text_branch_and_its_tokenizer(
    world: Path, tmp_path: Path, stage0: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = align_model(world, stage0, type="instruct_qformer", vocab_size=len(bert_tokenizer()) + 1)
    model |= {"instruction_tokenizer": str(stage0), "template": "vicuna_v1"}
    out = run(world, tmp_path / "i", "instruct", model, max_steps=1, learning_rate=1e-9)
    before, (trained, processor) = tensors(stage0), load(out)
    after = trained.state_dict()
    names = [name for name in before if name.startswith("connector.")]
    assert any(".text_mlp." in name for name in names)
    for name in names:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    message = next(record.getMessage() for record in caplog.records if "not used" in record.getMessage())
    assert "qformer" not in message.partition("not used")[2]
    assert processor.instruction_tokenizer.tokenizer.bos_token == "[DEC]"


def test_alignment_takes_the_norm_that_was_trained_with_the_qformer(world: Path, tmp_path: Path) -> None:
    model = qformer_model(world) | {"vision_feature_layer": "pooled"}  # only there CLIP's last norm counts
    model["vision_encoder"] = str(world / "vision")
    stage0 = run(world, tmp_path / "s", "pretrain_qformer", model, LN_TRAINED)
    name = "vision_encoder.post_layernorm.weight"
    trained = tensors(stage0)[name]
    assert not torch.equal(trained, load_vision_encoder(world / "vision").post_layernorm.weight)
    align = align_model(world, stage0) | {"vision_feature_layer": "pooled"}
    out = run(world, tmp_path / "a", "align", align, max_steps=1)
    assert torch.equal(tensors(out)[name], trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, r"'connector\.qformer\.layers\.2\..*' is absent"),
        ({"num_queries": 5}, r"'connector\.query' is \[1, 4, 32\] in .* and \[1, 5, 32\]"),
    ],
)
def test_a_connector_that_differs_is_refused(
    world: Path, tmp_path: Path, stage0: Path, change: dict[str, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        run(world, tmp_path / "a", "align", align_model(world, stage0, **change))


def test_another_vision_encoder_is_refused(world: Path, tmp_path: Path, stage0: Path) -> None:
    torch.manual_seed(5)
    make_vision().save_pretrained(tmp_path / "other")
    make_image_processor().save_pretrained(tmp_path / "other")
    model = align_model(world, stage0) | {"vision_encoder": str(tmp_path / "other")}
    with pytest.raises(CheckpointError, match="use the same vision encoder"):
        run(world, tmp_path / "a", "align", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -2}, "was trained with vision_feature_layer 'last', this model has -2"),
        ({"vision_feature_select": "patch"}, "was trained with num_prefix_tokens 0, this model has 1"),
        ({"connector": {"type": "linear"}}, "this connector is one projection, always new"),
    ],
)
def test_other_features_are_refused(
    world: Path, tmp_path: Path, stage0: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        run(world, tmp_path / "a", "align", align_model(world, stage0) | change)
