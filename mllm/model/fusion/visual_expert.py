"""Image positions have weights of their own in every layer (CogVLM, arXiv 2311.03079)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mllm.errors import ConfigError
from mllm.model.fusion.base import Fusion, check_takes_kwargs
from mllm.model.language_model import build_language_model, decoder_layers, unpacked


class Route(NamedTuple):
    """Which of the B * S positions go where; found once a call."""

    text: Tensor  # [T]
    image: Tensor  # [K]
    order: Tensor  # [B * S], where each position lies in [text, image]


class VisualExpert(Fusion):
    """For every linear layer inside a decoder layer a second one, its copy at first, for image positions.

    Attention stays common to all positions, and so do the norms. Each position is computed once. Text
    alone never touches the experts: it gives the bare language model's logits, bit for bit, whatever the
    experts have learned.

    Args:
        text_config: configuration of the language model.
        media_dim: width of the connector's tokens.
        media_tokens: M, tokens an image, its borders included.
        shared_positions: give all tokens between the borders one position id (CogVLM).
        boi_eoi: the first and last token of an image are its borders (connector `glu`). The first one goes
            to the expert, the last one counts as text.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        media_dim: int,
        media_tokens: int,
        shared_positions: bool = True,
        boi_eoi: bool = True,
    ):
        super().__init__()
        if boi_eoi and media_tokens < 3:
            raise ConfigError(
                f"visual_expert: an image has {media_tokens} tokens, its borders included; use the connector "
                "'glu', or boi_eoi: false"
            )
        self.media_tokens = media_tokens
        self.shared_positions = shared_positions
        self.first, self.last = (1, media_tokens - 2) if boi_eoi else (0, media_tokens - 1)
        with torch.device("meta"):
            layers = decoder_layers(build_language_model(text_config))
        self.places = [list(linears(layer)) for layer in layers]
        self.experts: Any = nn.ModuleList(
            nn.ModuleDict(
                {
                    name.replace(".", "_"): nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)
                    for name, m in linears(layer).items()
                }
            )
            for layer in layers
        )
        self._route: Route | None = None
        self._input: Tensor | None = None

    def _within(self, is_image: Tensor) -> Tensor:
        """[B, S]: the place of a position inside its image; of use at image positions only."""
        return (is_image.cumsum(1) - 1) % self.media_tokens

    def expert_mask(self, is_image: Tensor) -> Tensor:
        """[B, S], true at positions of the experts."""
        return is_image & (self._within(is_image) <= self.last)

    def position_ids(self, is_image: Tensor, attention_mask: Tensor) -> Tensor | None:
        """[B, S]: the tokens between the borders of an image share one id."""
        if not self.shared_positions:
            return None
        if is_image.shape != attention_mask.shape:
            raise ValueError("positions after an image cannot be told from a mask alone; give position_ids")
        within = self._within(is_image)
        shares = is_image & (within > self.first) & (within <= self.last)  # with the position before it
        return ((attention_mask.bool() & ~shares).cumsum(1) - 1).clamp(min=0)

    def prepare(self, is_image: Tensor, soft: Tensor, high: Tensor | None = None) -> tuple[Tensor, Route]:
        """The soft tokens go into the sequence as they are; the layers are told where."""
        mask = self.expert_mask(is_image).flatten()  # [B * S]
        text, image = (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
        return soft, Route(text, image, torch.cat([text, image]).argsort())

    def carry(self, context: Route) -> None:
        """What is generated is text."""

    def start_from(self, language_model: PreTrainedModel) -> None:
        """Every expert starts as a copy of the layer that it stands beside."""
        for experts, layer in zip(self.experts, decoder_layers(language_model), strict=True):
            for expert, linear in zip(experts.values(), linears(layer).values(), strict=True):
                expert.load_state_dict({n: unpacked(p) for n, p in linear.named_parameters()})

    def attach_layer(self, index: int, layer: nn.Module) -> list[Any]:
        """Around every linear layer. The context comes to them by way of the attention module."""
        check_takes_kwargs(layer)
        handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for child in layer.children():
            handles.append(child.register_forward_pre_hook(self._note, with_kwargs=True))
        for name, expert in zip(self.places[index], self.experts[index].values(), strict=True):
            # By name: where tuning has put an adapter around a linear layer, this is the whole of both, so
            # that the adapter too is for text alone, as the weight is into which it is merged.
            linear = layer.get_submodule(name)
            handles.append(linear.register_forward_pre_hook(self._narrow))
            handles.append(linear.register_forward_hook(partial(self._join, expert)))
        return handles

    def _enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs.setdefault(self.key, None)  # the language model called alone: forget the route of before
        return args, kwargs

    def _note(self, child: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # Here, and not at the layer: a layer that is recomputed in the backward pass is not called again,
        # its inside is.
        if self.key in kwargs:
            self._route = self.take(kwargs)
        return args, kwargs

    def _narrow(self, linear: nn.Module, args: tuple[Tensor]) -> Any:
        """Leave the language model's own linear the text positions: [B, S, D] -> [T, D]."""
        if self._route is None:
            return None
        if args[0].shape[:-1].numel() != len(self._route.order):
            raise ConfigError("visual_expert: a layer of this language model does not take every position")
        self._input = args[0]
        return args[0].flatten(0, -2)[self._route.text]

    def _join(self, expert: nn.Linear, linear: nn.Module, args: Any, output: Tensor) -> Any:
        """Compute the image positions, and put all in order: [T, D'] -> [B, S, D']."""
        if self._route is None:
            return None
        x, self._input = self._input, None
        assert x is not None
        own = expert(x.flatten(0, -2)[self._route.image].to(expert.weight.dtype))  # [K, D']
        joined = torch.cat([output, own.to(output.dtype)])[self._route.order]  # [B * S, D']
        return joined.unflatten(0, x.shape[:-1])


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a decoder layer, by name.

    Raises:
        ConfigError: there is none (GPT-2 has a class of its own for them).
    """
    found = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    if not found:
        raise ConfigError(
            f"visual_expert: {type(layer).__name__} has no nn.Linear inside; use another language model "
            "(Llama, Qwen2 and Mistral have)"
        )
    return found
