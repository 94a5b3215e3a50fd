"""What `plan` predicts is what real runs take: bytes counted on tiny models, FLOPs by PyTorch's counter."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import make_world, run_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.errors import ConfigError
from mllm.training.build import build
from mllm.training.flops import attention_flops, decoder_flops
from mllm.training.memory import WAYS, Measure, bytes_a_rank, way_of
from mllm.training.outline import example_batch, outline
from mllm.training.plan import Gpus, plan, step_flops
from mllm.training.recompute import checkpoint_selectively
from mllm.training.shapes import id_of
from mllm.training.train import train
from mllm.training.tuning import apply_tuning, upcast_trained

TUNINGS = {
    "stage 1": ("frozen", "full", "frozen"),
    "lora": ("frozen", "full", "lora"),
    "full": ("full", "full", "full"),
}
TOKENS = 96
ROWS = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("plan"))


class Sizes(TrainerCallback):
    """Bytes of weights, gradients and optimiser states of a run."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.weights = sum(p.nbytes for p in model.parameters())
        self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        states = kwargs["optimizer"].state.values()
        self.optimizer = sum(x.nbytes for one in states for x in one.values() if torch.is_tensor(x))


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_run_keeps(tuning: str, dtype: str, world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS[tuning], bf16=dtype == "bfloat16", max_steps=1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    watch = Sizes()
    train(config, callbacks=[watch])
    found = bytes_a_rank(Measure(config, deepspeed=False).facts(TOKENS), WAYS[0], 1, ROWS, False)
    assert found.weights == watch.weights
    assert found.gradients == watch.gradients
    assert found.optimizer == pytest.approx(watch.optimizer, rel=0.01)  # and a step counter each


def kept_by(model: Any, batch: dict[str, torch.Tensor], autocast: torch.dtype | None) -> int:
    """Bytes that one real forward pass leaves behind, its outputs among them."""
    own = {id_of(t) for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(id_of(tensor), tensor)
        return tensor

    gc.collect()
    before = {id(x) for x in gc.get_objects() if isinstance(x, torch.Tensor)}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        loss = model.train()(**batch).loss
    # What is recomputed keeps its inputs in closures, which the hooks do not see.
    for held in gc.get_objects():
        new = isinstance(held, torch.Tensor) and id(held) not in before
        if new and (held.is_floating_point() or held.dtype == torch.bool):
            kept.setdefault(id_of(held), held)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_activations(
    tuning: str, autocast: torch.dtype | None, checkpointing: bool | str, world: Path, tmp_path: Path
) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS[tuning], bf16=autocast is not None)
    model: Any
    model, processor = build(config.model)
    apply_tuning(model, config.tune)
    upcast_trained(model, config.tune)
    if checkpointing == "selective":
        checkpoint_selectively(model)
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    measured = kept_by(model, example_batch(model, processor, ROWS, TOKENS), autocast)
    found = bytes_a_rank(Measure(config, deepspeed=False).facts(TOKENS), WAYS[0], 1, ROWS, checkpointing)
    assert found.activations + found.logits == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_flops_are_those_of_pytorchs_counter(tuning: str, world: Path, tmp_path: Path) -> None:
    """A real forward and backward pass; the counter sees no attention on a CPU, so it has none here."""
    config = run_config(world, tmp_path / "run", TUNINGS[tuning])
    model: Any
    model, processor = build(config.model)
    apply_tuning(model, config.tune)
    with FlopCounterMode(display=False) as counter:
        model.train()(**example_batch(model, processor, 2, 3 * TOKENS)).loss.backward()
    trace = Measure(config, deepspeed=False).trace(2, 3 * TOKENS)
    counted = {key: flops + trace.backward[key] for key, flops in trace.forward.items()}
    products = sum(flops for key, flops in counted.items() if "attention" not in key)
    # Of a trained encoder, the layer behind the feature layer is counted too.
    exact = 0.001 if config.tune.vision_encoder == "frozen" else 0.01
    assert products == pytest.approx(counter.get_total_flops(), rel=exact)


@pytest.mark.parametrize("tuning", ["stage 1", "lora", "full"])
def test_formulas_are_the_counts(tuning: str, world: Path, tmp_path: Path) -> None:
    """N, H, d and L in the formula of the language model give what is counted on its modules."""
    config = run_config(world, tmp_path / "run", TUNINGS[tuning])
    model: Any = outline(config)[0]
    language_model = model.language_model
    head = language_model.get_output_embeddings().weight
    matrices = [p for p in language_model.model.layers.parameters() if p.dim() == 2]
    last = list(model.label_feed_forward.module.parameters())
    before, at_labels = [p for p in matrices if all(p is not q for q in last)], [*last, head]
    lengths, labels = [50, 96], 30
    formula = decoder_flops(
        lengths, labels, weights=sum(p.numel() for p in before), head=sum(p.numel() for p in at_labels),
        width=language_model.config.hidden_size, layers=language_model.config.num_hidden_layers,
        trained=sum(p.numel() for p in before if p.requires_grad),
        head_trained=sum(p.numel() for p in at_labels if p.requires_grad),
    )  # fmt: skip
    tokens = Measure(config, deepspeed=False)
    longer = example_batch(tokens.model, tokens.processor, 1, 0)["input_ids"].shape[1] + 8
    flops = step_flops(tokens.trace(2, longer), 2, longer)
    assert flops.of(lengths, 0, labels) == pytest.approx(formula, rel=0.01)


def test_published_size() -> None:
    """LLaVA-1.5 7B from its configurations: LoRA's 319.8 M weights and 27.8 GFLOP a token, 38.9 in full."""
    flops: dict[str, float] = {}
    trained = {}
    head = 4096 * 32000
    for tuning in ("frozen", "lora", "full"):
        measured = Measure(published(tuning), deepspeed=True)
        trained[tuning] = {report.part: report.trainable for report in measured.reports}
        step = step_flops(measured.trace(2, 800), 2, 800)
        last = step.label - (6 if tuning == "full" else 4) * head  # the last feed-forward, at labels only
        flops[tuning] = (step.token + last) / 1e9
    assert trained["lora"] == {"vision_encoder": 0, "connector": 20_979_712, "language_model": 319_815_680}
    assert flops == pytest.approx({"frozen": 25.9, "lora": 27.8, "full": 38.9}, rel=0.002)
    facts = measured.facts(2048)
    zero3 = bytes_a_rank(facts, WAYS[3], 8, 16, True)
    parameters = 303_507_456 + 20_979_712 + 6_738_415_616
    assert zero3.weights == 2 * parameters // 8
    assert zero3.optimizer == 12 * (parameters - 303_507_456) // 8


def published(tuning: str, **language_model: Any) -> RunConfig:
    """LLaVA-1.5 7B, its parts as configurations."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
        "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
    }  # fmt: skip
    llama = {"model_type": "llama", **language_model}
    parts = {"vision_encoder": vision, "language_model": llama, "dtype": "bfloat16"}
    return RunConfig.model_validate(
        {
            "stage": "instruct",
            "model": parts,
            "tune": {"language_model": tuning},
            "data": {"path": "none.jsonl"},
            "train": {"output_dir": "runs/none", "bf16": True, "per_device_batch_size": 16},
        }
    )


def test_attention_is_half_with_causality() -> None:
    assert attention_flops(10, 10, 4, False) == 4 * 10 * 10 * 4 == 2 * attention_flops(10, 10, 4, True)


def test_what_to_change_fits() -> None:
    """Every suggestion is one that the plan itself finds to fit, with the same rows a step."""
    config = published("lora", num_hidden_layers=2)
    cards = Gpus(8, 4)
    found = plan(config, cards, tflops=100)
    assert not next(option.fits for option in found.options if option.chosen)
    assert found.changes
    sizes = [int((re.findall(r"batch_size=(\d+)", change) or [16])[0]) for change in found.changes]
    assert sizes == sorted(sizes, reverse=True)
    for change in found.changes:
        changed: dict[str, Any] = {}
        for pair in change.split():
            key, value = pair.removeprefix("train.").split("=")
            changed[key] = {"null": None, "true": True}.get(value, int(value) if value.isdigit() else value)
        train_section = config.train.model_copy(update=changed)
        assert train_section.per_device_batch_size * train_section.gradient_accumulation_steps == 16
        again = plan(config.model_copy(update={"train": train_section}), cards, tflops=100)
        assert next(option.fits for option in again.options if option.chosen), change


def test_kept_features_take_the_encoder_out_of_the_step() -> None:
    """Of its arithmetic, and of what is kept of it where the recipe would train nothing before it."""
    plain = published("frozen", num_hidden_layers=2)
    kept = plain.model_copy(update={"data": plain.data.model_copy(update={"feature_cache": True})})
    traces = [Measure(config, deepspeed=False).trace(2, 800) for config in (plain, kept)]
    for counts in zip(*((trace.forward, trace.backward) for trace in traces), strict=True):
        own = {key: flops for key, flops in counts[0].items() if not key.startswith("vision_encoder")}
        assert len(own) < len(counts[0])
        assert counts[1] == own
    facts = Measure(kept, deepspeed=True).facts(800)
    assert facts.images == 2 * 576 * 1024
    found = [plan(config, Gpus(8, 80)) for config in (plain, kept)]
    assert found[0].step_seconds > found[1].step_seconds
    assert found[0].flops.image > found[1].flops.image > 0


def test_fsdp_is_a_way_of_its_own() -> None:
    """Weights in the precision that they are trained in, over all ranks."""
    config = published("full", num_hidden_layers=2)
    config = config.model_copy(update={"train": config.train.model_copy(update={"fsdp": True})})
    found = plan(config, Gpus(8, 80))
    assert [option.way for option in found.options if option.chosen] == ["fsdp"]
    chosen = found.options[-1].memory
    trained = sum(report.trainable for report in Measure(config, deepspeed=False).reports)
    assert chosen.weights == pytest.approx((4 * trained + 2 * 303_507_456) / 8)
    assert chosen.optimizer == 2 * chosen.gradients == pytest.approx(8 * trained / 8)
    (change,) = plan(config, Gpus(8, 4), tflops=1).changes[1:2]
    assert change.startswith("train.deepspeed=")
    assert "train.fsdp=false" in change


def test_float32_is_not_timed_as_16_bit() -> None:
    config = published("frozen", num_hidden_layers=2)
    slow = config.train.model_copy(update={"bf16": False})
    model = config.model.model_copy(update={"dtype": "float32"})
    found = [
        plan(one, Gpus(8, 80)) for one in (config, config.model_copy(update={"train": slow, "model": model}))
    ]
    assert [one.tflops for one in found] == [989, 67]
    for one in found:
        assert one.model_tflop == pytest.approx(one.hardware_tflop, rel=0.01)  # nothing is computed again


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_the_samples_are_known_ways(name: str) -> None:
    root = Path(__file__).resolve().parents[2]
    assert way_of(str(root / "ds_configs" / f"{name}.json")).name == name


@pytest.mark.parametrize(
    ("text", "problem"), [("[1]", "are a JSON object"), ("{", "not valid JSON"), (None, "no file")]
)
def test_a_file_that_is_none_of_deepspeeds(tmp_path: Path, text: str | None, problem: str) -> None:
    file = tmp_path / "zero.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        way_of(str(file))


@pytest.mark.parametrize("text", ["8", "x80", "0x80", "8x0", "8x80x2", "-1x80"])
def test_gpus_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="8x80"):
        Gpus.parse(text)
