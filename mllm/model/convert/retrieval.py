"""`Blip2ForImageTextRetrieval` in: BLIP-2 after its first stage, as the model that the stage trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Blip2ForImageTextRetrieval, Blip2Processor

from mllm.data.schema import images_of, message_text
from mllm.errors import ConfigError
from mllm.model.checkpoint import assemble, load, new_directory, save
from mllm.model.convert.blip2 import read_qformer
from mllm.model.convert.proof import Observed, Proof, prove, questions
from mllm.model.convert.qformer_names import retrieval_names
from mllm.model.convert.stock import load_stock, once, rename
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.model.pretraining.qformer_pretraining import QFormerForPretraining, QFormerPretrainingConfig
from mllm.model.vision_encoder import feature_shape

RETRIEVAL = Blip2ForImageTextRetrieval.__name__
_NAMES = {
    "vision_model.": "vision_encoder.",
    "vision_projection.": "heads.vision_proj.",
    "text_projection.": "heads.text_proj.",
    "itm_head.": "heads.itm_head.",
}


def import_retrieval(source: str | Path, out: str | Path) -> Proof:
    """Turn the directory into a checkpoint of `QFormerForPretraining`.

    Its head that writes text (ITG) and its temperature get new weights, as the source has neither.

    Raises:
        ConfigError: a setting that our model does not have.
        CheckpointError: the source is incomplete, or the scores of the result differ.
    """
    stock, theirs = load_stock(Blip2ForImageTextRetrieval, Blip2Processor, source)
    stock.config.image_token_index = None  # then it takes captions as they are, without placeholders
    tokens = theirs.tokenizer
    if tokens.bos_token_id is None:
        raise ConfigError(f"{source}: the tokenizer has no beginning token; BLIP-2's has [DEC]")
    processor = PairProcessor(theirs.image_processor, tokens)
    batch = processor(
        images=[images_of(messages)[0] for messages in questions()],
        text=[message_text(messages[0]) for messages in questions()],
    )
    pixel_shape = list(batch["pixel_values"].shape[1:])
    config = QFormerPretrainingConfig(
        vision_config=stock.config.vision_config,
        connector=read_qformer(stock.config, instruct=True),
        width=stock.config.qformer_config.hidden_size,
        embed_dim=stock.config.image_text_hidden_size,
        dec_token_id=tokens.bos_token_id,
        vision_dim=feature_shape(stock.config.vision_config, pixel_shape, "last")[2],
        pixel_shape=pixel_shape,
    )
    settings = stock.config.qformer_config
    table = retrieval_names(settings.num_hidden_layers, settings.cross_attention_frequency)
    pairs = {**_NAMES, **{old: f"connector.{new}" for old, new in table.items()}}
    names = rename(stock.state_dict(), pairs.items(), RETRIEVAL)
    new_heads: Any = QFormerForPretraining.build_part(config, "heads")
    for part in (stock.embeddings, stock.vision_projection, stock.text_projection, stock.itm_head, new_heads):
        part.to(stock.qformer.dtype)  # float32 where transformers loads the rest in float16
    weights = {f"heads.{name}": tensor for name, tensor in new_heads.state_dict().items()}
    weights |= {names[name]: tensor for name, tensor in once(stock.state_dict())}
    with new_directory(out) as folder:
        model = assemble(QFormerForPretraining, config, {}, weights).eval()
        save(
            model,
            processor,
            folder,
            record={"imported": {"from": str(source), "class": RETRIEVAL}},
        )
        del model, weights
        stock.float()
        with torch.no_grad():
            before = [
                Observed(stock(**batch, use_image_text_matching_head=matching).logits_per_image, [])
                for matching in (False, True)
            ]
            del stock
            written, _ = load(folder, dtype=torch.float32)
            after = [Observed(written.itc_scores(**batch), []), Observed(written.itm_scores(**batch), [])]
        return prove(before, after, str(source))
