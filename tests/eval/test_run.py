"""Running a tiny real model on questions: records, resuming, seeds, missing images."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from eval.records import meta_path, to_lines
from eval.run import answer, batch_seed, run
from eval.score import score
from eval.tasks import pope
from mllm import MllmForConditionalGeneration
from mllm.data.schema import user
from mllm.errors import ConfigError, DataError
from mllm.model import checkpoint as checkpoints

THINGS = ["dog", "cat", "apple", "car"]


def tiny(template: str = "vicuna_v1"):
    """A model with random weights and its processor."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = Fast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            initializer_factor=20.0,
        )
    )
    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    size = {"height": 16, "width": 16}
    return MllmForConditionalGeneration.from_components(
        vision_encoder=vision,
        language_model=text,
        tokenizer=tokenizer,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        connector={"type": "mlp"},
        template=template,
    )


@pytest.fixture(scope="module")
def parts():
    return tiny()


def world(folder: Path, n: int = 10) -> tuple[Path, Path]:
    """`n` questions, two a picture; returns the question file and the image folder."""
    images = folder / "images"
    images.mkdir(parents=True)
    for i in range((n + 1) // 2):
        picture = Image.new("RGB", (20 + i, 16), ((53 * i) % 256, (101 * i) % 256, 255 - (29 * i) % 256))
        picture.paste((255 - (40 * i) % 256, 20, 90), (0, 0, 4 + i % 12, 9))
        picture.save(images / f"{i}.png")
    rows = [
        {
            "question_id": i + 1,
            "image": f"{i // 2}.png",
            "text": f"Is there a {THINGS[i % 4]} in the image?",
            "label": "yes" if i % 2 == 0 else "no",
        }
        for i in range(n)
    ]
    questions = folder / "pope_random.jsonl"
    questions.write_text(to_lines(rows))
    return questions, images


def go(parts, questions: Path, images: Path, out: Path, **settings) -> Path:
    return run(*parts, questions, images, out, **{"max_new_tokens": 4, "batch_size": 3} | settings)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class StoppedError(Exception):
    """Stands for whatever ends a run."""


class StopsAfter:
    """A real processor that ends the run at its n-th batch."""

    def __init__(self, processor, batches: int):
        self.processor, self.left = processor, batches

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, conversations):
        self.left -= 1
        if self.left < 0:
            raise StoppedError
        return self.processor(conversations)


def interrupt(parts, batches: int, *args, **settings) -> None:
    with pytest.raises(StoppedError):
        go((parts[0], StopsAfter(parts[1], batches)), *args, **settings)


# ------------------------------------------------------------------------------------------ the record


def test_every_question_is_answered_and_recorded(parts, tmp_path):
    questions, images = world(tmp_path)
    out = go(parts, questions, images, tmp_path / "run" / "p.jsonl", seed=5, decode="vcd,alpha=0.5")
    rows = rows_of(out)
    assert [r["question_id"] for r in rows] == list(range(1, 11))
    first = pope.load(questions)[0]
    asked = "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    assert rows[0] == {
        "question_id": 1,
        "image": "0.png",
        "prompt": parts[1].prompt_text([user(asked, "0.png")]),
        "question": first.text,
        "answer": rows[0]["answer"],
        "label": "yes",
    }
    assert f"USER: <image>\n{asked} ASSISTANT:" in rows[0]["prompt"]
    meta = json.loads(meta_path(out).read_text())
    assert (meta["seed"], meta["batch_size"], meta["prompt_style"]) == (5, 3, "llava")
    assert meta["decode"]["name"] == "vcd"
    assert meta["decode"]["alpha"] == 0.5
    assert meta["question_file"]["sha256"] == pope.identify(questions)[0]
    assert len(meta["checkpoint"]["weights_sha256"]) == 64
    assert meta["dtype"] == "float32"
    assert {"torch", "transformers", "mllm", "python"} == set(meta["versions"])
    assert sorted(p.name for p in out.parent.iterdir()) == ["p.jsonl", "p.jsonl.meta.json"]
    result = score(out, questions)
    assert (result["n"], result["run"]) == (10, meta)
    assert not any("order" in note or "SHA-256" in note for note in result["notes"])


