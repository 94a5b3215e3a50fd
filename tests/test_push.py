"""`mllm push`: what goes to the Hub and what never does, over real HTTP to a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from publish_hub import TOKEN, Hub, running_hub
from runs import logits_of, make_world, run_config, tune

import mllm
from mllm.errors import CheckpointError, ConfigError
from mllm.publish import push
from mllm.training.train import train

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with all that lies about in one."""
    world = make_world(tmp_path_factory.mktemp("world"))
    output = world / "run"
    train(run_config(world, output, tune("frozen", "full", "lora"), max_steps=2, save_steps=1))
    (output / "feature_cache" / "0123").mkdir(parents=True)
    (output / "feature_cache" / "0123" / "a.safetensors").write_bytes(b"features")
    for left in ("eval/step-1/predictions.jsonl", "watchdog/rank-0.stack.txt", "stopped.rank0.json"):
        (output / left).parent.mkdir(parents=True, exist_ok=True)
        (output / left).write_text("{}")
    (output / "preflight.json").write_text("{}")
    (output / "optimizer.pt").write_bytes(b"a pickle")
    (output / "runs").mkdir()
    (output / "runs" / "events.out").write_bytes(b"log")
    (output / ".secret").write_text("x")
    return output


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def command(hub_url: str, *arguments: Any, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the endpoint is read when the library is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_TOKEN_PATH": "/nowhere", "no_proxy": "127.0.0.1"}
    environment.pop("HF_TOKEN", None)
    if token is not None:
        environment["HF_TOKEN"] = token
    words = [sys.executable, "-c", "from mllm.cli import main; main()", "push", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


def test_a_dry_run_lists_files_and_uses_no_network(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"the Hub does not take 'me/tiny/x': "):
        push(run, "me/tiny/x", dry_run=True)
    found = push(run, "me/tiny", dry_run=True)
    names = [name for name, _ in found.files]
    assert {"README.md", "mllm_manifest.json", "config.json", "model.safetensors"} <= set(names)
    assert {"adapter/adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names)
    odd = (
        "checkpoint-",
        "optimizer",
        "rng_state",
        "runs/",
        "feature_cache",
        "eval",
        "watchdog",
        "stopped",
        "preflight",
        ".",
        "trainer_state",
        "scheduler",
    )
    assert not [name for name in names if name.startswith(odd) or name.endswith((".pt", ".pth", ".bin"))]
    assert all(size == (run / name).stat().st_size for name, size in found.files)
    assert found.url is None
    assert [note.split()[0] for note in found.notes] == ["vision_encoder", "language_model"]


def test_an_upload_over_http_is_the_checkpoint(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = command(hub.url, run, "me/tiny", "--private", "--revision", "v1", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert hub.repos["me/tiny"]["name"] == "tiny"
    assert "private" in json.dumps(hub.repos["me/tiny"])
    assert hub.branches == [("me/tiny", "v1")]
    files = hub.commits["me/tiny", "v1"]
    assert sorted(files) == sorted(one["path"] for one in said["files"])
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits_of(*mllm.load(tmp_path)), logits_of(*mllm.load(run)))
    assert command(hub.url, run, "me/tiny").returncode == 0  # once more, into the repository that is there
    assert ("me/tiny", "main") in hub.commits


def test_refusals_are_one_line(run: Path, hub: Hub) -> None:
    for token, repo in (("hf_" + "wrong" * 5, "me/tiny"), (None, "me/tiny"), (TOKEN, "not a name")):
        done = command(hub.url, run, repo, token=token)
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: the Hub does not take")
        assert token is None or token not in line
    assert hub.commits == {}
    done = command("http://127.0.0.1:9", run, "me/tiny")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_card_is_made_if_there_is_none_and_a_broken_checkpoint_does_not_go(
    tmp_path: Path, run: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "README.md").unlink()
    push(copy, "me/tiny", dry_run=True)
    assert (copy / "README.md").is_file()
    config = copy / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace("{", '{"note": "hf_' + "x1" * 12 + '",', 1))
    with pytest.raises(ConfigError, match=r"config\.json holds what looks like an access token"):
        push(copy, "me/tiny", dry_run=True)
    config.write_text(whole)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="has changed since it was saved"):
        push(copy, "me/tiny", dry_run=True)
    with pytest.raises(CheckpointError, match="no mllm_manifest"):
        push(tmp_path, "me/tiny", dry_run=True)
