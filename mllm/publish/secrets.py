"""What looks like a password or an access token, in text or under a telling key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HIDDEN = "REDACTED"
# Tokens of Hugging Face, GitHub, GitLab, OpenAI-like services, Google, AWS and Slack; JSON web tokens; keys.
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bsk-[\w-]{16,}|\bAIza[\w-]{30,}|\bAKIA[A-Z0-9]{16}\b|\bxox[abprs]-[\w-]{10,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
# Of a name in the recipe. `tokenizer`, `added_tokens` and `image_token_id` are none.
_KEY = re.compile(r"(^|[_-])(api[_-]?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)


def redact(text: str) -> str:
    """The text without what looks like a token, and without the home folder's name."""
    text = _IN_ADDRESS.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=/|\b)", "~", text) if len(home) > 1 else text


def redact_values(value: Any) -> Any:
    """A nested record without the values of keys that name a secret, and all its text redacted."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(one, str) and _KEY.search(str(key)) else redact_values(one)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [redact_values(one) for one in value]
    return redact(value) if isinstance(value, str) else value


def has_secret(text: str) -> bool:
    """Whether there is something in the text that looks like a token or a password."""
    return bool(_TOKEN.search(text) or _IN_ADDRESS.search(text))