def test_batches_answer_like_single_questions(parts, tmp_path):
    questions, images = world(tmp_path)
    together = rows_of(go(parts, questions, images, tmp_path / "a.jsonl", batch_size=4))
    alone = rows_of(go(parts, questions, images, tmp_path / "b.jsonl", batch_size=1))
    assert together == alone
    assert len({r["answer"] for r in alone}) > 1  # or the comparison would show nothing


def test_an_answer_stops_at_its_end_token(parts, tmp_path):
    model, processor = parts
    messages = [[user("hello", Image.new("RGB", (16, 16), (200, 10, 10)))]]
    whole = answer(model, processor, messages, "greedy", 6, 0)
    inputs = processor(messages)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert whole == [processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()]

    class EndsAtThird:
        """The processor, with the third token of the answer as an end token."""

        end_token_ids = [*processor.end_token_ids, int(tokens[2])]  # noqa: RUF012

        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, conversations):
            return processor(conversations)

    cut = tokens[: tokens.tolist().index(int(tokens[2]))]
    expected = processor.tokenizer.decode(cut, skip_special_tokens=True).strip()
    assert answer(model, EndsAtThird(), messages, "greedy", 6, 0) == [expected]


def test_a_checkpoint_is_named_by_its_manifest(parts, tmp_path):
    questions, images = world(tmp_path, 2)
    folder = tmp_path / "checkpoint"
    checkpoints.save(*parts, folder)
    out = go(parts, questions, images, tmp_path / "p.jsonl", checkpoint=folder)
    recorded = json.loads(meta_path(out).read_text())["checkpoint"]
    assert recorded == {"path": str(folder), "manifest_sha256": checkpoints.manifest_hash(folder)}
    # The same checkpoint at another place is the same.
    folder.rename(tmp_path / "moved")
    assert go(parts, questions, images, out, checkpoint=tmp_path / "moved") == out


def test_blank_pictures_all_look_the_same(tmp_path):
    parts = tiny("plain")  # shows the picture only, so that the answer hangs on nothing else
    questions, images = world(tmp_path, 10)
    seen = rows_of(go(parts, questions, images, tmp_path / "a.jsonl"))
    blank = rows_of(go(parts, questions, images, tmp_path / "b.jsonl", blank_images=True))
    assert len({r["answer"] for r in seen}) > 1
    assert len({r["answer"] for r in blank}) == 1
    assert json.loads(meta_path(tmp_path / "b.jsonl").read_text())["blank_images"] is True


# ----------------------------------------------------------------------------------------------- seeds


def test_seeds(parts, tmp_path):
    questions, images = world(tmp_path)
    once, again, other = (
        rows_of(go(parts, questions, images, tmp_path / f"{i}.jsonl", decode="sample", seed=seed))
        for i, seed in enumerate((1, 1, 2))
    )
    assert once == again
    assert once != other


def test_batch_seeds_differ():
    seeds = {batch_seed(seed, batch) for seed in range(50) for batch in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "tail", ["", '{"question_id": 7, "ima', '{"question_id": 7}\n{"quest', '{"quest\n', "\0\0\0"]
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(parts, tmp_path, tail):
    questions, images = world(tmp_path)
    whole = go(parts, questions, images, tmp_path / "whole.jsonl", decode="sample", seed=3)
    out = tmp_path / "p.jsonl"
    interrupt(parts, 2, questions, images, out, decode="sample", seed=3)
    assert not out.exists()
    part = out.with_name("p.jsonl.part")
    assert len(rows_of(part)) == 6
    with part.open("a") as file:
        file.write(tail)
    # Two batches are left; a third would be one too many.
    counted = (parts[0], StopsAfter(parts[1], 2))
    assert go(counted, questions, images, out, decode="sample", seed=3) == out
    assert out.read_text() == whole.read_text()
    assert not part.exists()


def test_a_killed_process_leaves_nothing_broken(parts, tmp_path):
    questions, images = world(tmp_path, 90)
    out = tmp_path / "p.jsonl"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_run as t; "
        "from pathlib import Path; "
        f"t.go(t.tiny(), Path({str(questions)!r}), Path({str(images)!r}), Path({str(out)!r}), "
        "decode='sample', seed=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    part = out.with_name("p.jsonl.part")
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was killed in the middle, it had not ended
    assert not out.exists()
    go(parts, questions, images, out, decode="sample", seed=1)
    whole = go(parts, questions, images, tmp_path / "w.jsonl", decode="sample", seed=1)
    assert out.read_text() == whole.read_text()


def test_a_complete_run_is_not_run_again(parts, tmp_path):
    questions, images = world(tmp_path)
    out = go(parts, questions, images, tmp_path / "p.jsonl")
    assert go((parts[0], StopsAfter(parts[1], 0)), questions, images, out) == out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"decode": "vcd,alpha=0.5"}, "decode.name was 'greedy', now 'vcd'"),
        ({"batch_size": 2}, "batch_size was 3, now 2"),
        ({"prompt_style": "vcd"}, "prompt_style was 'llava', now 'vcd'"),
        ({"blank_images": True}, "blank_images was False, now True"),
        ({"max_new_tokens": 5}, "max_new_tokens was 4, now 5"),
    ],
)
def test_other_settings_are_refused_unless_overwritten(parts, tmp_path, change, named):
    questions, images = world(tmp_path, 6)
    out = tmp_path / "p.jsonl"
    interrupt(parts, 1, questions, images, out)
    before = out.with_name("p.jsonl.part").read_text()
    with pytest.raises(ConfigError, match=named):
        go(parts, questions, images, out, **change)
    assert out.with_name("p.jsonl.part").read_text() == before
    go(parts, questions, images, out, **change, overwrite=True)
    assert len(rows_of(out)) == 6
    fresh = go(parts, questions, images, tmp_path / "fresh.jsonl", **change)
    assert rows_of(out) == rows_of(fresh)


