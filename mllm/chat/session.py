"""A conversation: history, images and settings. No input or output happens here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.data.schema import Message, assistant, images_of, user
from mllm.decoding import Decoder, generate


@dataclass
class ChatSession:
    """One conversation with a model.

    Attributes:
        model: the model.
        processor: its processor.
        decode: how answers are decoded.
        max_new_tokens: longest answer.
        seed: of the first answer; each further answer takes the next one.
        messages: the history, ending with an assistant message.
        pending: images that go with the next question.
    """

    model: Any
    processor: Any
    decode: Decoder
    max_new_tokens: int = 256
    seed: int = 0
    messages: list[Message] = field(default_factory=list)
    pending: list[Any] = field(default_factory=list)

    def add_image(self, image: str | Path) -> None:
        """Show an image with the next question; it is decoded now, so that a bad file is told at once."""
        self.processor.pixels([image])
        self.pending.append(image)

    def ask(self, text: str, streamer: Any = None) -> str:
        """Ask, remember the question and the answer, and return the answer.

        Nothing is remembered when generation fails or is interrupted.
        """
        question = user(text, *self.pending)
        answer = answer_of(
            self.model,
            self.processor,
            [*self.messages, question],
            decode=self.decode,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed + len(self.messages) // 2,
            streamer=streamer,
        )
        self.messages += [question, assistant(answer)]
        self.pending = []
        return answer

    def clear(self) -> None:
        """Forget the history and the images."""
        self.messages = []
        self.pending = []

    @property
    def images(self) -> list[Any]:
        """Every image shown so far."""
        return [*images_of(self.messages), *self.pending]


def answer_of(
    model: Any,
    processor: Any,
    messages: Sequence[Message],
    *,
    decode: Decoder | str = "greedy",
    max_new_tokens: int = 256,
    seed: int | None = None,
    streamer: Any = None,
) -> str:
    """The model's answer to a conversation that ends with the user's message."""
    inputs = processor([messages]).to(model.device)
    tokens = generate(
        model, inputs, decode=decode, max_new_tokens=max_new_tokens, seed=seed, streamer=streamer
    )
    return processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
