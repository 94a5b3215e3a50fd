"""`mllm card`: a model card says what the run has recorded, and nothing that it has not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_model
from huggingface_hub import ModelCard
from runs import make_world, run_config, tune
from test_cli import mllm

from mllm.config import RunConfig, load_recipe
from mllm.data.files import sha256_of
from mllm.errors import CheckpointError, ConfigError, DataError
from mllm.model.checkpoint import manifest_hash, save
from mllm.model.convert import merge_checkpoint
from mllm.publish import write_card
from mllm.publish.secrets import HIDDEN, has_secret, redact, redact_values
from mllm.revision import code_state
from mllm.training.metrics import read_metrics
from mllm.training.train import train

ROOT = Path(__file__).parents[1]
SECRET = "hf_" + "Ab3" * 11
CARD = {
    "title": "Fox teller",
    "description": "Tells foxes from worlds.",
    "license": "apache-2.0",
    "languages": ["en"],
    "base_models": ["openai/clip-vit-large-patch14-336"],
    "datasets": ["me/foxes"],
    "tags": ["foxes", SECRET],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, the second on two data files, with LoRA."""
    world = make_world(tmp_path_factory.mktemp("world"))
    train(run_config(world, world / "align", tune("frozen", "full", "frozen"), max_steps=1))
    raw = run_config(world, world / "instruct", tune("frozen", "full", "lora")).model_dump(exclude_unset=True)
    raw["model"] = {"init_from": str(world / "align")}
    rows = world / "rows" / "rows.jsonl"
    (world / "rows" / "more.jsonl").write_text(rows.read_text())
    more = {"path": str(world / "rows" / "more.jsonl"), "license": "cc0-1.0"}
    raw["data"] |= {"path": [str(rows), more], "license": "cc-by-4.0"}
    train(RunConfig.model_validate({**raw, "card": CARD}))
    return world


def scores(manifest: str | None, **change: Any) -> dict[str, Any]:
    """As `mllm eval score` writes them."""
    metrics = {"n": 3000, "accuracy": 0.8731, "f1": 0.86, "precision": 0.9, "recall": 0.83, "yes_ratio": 0.46}
    run = {"checkpoint": {"manifest_sha256": manifest}, "decode": "greedy", "blank_images": False}
    return {
        "task": "pope",
        "rule": "official",
        "splits": {"random": {"official": {**metrics, "notes": []}, "vcd": {**metrics, "accuracy": 0.1}}},
        "questions": {"file": "q.json", "sha256": "5" * 64},
        "run": run,
        **change,
    }


def test_the_front_matter_is_the_hubs(runs: Path) -> None:
    data = ModelCard.load(runs / "instruct" / "README.md").data
    assert (data.license, data.library_name, data.language) == ("apache-2.0", "mllm", ["en"])
    assert (data.pipeline_tag, data.datasets) == ("image-text-to-text", ["me/foxes"])
    assert data.base_model == ["openai/clip-vit-large-patch14-336"]
    assert data.tags == ["multimodal", "foxes", HIDDEN]
    assert data.eval_results is None


def test_a_card_tells_what_the_run_has_recorded(runs: Path) -> None:
    text = (runs / "instruct" / "README.md").read_text()
    assert "# Fox teller\n\nTells foxes from worlds." in text
    assert "stage `instruct`, 3 steps" in text
    for name, licence in (("rows", "cc-by-4.0"), ("more", "cc0-1.0")):
        path = runs / "rows" / f"{name}.jsonl"
        assert f"`{path}` | 16 | 16 | 50.0% | {licence} | `{sha256_of(path)}` |" in text
    assert "| language_model | llama (2 layers, 32 wide) | language | lora | 4,096 |" in text
    assert (
        f"It started from `align` (manifest `{manifest_hash(runs / 'align')[:12]}`, stage `instruct`)" in text
    )
    assert "![Loss over steps](loss.png)" in text
    loss = [json.loads(line) for line in (runs / "instruct" / "metrics.jsonl").read_text().splitlines()]
    assert f"loss is {[one['loss'] for one in loss if 'loss' in one][-1]:.4f}" in text
    assert "No evaluation was given to this card" in text
    assert (code_state()["commit"] or "no git commit recorded") in text
    assert SECRET not in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["train"]["weight_decay"] == 0.0  # a default, too
    assert settings["tune"]["lora"]["r"] == 4


