"""What makes a step faster or smaller changes no loss and no gradient."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from runs import TUNINGS, make_rows, make_world, run_config

from mllm.config import TrainSection, TuneSection
from mllm.data.collator import Collator
from mllm.data.packing import PackingCollator
from mllm.errors import ConfigError
from mllm.training.metrics import read_metrics
from mllm.training.recompute import checkpoint_selectively
from mllm.training.speed import compile_layers, own_gpu, speed_up
from mllm.training.train import train
from mllm.training.tuning import apply_tuning


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def tuned(text: str, tuning: str) -> tuple[Any, Any]:
    model, processor = make_model(text=text)
    how = TuneSection(
        language_model=tuning, **({"lora": {"r": 4, "dropout": 0.0}} if tuning == "lora" else {})
    )
    apply_tuning(model, how)
    return model.train(), processor


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # GPT-2 drops out
    loss = model(**{k: v for k, v in batch.items() if k not in ("row_ids", "dropped_turns")}).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("collator", [Collator, PackingCollator])
@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
@pytest.mark.parametrize("text", ["llama", "gpt2"])
def test_selective_checkpointing(text: str, tuning: str, collator: Any) -> None:
    model, processor = tuned(text, tuning)
    if collator is PackingCollator:
        model.language_model.set_attn_implementation("packed")
    batch = collator(processor)(make_rows(5))
    want = gradients(model, batch)
    kept: list[list[int]] = []
    for select in (False, True):
        if select:
            checkpoint_selectively(model)
            model.train()
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept[-1].append(t.nbytes), t)[1], lambda t: t
        ):
            got = gradients(model, batch)
        assert_same(got, want)
    assert sum(kept[1]) < 0.5 * sum(kept[0])  # of what autograd itself holds


def test_what_is_kept_is_not_computed_again() -> None:
    """Products and attention run once; a norm runs twice."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: dict[str, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            self.calls[name] = self.calls.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    counts = []
    for select in (False, True):
        model, processor = tuned("llama", "full")
        if select:
            checkpoint_selectively(model)
            model.train()
        with Count() as count:
            gradients(model, Collator(processor)(make_rows(3)))
        counts.append(count.calls)
    plain, selective = counts
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert plain["mm"] == selective["mm"]
    assert plain[attention] == selective[attention]
    assert selective["rsqrt"] > plain["rsqrt"]


@pytest.mark.slow
def test_compiled_layers() -> None:
    for tuning, collator in (("full", Collator), ("lora", PackingCollator)):
        model, processor = tuned("llama", tuning)
        if collator is PackingCollator:
            model.language_model.set_attn_implementation("packed")
        batches = [collator(processor)(make_rows(n)) for n in (3, 5)]
        want = [gradients(model, batch) for batch in batches]
        names = list(model.state_dict())
        compile_layers(model)
        for batch, expected in zip(batches, want, strict=True):
            got = gradients(model, batch)
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
        assert list(model.state_dict()) == names


@pytest.mark.parametrize("size", [1, 2, 100])
def test_images_in_sub_batches(size: int) -> None:
    model, processor = tuned("llama", "full")
    batch = Collator(processor)(make_rows(6))
    want = gradients(model, batch)
    seen = []
    model.vision_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    speed_up(model, TrainSection(output_dir="x", vision_batch_size=size))
    assert_same(gradients(model, batch), want)
    images = len(batch["pixel_values"])
    assert seen == [size] * (images // size) + [images % size] * (images % size > 0)


def test_runs_with_them(world: Path, tmp_path: Path) -> None:
    losses = {}
    for name, options in {
        "plain": {},
        "selective": {"gradient_checkpointing": "selective", "vision_batch_size": 2, "optim": "adamw_torch"},
    }.items():
        train(run_config(world, tmp_path / name, TUNINGS["lora_llm"], **options))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert losses["selective"] == pytest.approx(losses["plain"], rel=1e-5)


@pytest.mark.parametrize(
    ("tuning", "options", "message"),
    [
        ("all", {"vision_batch_size": 2}, "train.vision_batch_size: the vision encoder is trained"),
        ("llm", {"kernels": "liger"}, r"train.kernels: liger.* (install|need a GPU)"),
        ("llm", {"optim": "adamw_tosch"}, "knows no 'adamw_tosch'; did you mean 'adamw_torch'"),
        ("llm", {"optim": "adamm"}, "knows no 'adamm'; use adamw_torch, adamw_torch_fused, .*, or another"),
        ("llm", {"optim": "paged_adamw_32bit"}, "there is no GPU"),
    ],
)
def test_what_cannot_be(
    world: Path, tmp_path: Path, tuning: str, options: dict[str, Any], message: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("some of these can be on a GPU")
    with pytest.raises(ConfigError, match=message):
        train(run_config(world, tmp_path / "run", TUNINGS[tuning], **options))


def test_each_rank_tries_kernels_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_gpu() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_gpu() == torch.device("cuda", 3)


def test_flash_attention_is_refused_where_it_cannot_run(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS["llm"], bf16=True)
    model = config.model.model_copy(update={"attn_implementation": "flash_attention_2"})
    if torch.cuda.is_available():
        pytest.skip("it may be possible here")
    with pytest.raises(ConfigError, match=r"'flash_attention_2', but it needs a GPU, .* or use sdpa"):
        train(config.model_copy(update={"model": model}))


def test_two_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="compile and gradient_checkpointing 'selective' are both given"):
        TrainSection(output_dir="x", compile=True, gradient_checkpointing="selective")


def test_what_is_measured_on_a_gpu_runs_without_one(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench" / "gpu_train.py"
    options = ["--tiny", "--device=cpu", "--tokens=400", "--steps=1", "--warmup=0", "--who=ours"]
    known = {"stages": {"lora": {"hugging face": {"error": "OutOfMemoryError"}}}}
    (tmp_path / "found.json").write_text(json.dumps(known))
    command = [sys.executable, str(script), *options, "--json", str(tmp_path / "found.json")]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())["stages"]
    assert set(found) == {"stage 1", "lora", "full"}
    for contenders in found.values():
        assert contenders["ours"]["tflops"] > 0
        assert contenders["ours"]["tokens"] == 400
    assert found["lora"]["hugging face"] == known["stages"]["lora"]["hugging face"]  # not measured again
