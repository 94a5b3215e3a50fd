"""One model class for any vision encoder, connector and language model.

Files in the order of the data: processing, vision_encoder, connectors, modeling; compose builds a model
from parts and checkpoint saves and loads it.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mllm.model.checkpoint import load, save
from mllm.model.compose import compose
from mllm.model.configuration import MllmConfig
from mllm.model.modeling import PARTS, MllmForConditionalGeneration
from mllm.model.processing import MllmProcessor

AutoConfig.register("mllm", MllmConfig)
AutoModelForImageTextToText.register(MllmConfig, MllmForConditionalGeneration)
AutoProcessor.register(MllmConfig, MllmProcessor)

__all__ = [
    "PARTS",
    "MllmConfig",
    "MllmForConditionalGeneration",
    "MllmProcessor",
    "compose",
    "load",
    "save",
]
