"""The text that the tiny language model is pretrained on, and its tokenizer. No image comes in.

A document is a caption, a talk about the world, or a talk about a scene that is given in words: as a
caption, or as a map, one word a patch in reading order. The map is what patches will be later, when
the connector has learnt to speak in this vocabulary.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mllm.quickstart.wording import ONE_WORD, Turn, captions, instruction_rows, world_rows
from mllm.quickstart.world import IMAGE_SIZE, Habits, Scene, SceneObject

# The preamble of the vicuna_v1 template: it opens every conversation of stage 2.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# A word with the space in front of it, a number, punctuation, or space.
WORDS = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
PATCH = 16  # pixels a side, as in the vision encoder
MIN_COVER = 0.15  # share of a patch that an object must cover to be named on the map


class Piece(NamedTuple):
    """A stretch of a document; only `learnt` ones count in the loss."""

    text: str
    learnt: bool


def document(scene: Scene, rng: random.Random, habits: Habits) -> list[Piece]:
    """One document about a scene, without <s>; `</s>` stands where an answer ends."""
    way = rng.random()
    if way < 0.08:
        return [Piece(rng.choice(captions(scene, rng, 5)) + "\n", True)]
    if way < 0.13:
        return _talk("", world_rows(rng))
    if way < 0.4:
        caption = rng.choice(captions(scene, rng, 4))
        return [Piece(scene_map(scene, rng), False), Piece(caption + "\n", True)]
    given = scene_map(scene, rng) if rng.random() < 0.75 else captions(scene, rng, 1)[0]
    return _talk(given + "\n", instruction_rows(scene, rng, habits, n_turns=8))


def _talk(context: str, turns: Sequence[Turn]) -> list[Piece]:
    pieces = [Piece(f"{SYSTEM} USER: {context}", False)]
    for i, (question, answer) in enumerate(turns):
        opening = "USER: " if i else ""
        pieces += [
            Piece(f"{opening}{question} ASSISTANT: ", False),
            Piece(f"{answer}</s>", True),
        ]
    return pieces


def scene_map(scene: Scene, rng: random.Random) -> str:
    """One word a patch in reading order: kind or colour of what covers it, or the ground."""
    named: dict[SceneObject, int] = {}
    words = []
    for y in range(0, IMAGE_SIZE, PATCH):
        for x in range(0, IMAGE_SIZE, PATCH):
            obj = max(scene.objects, key=lambda o: _cover(o, x, y))
            if _cover(obj, x, y) < MIN_COVER:
                words.append(scene.background)
                continue
            # The first patch of an object names its kind, the second its colour, others either.
            turn = named.get(obj, 0)
            named[obj] = turn + 1
            choices = ([obj.kind], [obj.colour], [obj.kind, obj.colour])[min(turn, 2)]
            words.append(rng.choice(choices))
    return "".join(f" {word}" for word in words)


def _cover(obj: SceneObject, x: int, y: int) -> float:
    """Share of the patch at (x, y) that the object's square covers."""
    left, top, width, height = obj.box
    across = min(x + PATCH, left + width) - max(x, left)
    down = min(y + PATCH, top + height) - max(y, top)
    return max(0, across) * max(0, down) / PATCH**2


def documents(scenes: Sequence[Scene], habits: Habits, seed: int) -> Iterator[list[Piece]]:
    """Endless documents: the scenes over and over in new orders, every time said differently."""
    rng = random.Random(f"corpus/{seed}")
    while True:
        for scene in rng.sample(scenes, len(scenes)):
            yield document(scene, rng, habits)


def encode(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels of a document; -100 where a label is masked.

    Answers are tokenised alone, as they are in training on images.
    """
    ids, labels = [tokenizer.bos_token_id], [-100]
    for learnt, run in groupby(pieces, key=lambda piece: piece.learnt):
        text = "".join(piece.text for piece in run)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if learnt else [-100] * len(tokens)
    return ids, labels


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts <s> in front; any text can be encoded.

    The preamble and LLaVA's one-word request are never split into words, so that each becomes one
    token: a tiny model on a CPU should not pay forty positions a row for them.
    """
    tokenizer = Tokenizer(models.BPE())
    whole = "|".join(re.escape(text) for text in (SYSTEM, ONE_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{whole}|{WORDS}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.replace("</s>", "") for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
