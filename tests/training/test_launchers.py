"""However a run is started, it is the same run; and what cannot run says so in one line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from launched import DS_CONFIGS, REPOSITORY, command_of, start
from runs import TUNINGS, make_world, run_config

from mllm.config import load_recipe
from mllm.errors import ConfigError
from mllm.training.launch import check_launch
from mllm.training.metrics import read_metrics

LAUNCHERS = {
    "plain": {},
    "torchrun": {},
    "accelerate": {},
    "deepspeed": {"deepspeed": str(DS_CONFIGS / "zero2.json")},
}
SCRIPT = str(REPOSITORY / "scripts" / "train.py")


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The metrics of one recipe under every launcher, all of them at once on this host."""
    folder = tmp_path_factory.mktemp("launchers")
    world = make_world(folder / "world")
    config = run_config(world, folder / "run", TUNINGS["all"], per_device_batch_size=2)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)))
    running = {}
    for name, options in LAUNCHERS.items():
        keys = {"output_dir": folder / name, "per_device_batch_size": 4 if name == "plain" else 2, **options}
        script = [] if name == "plain" else [SCRIPT]
        overrides = [f"train.{key}={value}" for key, value in keys.items()]
        running[name] = start([*command_of(name), *script, str(recipe), *overrides], folder / f"{name}.log")
    for name, launch in running.items():
        code, text = launch.finish()
        assert code == 0, (name, text[-3000:])
    return {name: read_metrics(folder / name / "metrics.jsonl") for name in LAUNCHERS}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name != "plain"])
def test_losses_do_not_depend_on_the_launcher(metrics: dict[str, Any], name: str) -> None:
    """Two ranks, of which one writes: every step stands once in the metrics."""
    pytest.importorskip("deepspeed")
    plain, found = metrics["plain"], metrics[name]
    assert [line["step"] for line in found] == [line["step"] for line in plain] == [1, 2, 3, 3]
    for key in ("loss", "grad_norm", "learning_rate/connector"):
        ours, theirs = ([line[key] for line in lines if key in line] for lines in (found, plain))
        assert ours == pytest.approx(theirs, rel=1e-5), key


# -- what cannot run --------------------------------------------------------------------------------


def train_section(**options: Any) -> Any:
    overrides = [f"train.{key}={value}" for key, value in options.items()]
    parts = ["data.path=x", "train.output_dir=x", *overrides]
    return load_recipe("llava-1.5-7b/align", parts).train


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launcher starts a process."""
    monkeypatch.setenv("RANK", "0")


def test_deepspeed_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="needs a launcher; start with: deepspeed --num_gpus N"):
        check_launch(train_section(deepspeed=DS_CONFIGS / "zero2.json"))


def test_fsdp_of_one_process() -> None:
    with pytest.raises(ConfigError, match=r"train\.fsdp is for several processes"):
        check_launch(train_section(deepspeed="null", fsdp="true"))


@pytest.mark.parametrize(("variable", "key"), [("DEEPSPEED", "deepspeed"), ("FSDP", "fsdp")])
def test_an_engine_that_accelerate_turns_on(monkeypatch: pytest.MonkeyPatch, variable: str, key: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ConfigError, match=f"turns {key} on, but the recipe does not"):
        check_launch(train_section(deepspeed="null"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "are a JSON object"),
        ('{"zero_optimization": {"stage": 3}}', "gather_16bit"),
        (
            '{"optimizer": {"type": "AdamW"}}',
            "'optimizer' is decided by the recipe .*remove it from the file",
        ),
    ],
)
def test_a_wrong_file(tmp_path: Path, as_rank: None, text: str, message: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_launch(train_section(deepspeed=tmp_path / "ds.json"))


def test_an_optimiser_that_cannot_be_built(
    tmp_path: Path, as_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler and ninja, and with nothing built before."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    with pytest.raises(
        ConfigError, match=r"zero2_offload.json keeps the optimiser on the CPU.*install g\+\+"
    ) as error:
        check_launch(train_section(deepspeed=DS_CONFIGS / "zero2_offload.json"))
    assert "\n" not in str(error.value)


def test_two_engines_at_once() -> None:
    with pytest.raises(ConfigError, match="deepspeed and fsdp are both given"):
        train_section(deepspeed=DS_CONFIGS / "zero2.json", fsdp="true")


# -- samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "scripts" / "launch").glob("*.s*")), ids=lambda p: p.name
)
def test_samples_are_valid_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "scripts/train.py" in path.read_text()


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda p: p.name)
def test_shipped_settings_pass_the_check(as_rank: None, path: Path) -> None:
    pytest.importorskip("deepspeed")
    json.loads(path.read_text())
    check_launch(train_section(deepspeed=path))
