"""Pieces of a rendered conversation -> token ids and labels.

Neighbouring masked pieces are tokenised together, as the model will see them in a prompt; an answer is
tokenised alone, so that its ids are the same whatever stands around it. Training ids are therefore the
prompt's ids followed by the answer's, and the labels are exactly the answer and its end token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from mllm.data.templates import Piece, adds_prefix_space

IGNORE = -100


class PieceTokenizer:
    """Tokenises pieces with one tokenizer; finds out once what that tokenizer does with spaces.

    Args:
        tokenizer: any Hugging Face tokenizer.
        image_token_id: id of the image marker, one a marker; expansion comes later.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int):
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.prefix_space = adds_prefix_space(tokenizer)
        self.special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def __call__(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Ids and labels (`IGNORE` where masked), both of the length of the sequence."""
        ids: list[int] = []
        labels: list[int] = []
        for supervised, group in groupby(pieces, key=lambda piece: piece.supervised):
            run = list(group)
            tokens = self._answer(run) if supervised else self._masked(run)
            ids += tokens
            labels += tokens if supervised else [IGNORE] * len(tokens)
        return ids, labels

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not parse_special)
        return list(encoded["input_ids"])

    def _masked(self, run: Sequence[Piece]) -> list[int]:
        text, ids = "", []
        for piece in run:
            if piece.source == "user" and self._has_special(piece.text):
                ids += self._encode(text, True) + self._encode(piece.text, False)
                text = ""
            else:
                text += piece.text
        # A tokenizer that writes a space in front of every text writes the one in front of the answer
        # too; keeping the template's would make two of it ("ASSISTANT:" + "_Yes", as LLaVA has it).
        if self.prefix_space and text.endswith(" "):
            text = text[:-1]
        return ids + self._encode(text, True)

    def _answer(self, run: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        text = ""
        for part, special in self._parsed(run):
            if special:
                ids += self._encode(text, False) + self._encode(part, True)
                text = ""
            else:
                text += part
        return ids + self._encode(text, False)

    def _parsed(self, run: Sequence[Piece]) -> Iterator[tuple[str, bool]]:
        """Split the template's text at its special tokens; a content is never parsed for them."""
        for piece in run:
            text = piece.text
            while piece.source == "template" and (found := self._first_special(text)):
                start, token = found
                yield text[:start], False
                yield token, True
                text = text[start + len(token) :]
            yield text, False

    def _first_special(self, text: str) -> tuple[int, str] | None:
        starts = [(text.find(token), token) for token in self.special if token in text]
        return min(starts) if starts else None

    def _has_special(self, text: str) -> bool:
        return any(token in text for token in self.special)


def expand_images(
    ids: Sequence[int], labels: Sequence[int], image_token_id: int, num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """Repeat every image placeholder `num_image_tokens` times; labels there are masked."""
    long_ids: list[int] = []
    long_labels: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        count = num_image_tokens if token == image_token_id else 1
        long_ids += [token] * count
        long_labels += [label] * count
    return long_ids, long_labels
