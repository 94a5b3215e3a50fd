"""The command line: help at once, and one clear line for every mistake a user can make."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_image_processor, make_model, make_picture, make_vision, save_parts
from pairs import bert_tokenizer
from typer.testing import CliRunner

from mllm import cli
from mllm.errors import ConfigError
from mllm.model import load, save
from mllm.model.pretraining.compose import compose_qformer_pretraining

COMMANDS = [
    ["train"],
    ["recipes"],
    ["explain"],
    ["plan"],
    ["chat"],
    ["quickstart"],
    ["import"],
    ["export"],
    ["merge"],
    ["card"],
    ["push"],
    ["data", "convert"],
    ["data", "generate"],
    ["data", "capfilt"],
    ["data", "inspect"],
    ["data", "check"],
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
        ({"model": {"connector": {"type": "mlp", "dept": 3}}}, "'dept'; its arguments: depth: int = 2"),
        ({"model": {"connector": {"type": "mlp", "depth": "x"}}}, "connector 'mlp': "),
        (
            {"model": {"connector": {"type": "qformer", "width": 32, "heads": 4, "dropout": 2}}},
            "connector 'qformer': dropout",
        ),
        ({"model": {"fusion": {"type": "gated"}}}, "unknown fusion type 'gated'; use one of gated_cross"),
        ({"model": {"fusion": {"type": "gated_cross_attention", "heads": 0}}}, "heads, head_dim and ff_mult"),
        (
            {"model": {"tiling": {"type": "anyres", "pinpoints": 64}}},
            "pinpoint 64 must be two multiples of 32",
        ),
        (
            {"model": {"tiling": {"type": "anyres", "pinpoints": [64, 32]}}},
            "pinpoint 64 must be two multiples",
        ),
        (
            {"model": {"vision_encoder": {"model_type": "siglip_vision_model"}}},
            "image_processor: say which one",
        ),
        ({"model": {"vision_encoder": {"model_type": "no_such_model"}}}, "no_such_model"),
        (
            {"model": {"vision_encoder": {"model_type": "dinov2", "hiden": 1}}},
            "dinov2 has no setting 'hiden'",
        ),
        ({"model": {"vision_feature_layer": 99}}, "vision_feature_layer is 99"),
        ({"model": {"image_size": 5}}, "cannot read images of [3, 5, 5]"),
        ({"model": {"added_tokens": ["<a>", "<a>"]}}, "a token is empty or there twice"),
        ({"model": {"added_tokens": ["</s>"]}}, "the tokenizer has '</s>' already"),
        ({"model": {"attn_implementation": "no_such"}}, "there is no 'no_such'; use sdpa or eager (run"),
        ({"model": {"language_model": "/no/such"}}, "model.language_model: there is no folder '/no/such'"),
        ({"model": {"connector_from": "/nowhere"}}, "'/nowhere' is no checkpoint"),
        ({"tune": {"fusion": "full"}}, "tune.fusion: the model has no such part"),
        ({"tune": {"text_encoder": "frozen"}}, "tune.text_encoder: the model has no such part"),
        ({"tune": {"overrides": {"vision_encoder.post_layernorm": "full"}}}, "the loss does not reach"),
        (
            {"train": {"learning_rates": {"heads": 1e-3}}},
            "train.learning_rates.heads: no such part is trained",
        ),
        (
            {"train": {"learning_rates": {"vision_encoder": 1e-3}}},
            "learning_rates.vision_encoder: no such part",
        ),
        ({"train": {"lr_scheduler_type": "cosin"}}, "train.lr_scheduler_type or _kwargs: cosin is not"),
        ({"train": {"lr_scheduler_kwargs": {"foo": 1}}}, "unexpected keyword argument 'foo'"),
        ({"train": {"report_to": ["foo"]}}, "train.report_to: foo is not supported"),
        ({"train": {"output_dir": "/dev/null/run"}}, "'/dev/null' is no folder that can be written"),
    ],
)
def test_a_wrong_recipe_is_one_line(change: Any, wanted: str, run: Any, recipe: Any, tmp_path: Path) -> None:
    code, _, _ = run("train", recipe([llava()], **change))
    assert wanted in code
    assert "\n" not in code
    assert len(code) < 700
    assert not list((tmp_path / "out").glob("*"))


@pytest.fixture(scope="module")
def of_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `pretrain_qformer`."""
    qformer = {"num_queries": 4, "width": 32, "layers": 2, "heads": 4, "intermediate": 64}
    model, processor = compose_qformer_pretraining(
        make_vision(), bert_tokenizer(), qformer, image_processor=make_image_processor(), embed_dim=16
    )
    return save(model, processor, tmp_path_factory.mktemp("pairs") / "model")


