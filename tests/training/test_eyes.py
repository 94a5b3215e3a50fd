"""What a run shows of itself: counted by hand from its rows, and without a trace in the losses."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from runs import TUNINGS, make_world, run_config, write_rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from mllm.config import DataSection, RunConfig
from mllm.data.collator import Collator
from mllm.data.packing import PackingCollator
from mllm.data.rows import open_rows
from mllm.training.aside import aside
from mllm.training.batches import step_flops
from mllm.training.build import build, open_mixture
from mllm.training.callbacks import known_lengths
from mllm.training.eyes import Eyes, QuietProgress, peak_tflops
from mllm.training.flops import StepFlops
from mllm.training.longest import LongestFirst, _room_for_states, longest_rows, sample_numbers
from mllm.training.memory import Measure
from mllm.training.metrics import read_metrics
from mllm.training.outline import outline
from mllm.training.plan import step_flops as traced_flops
from mllm.training.steps import StepLog
from mllm.training.train import train
from mllm.training.tuning import apply_tuning


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def metrics(output: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


def with_data(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


# -- counts -----------------------------------------------------------------------------------------


def test_counts_are_those_of_the_batch(world: Path) -> None:
    """Against the tensors, padded and packed."""
    processor = build(run_config(world, world / "x", TUNINGS["llm"]).model)[1]
    rows = list(open_rows(world / "rows" / "rows.jsonl", "auto", world / "rows"))[:6]
    for cls in (Collator, PackingCollator):
        batch = cls(processor)(rows)
        counts = batch["counts"]
        assert sum(c.tokens for c in counts) == (
            batch["attention_mask"].sum() if cls is Collator else batch["input_ids"].numel()
        )
        assert sum(c.image_tokens for c in counts) == (batch["input_ids"] == processor.image_token_id).sum()
        assert sum(c.labels for c in counts) == (batch["labels"][:, 1:] != -100).sum()
        assert sum(c.views for c in counts) == len(batch["pixel_values"])
        assert [c.views for c in counts] == [1, 0, 2, 1, 0, 2]


def test_a_run_logs_its_speed_and_what_it_learns(world: Path, tmp_path: Path) -> None:
    """Two data sets and two steps of accumulation, added up by hand."""
    few = write_rows(tmp_path / "few", count=6)
    sources = [world / "rows" / "rows.jsonl", few]
    listed = [{"path": str(path), "image_root": str(path.parent)} for path in sources]
    config = run_config(
        world, tmp_path / "run", TUNINGS["llm"], max_steps=2, logging_steps=2, per_device_batch_size=11
    )
    config = config.model_copy(update={"data": DataSection.model_validate({"path": listed})})
    (line,) = metrics(train(config))
    processor = build(config.model)[1]
    rows = open_mixture(config.data, config.train.seed)
    collate = Collator(processor, config.data.max_length)
    counts = [count for i in range(len(rows)) for count in collate([rows[i]])["counts"]]
    tokens, labels = sum(c.tokens for c in counts), sum(c.labels for c in counts)
    assert {c.dataset for c in counts} == {str(path) for path in sources}
    assert line["supervised/all"] == pytest.approx(labels / tokens)
    images = sum(c.labels for c in counts if c.views)
    assert line["supervised/with_images"] == pytest.approx(images / labels)
    for path in sources:
        own = [c for c in counts if c.dataset == str(path)]
        name = str(path)  # both are called rows.jsonl
        assert line[f"supervised/{name}"] == pytest.approx(
            sum(c.labels for c in own) / sum(c.tokens for c in own)
        )
        assert line[f"supervised_share/{name}"] == pytest.approx(sum(c.labels for c in own) / labels)
    seconds = len(rows) / line["speed/samples_per_second"]
    assert line["speed/tokens_per_second"] * seconds == pytest.approx(tokens)
    pictures = sum(c.image_tokens for c in counts)
    assert line["speed/image_tokens_per_second"] * seconds == pytest.approx(pictures)
    assert line["speed/text_tokens_per_second"] * seconds == pytest.approx(tokens - pictures)
    model, _ = build(config.model)
    apply_tuning(model, config.tune)
    flops = step_flops(model).of([c.tokens for c in counts], sum(c.views for c in counts), labels)
    assert line["speed/tflops"] * seconds * 1e12 == pytest.approx(flops)
    assert "speed/mfu" not in line  # of a CPU nobody knows the peak
    assert 0 <= line["speed/data_wait"] <= 1
    assert 0.05 < line["memory/peak_gib"] < 64
    total = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["total_flos"]
    assert total == pytest.approx(flops, rel=1e-6)
    assert (tmp_path / "run" / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_mfu_and_sums_over_ranks() -> None:
    """Two ranks of which each needs a second for what the formula calls 100 TFLOP, on a device of 400."""
    steps = StepLog()
    eyes = Eyes(steps, ["a"], StepFlops(image=0, token=1e12, square=0, label=0), peak=400.0)
    eyes.sums |= {"samples": 2, "tokens": 100, "seconds": 1.0, "waited": 0.25, "flops": 100e12, "labels": 10}
    logs = eyes.report(lambda sums: 2 * sums, ranks=2)
    assert logs["speed/tflops"] == pytest.approx(100)
    assert logs["speed/mfu"] == pytest.approx(0.25)
    assert logs["speed/tokens_per_second"] == pytest.approx(200)
    assert logs["speed/data_wait"] == pytest.approx(0.25)
    assert not any(eyes.sums.values())
    assert peak_tflops("NVIDIA H200") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA GH200 480GB") == 989
    for name in ("somebody's card", "NVIDIA L40", "NVIDIA A10G", "NVIDIA RTX A1000"):
        assert peak_tflops(name) is None


def test_one_estimate_serves_packing_and_mfu_and_agrees_with_the_plan(world: Path) -> None:
    """The sizes of the loaded model against the products of its forward pass, counted with shapes only."""
    big = {
        "vision_encoder": {
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256,
            "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
        },
        "language_model": {
            "model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
            "num_attention_heads": 4, "vocab_size": 1000,
        },
    }  # fmt: skip
    for tuning in (TUNINGS["connector"], TUNINGS["llm"], TUNINGS["lora_llm"]):
        config = run_config(world, world / "x", tuning, big)
        model, _, _ = outline(config)
        ours = step_flops(model)
        trace = Measure(config, deepspeed=False).trace(2, 1024)
        theirs = traced_flops(trace, 2, 1024)
        assert ours.token == pytest.approx(theirs.token, rel=0.05), tuning
        assert ours.square == pytest.approx(theirs.square, rel=0.05), tuning
        assert ours.image == pytest.approx(theirs.image, rel=0.35), tuning


def test_waiting_for_data_is_measured_and_told_once(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(world, tmp_path / "run", TUNINGS["connector"], max_steps=4)

    class Slow(TrainerCallback):
        """The loader becomes slow."""

        def on_train_begin(
            self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kw: Any
        ) -> None:
            loader = train_dataloader.base_dataloader
            plain = loader.collate_fn
            loader.collate_fn = lambda rows: time.sleep(1.0) or plain(rows)

    with caplog.at_level(logging.WARNING, logger="mllm.training.eyes"):
        lines = metrics(train(config, callbacks=[Slow()]))
    waits = [line["speed/data_wait"] for line in lines]
    assert min(waits[:-1]) > 0.5  # the loader is a batch ahead, so that the last step waits for none
    told = [record.getMessage() for record in caplog.records if "for data" in record.getMessage()]
    assert len(told) == 1
    assert "train.num_workers" in told[0]


def test_counting_does_not_wait_for_the_device() -> None:
    """A meta tensor has no value: whoever asked it for one would fail."""
    steps = StepLog()
    steps.begin()
    batch = {
        "labels": torch.zeros(2, 3, device="meta"),
        "row_ids": ["a", "b"],
        "counts": [],
        "dropped_turns": 2,
    }
    rows, counts = steps.take(batch)
    steps.note(rows, counts, batch["labels"], torch.zeros((), device="meta"))
    eyes = Eyes(steps, ["a"], None, None)
    eyes.on_step_end(None, None, None)
    assert steps.rows == ["a", "b"]
    assert steps.dropped_turns == 2
    assert set(batch) == {"labels"}


def test_the_bar_shows_loss_speed_and_waiting() -> None:
    from types import SimpleNamespace

    bar, shown = QuietProgress(), {}
    lines: list[str] = []
    bar.training_bar = SimpleNamespace(  # type: ignore[assignment]
        set_postfix=shown.update, write=lambda line, file: lines.append(line)
    )
    state = SimpleNamespace(is_world_process_zero=True, global_step=20)
    bar.on_log(None, state, None, {"loss": 1.5, "speed/tokens_per_second": 1234.5, "speed/data_wait": 0.07})
    assert shown == {"loss": "1.5000", "tok/s": "1,234", "wait": "7%"}
    assert not lines
    bar.on_log(None, state, None, {"val/loss": 1.25, "val/image_gap": 0.0312})
    assert lines == ["step 20, val: loss 1.25, image_gap 0.0312"]
    assert shown["loss"] == "1.5000"


def test_the_rate_of_a_part_is_that_of_the_step() -> None:
    """Not the next step's, which the schedule has set when the step is logged."""
    from types import SimpleNamespace

    eyes = Eyes(StepLog(), ["a"], None, None)
    group = {"part": "connector", "lr": 0.5}
    eyes.on_step_begin(None, None, None, optimizer=SimpleNamespace(param_groups=[group]))
    group["lr"] = 0.25
    assert eyes.rates == {"connector": 0.5}


