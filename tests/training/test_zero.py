"""Two real ranks under DeepSpeed and FSDP2 do what one process does, whatever is sharded and however cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import DS_CONFIGS, launch_runs
from runs import TUNINGS, make_world, run_config, write_rows
from tiny_recipes import TinyWorld
from torch.distributed.checkpoint import FileSystemReader
from transformers import TrainerCallback

import mllm
from mllm.config import RunConfig, SourceSection
from mllm.training.metrics import read_metrics
from mllm.training.saving import FSDP_SHARES
from mllm.training.train import train

pytest.importorskip("deepspeed")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow
KINDS = {"full": TUNINGS["all"], "lora": TUNINGS["lora_llm_vision"]}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero0": {"deepspeed": "zero0"},
    **{name: {"deepspeed": str(DS_CONFIGS / f"{name}.json")} for name in ("zero1", "zero2", "zero3")},
    "zero2_offload": {"deepspeed": str(DS_CONFIGS / "zero2_offload.json")},
    "fsdp": {"fsdp": True},
}
SPLITS = [(1, 8), (2, 4), (4, 2)]  # rows a micro-batch, micro-batches a step; with two ranks all 16 rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def engine(name: str, folder: Path) -> dict[str, Any]:
    """The keys of a recipe's `train` section; stage 0 is written for the test."""
    options = {"deepspeed": str(DS_CONFIGS / f"{name}.json")} if name not in ENGINES else dict(ENGINES[name])
    if options.get("deepspeed") == "zero0":
        settings = json.loads((DS_CONFIGS / "zero1.json").read_text())
        settings["zero_optimization"] = {"stage": 0}
        (folder / "zero0.json").write_text(json.dumps(settings))
        options["deepspeed"] = str(folder / "zero0.json")
    return options


class Gradients(TrainerCallback):
    """The gradients of the first step, in one process."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.found:
            named = kwargs["model"].named_parameters()
            self.found = {n: p.grad.clone() for n, p in named if p.requires_grad}


def losses(output: str | Path) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(output) / "metrics.jsonl") if "loss" in line]


# -- gradients --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Gradients and loss of each tuning with all 16 rows in one micro-batch."""
    folder, found = tmp_path_factory.mktemp("one"), {}
    for kind, tuning in KINDS.items():
        spy = Gradients()
        config = run_config(
            world, folder / kind, tuning, max_steps=1, per_device_batch_size=16, max_grad_norm=0.0
        )
        train(config, callbacks=[spy])
        found[kind] = (spy.found, losses(folder / kind))
    return found


@pytest.fixture(scope="module")
def two_ranks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every engine, tuning and cut of the global batch, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    configs = {
        f"{name}-{kind}-{rows}x{steps}": run_config(
            world,
            folder / f"{name}-{kind}-{rows}x{steps}",
            tuning,
            max_steps=1,
            per_device_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            rehearsal=False,
            **engine(name, folder),
        )
        for name in ENGINES
        for kind, tuning in KINDS.items()
        for rows, steps in SPLITS
    }
    found = launch_runs("deepspeed", folder / "found", configs)
    return {name: [*ranks, losses(folder / name)] for name, ranks in found.items()}


@pytest.mark.parametrize("name", ENGINES)
def test_gradients_are_those_of_one_process(
    two_ranks: dict[str, Any], one_process: dict[str, Any], name: str
) -> None:
    """With rows of uneven length, so that a mean over ranks or micro-batches would show."""
    for kind in KINDS:
        gradients, loss = one_process[kind]
        for rows, steps in SPLITS:
            found, other, found_loss = two_ranks[f"{name}-{kind}-{rows}x{steps}"]
            assert found["error"] is other["error"] is None
            assert found["gradients"].keys() == gradients.keys()
            assert found_loss == pytest.approx(loss, abs=1e-5)
            for parameter, gradient in gradients.items():
                far = (found["gradients"][parameter] - gradient).abs().max().item()
                assert far <= 1e-5, (name, kind, rows, steps, parameter, far)


# -- runs of several steps --------------------------------------------------------------------------


