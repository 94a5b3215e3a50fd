"""Decoding: logits -> tokens, by one `decode=` argument that means the same everywhere.

Another decoder is one file with a `Decoder` dataclass and one line in `DECODERS`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from mllm.decoding.contrastive import Vcd
from mllm.decoding.plain import Decoder, Greedy, Sample
from mllm.errors import ConfigError

__all__ = [
    "DECODERS",
    "Decoder",
    "Greedy",
    "Sample",
    "Vcd",
    "describe",
    "generate",
    "parse_decode",
]

DECODERS: dict[str, type[Decoder]] = {
    "greedy": Greedy,
    "sample": Sample,
    "vcd": Vcd,
}

_ONE_PATH = "every decoder here follows one hypothesis a row, and no contrast is defined for beams"
_ONE_MODEL = "assisted decoding would choose the tokens in place of the decoder"
_IN_DECODE = "it belongs to decode, e.g. decode='sample,temperature=0.7'"
_ANOTHER = "it selects another decoder; use decode"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("do_sample", "temperature", "top_p", "top_k"), _IN_DECODE),
    **dict.fromkeys(("num_beams", "num_beam_groups", "constraints", "force_words_ids"), _ONE_PATH),
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "use_mtp"), _ONE_MODEL),
    "assistant_early_exit": _ONE_MODEL,
    **dict.fromkeys(("penalty_alpha", "dola_layers", "custom_generate"), _ANOTHER),
    "generation_config": "pass its settings by name",
    "return_dict_in_generate": "only the new tokens are returned",
}
"""Options of transformers' `generate` that `generate` here does not take, each with its reason."""

_KEPT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len"),
    *("compile_config", "disable_compile", "transformers_version"),
}
"""What is taken over from a model's generation config: special tokens and the cache, no search."""


def parse_decode(decode: str | Decoder) -> Decoder:
    """Return the decoder that `decode` names, e.g. "greedy" or "vcd,alpha=0.5,do_sample=true".

    Raises `ConfigError` for an unknown name or setting (with the nearest known one) or a bad value.
    """
    if isinstance(decode, Decoder):
        return decode
    name, *settings = (part.strip() for part in decode.split(","))
    if name not in DECODERS:
        reason = _reason("num_beams") if name == "beam" else ""
        raise ConfigError(f"decode {decode!r}: {_unknown('decoder', name, list(DECODERS))}{reason}")
    defaults: dict[str, Any] = {field.name: field.default for field in fields(DECODERS[name])}
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, text = (part.strip() for part in setting.partition("="))
        if key in values:
            raise ConfigError(f"decode {decode!r}: {key} is given twice")
        if key not in defaults:
            unknown = _unknown("setting", key, list(defaults))
            raise ConfigError(f"decode {decode!r}: {unknown}{_reason(key)}")
        values[key] = _parse_value(decode, key, text, type(defaults[key]))
    return DECODERS[name](**values)


def describe(decoder: Decoder) -> dict[str, Any]:
    """Return name and all settings, JSON-able, for the record of a run."""
    return {"name": decoder.name, **asdict(decoder)}


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    decode: str | Decoder = "greedy",
    *,
    max_new_tokens: int = 128,
    seed: int | None = None,
    streamer: Any = None,
    **generate_kwargs: Any,
) -> Tensor:
    """Continue every row of `inputs` and return the new tokens [B, T], padded after the end.

    `model` is any (vision-)language model of transformers or ours, `inputs` the batch of its processor,
    left-padded unless an encoder reads it. The search is what `decode` says and nothing else: sampling
    settings, penalties and beams in the model's own generation config do not count. `generate_kwargs` go
    to transformers' `generate` (`use_cache`, `repetition_penalty`, `stopping_criteria`, ...); with a
    contrastive decoder, logits processors work on contrasted scores and are shown 2B rows.

    `seed` fixes sampling and leaves the global random state as it was; without it, sampling goes on
    with the global one. Raises `ConfigError` for what cannot work, with the reason.
    """
    decoder = parse_decode(decode)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r}: it must be 1 or more")
    inputs = {name: value for name, value in inputs.items() if value is not None}
    for name, reason in {**REFUSED, **decoder.refuses}.items():
        if generate_kwargs.get(name) is not None or name in inputs:
            raise ConfigError(f"{name} cannot be used with decode {decoder.name!r}: {reason}")

    tensors = {
        name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    arguments = _neutral(model, generate_kwargs) | {"max_new_tokens": max_new_tokens}
    arguments["suppress_tokens"] = _suppressed(model, generate_kwargs.get("suppress_tokens"))
    arguments |= decoder.generate_kwargs(model, tensors, streamer)
    with _seeded(seed, model.device):
        sequences: Tensor = model.generate(**arguments)
    # An encoder-decoder's sequences begin with its start token, not with the prompt.
    return sequences[:, 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :]


def _neutral(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Options that undo a model's own habits of search, with the options `given` on top."""
    own = model.generation_config.to_dict()
    habits = (name for name, value in own.items() if value is not None and name not in _KEPT)
    options = {**dict.fromkeys(habits), "num_beams": 1, "num_return_sequences": 1, **given}
    eos, pad = (given.get(name, own.get(name)) for name in ("eos_token_id", "pad_token_id"))
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    return {**options, "pad_token_id": pad}


def _suppressed(model: Any, others: list[int] | None) -> list[int] | None:
    """Tokens never to be answered: `others`, and the image placeholder if it is in the vocabulary.

    An untrained head can choose it, and a placeholder without an image stops the next step.
    """
    image = getattr(model.config, "image_token_id", None)
    tokens = list(others or [])
    if image is not None and 0 <= image < model.config.get_text_config().vocab_size:
        tokens.append(image)
    return tokens or None


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside, and put the random state back after; nothing happens for None."""
    if seed is None:
        yield
        return
    gpus = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"; nearest: {near[0]}" if near else ""
    return f"unknown {what} {name!r}; known: {', '.join(known) or 'none'}{hint}"


def _reason(option: str) -> str:
    return f" ({option}: {REFUSED[option]})" if option in REFUSED else ""


def _parse_value(decode: str, key: str, text: str, kind: type) -> Any:
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind is bool:
            raise ValueError(text)
        return kind(text)
    except ValueError:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"decode {decode!r}: {key}={text!r} must be {wanted}") from None