# -- the longest rows first -------------------------------------------------------------------------


class Watch(TrainerCallback):
    """How many rows, and of what length, each forward pass has in training mode."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: (
                self.shapes.append(tuple(kwargs["input_ids"].shape)) if module.training else None
            ),
            with_kwargs=True,
        )


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_longest_rows_come_first_and_leave_no_trace(world: Path, tmp_path: Path, packing: bool) -> None:
    """With LoRA's dropout, which draws random numbers; losses and gradient norms bit for bit."""
    found = {}
    for first in (True, False):
        watch = Watch()
        config = run_config(
            world, tmp_path / f"run-{first}", TUNINGS["lora_all"], gradient_accumulation_steps=2
        )
        lora = config.tune.lora.model_copy(update={"dropout": 0.3})
        config = config.model_copy(update={"tune": config.tune.model_copy(update={"lora": lora})})
        config = with_data(config, longest_first=first, packing=packing)
        lines = metrics(train(config, callbacks=[watch]))
        found[first] = [(line["loss"], line["grad_norm"]) for line in lines], watch.shapes
    assert found[True][0] == found[False][0]
    assert len(found[True][1]) == len(found[False][1]) + 1
    tried, *rest = found[True][1]
    assert rest == found[False][1]
    if not packing:
        assert tried[0] == 4
    assert tried[1] >= max(length for _, length in rest)