class Order(TrainerCallback):
    """The rows in the order of the first epoch."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = [name for batch in kwargs["train_dataloader"] for name in batch["row_ids"]]
        self.rows = [re.search(r"n\d+", name).group() for name in names]  # type: ignore[union-attr]


def with_rows(config: RunConfig, path: Path) -> RunConfig:
    data = {"path": [SourceSection(path=str(path))], "image_root": str(path.parent)}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def alternating_rows(world: Path, folder: Path) -> Path:
    """20 rows whose pictures all fall to one of two ranks, to the other in the next step, and so on."""
    pictures, text = folder / "rows.jsonl", folder / "order.jsonl"
    write_rows(folder, 60)
    lines = [json.loads(line) for line in pictures.read_text().splitlines()]
    with_images = [line for line in lines if len(line["messages"][0]["content"]) > 1]
    without = [line for line in lines if len(line["messages"][0]["content"]) == 1]
    text.write_text(
        "".join(json.dumps({**line, "id": f"n{n}"}) + "\n" for n, line in enumerate(without[:20]))
    )
    order = Order()
    config = run_config(
        world, folder / "scout", ("frozen", "frozen", "full"), max_steps=1, per_device_batch_size=1
    )
    train(with_rows(config, text), callbacks=[order])
    rows = {}
    for place, row in enumerate(order.rows):
        step, rank = divmod(place, 2)
        rows[row] = {**(with_images if (step + rank) % 2 else without).pop(), "id": row}
    pictures.write_text("".join(json.dumps(rows[f"n{n}"]) + "\n" for n in range(20)))
    return pictures


RECIPES = ("blip2/align_opt", "flamingo/align", "cogvlm/align")
QLORA = ("frozen", "full", "qlora")
RESUMED = {"fsdp": TUNINGS["llm"], "zero2": QLORA, "zero3": QLORA}
ADAPTED = ("ddp", "zero2", "zero3", "fsdp")
FAULTS = {
    "nan-zero2": "nan",
    "nan-zero3": "nan",
    "thaw-zero3": "thaw",
    "silent-zero3": "text",
    **{f"dead-{kind}": "dead" for kind in ADAPTED},
    "look": "look",
}


@pytest.fixture(scope="module")
def steps(
    world: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], dict[str, RunConfig]]:
    """Several steps of everything, in one launch: (folder, what was found, the same for one process)."""
    folder, single = tmp_path_factory.mktemp("steps"), {}
    configs: dict[str, RunConfig] = {}

    def add(
        name: str, kind: str, tuning: Any, model: Any = None, rows: Path | None = None, **options: Any
    ) -> None:
        options = {**options, **(engine(kind, folder) if kind else {})}
        made = run_config(world, folder / name, tuning, model, **options)
        (configs if kind else single)[name] = made if rows is None else with_rows(made, rows)

    alternating = alternating_rows(world, folder / "alternating")
    for kind in (*ENGINES, ""):
        add(
            f"mixed-{kind}",
            kind,
            TUNINGS["all"],
            rows=alternating,
            max_steps=10,
            per_device_batch_size=1 if kind else 2,
        )
    add("look", "ddp", TUNINGS["all"], rows=alternating, max_steps=1, per_device_batch_size=1)
    add("align-zero3", "zero3", TUNINGS["connector"], max_steps=2, save_steps=1, per_device_batch_size=2)
    later = {"init_from": str(folder / "align-zero3")}
    rates = {"connector": 1e-2}  # another than the language model's: groups must survive the engine
    for kind in ("zero0", "zero3", "zero3_offload", ""):
        add(
            f"instruct-{kind}", kind, TUNINGS["lora_llm_vision"], later, save_steps=2, max_steps=2,
            learning_rates=rates, per_device_batch_size=2 if kind else 4,
        )  # fmt: skip
    for kind, tuning in RESUMED.items():
        options = {"save_steps": 2, "per_device_batch_size": 4, "max_grad_norm": 0.0}
        add(f"{kind}-whole", kind, tuning, max_steps=4, **options)
        add(f"{kind}-cut", kind, tuning, max_steps=2, **options)
        configs[f"{kind}-first"] = configs.pop(f"{kind}-cut")
        add(f"{kind}-cut", kind, tuning, max_steps=4, resume=True, **options)
    add("qlora", "", QLORA, max_steps=4, per_device_batch_size=8, max_grad_norm=0.0)
    for name in ("nan-zero2", "nan-zero3", "thaw-zero3", "silent-zero3"):
        text = write_text(folder / "text") if name == "silent-zero3" else None
        add(name, name.rpartition("-")[2], TUNINGS["llm"], rows=text, max_steps=3)
    for kind in ADAPTED:
        rows = {"rows": alternating, "per_device_batch_size": 1, "max_steps": 5, "warmup_steps": 3}
        add(f"dead-{kind}", kind, TUNINGS["lora_all"], **rows)
        add(f"alive-{kind}", kind, TUNINGS["lora_all"], **rows)
    small = TinyWorld(folder / "recipes")
    for recipe in RECIPES:
        config = small.shrink(recipe)
        if config.model.connector["type"] == "qformer":
            config.model.connector["dropout"] = 0.0  # so that losses can be compared
        one = {"output_dir": str(folder / f"one-{recipe}"), "per_device_batch_size": 4}
        two = {"output_dir": str(folder / recipe), "per_device_batch_size": 2, **engine("zero3", folder)}
        single[recipe] = config.model_copy(update={"train": config.train.model_copy(update=one)})
        configs[recipe] = config.model_copy(update={"train": config.train.model_copy(update=two)})
    renamed = {name.replace("/", "-"): config for name, config in configs.items()}
    return folder, launch_runs("deepspeed", folder / "found", renamed, FAULTS), single


def write_text(folder: Path) -> Path:
    """Rows without pictures."""
    path = write_rows(folder, 48)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1::3]) + "\n")
    return path


def test_rows_of_text_on_one_rank_and_of_pictures_on_the_other(steps: Any) -> None:
    """Whichever part a rank has no use for, it calls all the same, or the others would wait for ever."""
    folder, found, single = steps
    assert [[bool(n) for n in rank["images"]] for rank in found["look"]] == [
        [bool(step % 2) for step in range(10)],
        [not step % 2 for step in range(10)],
    ]
    wanted = losses(train(single["mixed-"]))
    assert len(wanted) == 10
    for kind in ENGINES:
        assert losses(folder / f"mixed-{kind}") == pytest.approx(wanted, abs=2e-4), kind


def test_a_second_stage_under_zero3(steps: Any) -> None:
    folder, _, single = steps
    wanted = losses(train(single["instruct-"]))
    assert losses(folder / "instruct-zero0") == pytest.approx(wanted, abs=1e-4)
    for kind in ("zero3", "zero3_offload"):
        assert losses(folder / f"instruct-{kind}") == pytest.approx(wanted, abs=1e-4), kind


def test_every_checkpoint_under_zero3_is_whole(steps: Any) -> None:
    """`load` checks each tensor against the manifest and computes the probe again."""
    folder = steps[0]
    files = [file for file in folder.rglob("mllm_manifest.json") if "one-" not in str(file)]
    names = {str(file.parent.relative_to(folder)) for file in files}
    for name in ("align-zero3", "instruct-zero3", "instruct-zero3_offload", "fsdp-whole", *RECIPES):
        assert name in names
    assert {"align-zero3/checkpoint-1", "instruct-zero3/checkpoint-2", "fsdp-whole/checkpoint-2"} <= names
    for file in files:
        if file.parent.name.startswith("mixed"):  # as many of one make need not be loaded
            continue
        manifest = json.loads(file.read_text())
        assert all(0 not in entry["shape"] for entry in (manifest["weights"] | manifest["adapter"]).values())
        model, _ = mllm.load(file.parent)
        assert all(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_goes_on(steps: Any, kind: str) -> None:
    folder = steps[0]
    whole, parts = losses(folder / f"{kind}-whole"), losses(folder / f"{kind}-cut")
    assert parts == whole
    assert len(whole) == 4


def test_shares_are_of_what_is_trained(steps: Any) -> None:
    """Else each save of an adapter would hold its base again; of ZeRO, `test_resume.py` looks at it."""
    shares = steps[0] / "fsdp-whole" / "checkpoint-2" / FSDP_SHARES
    names = FileSystemReader(shares).read_metadata().state_dict_metadata
    assert any(name.startswith("model.language_model.") for name in names)
    assert not any(name.startswith("model.vision_encoder.") for name in names)


def test_a_base_in_4_bit_under_deepspeed(steps: Any) -> None:
    """Losses of four steps and gradients of the first are those of one process."""
    folder, found, single = steps
    spy = Gradients()
    wanted = losses(train(single["qlora"], callbacks=[spy]))
    for kind in ("zero2", "zero3"):
        assert losses(folder / f"{kind}-whole") == pytest.approx(wanted, abs=1e-5), kind
        gradients = found[f"{kind}-whole"][0]["gradients"]
        assert gradients.keys() == spy.found.keys()
        for name, gradient in spy.found.items():
            assert (gradients[name] - gradient).abs().max() <= 1e-5, (kind, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_connectors_and_fusions_under_zero3(steps: Any, recipe: str) -> None:
    folder, found, single = steps
    assert found[recipe.replace("/", "-")][0]["error"] is None
    wanted = losses(train(single[recipe]))
    assert len(wanted) == 2
    assert losses(folder / recipe) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan-zero2", "step 2: a gradient is not finite"),
        ("nan-zero3", "step 2: a gradient is not finite"),
        ("thaw-zero3", "vision_encoder.* is declared frozen and has changed"),
        ("silent-zero3", "connector is declared trainable and all its gradients were zero for 3 steps"),
    ],
)
def test_guards_under_deepspeed(steps: Any, name: str, message: str) -> None:
    """What one rank alone has, or sees, stops all of them."""
    for rank in steps[1][name]:
        assert re.match(message, rank["error"] or ""), rank["error"]


@pytest.mark.parametrize("kind", ADAPTED)
def test_a_dead_adapter_stops_all_ranks(steps: Any, kind: str) -> None:
    """In the same step, each naming its own rows; healthy ones go on, pictures on one rank in turn."""
    message = (
        r"step 3: the adapter of language_model\S+ is dead, its gradient was 0 in 3 steps, on rows (.*);"
    )
    found = [re.match(message, rank["error"] or "") for rank in steps[1][f"dead-{kind}"]]
    assert all(found), steps[1][f"dead-{kind}"]
    assert found[0][1] != found[1][1]  # type: ignore[index]
    assert [rank["error"] for rank in steps[1][f"alive-{kind}"]] == [None, None]


def test_one_rank_keeps_the_records(steps: Any) -> None:
    """A step stands once in the metrics, whatever the number of ranks."""
    folder = steps[0]
    for kind in ENGINES:
        lines = [
            line["step"]
            for line in read_metrics(folder / f"mixed-{kind}" / "metrics.jsonl")
            if "loss" in line
        ]
        assert lines == list(range(1, 11)), kind
