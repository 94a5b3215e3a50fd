"""`{"type": kind, argument: value}` -> an object: how recipes name connectors and fusions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mllm.errors import ConfigError, MllmError

T = TypeVar("T")


def build_typed(
    what: str, table: Mapping[str, Callable[..., T]], settings: Mapping[str, Any], *own: Any
) -> T:
    """`table[settings["type"]]`, called with `own` and the other settings.

    Raises:
        ConfigError: unknown type or argument, or a value that it cannot take; lists the known ones.
    """
    arguments = dict(settings)
    kind = arguments.pop("type", None)
    if kind not in table:
        raise ConfigError(f"unknown {what} type {kind!r}; use one of {', '.join(table)}")
    try:
        return table[kind](*own, **arguments)
    except MllmError:
        raise
    except (TypeError, ValueError) as error:
        known = [str(p).replace("'", "") for p in inspect.signature(table[kind]).parameters.values()][
            len(own) :
        ]
        raise ConfigError(f"{what} {kind!r}: {error}; its arguments: {', '.join(known) or 'none'}") from error
