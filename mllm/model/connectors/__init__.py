"""Connectors: patch features [I, N, Dv] -> soft tokens [I, M, Dt]. One file and one line adds one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.errors import ConfigError
from mllm.model.connectors.base import Connector
from mllm.model.connectors.linear import LinearConnector
from mllm.model.connectors.mlp import MlpConnector

CONNECTORS: dict[str, type[Connector]] = {
    "linear": LinearConnector,
    "mlp": MlpConnector,
}


def build_connector(settings: Mapping[str, Any], vision_dim: int, text_dim: int) -> Connector:
    """Build the connector named by `settings["type"]`; the other keys are its arguments.

    Raises:
        ConfigError: unknown type or argument, listing the known ones.
    """
    arguments = dict(settings)
    kind = arguments.pop("type", None)
    if kind not in CONNECTORS:
        raise ConfigError(f"unknown connector type {kind!r}; use one of {', '.join(CONNECTORS)}")
    try:
        return CONNECTORS[kind](vision_dim, text_dim, **arguments)
    except TypeError as error:
        raise ConfigError(f"connector {kind!r}: {error}") from error


__all__ = ["CONNECTORS", "Connector", "build_connector"]
