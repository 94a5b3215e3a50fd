"""Learned tokens in front of a language model's sequence: prompt tuning and prefix tuning.

Prompt tuning (arXiv 2104.08691) learns embeddings that stand in front of the sequence. Prefix tuning
(arXiv 2101.00190) learns the keys and values that such tokens would leave in the cache of every layer. The
parameters are PEFT's own modules; PEFT's way of applying them is made for a bare language model and does not
survive cached generation inside a larger one.

Callers do not see these tokens: masks, positions, labels and logits are those of the sequence alone, while
the cache holds the tokens too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mllm.errors import ConfigError
from mllm.model.language_model import decoder_layers


class SoftPrompt(nn.Module):
    """P learned tokens in front of a sequence.

    Args:
        language_model: the causal language model that they are for.
        kind: `prompt` or `prefix`.
        length: P.
        init: of a prompt: `vocab` starts from embeddings of random tokens, `random` from noise.
        hidden: of a prefix: width of a layer that it is computed by; None learns keys and values directly.
    """

    def __init__(
        self,
        language_model: Any,
        kind: str,
        length: int,
        init: str = "vocab",
        hidden: int | None = None,
    ):
        from peft import PrefixEncoder, PrefixTuningConfig, PromptEmbedding, PromptTuningConfig

        super().__init__()
        self.kind = kind
        self.length = length
        config = language_model.config
        embedding = language_model.get_input_embeddings()
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = {
            "num_virtual_tokens": length,
            "num_attention_heads": self.heads,
            "num_layers": config.num_hidden_layers,
            "num_transformer_submodules": 1,
        }
        self.encoder: nn.Module
        if kind == "prefix":
            self.encoder = PrefixEncoder(
                PrefixTuningConfig(
                    token_dim=self.heads * self.width,
                    prefix_projection=hidden is not None,
                    encoder_hidden_size=hidden,  # type: ignore[arg-type]
                    **shape,
                )
            )
        else:
            start = {"vocab": "SAMPLE_VOCAB", "random": "RANDOM"}[init]
            settings = PromptTuningConfig(
                token_dim=embedding.embedding_dim, prompt_tuning_init=start, **shape
            )
            self.encoder = PromptEmbedding(settings, embedding)

    def tokens(self, batch: int, dtype: torch.dtype) -> Tensor:
        """What was learned: embeddings [B, P, D], or keys and values [2 * layers, B, heads, P, width]."""
        learned = self.encoder(torch.arange(self.length, device=next(self.parameters()).device)[None])
        learned = learned.to(dtype).expand(batch, -1, -1)  # [B, P, D] or [B, P, 2 * layers * heads * width]
        if self.kind == "prompt":
            return learned
        layers = learned.unflatten(-1, (-1, self.heads, self.width))
        return layers.permute(2, 0, 3, 1, 4)  # [B, P, 2L, H, W] -> [2L, B, H, P, W]

    def lead(self, language_model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the language model's call, with the learned tokens in them.

        A call with an empty cache starts a sequence; in every later one the tokens are already cached, and
        only mask and positions must count them.

        Raises:
            ValueError: the mask does not fit the cache.
            ConfigError: a prefix under gradient checkpointing, which throws the cache away.
        """
        embeds, mask, cache = (inputs[key] for key in ("inputs_embeds", "attention_mask", "past_key_values"))
        batch, count = embeds.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        changed = {}
        if mask is not None:
            if mask.dim() != 2 or (past and self.length + mask.shape[1] != past + count):
                raise ValueError(
                    f"attention_mask {list(mask.shape)} does not fit {count} tokens after {past} in cache, "
                    f"{self.length} of them learned; pass new tokens only, and a mask of all tokens"
                )
            changed["attention_mask"] = torch.cat([mask.new_ones(batch, self.length), mask], dim=1)
        if inputs["position_ids"] is not None:
            changed["position_ids"] = inputs["position_ids"] + self.length
        if past:
            return {**inputs, **changed}
        tokens = self.tokens(batch, embeds.dtype)
        if self.kind == "prefix":
            recomputed = any(layer.training for layer in decoder_layers(language_model))
            if recomputed and language_model.is_gradient_checkpointing:
                raise ConfigError(
                    "prefix tuning cannot be trained with gradient checkpointing, which takes the cache away "
                    "from the layers, and the prefix with it; set train.gradient_checkpointing=false"
                )
            cache = DynamicCache(config=language_model.config) if cache is None else cache
            for layer, (keys, values) in enumerate(tokens.unflatten(0, (-1, 2))):
                cache.update(keys, values, layer)
            return {**inputs, **changed, "past_key_values": cache}
        changed["inputs_embeds"] = torch.cat([tokens, embeds], dim=1)  # [B, P + S, D]
        if "position_ids" in changed:
            front = torch.arange(self.length, device=embeds.device).expand(batch, -1)
            changed["position_ids"] = torch.cat([front, changed["position_ids"].expand(batch, -1)], dim=1)
        # The last S logits are those of the sequence; 0 asks for all of them.
        keep = inputs["logits_to_keep"]
        changed["logits_to_keep"] = keep + self.length if torch.is_tensor(keep) else min(keep or count, count)
        return {**inputs, **changed}


def insert_soft_prompt(part: nn.Module, kind: str, **settings: Any) -> None:
    """Give a language model learned tokens, as its child `soft_prompt`.

    Raises:
        ConfigError: it is not a causal language model.
    """
    if getattr(part, "config", None) is None or part.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise ConfigError(
            f"{type(part).__name__} is no decoder-only language model, and only their cache has one sequence "
            "that tokens can stand in front of; use 'lora' or 'ia3'"
        )
    device = part.get_input_embeddings().weight.device  # type: ignore[operator]
    part.soft_prompt = SoftPrompt(part, kind, **settings).to(device)


def call_language_model(language_model: Any, **inputs: Any) -> Any:
    """Call a language model, with its learned tokens in front if it has any."""
    soft_prompt = getattr(language_model, "soft_prompt", None)
    if soft_prompt is None:
        return language_model(**inputs)
    output = language_model(**soft_prompt.lead(language_model, inputs))
    if inputs["past_key_values"] is None and inputs["use_cache"] is False:
        # A prefix has made a cache that nobody asked for; kept, it would be taken for one to go on from.
        output.past_key_values = None
    return output
