"""BLIP-2 and InstructBLIP: EVA-CLIP with its final norm, a Q-Former, any language model."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVisionConfig,
    PreTrainedModel,
)

from mllm.data.templates import IMAGE
from mllm.errors import ConfigError
from mllm.model.compose import describe
from mllm.model.configuration import MllmConfig
from mllm.model.convert.family import Family, demand
from mllm.model.convert.proof import questions
from mllm.model.convert.qformer_names import qformer_names
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.processing import MllmProcessor

# Our arguments of the connector, and their names in a Q-Former's configuration.
_QFORMER = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "cross_every": "cross_attention_frequency",
    "dropout": "hidden_dropout_prob",
    "eps": "layer_norm_eps",
}
_INSTRUCT = {**_QFORMER, "vocab_size": "vocab_size", "max_positions": "max_position_embeddings"}


def read_qformer(config: Any, instruct: bool) -> dict[str, Any]:
    """The arguments of our connector for a Q-Former of theirs."""
    settings = config.qformer_config
    demand(
        "our Q-Former can be it",
        hidden_act=(settings.hidden_act, "gelu"),
        # InstructBLIP's always reads text, and has no such setting.
        use_qformer_text_input=(getattr(settings, "use_qformer_text_input", instruct), instruct),
    )
    names = _INSTRUCT if instruct else _QFORMER
    arguments = {ours: getattr(settings, theirs) for ours, theirs in names.items()}
    return {"num_queries": config.num_query_tokens, **arguments}


class Blip2(Family):
    """`Blip2ForConditionalGeneration`."""

    model: Any = Blip2ForConditionalGeneration
    processor: Any = Blip2Processor
    config_class: Any = Blip2Config
    vision_class: Any = Blip2VisionConfig
    connector = "qformer"
    instruct = False

    def read(self, config: Any, processor: Any, template: str | None) -> tuple[MllmConfig, MllmProcessor]:
        """The prompt is the question as it stands, unless a template is named."""
        processor.num_query_tokens = config.num_query_tokens  # older directories have it here only
        return describe(
            config.vision_config,
            config.text_config,
            {"type": self.connector, **read_qformer(config, self.instruct)},
            tokenizer=processor.tokenizer,
            image_processor=processor.image_processor,
            template=template or "bare",
            vision_feature_layer="last",
            vision_feature_select="full",
            instruction_tokenizer=getattr(processor, "qformer_tokenizer", None),
        )

    def names(self, config: Any) -> Iterator[tuple[str, str]]:
        """The Q-Former's tensors are listed one by one."""
        settings = config.qformer_config
        table = qformer_names(settings.num_hidden_layers, self.instruct, settings.cross_attention_frequency)
        yield "vision_model.", "vision_encoder."
        yield "language_model.", "language_model."
        yield from ((theirs, f"connector.{ours}") for theirs, ours in table.items())

    def generator(self, model: Any) -> PreTrainedModel:
        """Their `generate` is the language model's own."""
        return model.language_model

    def batch(self, processor: Any, text: str, image: Any) -> dict[str, torch.Tensor]:
        """Their processor puts the image in front of everything, and the beginning of a sequence after it."""
        bos = processor.tokenizer.bos_token or ""
        text = text.replace(IMAGE, "", 1).removeprefix(bos)
        batch = processor(text=[text], images=[image], return_tensors="pt")
        return {name.replace("qformer_input_ids", "instruction_ids"): batch[name] for name in batch}

    def write(self, model: MllmForConditionalGeneration) -> Any:
        """All tokens of EVA-CLIP's final norm."""
        config = model.config
        if not isinstance(config.vision_config, (Blip2VisionConfig, InstructBlipVisionConfig)):
            raise ConfigError(
                f"{self.model.__name__} has EVA-CLIP in BLIP-2's form, found the vision encoder "
                f"{config.vision_config.model_type!r}"
            )
        demand(
            f"{self.model.__name__} can be it",
            vision_feature_layer=(config.vision_feature_layer, "last"),
            num_prefix_tokens=(config.num_prefix_tokens, 0),
        )
        text = deepcopy(config.text_config)
        # Their `generate` asks the language model's configuration where an answer ends.
        text.eos_token_id = model.generation_config.eos_token_id
        # What the recipe left out is as published, in their configuration as in our connector, but for
        # the words of the text branch: LAVIS adds one to BERT's.
        given = {name: config.connector[ours] for ours, name in _INSTRUCT.items() if ours in config.connector}
        return self.config_class(
            # EVA-CLIP is the same in both, under two names.
            vision_config={**config.vision_config.to_dict(), "model_type": self.vision_class.model_type},
            qformer_config={"vocab_size": 30523, **given},
            text_config=text,
            num_query_tokens=config.num_image_tokens,
            image_token_index=config.image_token_id,
        )

    def write_processor(self, config: Any, processor: MllmProcessor) -> Any:
        """Theirs has no chat template: it takes the prompt's text and puts the image in front."""
        text = processor.prompt_text(questions()[0])
        if not text.startswith(IMAGE):
            raise ConfigError(
                f"{self.processor.__name__} puts the image in front, the template {text[:20]!r}; "
                "export with the template 'bare' or 'question_answer'"
            )
        others = [processor.instruction_tokenizer.tokenizer] if processor.instruction_tokenizer else []
        return self.processor(
            processor.image_processor, processor.tokenizer, *others, num_query_tokens=config.num_query_tokens
        )


class InstructBlip(Blip2):
    """`InstructBlipForConditionalGeneration`: the Q-Former also reads the instruction."""

    model = InstructBlipForConditionalGeneration
    processor = InstructBlipProcessor
    config_class = InstructBlipConfig
    vision_class = InstructBlipVisionConfig
    connector = "instruct_qformer"
    instruct = True
