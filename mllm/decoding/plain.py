"""What a decoder is, and the two plain ones: greedy and sampling.

A decoder is a frozen dataclass of settings that knows what to hand to transformers' `generate`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mllm.errors import ConfigError


@dataclass(frozen=True)
class Decoder:
    """Settings of one way to turn logits into tokens; checked when they are made."""

    name: ClassVar[str]
    refuses: ClassVar[Mapping[str, str]] = {}
    """Options of `generate` that cannot work with this decoder, each with its reason."""

    def generate_kwargs(self, model: Any, inputs: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """Return all that `model.generate` must be given to decode `inputs` this way."""
        raise NotImplementedError

    def require(self, holds: bool, setting: str, rule: str) -> None:
        """Raise `ConfigError` naming `setting` and its value unless `holds`."""
        if not holds:
            value = getattr(self, setting)
            raise ConfigError(f"decode {self.name!r}: {setting}={value!r} is refused: {rule}")


@dataclass(frozen=True)
class Greedy(Decoder):
    """The most likely token at every step."""

    name: ClassVar[str] = "greedy"

    def generate_kwargs(self, model: Any, inputs: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """Plain `generate` without sampling."""
        return {**inputs, "streamer": streamer, "do_sample": False}


@dataclass(frozen=True)
class Sample(Decoder):
    """Tokens drawn from the distribution; the defaults draw from all of it, as it is.

    `top_k=0` and `top_p=1.0` mean no cut. Plain sampling is the baseline of the VCD paper.
    """

    name: ClassVar[str] = "sample"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_sampling(self)

    def generate_kwargs(self, model: Any, inputs: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """Plain `generate` with sampling."""
        return {
            **inputs,
            "streamer": streamer,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


def check_sampling(decoder: Any) -> None:
    """Raise `ConfigError` unless `temperature`, `top_p` and `top_k` of `decoder` make sense."""
    warm = math.isfinite(decoder.temperature) and decoder.temperature > 0
    decoder.require(warm, "temperature", "it must be above 0")
    decoder.require(0 < decoder.top_p <= 1, "top_p", "it must be above 0 and at most 1")
    counts = isinstance(decoder.top_k, int) and decoder.top_k >= 0
    decoder.require(counts, "top_k", "it must be a whole number, 0 for no cut")
