"""The shipped backbones load, are small, and the text they are trained on is what it says."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import mllm.quickstart
from mllm.quickstart.corpus import SYSTEM, document, documents, encode, scene_map, train_tokenizer
from mllm.quickstart.drawing import render
from mllm.quickstart.pretrain_language import train_language
from mllm.quickstart.pretrain_vision import (
    HARD_NEGATIVES,
    _captions,
    _phrases,
    late_interaction,
    train_vision,
)
from mllm.quickstart.wording import ONE_WORD
from mllm.quickstart.world import COLOURS, IMAGE_SIZE, KINDS, make_scenes, measure_habits

BACKBONES = Path(mllm.quickstart.__file__).parent / "backbones"
SCENES = make_scenes(80, 0, "pretrain_language")
HABITS = measure_habits(SCENES)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BACKBONES / "language_model")


def test_shipped_weights_are_small_and_load_in_fp32(tokenizer) -> None:
    files = [path for path in BACKBONES.rglob("*") if path.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in files) < 10e6
    vision = CLIPVisionModel.from_pretrained(BACKBONES / "vision_encoder")
    language = AutoModelForCausalLM.from_pretrained(BACKBONES / "language_model")
    assert {p.dtype for p in (*vision.parameters(), *language.parameters())} == {torch.float32}
    assert language.config.vocab_size >= len(tokenizer)
    processor = AutoImageProcessor.from_pretrained(BACKBONES / "vision_encoder")
    pixels = processor(render(SCENES[0]), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    # As in pretraining: no resampling at the native size, (x - 0.5) / 0.25.
    exact = (torch.from_numpy(np.array(render(SCENES[0]))).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(pixels[0], exact, atol=1e-5, rtol=0)


def test_tokenizer_keeps_any_text_and_repeated_phrases_are_short(tokenizer) -> None:
    for text in ("A red ball.", "Grüße, 世界 🙂\n\n  x", f"{SYSTEM} USER: hi{ONE_WORD} ASSISTANT: Yes"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    for text in (SYSTEM, ONE_WORD, "Yes", "No", *(f" {kind}" for kind in KINDS)):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text


def test_map_names_every_object_and_only_what_is_there() -> None:
    rng = random.Random(0)
    for scene in SCENES:
        words = scene_map(scene, rng).split()
        assert len(words) == 36
        said = set(words)
        assert said & set(KINDS) == set(scene.counts)
        assert said & set(COLOURS) <= {obj.colour for obj in scene.objects}
        assert said - set(KINDS) - set(COLOURS) <= {scene.background}


def test_only_answers_and_captions_are_learnt(tokenizer) -> None:
    rng = random.Random(0)
    for scene in SCENES[:20]:
        pieces = document(scene, rng, HABITS)
        ids, labels = encode(pieces, tokenizer)
        assert len(ids) == len(labels)
        learnt = [label for label in labels if label >= 0]
        assert tokenizer.decode(learnt) == "".join(p.text for p in pieces if p.learnt)
        assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
        assert tokenizer.decode(ids) == "<s>" + "".join(piece.text for piece in pieces)


def test_changed_captions_differ_in_one_phrase_and_are_false() -> None:
    rng = random.Random(0)
    captions = _captions(SCENES, rng)
    assert len(captions) == len(SCENES) * (1 + HARD_NEGATIVES)
    for i, true in enumerate(captions[: len(SCENES)]):
        start = len(SCENES) + i * HARD_NEGATIVES
        for changed in captions[start : start + HARD_NEGATIVES]:
            (new,) = [p for p, q in zip(changed, true, strict=True) if p != q]
            assert new not in true


def test_late_interaction_equals_its_definition() -> None:
    torch.manual_seed(0)
    patches, vectors = torch.randn(3, 5, 8), torch.randn(6, 8)
    phrases, member = _phrases([("a", "b"), ("b", "c", "d"), ("e", "f", "a", "c")])
    assert phrases == ["a", "b", "c", "d", "e", "f"]
    scores = late_interaction(patches, vectors, member)
    by_hand = torch.tensor(
        [
            [
                np.mean([max(float(p @ vectors[k]) for p in image) for k in caption])
                for caption in ([0, 1], [1, 2, 3], [4, 5, 0, 2])
            ]
            for image in patches
        ]
    )
    torch.testing.assert_close(scores, by_hand.float(), atol=1e-5, rtol=1e-5)


def test_pretraining_learns_and_repeats() -> None:
    pieces = itertools.chain.from_iterable(itertools.islice(documents(SCENES, HABITS, 0), 100))
    tokenizer = train_tokenizer(piece.text for piece in pieces)

    def losses(train, *args) -> list[float]:
        seen: list[float] = []
        train(*args, batch_size=8, report=lambda step, steps, loss: seen.append(loss))
        return seen

    for train, args in ((train_vision, (SCENES, 12)), (train_language, (SCENES, tokenizer, 12))):
        first = losses(train, *args)
        assert len(first) == 12
        assert sum(first[-3:]) < sum(first[:3])
        assert first == losses(train, *args)
