"""Connectors: patch features [I, N, Dv] -> soft tokens [I, M, Dt]. One file and one line adds one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.model.connectors.base import Connector, check_positive
from mllm.model.connectors.concat_linear import ConcatLinearConnector
from mllm.model.connectors.glu import GluConnector
from mllm.model.connectors.linear import LinearConnector
from mllm.model.connectors.mapping_network import MappingNetworkConnector
from mllm.model.connectors.mlp import MlpConnector
from mllm.model.connectors.pixel_shuffle import PixelShuffleConnector
from mllm.model.connectors.qformer import InstructQFormerConnector, QFormerConnector
from mllm.model.connectors.resampler import ResamplerConnector
from mllm.model.typed import build_typed

CONNECTORS: dict[str, type[Connector]] = {
    "linear": LinearConnector,
    "mlp": MlpConnector,
    "resampler": ResamplerConnector,
    "pixel_shuffle": PixelShuffleConnector,
    "concat_linear": ConcatLinearConnector,
    "mapping_network": MappingNetworkConnector,
    "glu": GluConnector,
    "qformer": QFormerConnector,
    "instruct_qformer": InstructQFormerConnector,
}


def build_connector(settings: Mapping[str, Any], vision_dim: int, text_dim: int) -> Connector:
    """Build the connector named by `settings["type"]`; the other keys are its arguments.

    Raises:
        ConfigError: unknown type or argument, listing the known ones.
    """
    check_positive(vision_dim=vision_dim, text_dim=text_dim)
    return build_typed("connector", CONNECTORS, settings, vision_dim, text_dim)


__all__ = ["CONNECTORS", "Connector", "build_connector"]
