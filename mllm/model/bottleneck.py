"""Bottleneck adapters: two small layers behind a sub-layer, before its output joins the residual stream.

Houlsby et al. (arXiv 1902.00751) put one behind attention and one behind the feed-forward; Pfeiffer et al.
(arXiv 2005.00247) keep the second only. PEFT has none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mllm.errors import ConfigError
from mllm.model.language_model import decoder_layers

INIT_STD = 1e-3


class Bottleneck(nn.Module):
    """`x + up(gelu(down(x)))`; its weights start near zero, as in the paper, so it starts near identity.

    Args:
        width: of x.
        size: between `down` and `up`.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]; its weights may be of another dtype than x."""
        change = self.up(F.gelu(self.down(x.to(self.down.weight.dtype))))
        return x + change.to(x.dtype)

    def follow(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The hook of the layer that it stands behind; a bound method, so that a copied model has its own."""
        return self(output)


def insert_bottlenecks(part: nn.Module, kind: str, size: int, placement: str) -> None:
    """Put bottlenecks into every transformer layer of a part.

    They stand right behind the projections that lead back to the residual stream, as children of those
    (`...o_proj.bottleneck`). Layers that add attention and feed-forward to the stream at once, such as
    Phi's, get the same two: each before the addition.

    Args:
        part: a Hugging Face model.
        kind: `adapter`.
        size: width of the bottleneck.
        placement: `houlsby` or `pfeiffer`.

    Raises:
        ConfigError: no transformer layers, two stacks of them, or none of the known shape.
    """
    config: Any = getattr(part, "config", None)
    if not hasattr(config, "num_hidden_layers") or config.is_encoder_decoder:
        raise ConfigError(
            f"{type(part).__name__} has no one list of transformer layers; use 'full' or 'lora'"
        )
    layers: Any = decoder_layers(part)  # type: ignore[arg-type]
    for layer in layers:
        attention, feed_forward = output_projections(layer, config.hidden_size)
        for place in (attention, feed_forward) if placement == "houlsby" else (feed_forward,):
            place.bottleneck = bottleneck = Bottleneck(config.hidden_size, size).to(place.weight.device)
            place.register_forward_hook(bottleneck.follow)


def output_projections(layer: nn.Module, width: int) -> tuple[Any, Any]:
    """The linear layers by which attention and feed-forward of a transformer layer write to the stream.

    Found by structure: attention is the layer's first child with linear layers in it, and either block ends
    with its output projection.

    Raises:
        ConfigError: the layer is built otherwise (T5's, mixtures of experts).
    """
    blocks = [linears for child in layer.children() if (linears := _linears(child))]
    if len(blocks) < 2 or any(_width(block[-1]) != width for block in (blocks[0], blocks[-1])):
        raise ConfigError(
            f"{type(layer).__name__} is not attention followed by a dense feed-forward; use 'full' or 'lora'"
        )
    return blocks[0][-1], blocks[-1][-1]


def _linears(module: nn.Module) -> list[Any]:
    return [child for child in module.modules() if isinstance(child, (nn.Linear, Conv1D))]


def _width(linear: Any) -> int:
    return linear.nf if isinstance(linear, Conv1D) else linear.out_features
