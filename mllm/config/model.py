"""The section `model`: what the model is made of, or which checkpoint it starts from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mllm.config.section import Section

# A directory or Hub name of published weights, or `{model_type: ..., setting: value}` for fresh ones.
Source = str | dict[str, Any]
Layer = int | Literal["last", "pooled", "projected"]
# Keys that name models or what belongs to them, on disk or on the Hub.
PLACES = ("vision_encoder", "language_model", "text_encoder", "tokenizer", "image_processor")
# What a stage on pairs takes of the section `model`; the other stages take all but ONLY_PAIRS.
ONLY_PAIRS = {"text_encoder", "pretraining"}
PAIRS = {"init_from", "vision_encoder", "tokenizer", "image_processor", "dtype"} | ONLY_PAIRS
TAKES = {
    "pretrain_vision": PAIRS,
    "pretrain_qformer": PAIRS | {"connector", "vision_feature_layer", "vision_feature_select"},
}
# What a stage may say of a model that an earlier stage has made.
AFTER_INIT = {
    *("init_from", "template", "image_size", "image_aspect_ratio", "tiling", "dtype"),
    "attn_implementation",
}


class PretrainingSection(Section):
    """Settings of the stages `pretrain_vision` and `pretrain_qformer`."""

    objective: Literal["clip", "siglip"] = Field("clip", description="of pretrain_vision")
    embed_dim: int = Field(256, ge=1, description="width in which images and texts are compared")
    max_text_length: int = Field(32, ge=4, description="tokens a caption")


class ModelSection(Section):
    """What the model is made of, or which checkpoint it starts from."""

    init_from: str | None = Field(None, description="checkpoint of an earlier stage; the parts come from it")
    vision_encoder: Source | list[Source] | None = Field(None, description="place, settings, or several")
    language_model: Source | None = Field(None, description="place, or settings for fresh weights")
    tokenizer: str | None = Field(None, description="default: with the language model")
    image_processor: str | list[str] | None = Field(None, description="default: with the vision encoder")
    instruction_tokenizer: str | None = Field(None, description="of a connector that reads the instruction")
    connector: dict[str, Any] = Field({"type": "mlp"}, description="type, or type and its arguments")
    fusion: dict[str, Any] | None = Field(None, description="deep fusion: type and its arguments")
    tiling: dict[str, Any] | None = Field(None, description="images as several views: type and its arguments")
    vision_feature_layer: Layer | list[Layer] = Field(
        -2, description="hidden state, `last`, `pooled` or `projected`; of several encoders also one each"
    )
    vision_feature_select: Literal["patch", "full"] = Field("patch", description="drop or keep class tokens")
    added_tokens: list[str] = Field(default_factory=list, description="new words, such as <c{0..511}>")
    template: str | None = Field(None, description="chat template of this stage")
    image_size: int | None = Field(None, ge=1, description="side of a picture; default: the processor's")
    image_aspect_ratio: Literal["square", "pad"] | None = Field(None, description="pad pictures to a square?")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of frozen weights")
    attention: Literal["causal", "prefix"] = Field(
        "causal", description="prefix: prompts see themselves whole"
    )
    attn_implementation: str | None = Field(None, description="sdpa, eager, flash_attention_2, ...")
    connector_from: str | None = Field(
        None, description="checkpoint whose connector the new one starts from, all but its last projection"
    )
    text_encoder: Source | None = Field(None, description="of pretraining; for a Q-Former, the BERT it is")
    pretraining: PretrainingSection = PretrainingSection()

    @property
    def given(self) -> set[str]:
        """The keys that a recipe gives a value; null is none."""
        return {key for key in self.model_fields_set if getattr(self, key) is not None}

    @field_validator("connector", "fusion", "tiling", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A name alone is the type with its default settings."""
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> ModelSection:
        for key in ("connector", "fusion", "tiling"):
            settings = getattr(self, key)
            if settings is not None and "type" not in settings:
                raise ValueError(f"{key} is {settings}; it needs a 'type'")
        if self.vision_encoder == []:
            raise ValueError("vision_encoder is an empty list; name one, or several")
        if self.tiling and self.image_aspect_ratio == "pad":
            raise ValueError("image_aspect_ratio is 'pad', but tiling pads images itself; remove it")
        if isinstance(self.image_processor, list):
            encoders = len(self.vision_encoder) if isinstance(self.vision_encoder, list) else 1
            if len(self.image_processor) != encoders or encoders == 1:
                raise ValueError(
                    f"image_processor: {len(self.image_processor)} for {encoders} vision encoders; "
                    "give one each, or one that is no list"
                )
        return self