def test_other_weights_and_other_questions_are_refused(parts, tmp_path):
    questions, images = world(tmp_path, 6)
    out = tmp_path / "p.jsonl"
    interrupt(parts, 1, questions, images, out)
    weight = next(parts[0].connector.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0] += 1
    with pytest.raises(ConfigError, match=r"checkpoint\.weights_sha256"):
        go(parts, questions, images, out)
    with torch.no_grad():
        weight.copy_(before)
    questions.write_text(questions.read_text().replace("a dog", "a cow"))
    with pytest.raises(ConfigError, match=r"question_file\.sha256"):
        go(parts, questions, images, out)


def test_what_is_not_ours_is_not_touched(parts, tmp_path):
    questions, images = world(tmp_path, 4)
    out = tmp_path / "p.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"p\.jsonl\.meta\.json"):
        go(parts, questions, images, out)
    assert out.read_text() == "mine\n"
    assert len(rows_of(go(parts, questions, images, out, overwrite=True))) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [("{broken", r"\.part:2: not JSON"), ('{"question_id": 9}', r"\.part:2: does not answer")],
)
def test_a_broken_line_in_the_middle_is_refused(parts, tmp_path, line, message):
    questions, images = world(tmp_path)
    out = tmp_path / "p.jsonl"
    interrupt(parts, 2, questions, images, out)
    part = out.with_name("p.jsonl.part")
    lines = part.read_text().splitlines()
    part.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=message):
        go(parts, questions, images, out)


# ----------------------------------------------------------------------------------------- bad input


def test_missing_images_are_named_before_anything_is_written(parts, tmp_path):
    questions, images = world(tmp_path)
    (images / "3.png").unlink()
    with pytest.raises(DataError) as caught:
        go(parts, questions, images, tmp_path / "run" / "p.jsonl")
    message = str(caught.value)
    for part in ("pope_random.jsonl:7", "3.png", "question_id 7", "1 of 5 images missing"):
        assert part in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_names_its_question_and_the_run_can_go_on(parts, tmp_path):
    questions, images = world(tmp_path)
    good = (images / "2.png").read_bytes()
    (images / "2.png").write_bytes(good[:40])
    out = tmp_path / "p.jsonl"
    with pytest.raises(DataError, match=r"pope_random.jsonl:5.*2\.png"):
        go(parts, questions, images, out)
    assert len(rows_of(out.with_name("p.jsonl.part"))) == 3
    (images / "2.png").write_bytes(good)
    assert len(rows_of(go(parts, questions, images, out))) == 10


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"decode": "vdc"}, {"prompt_style": "none"}, {"max_new_tokens": 0}]
)
def test_bad_settings_are_refused_before_anything_is_written(parts, tmp_path, settings):
    questions, images = world(tmp_path, 2)
    with pytest.raises(ConfigError):
        go(parts, questions, images, tmp_path / "run" / "p.jsonl", **settings)
    assert not (tmp_path / "run").exists()
