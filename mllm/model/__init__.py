"""One model class for any vision encoder, connector and language model.

Files in the order of the data: processing, vision_encoder, connectors, modeling; compose builds a model
from parts and checkpoint saves and loads it.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

# By its module: up to transformers 5.17, `transformers.AutoImageProcessor` asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mllm.model.checkpoint import load, save
from mllm.model.compose import compose
from mllm.model.configuration import MllmConfig
from mllm.model.fused_vision import FusedImageProcessor, FusedVisionConfig, FusedVisionEncoder
from mllm.model.modeling import PARTS, MllmForConditionalGeneration
from mllm.model.pretraining.dual_encoder import DualEncoder, DualEncoderConfig
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.model.pretraining.qformer_pretraining import QFormerForPretraining, QFormerPretrainingConfig
from mllm.model.processing import MllmProcessor

AutoConfig.register("mllm", MllmConfig)
AutoModelForImageTextToText.register(MllmConfig, MllmForConditionalGeneration)
AutoProcessor.register(MllmConfig, MllmProcessor)
AutoConfig.register("mllm_fused_vision", FusedVisionConfig)
AutoModel.register(FusedVisionConfig, FusedVisionEncoder)
AutoImageProcessor.register(FusedVisionConfig, image_processor_classes={"pil": FusedImageProcessor})
for _config, _model in (
    (DualEncoderConfig, DualEncoder),
    (QFormerPretrainingConfig, QFormerForPretraining),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoProcessor.register(_config, PairProcessor)

__all__ = [
    "PARTS",
    "MllmConfig",
    "MllmForConditionalGeneration",
    "MllmProcessor",
    "compose",
    "load",
    "save",
]
