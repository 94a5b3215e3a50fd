"""Pieces of a rendered conversation -> token ids and labels.

Neighbouring masked pieces are tokenised together, as the model will see them in a prompt; an answer is
tokenised alone, so that its ids are the same whatever stands around it. Training ids are therefore the
prompt's ids followed by the answer's, and the labels are exactly the answer and its end token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mllm.data.templates import Piece, adds_bos, adds_prefix_space

IGNORE = -100


class PieceTokenizer:
    """Tokenises pieces with one tokenizer; finds out once what that tokenizer does with spaces.

    Args:
        tokenizer: any Hugging Face tokenizer.
        image_token_id: id of the image marker, one a marker; expansion comes later.

    Attributes:
        names: special tokens that have a name, as templates know them.
        ends: special tokens that may end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int):
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        image = str(tokenizer.convert_ids_to_tokens(image_token_id))
        self.names = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        # `all_special_tokens` has only those with a name of their own: not the `<|end|>` of Phi.
        added = tokenizer.added_tokens_decoder.values()
        self.ends = [token.content for token in added if token.special and token.content != image]
        # Ids of special tokens alone, which are half of all that is tokenised; None until asked for.
        self.known: dict[str, list[int] | None] = dict.fromkeys(tokenizer.get_added_vocab())
        self.prefix_space = adds_prefix_space(tokenizer)
        # Some write that space only where the text has none: " a" and "a" would become the same ids.
        self.merges_space = self.prefix_space and self._encode(" a", False) == self._encode("a", False)
        special = sorted(self.known, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)))
        # LLaVA tokenises what follows the beginning of a sequence, or an image, as a text of its own.
        starts = [tokenizer.bos_token if adds_bos(tokenizer) else None, image]
        self.starts = re.compile("(" + "|".join(re.escape(token) for token in starts if token) + ")")

    def __call__(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Ids and labels (`IGNORE` where masked), both of the length of the sequence."""
        ids: list[int] = []
        labels: list[int] = []
        before = ""
        for run in _runs(pieces):
            supervised = run[0].supervised
            tokens = self._answer(run) if supervised else self._masked(run, before)
            ids += tokens
            labels += tokens if supervised else [IGNORE] * len(tokens)
            before = self._last_special(run)
        return ids, labels

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not text:
            return []
        if parse_special and (known := self.known.get(text)) is not None:
            return list(known)
        ids = self._tokenise(text, parse_special)
        if parse_special and text in self.known:
            self.known[text] = list(ids)
        return ids

    def _tokenise(self, text: str, parse_special: bool) -> list[int]:
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            options = {"add_special_tokens": False, "split_special_tokens": not parse_special}
            return list(self.tokenizer(text, **options)["input_ids"])
        # The same without all that transformers makes of a text beside its ids, which takes as long again.
        backend = self.tokenizer.backend_tokenizer
        if backend.padding or backend.truncation:  # another call has left them
            backend.no_padding()
            backend.no_truncation()
        if backend.encode_special_tokens == parse_special:
            backend.encode_special_tokens = not parse_special
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _masked(self, run: Sequence[Piece], before: str) -> list[int]:
        """Ids of masked text; `before` is the special token in front of it, which may eat a space."""
        chunks = list(self._chunks(run))
        # A tokenizer that writes a space in front of every text writes the one in front of the answer
        # too; keeping the template's would make two of it ("ASSISTANT:" + "_Yes", as LLaVA has it).
        text, parse = chunks[-1]
        if self.prefix_space and parse and text.endswith(" "):
            chunks[-1] = (text[:-1], parse)
        ids: list[int] = []
        for text, parse in chunks:
            context = before if parse else ""
            ids += self._encode(context + text, parse)[len(self._encode(context, True)) :]
            before = ""
        return ids

    def _chunks(self, run: Sequence[Piece]) -> Iterator[tuple[str, bool]]:
        """(text, whether special tokens are parsed in it) of what is tokenised together."""
        specials = [found.span() for found in self.special.finditer("".join(piece.text for piece in run))]
        text, at = "", 0
        for source, group in groupby(run, key=lambda piece: piece.source):
            content = "".join(piece.text for piece in group)
            start, at = at, at + len(content)
            if source != "template" and any(a < at and b > start for a, b in specials):
                yield from self._split(text)
                yield content, False
                text = ""
            else:
                text += content
        yield from self._split(text)

    def _split(self, text: str) -> Iterator[tuple[str, bool]]:
        # Without a space in front of every text, the parts are tokenised as the whole is.
        parts = self.starts.split(text) if self.prefix_space else [text]
        yield from ((part, True) for part in parts)

    def _answer(self, run: Sequence[Piece]) -> list[int]:
        """Ids of one answer, where nothing is parsed, and of the template's text after it."""
        tail = "".join(piece.text for piece in run[1:])
        found = self.special.search(tail)
        end = found.start() if found else len(tail)
        text = run[0].text + tail[:end]
        if self.merges_space and text.startswith(" "):
            text = " " + text
        return self._encode(text, False) + self._encode(tail[end:], True)

    def _last_special(self, run: Sequence[Piece]) -> str:
        """The special token that a run ends with, if it does."""
        if run[-1].source != "template":
            return ""
        found = [match.group() for match in self.special.finditer(run[-1].text)]
        return found[-1] if found and run[-1].text.endswith(found[-1]) else ""


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are tokenised together: masked neighbours, or one answer and what ends it."""
    run: list[Piece] = []
    for piece in pieces:
        if run and (piece.supervised != run[0].supervised or (piece.supervised and piece.source == "answer")):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def expand_images(
    ids: Sequence[int], labels: Sequence[int], image_token_id: int, counts: Iterable[int]
) -> tuple[list[int], list[int]]:
    """Repeat each image placeholder as often as its image has tokens; labels there are masked.

    Of an iterator, `counts`, as many are taken as there are placeholders: rows may share one.
    """
    long_ids: list[int] = []
    long_labels: list[int] = []
    start, of_images = 0, iter(counts)
    for _ in range(ids.count(image_token_id)):
        place, count = ids.index(image_token_id, start), next(of_images)
        long_ids += [*ids[start:place], *[image_token_id] * count]
        long_labels += [*labels[start:place], *[labels[place]] * count]
        start = place + 1
    return [*long_ids, *ids[start:]], [*long_labels, *labels[start:]]


def pad_rows(rows: Sequence[Sequence[int]], filler: int, left: bool = False) -> torch.Tensor:
    """Rows of different lengths as one tensor [B, S], padded on the right unless `left`."""
    width = max(map(len, rows))
    padding = [[filler] * (width - len(row)) for row in rows]
    return torch.tensor([[*p, *row] if left else [*row, *p] for p, row in zip(padding, rows, strict=True)])
