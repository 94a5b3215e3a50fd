"""`explain` says what training then does; both commands answer, and fail in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import TUNINGS, make_world, run_config
from tiny_recipes import TinyWorld
from transformers import TrainerCallback

from mllm import cli
from mllm.config import AFTER_INIT, RunConfig, SourceSection, load_recipe, shipped_recipes
from mllm.errors import CheckpointError
from mllm.training.explain import absent, explain, report
from mllm.training.outline import example_batch, outline, whole_recipe
from mllm.training.plan import Gpus, plan
from mllm.training.shapes import shapes_only, trace_forward
from mllm.training.train import train

RECIPES = [name for name in shipped_recipes() if not name.startswith("quickstart/")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("explain"))


class Unrun(TinyWorld):
    """Tiny parts of the recipes, none of whose stages is run."""

    def after(self, output_dir: str) -> Path:
        return self.folder / output_dir

    def whole(self, name: str) -> RunConfig:
        """A recipe whose parts are those of the stage it starts from."""
        config = self.shrink(name)
        section = config.model
        if section.instruction_tokenizer:
            section = section.model_copy(update={"instruction_tokenizer": self.bert()})
        if section.init_from:
            writes = {str(self.after(load_recipe(other).train.output_dir)): other for other in RECIPES}
            given = {
                key: getattr(section, key) for key in section.model_fields_set & AFTER_INIT - {"init_from"}
            }
            section = self.whole(writes[section.init_from]).model.model_copy(update=given)
        return config.model_copy(update={"model": section})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Unrun:
    return Unrun(tmp_path_factory.mktemp("recipes") / "world")


class Watch(TrainerCallback):
    """What a run is made of when it begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.max_steps
        named = list(kwargs["model"].named_parameters())
        self.trained = sum(p.numel() for _, p in named if p.requires_grad)
        self.total = sum(p.numel() for _, p in named)
        self.rates = {group["part"]: group["initial_lr"] for group in kwargs["optimizer"].param_groups}


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_it_says_what_the_run_does(rows: int, world: Path, tmp_path: Path) -> None:
    options: Any = {"per_device_batch_size": rows, "gradient_accumulation_steps": 2, "max_steps": None}
    options |= {"num_train_epochs": 1.5, "learning_rates": {"connector": 2e-3}}
    config = run_config(world, tmp_path / "run", ("frozen", "full", "lora"), **options)
    found, watch = explain(config), Watch()
    train(config, callbacks=[watch])
    assert found.steps == watch.steps
    assert sum(part.trainable for part in found.parts) == watch.trained
    assert sum(part.total for part in found.parts) == watch.total
    assert {part: rate for part, rate in found.rates.items() if part in watch.rates} == watch.rates
    assert (found.rows, found.effective_batch, found.tokens_an_image) == (16, 2 * rows, (16, 16))
    assert "".join(text for text, learnt in found.sample if learnt).startswith("fox")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name: str, tiny: Unrun) -> None:
    """Outlined before any stage has run; a forward pass reaches what is declared to learn."""
    config = tiny.whole(name)
    found = explain(config, ranks=2)
    assert found.effective_batch == 8
    assert (not found.sample) == config.on_pairs
    assert report(found).renderables
    model, processor, parts = outline(config)
    assert all(p.is_meta for p in model.parameters())
    trace = trace_forward(model, example_batch(model, processor, 2, 0), None)
    assert trace.kept(False) >= trace.outside > 0
    assert sum(trace.backward.values()) > 0
    assert [part.trainable for part in parts] == [part.trainable for part in found.parts]


