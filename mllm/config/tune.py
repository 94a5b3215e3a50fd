"""The section `tune`: how each part is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mllm.config.section import Section

Tuning = Literal["frozen", "full", "lora", "qlora", "dora", "rslora", "prefix", "prompt", "ia3", "adapter"]


class LoraSection(Section):
    """LoRA on every linear layer of the parts tuned with it; the defaults are LLaVA-1.5's."""

    r: int = Field(128, ge=1, description="rank")
    alpha: int = Field(256, ge=1, description="scale is alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="on the input of A")
    target_modules: list[str] | None = Field(None, description="names of layers; null: all but the head")


class PrefixSection(Section):
    """Prefix tuning: learned keys and values in front of every layer's."""

    length: int = Field(20, ge=1, description="learned tokens")
    hidden: int | None = Field(None, ge=1, description="width of a layer that computes them; null: none")


class PromptSection(Section):
    """Prompt tuning: learned embeddings in front of the sequence; the length is Lester et al.'s."""

    length: int = Field(100, ge=1, description="learned tokens")
    init: Literal["vocab", "random"] = Field("vocab", description="embeddings of random tokens, or noise")


class AdapterSection(Section):
    """Bottleneck adapters; the size is Houlsby et al.'s."""

    size: int = Field(64, ge=1, description="width of the bottleneck")
    placement: Literal["houlsby", "pfeiffer"] = Field("houlsby", description="in both blocks, or in the last")


# Which tunings read each section of settings.
USERS = {
    "lora": ("lora", "qlora", "dora", "rslora"),
    "prefix": ("prefix",),
    "prompt": ("prompt",),
    "adapter": ("adapter",),
}


class TuneSection(Section):
    """How each part is trained."""

    vision_encoder: Tuning = "frozen"
    connector: Tuning = "full"
    fusion: Literal["frozen", "full"] = "full"
    language_model: Tuning = "frozen"
    text_encoder: Literal["frozen", "full"] = "full"
    heads: Literal["frozen", "full"] = "full"
    overrides: dict[str, Literal["frozen", "full"]] = Field(
        default_factory=dict, description="modules or parameters tuned otherwise than their part"
    )
    lora: LoraSection = Field(LoraSection(), description="also of qlora, dora and rslora")
    prefix: PrefixSection = PrefixSection()
    prompt: PromptSection = PromptSection()
    adapter: AdapterSection = AdapterSection()

    @model_validator(mode="after")
    def _settings_are_used(self) -> TuneSection:
        tunings = {self.vision_encoder, self.connector, self.language_model}
        for name, users in USERS.items():
            if getattr(self, name).model_fields_set and not tunings & set(users):
                raise ValueError(
                    f"{name} has settings, but no part is tuned as {' or '.join(users)}; remove them "
                    f"(tune.{name}={{}} after a recipe's name)"
                )
        return self

    @model_validator(mode="after")
    def _possible(self) -> TuneSection:
        for part in ("vision_encoder", "connector"):
            tuning = getattr(self, part)
            if tuning == "qlora":
                raise ValueError(
                    f"{part} cannot be 'qlora': only the language model is loaded in 4 bit; use 'lora'"
                )
            if tuning in ("prefix", "prompt"):
                raise ValueError(
                    f"{part} cannot be {tuning!r}: there is no sequence of text for learned tokens to stand "
                    "in front of; use 'lora', 'ia3' or 'adapter'"
                )
        return self