def test_a_checkpoint_of_pairs_is_not_taken_for_another(
    run: Any, recipe: Any, of_pairs: Path, checkpoint: Path, tmp_path: Path
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "written.jsonl"
    path = recipe([llava()])
    raw = yaml.safe_load(path.read_text())
    capfilt = ("data", "capfilt", rows, out, "--captioner")
    for stage, model, wanted in (
        ("align", {"init_from": str(of_pairs)}, "is a QFormerForPretraining, this stage goes on with a Mllm"),
        ("align", {"init_from": str(of_pairs), "tiling": {"type": "anyres"}}, "is a QFormerForPretraining"),
        ("pretrain_qformer", {"init_from": str(checkpoint)}, "is a MllmForConditionalGeneration"),
        ("pretrain_vision", {"init_from": str(of_pairs)}, "this stage goes on with a DualEncoder"),
    ):
        path.write_text(yaml.safe_dump({**raw, "stage": stage, "model": model}))
        code, _, _ = run("train", path)
        assert wanted in code
        assert "\n" not in code
    for arguments, wanted in {
        ("chat", of_pairs, "--prompt", "hi"): "cannot answer",
        (*capfilt, of_pairs, "--filter", of_pairs): "cannot answer",
        (*capfilt, checkpoint, "--filter", checkpoint): "give one of pretrain_qformer",
        (*capfilt, checkpoint, "--filter", of_pairs, "--batch-size", "0"): "batch size 0",
        (
            *capfilt,
            checkpoint,
            "--filter",
            of_pairs,
            "--image-root",
            "/no",
        ): "all 1 rows are bad; the first: ",
        (
            "data",
            "capfilt",
            rows,
            rows,
            "--captioner",
            checkpoint,
            "--filter",
            of_pairs,
        ): "the file that is read",
        ("export", of_pairs, out): "has no class in transformers",
        ("export", checkpoint, of_pairs): "is there already",
        ("import", checkpoint, out): "cannot import 'none'; give one of Llava",
        ("import", rows, out): "config.json",
        ("chat", checkpoint, "--prompt", "hi", "--device", "foo"): "device 'foo': ",
    }.items():
        code, _, _ = run(*arguments)
        assert isinstance(code, str), arguments
        assert wanted in code
        assert "\n" not in code
    assert not list(tmp_path.glob("*written.jsonl*"))


@pytest.mark.parametrize(("batch", "stage"), [(1, "pretrain_vision"), (9, "pretrain_qformer")])
def test_a_batch_of_pairs_has_negatives_and_fits_the_data(
    batch: int, stage: str, run: Any, recipe: Any, parts: dict[str, str], tmp_path: Path
) -> None:
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    common = {"vision_encoder": parts["vision_encoder"], "tokenizer": str(tmp_path / "bert")}
    path = recipe([llava(), llava()], train={"per_device_batch_size": batch})
    model = {
        "pretrain_vision": {**common, "text_encoder": {"model_type": "bert", **sizes}},
        "pretrain_qformer": {
            **common,
            "connector": {"type": "qformer", "width": 32, "layers": 2, "heads": 4, "intermediate": 64},
        },
    }[stage]
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "stage": stage, "model": model}))
    code, _, _ = run("train", path)
    assert f"a batch has {batch} pairs, the data have 2" in code
    assert not list((tmp_path / "out").glob("*"))


def test_options_without_effect_are_refused(run: Any, recipe: Any, tmp_path: Path) -> None:
    recipe([llava()])
    convert = ("data", "convert", tmp_path / "rows.jsonl", tmp_path / "written.jsonl")
    for arguments, wanted in {
        (*convert, "--tasks", "refer"): "are of --format coco_boxes",
        (*convert, "--seed", "0"): "are of --format coco_boxes",
        (*convert, "--per", "image"): "is of COCO captions",
        (*convert, "--max-bad", "0.5"): "is of --on-error skip",
        (*convert, "--on-error", "skip", "--max-bad", "7"): "it is a share",
        (*convert, "--format", "coco_boxes"): "a box style and the format 'coco_boxes' go together",
        (*convert, "--format", "coco_boxes", "--box-style", "llva"): "unknown box style 'llva'",
        (*convert, "--format", "coco_boxes", "--box-style", "llava", "--tasks", "refer,refer"): "there twice",
        ("data", "convert", tmp_path / "rows.jsonl", tmp_path): "is a folder",
        ("data", "inspect", tmp_path / "recipe.yaml", "--start", "9"): "has 1 rows",
        ("quickstart", "--fast", "--out", tmp_path / "rows.jsonl"): "Not a directory",
    }.items():
        code, _, _ = run(*arguments)
        assert isinstance(code, str), arguments
        assert wanted in code
        assert "\n" not in code
    assert not (tmp_path / "written.jsonl").exists()


def test_debug_shows_the_traceback(run: Any) -> None:
    with pytest.raises(ConfigError):
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


def test_training_needs_no_deepspeed() -> None:
    """The quickstart's installation has none, and accelerate then lacks what is about it."""
    code = """
import importlib.metadata as metadata
known = metadata.metadata
def hiding(name):
    if name == "deepspeed":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.metadata = hiding
import mllm.quickstart.run, mllm.training.preflight
from accelerate.utils import is_deepspeed_available
assert not is_deepspeed_available()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
