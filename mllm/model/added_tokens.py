"""New tokens of a language model: places and classes as words of their own (VisionLLM, arXiv 2305.11175)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mllm.errors import ConfigError

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)\}")


def expand(patterns: Sequence[str]) -> list[str]:
    """`["<c{0..2}>", "<eoc>"]` -> `["<c0>", "<c1>", "<c2>", "<eoc>"]`; both ends of a range are in it.

    Raises:
        ConfigError: an empty pattern or range, or the same token twice.
    """
    tokens: list[str] = []
    for pattern in patterns:
        found = _RANGE.search(pattern)
        if found is None:
            tokens.append(pattern)
            continue
        first, last = map(int, found.groups())
        tokens += [f"{pattern[: found.start()]}{n}{pattern[found.end() :]}" for n in range(first, last + 1)]
        if last < first:
            raise ConfigError(f"model.added_tokens: {pattern!r} is an empty range")
    if not all(tokens) or len(set(tokens)) != len(tokens):
        raise ConfigError("model.added_tokens: a token is empty or there twice")
    return tokens


def add_tokens(tokenizer: PreTrainedTokenizerBase, patterns: Sequence[str], vocab_size: int) -> int:
    """Add tokens, in place; returns the rows that the language model's embedding then needs.

    Raises:
        ConfigError: see `expand`; or the tokenizer has such a token.
    """
    tokens = expand(patterns)
    if old := sorted(set(tokens) & tokenizer.get_vocab().keys()):
        raise ConfigError(f"model.added_tokens: the tokenizer has {old[0]!r} already; leave it out")
    tokenizer.add_tokens(tokens)
    ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)  # type: ignore[assignment]
    return max(vocab_size, *(index + 1 for index in ids))


def resize_embeddings(language_model: PreTrainedModel, rows: int) -> set[str]:
    """Give embedding and head `rows` rows, new ones being their mean; returns the parameters that changed."""
    if rows == language_model.config.vocab_size:
        return set()
    language_model.resize_token_embeddings(rows)
    return embedding_names(language_model)


def embedding_names(language_model: PreTrainedModel) -> set[str]:
    """Names of the parameters of the input embedding and of the head."""
    ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    own = {id(p) for end in ends if end is not None for p in end.parameters()}
    return {name for name, p in language_model.named_parameters(remove_duplicate=False) if id(p) in own}
