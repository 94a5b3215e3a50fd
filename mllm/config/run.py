"""One stage of training: all sections together, and what they must agree on."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mllm.config.beside import CardSection, EvalSection, ValSection
from mllm.config.data import DataSection
from mllm.config.model import AFTER_INIT, ONLY_PAIRS, TAKES, ModelSection
from mllm.config.section import Section
from mllm.config.train import TrainSection
from mllm.config.tune import TuneSection


class RunConfig(Section):
    """One stage of training."""

    stage: Literal["pretrain_vision", "pretrain_qformer", "align", "instruct"]
    model: ModelSection
    tune: TuneSection = TuneSection()
    data: DataSection
    train: TrainSection
    val: ValSection | None = None
    eval: EvalSection | None = None
    card: CardSection = CardSection()

    @property
    def on_pairs(self) -> bool:
        """Whether the stage learns from image-caption pairs, before there is a language model."""
        return self.stage in ("pretrain_vision", "pretrain_qformer")

    @model_validator(mode="after")
    def _complete(self) -> RunConfig:
        model = self.model
        other = {"pretrain_vision": "text_encoder", "pretrain_qformer": "tokenizer"}
        needed = other.get(self.stage, "language_model")
        if model.init_from is None and (model.vision_encoder is None or getattr(model, needed) is None):
            raise ValueError(f"give model.init_from, or both model.vision_encoder and model.{needed}")
        if self.train.output_dir in (model.init_from, model.connector_from):
            raise ValueError(
                f"train.output_dir {self.train.output_dir!r} is what the run starts from; change it"
            )
        return self

    @model_validator(mode="after")
    def _packed_weights_stay_whole(self) -> RunConfig:
        """FSDP2 leaves weights in 4 bit out, so that nothing is saved; on a GPU they would stay behind."""
        if self.train.fsdp and self.tune.language_model == "qlora":
            raise ValueError(
                "train.fsdp does not divide weights in 4 bit, and tune.language_model is 'qlora'; use "
                "train.fsdp=false train.deepspeed=ds_configs/zero2.json"
            )
        return self

    @model_validator(mode="after")
    def _stream_ends(self) -> RunConfig:
        if self.data.streaming and self.train.max_steps is None:
            raise ValueError("data.streaming: a stream has no end that is known; give train.max_steps")
        return self

    @model_validator(mode="after")
    def _limits_what_is_saved(self) -> RunConfig:
        best = self.val is not None and self.val.keep_best
        if self.train.save_total_limit and not (self.train.save_steps or best):
            raise ValueError(
                "train.save_total_limit is given, but nothing is saved before the end; give train.save_steps "
                "or val.keep_best"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> RunConfig:
        """A key that this stage does not read is a mistake."""
        model = self.model
        if ignored := sorted(model.given - TAKES.get(self.stage, {*ModelSection.model_fields} - ONLY_PAIRS)):
            raise ValueError(f"model.{ignored[0]} means nothing in the stage {self.stage}; remove it")
        if model.init_from and (given := sorted(model.given - AFTER_INIT)):
            raise ValueError(
                f"model.{given[0]} is decided by the checkpoint of model.init_from; remove one of the two"
            )
        if self.stage == "pretrain_qformer" and "objective" in model.pretraining.model_fields_set:
            raise ValueError("model.pretraining.objective is of the stage pretrain_vision; remove it")
        if self.on_pairs and "max_length" in self.data.model_fields_set:
            raise ValueError("data.max_length is for conversations; give model.pretraining.max_text_length")
        if self.on_pairs and (self.data.packing or self.data.grouping != "none"):
            raise ValueError("data.packing and data.grouping are for conversations; remove them")
        return self

    @model_validator(mode="after")
    def _features_are_fixed(self) -> RunConfig:
        if not self.data.feature_cache:
            return self
        if self.on_pairs:
            raise ValueError("data.feature_cache is for conversations; remove it")
        if self.tune.vision_encoder != "frozen":
            raise ValueError(
                f"data.feature_cache keeps what a frozen vision encoder computes, and tune.vision_encoder is "
                f"{self.tune.vision_encoder!r}; remove one of the two"
            )
        if self.data.streaming:
            raise ValueError("data.feature_cache goes through all rows before training; set streaming=false")
        if self.model.tiling:
            raise ValueError("data.feature_cache does not keep the views of model.tiling; remove it")
        return self

    @model_validator(mode="after")
    def _pairs_are_not_asked(self) -> RunConfig:
        for name in ("val", "eval"):
            if self.on_pairs and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for conversations; a loss on pairs depends on what else is in the batch, and "
                    "such a model says nothing; remove it"
                )
        return self

    @model_validator(mode="after")
    def _vision_is_whole(self) -> RunConfig:
        if self.stage == "pretrain_vision" and isinstance(self.model.vision_encoder, list):
            raise ValueError("model.vision_encoder: pretrain_vision trains one encoder; give no list")
        if self.stage == "pretrain_vision" and self.tune.vision_encoder not in ("frozen", "full"):
            raise ValueError(
                f"tune.vision_encoder is {self.tune.vision_encoder!r}; pretrain_vision hands on whole "
                "weights, use 'full'"
            )
        return self