def test_the_settings_of_a_card_are_a_recipe(runs: Path, tmp_path: Path) -> None:
    text = (runs / "instruct" / "README.md").read_text()
    (tmp_path / "again.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    again = load_recipe(tmp_path / "again.yaml", [f"train.output_dir={tmp_path / 'again'}"])
    train(again)
    first, second = (
        read_metrics(place / "metrics.jsonl") for place in (runs / "instruct", tmp_path / "again")
    )
    assert [line.get("loss") for line in first] == [line.get("loss") for line in second]


def test_scores_are_of_this_model_or_refused(runs: Path, tmp_path: Path) -> None:
    checkpoint, file = runs / "instruct", tmp_path / "score.json"
    own = manifest_hash(checkpoint)
    file.write_text(json.dumps(scores(own)))
    text = write_card(checkpoint, [file]).read_text()
    assert "| pope | random | official | 3,000 | greedy | 0.873 | 0.900 | 0.830 | 0.860 | 0.460 |" in text
    assert "No evaluation was given" not in text
    results = ModelCard(text).data.eval_results
    assert results is not None
    assert ("accuracy", 0.8731) in [(one.metric_type, one.metric_value) for one in results]
    for manifest, words in ((None, "a model that it does not name"), ("b" * 64, "manifest bbbbbbbbbbbb")):
        file.write_text(json.dumps(scores(manifest)))
        with pytest.raises(DataError, match=words):
            write_card(checkpoint, [file])
    for broken in ("{}", "[1]", '{"splits": {"a": {}}, "rule": "official"}'):
        file.write_text(broken)
        with pytest.raises(DataError, match="no result of 'mllm eval score --json'"):
            write_card(checkpoint, [file])
    write_card(checkpoint)


def test_a_merged_model_has_its_sources_scores(runs: Path, tmp_path: Path) -> None:
    merge_checkpoint(runs / "instruct", tmp_path / "merged")
    file = tmp_path / "score.json"
    file.write_text(json.dumps(scores(manifest_hash(runs / "instruct"))))
    text = write_card(tmp_path / "merged", [file]).read_text()
    assert "The adapters of language_model were merged" in text
    assert "It started from `instruct`" in text
    assert ", which started from `align`" in text
    file.write_text(json.dumps(scores(manifest_hash(runs / "align"))))
    with pytest.raises(DataError, match="not about this checkpoint"):
        write_card(tmp_path / "merged", [file])


def test_what_a_person_has_written_stays(runs: Path, tmp_path: Path) -> None:
    config = run_config(runs, tmp_path / "run", tune("frozen", "full", "frozen"), max_steps=1)
    train(config)
    card = tmp_path / "run" / "README.md"
    mine = card.read_text().replace("## Limits", "## Limits\n\n- It is shy.")
    card.write_text(mine)
    with pytest.raises(ConfigError, match=r"README\.md was written or changed by hand; --force replaces it"):
        write_card(tmp_path / "run")
    train(config)
    assert card.read_text() == mine
    write_card(tmp_path / "run", force=True)
    write_card(tmp_path / "run")
    assert "It is shy" not in card.read_text()


def test_a_checkpoint_without_a_run_says_so(tmp_path: Path) -> None:
    checkpoint = save(*make_model(), tmp_path / "model")
    text = write_card(checkpoint).read_text()
    assert "The checkpoint does not record what it was trained on." in text
    assert "The recipe gives no licence for these weights" in text
    assert ModelCard(text).data.license is None
    with pytest.raises(CheckpointError, match="no mllm_manifest"):
        write_card(tmp_path)


def test_a_stream_has_no_number_of_rows(tmp_path: Path) -> None:
    data = {"rows": None, "mixing": "concat", "grouping": "none", "seed": 1}
    record = {"data": {**data, "files": [{"path": "hf:me/rows", "sha256": "5" * 64, "streaming": True}]}}
    text = write_card(save(*make_model(), tmp_path / "model", record=record)).read_text()
    assert "uncounted rows, mixing `concat`" in text
    assert f"| `hf:me/rows` | uncounted | uncounted | - | not given | `{'5' * 64}` |" in text


def test_the_command(runs: Path, monkeypatch: Any, capsys: Any) -> None:
    code, out, _ = mllm("card", runs / "align", "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, json.loads(out)) == (0, {"card": str(runs / "align" / "README.md")})


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        "ghp_" + "a1B2" * 9,
        "sk-" + "proj-abcdefgh12345678",
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "https://me:word@host/x",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    assert has_secret(f"a {text} b")
    assert not has_secret(redact(f"a {text} b"))
    assert redact(f"a {text} b").startswith("a ")


def test_what_is_no_secret_stays() -> None:
    plain = {
        "tokenizer": "llama",
        "added_tokens": ["<c0>"],
        "sha256": "5" * 64,
        "path": "/data/hf_rows/sk-learn.json",
        "max_tokens": 3,
    }
    assert redact_values(plain) == plain
    hidden = {"wandb_api_key": "0" * 40, "hub": {"token": "x"}, "list": [{"password": "y"}]}
    assert redact_values(hidden) == {
        "wandb_api_key": HIDDEN,
        "hub": {"token": HIDDEN},
        "list": [{"password": HIDDEN}],
    }
    assert redact(f"{Path.home()}/data and {Path.home()}x") == f"~/data and {Path.home()}x"


def test_the_commit_is_that_of_the_working_tree() -> None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no working tree")
    assert code_state()["commit"] == done.stdout.strip()
