"""Several fusions in one language model: CogAgent has CogVLM's visual expert beside its cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mllm.errors import ConfigError
from mllm.model.fusion.base import KEY, Context, Fusion


class FusionStack(Fusion):
    """The fusions `of`, each with its own context under its own name.

    Args:
        text_config: configuration of the language model.
        media_dim: width of the connector's tokens.
        media_tokens: M.
        of: settings of each fusion, `{"type": ..., argument: value}`.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        media_dim: int,
        media_tokens: int,
        of: Sequence[Mapping[str, Any]],
    ):
        from mllm.model.fusion import build_fusion  # which has this class in its list

        super().__init__()
        if len(of) < 2:
            raise ConfigError(f"fusion 'stack': 'of' has {len(of)} fusions; give at least two")
        built = [build_fusion(settings, text_config, media_dim, media_tokens) for settings in of]
        if any(fusion.num_placeholders(media_tokens) != media_tokens for fusion in built):
            raise ConfigError("fusion 'stack': gated_cross_attention stands alone; remove one of the two")
        self.fusions: Any = nn.ModuleList(built)
        for index, fusion in enumerate(built):
            fusion.key = f"{KEY}_{index}"
        self.high_res_size = next((f.high_res_size for f in built if f.high_res_size), None)

    def prepare(self, is_image: Tensor, soft: Tensor, high: Tensor | None = None) -> tuple[Tensor, Context]:
        """Every fusion in turn; none of them changes the number of soft tokens."""
        contexts = []
        for fusion in self.fusions:
            soft, context = fusion.prepare(is_image, soft, high)
            contexts.append(context)
        return soft, tuple(contexts)

    def carry(self, context: Context) -> Context:
        """Every context by its own fusion."""
        return tuple(f.carry(c) for f, c in zip(self.fusions, context, strict=True))

    def arguments(self, context: Context) -> dict[str, Context]:
        """The contexts under the names of their fusions."""
        contexts = [None] * len(self.fusions) if context is None else context
        return {f.key: c for f, c in zip(self.fusions, contexts, strict=True)}

    def position_ids(self, is_image: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Those of the first fusion that has a numbering of its own."""
        found = (fusion.position_ids(is_image, attention_mask) for fusion in self.fusions)
        return next((ids for ids in found if ids is not None), None)

    def start_from(self, language_model: PreTrainedModel) -> None:
        """Every fusion takes its own first weights."""
        for fusion in self.fusions:
            fusion.start_from(language_model)

    def attach(self, language_model: PreTrainedModel) -> None:
        """Every fusion attaches itself."""
        for fusion in self.fusions:
            fusion.attach(language_model)

    def members(self) -> Iterator[Fusion]:
        """The fusions themselves."""
        yield from self.fusions
