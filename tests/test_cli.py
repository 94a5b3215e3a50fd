"""The command line: help at once, and one clear line for every mistake a user can make."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_model, make_picture, save_parts
from typer.testing import CliRunner

from mllm import cli
from mllm.model import load, save

COMMANDS = [
    ["train"],
    ["chat"],
    ["quickstart"],
    ["data", "convert"],
    ["data", "generate"],
    ["data", "inspect"],
    ["eval", "build"],
    ["eval", "run"],
    ["eval", "score"],
]


def mllm(
    *arguments: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Any, str, str]:
    """(exit code or message, stdout, stderr) of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mllm", *map(str, arguments)])
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: mllm(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(*make_model(), tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def recipe(tmp_path: Path, parts: dict[str, str]) -> Any:
    """A function that writes a recipe and its data file, and returns the recipe's path."""

    def write(rows: Any, **changes: Any) -> Path:
        make_picture().save(tmp_path / "good.png")
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw = {
            "stage": "align",
            "model": {**parts, "template": "vicuna_v1"},
            "data": {"path": str(data), "image_root": str(tmp_path)},
            "train": {"output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_batch_size": 1},
        }
        for key, value in changes.items():
            raw[key] = {**raw.get(key, {}), **value}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def llava(image: Any = "good.png", question: str = "<image>\nWhat?", **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A cat."}]
    return {"id": "seven", "image": image, "conversations": turns, **changes}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"mllm {' '.join(command)}" in result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['mllm', '--help']\n"
        "from mllm.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'PIL', 'pydantic') if m in sys.modules]\n"
        "sys.stderr.write(','.join(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Train, probe and serve" in done.stdout
    assert done.stderr == ""


WRONG_ORDER = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "human", "value": "And?"},
    {"from": "gpt", "value": "A cat."},
]
BAD_ROWS = {
    "missing image": (llava("gone.png"), ["rows.jsonl", "seven", "gone.png", "does not exist"]),
    "truncated image": (llava("cut.jpg"), ["rows.jsonl", "seven", "cut.jpg", "truncated"]),
    "too few markers": (llava(question="What?"), ["rows.jsonl", "seven", "<image>"]),
    "too many markers": (llava(question="<image><image>"), ["rows.jsonl", "seven", "<image>"]),
    "wrong role order": (llava(conversations=WRONG_ORDER), ["rows.jsonl", "seven", "conversations"]),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_line_that_names_it(
    name: str, workers: int, run: Any, recipe: Any, tmp_path: Path
) -> None:
    make_picture(size=(200, 200)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    row, wanted = BAD_ROWS[name]
    code, _, _ = run("train", recipe([row], train={"num_workers": workers}))
    assert isinstance(code, str)
    assert code.startswith("error: ")
    assert "\n" not in code
    for word in wanted:
        assert word in code
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / "mllm_manifest.json").exists()


def test_an_empty_data_set_is_refused(run: Any, recipe: Any) -> None:
    code, _, _ = run("train", recipe([]))
    assert "rows.jsonl" in code
    assert "at least one row" in code


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"train": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"model": {"conector": {"type": "mlp"}}}, "did you mean 'connector'"),
        ({"model": {"connector": {"type": "mpl"}}}, "unknown connector type 'mpl'"),
        ({"model": {"template": "vicuna"}}, "unknown template 'vicuna'"),
        ({"model": {"vision_encoder": "/nowhere"}}, "vision_encoder"),
        ({"tune": {"connector": "frozen"}}, "nothing is trained"),
        ({"train": {"deepspeed": "no_such.json"}}, "samples are in ds_configs/"),
    ],
)
def test_a_wrong_recipe_is_one_line(change: Any, wanted: str, run: Any, recipe: Any) -> None:
    code, _, _ = run("train", recipe([llava()], **change))
    assert wanted in code
    assert "\n" not in code


def test_debug_shows_the_traceback(run: Any) -> None:
    with pytest.raises(cli.ConfigError):
        run("--debug", "train", "no-such-recipe")


def test_train_chat_and_eval_from_the_command_line(run: Any, recipe: Any, tmp_path: Path) -> None:
    assert run("train", recipe([llava()]))[0] == 0
    out = tmp_path / "out"
    assert {"metrics.jsonl", "loss.png", "mllm_manifest.json"} <= {path.name for path in out.iterdir()}
    asked = ("chat", out, "--image", tmp_path / "good.png", "--prompt", "What?", "--max-new-tokens", "4")
    for decode in ("greedy", "sample", "vcd", "vcd,do_sample=true"):
        code, printed, _ = run(*asked, "--decode", decode, "--json")
        assert code == 0
        assert json.loads(printed)["prompt"] == "What?"
    questions = tmp_path / "questions.jsonl"
    row = {"question_id": 1, "image": "good.png", "text": "Is there a cat in the image?", "label": "yes"}
    questions.write_text(json.dumps(row) + "\n")
    predictions = tmp_path / "predictions.jsonl"
    assert run("eval", "run", out, questions, predictions, "--image-root", tmp_path)[0] == 0
    code, printed, _ = run("eval", "score", predictions, questions, "--json")
    assert code == 0
    assert json.loads(printed)["n"] == 1


def test_wrong_paths_and_settings_are_one_line(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    ask = ("--prompt", "hi")
    for arguments, wanted in {
        ("chat", tmp_path / "nothing", *ask): "mllm_manifest.json",
        ("chat", checkpoint, "--image", tmp_path / "no.png", *ask): "does not exist",
        ("chat", checkpoint, "--decode", "beam", *ask): "beam",
        ("chat", checkpoint, "--decode", "vcd,alhpa=1", *ask): "alpha",
        ("data", "convert", tmp_path / "no.json", tmp_path / "out.jsonl"): "no.json",
        ("data", "generate", tmp_path / "out.jsonl", "--teacher", "gtp"): "gtp",
        ("eval", "score", tmp_path / "no.jsonl", tmp_path / "q.jsonl"): "q.jsonl",
    }.items():
        code, _, _ = run(*arguments)
        assert isinstance(code, str)
        assert wanted in code
        assert "\n" not in code
    assert not (tmp_path / "out.jsonl").exists()


def test_a_chat_session_with_commands(checkpoint: Path, tmp_path: Path) -> None:
    import io

    from rich.console import Console

    from mllm.chat.session import ChatSession
    from mllm.chat.terminal import chat_loop
    from mllm.decoding import Vcd, parse_decode

    make_picture().save(tmp_path / "a.png")
    screen = io.StringIO()
    model, processor = load(checkpoint)
    session = ChatSession(model, processor, parse_decode("greedy"), max_new_tokens=4)
    lines = [
        f"/image {tmp_path / 'a.png'}",
        "What?",
        "And?",
        "/image no.png",
        "/nonsense",
        "/decode vcd",
        "Why?",
    ]
    chat_loop(session, Console(file=screen, width=200), lines)
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3
    assert len(session.images) == 1
    assert isinstance(session.decode, Vcd)
    assert "does not exist" in screen.getvalue()
    assert "unknown command /nonsense" in screen.getvalue()
    # The prompt that the model saw is the one it would be trained on.
    ids = processor.encode(session.messages).input_ids
    opened = processor.encode(session.messages[:-1], open_answer=True).input_ids
    assert ids[: len(opened)] == opened
    chat_loop(session, Console(file=screen), ["/clear", "/quit", "never asked"])
    assert session.messages == []