def test_a_later_stage_before_the_earlier_one(world: Path, tmp_path: Path) -> None:
    """The recipe beside it that writes the checkpoint tells the parts; without one, the error is one line."""
    first = run_config(world, tmp_path / "align", ("frozen", "full", "frozen"))
    second = run_config(
        world, tmp_path / "instruct", ("frozen", "full", "full"), model={"init_from": str(tmp_path / "align")}
    )
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second.model_dump(exclude_unset=True)))
    with pytest.raises(CheckpointError, match="train that stage first"):
        whole_recipe(tmp_path / "second.yaml")
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first.model_dump(exclude_unset=True)))
    before = explain(whole_recipe(tmp_path / "second.yaml"))
    train(first)
    after = explain(whole_recipe(tmp_path / "second.yaml"))
    assert before.parts == after.parts
    assert before.tokens_an_image == after.tokens_an_image


def test_integers_keep_their_values() -> None:
    with shapes_only():
        ids = torch.arange(6).reshape(2, 3).to("meta")
        table = torch.nn.Embedding(8, 4)
        rows = table(ids)[ids[:, 0] > 0]
        assert ids.sum().item() == 15
        assert (rows.shape, rows.is_meta) == ((1, 3, 4), True)
        assert not torch.equal(table.weight[0], table.weight[1])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def command(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["mllm", *arguments])
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return command


def test_the_commands(run: Callable[..., Any]) -> None:
    code, out = run("explain", "quickstart/instruct", "--json", "--gpus", "2")
    assert code in (0, None)
    assert json.loads(out)["effective_batch"] == 32
    code, out = run("plan", "quickstart/instruct", "--gpus", "1x24", "--json")
    assert code in (0, None)
    assert all(option["fits"] for option in json.loads(out)["options"])
    code, out = run("plan", "quickstart/instruct", "--gpus", "1x0.1", "--tflops", "1")
    assert code == 1
    assert "To change: train." in out


def test_what_is_not_there_is_noted_beside_the_answer(monkeypatch: Any, capsys: Any) -> None:
    """On standard error, with exit code 0, so that a recipe can be looked at anywhere."""
    for command, unknown in {
        "explain": "rows and shares are not known, and the row shown is made up",
        "plan": "the plan holds, as it reads no rows, but the run cannot start",
    }.items():
        arguments = [
            "quickstart/instruct",
            "val={path: gone.json, image_root: .}",
            "data.path=rows.json",
            "--json",
        ]
        monkeypatch.setattr("sys.argv", ["mllm", command, *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        out, err = capsys.readouterr()
        assert json.loads(out)
        assert [line for line in err.splitlines() if line.startswith("note: ")] == [
            "note: data.path: rows.json is not on this machine",
            "note: val.path: gone.json is not on this machine",
            "note: data.image_root: runs/quickstart/world/images is not on this machine",
            f"note: therefore {unknown}",
        ]


@pytest.mark.parametrize(
    ("place", "missing"), [("hf:org/name:config:train", False), ("hf:./none", True), ("none.json", True)]
)
def test_what_may_be_on_the_hub_is_not_called_absent(world: Path, place: str, missing: bool) -> None:
    config = run_config(world, world / "run", TUNINGS["llm"])
    data = config.data.model_copy(update={"path": [SourceSection(path=place)]})
    assert bool(absent(config.model_copy(update={"data": data}))) == missing


def test_epochs_are_those_of_max_steps(world: Path) -> None:
    """16 rows, 4 a step."""
    found = explain(run_config(world, Path("none"), ("frozen", "full", "frozen"), max_steps=10))
    assert (found.steps, found.epochs) == (10, 2.5)


def test_faults_are_one_line(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in ("explain", "plan"):
        code, _ = run(command, "llava-1.5-7b/instruct")
        assert "openai/clip-vit-large-patch14-336" in code
        assert "\n" not in code
    code, _ = run("plan", "quickstart/align", "--gpus", "8x57")
    assert "--tflops" in code


def test_longer_rows_and_more_of_them_take_more(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "run", ("frozen", "full", "full"))
    totals = [plan(config, Gpus(1, 24), tokens=tokens).options[0].memory.total for tokens in (128, 256, 512)]
    assert totals == sorted(set(totals))