def test_memory_that_is_missing_shows_before_the_first_step(world: Path, tmp_path: Path) -> None:
    class Steps(TrainerCallback):
        begun = 0

        def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
            def full(module: Any, args: Any, kwargs: Any) -> None:
                if module.training:
                    raise torch.OutOfMemoryError("CUDA out of memory")

            model.register_forward_pre_hook(full, with_kwargs=True)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            self.begun += 1

    spy = Steps()
    with pytest.raises(ValueError, match="the GPU's memory is full"):
        train(run_config(world, tmp_path / "run", TUNINGS["llm"]), callbacks=[spy])
    assert spy.begun == 0


def test_the_longest_of_a_sample_or_of_all(world: Path) -> None:
    config = run_config(world, world / "x", TUNINGS["llm"])
    processor = build(config.model)[1]
    rows = open_mixture(config.data, 0)
    known = known_lengths(None, rows, Collator(processor))
    lengths, numbers = known.lengths, known.numbers
    exact = [len(processor.encode(rows[i]["messages"]).input_ids) for i in range(len(rows))]
    chosen = longest_rows(None, lengths, numbers, 3)
    assert sorted(exact[i] for i in chosen) == sorted(exact)[-3:]
    assert len(sample_numbers(10_000)) == 512
    assert sample_numbers(10_000)[-1] == 9_999
    assert LongestFirst(rows, None, chosen).rows == chosen


@pytest.mark.parametrize(
    ("optim", "moments"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("paged_adamw_32bit", 0), ("adafactor", 0)],
)
def test_room_for_what_the_optimiser_keeps_on_a_gpu(optim: str, moments: int) -> None:
    model = torch.nn.Linear(3, 5, device="meta")
    model.bias.requires_grad_(False)
    room = _room_for_states(model, torch.device("meta"), optim)
    assert sum(tensor.nbytes for tensor in room) == moments * 15
    assert _room_for_states(model, torch.device("cpu"), optim) == []


def test_aside_puts_back_numbers_modes_and_buffers() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).train()
    model[1].eval()
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    mean = model[0].running_mean.clone()
    with aside(model):
        model.train()
        model(torch.randn(4, 3))
        torch.rand(100)
    assert torch.equal(torch.rand(3), want)
    assert torch.equal(model[0].running_mean, mean)
    assert model[0].training
    assert not model[1].training


def weights_afterwards(rank: int, world: int) -> list[bool]:
    """Whether each weight is a shard again after a forward aside."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    fully_shard(model[1], mesh=init_device_mesh("cpu", (world,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    with aside(model), torch.no_grad():
        model(torch.ones(1, 3))
    return [isinstance(parameter, DTensor) for parameter in model.parameters()]


@pytest.mark.slow
def test_aside_gives_weights_back_to_their_shards(tmp_path: Path) -> None:
    """FSDP2 keeps the root's whole for a backward; at the last step the guard would take them for changed."""
    assert on_ranks(weights_afterwards, 2, tmp_path) == [[True] * 4] * 2
