"""BLIP-2's first stage: scores against transformers', masks by perturbation, losses by hand, two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_image_processor, make_picture, make_tokenizer, make_vision
from pairs import CAPTIONS, bert_tokenizer
from ranks import on_ranks
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Blip2Config, Blip2ForImageTextRetrieval

from mllm.errors import ConfigError
from mllm.model import load, save
from mllm.model.convert.qformer_names import retrieval_names
from mllm.model.pretraining.compose import compose_qformer_pretraining
from mllm.model.pretraining.contrastive import batch_generator, hard_negatives
from mllm.model.pretraining.qformer_pretraining import QFormerForPretraining

QUERIES, WIDTH, LAYERS = 4, 32, 2
TINY = {
    "num_queries": QUERIES,
    "width": WIDTH,
    "layers": LAYERS,
    "heads": 4,
    "intermediate": 64,
    "dropout": 0.0,
}


def make(vision: Any = None, **settings: Any) -> tuple[QFormerForPretraining, Any]:
    """A tiny model, whose words and heads are drawn wide enough that its scores differ."""
    torch.manual_seed(0)
    model, processor = compose_qformer_pretraining(
        vision or make_vision(),
        bert_tokenizer(),
        TINY,
        image_processor=make_image_processor(),
        embed_dim=16,
        max_text_length=12,
        **settings,
    )
    with torch.no_grad():
        for parameter in [*model.connector.parameters(), *model.heads.parameters()]:
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model, processor


def batch(processor: Any, count: int = 4) -> dict[str, Tensor]:
    """Pairs of noise pictures and captions of uneven length."""
    captions = [CAPTIONS[i % 4] + " hello" * (i // 4) for i in range(count)]
    return dict(processor(images=[make_picture(i) for i in range(count)], text=captions))


# -- transformers -----------------------------------------------------------------------------------


def test_scores_equal_those_of_transformers() -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    qformer = {
        "vocab_size": len(bert_tokenizer()) + 1,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "encoder_hidden_size": 32,
        "use_qformer_text_input": True,
    }
    config = Blip2Config(vision_config=vision, qformer_config=qformer, num_query_tokens=QUERIES)
    config.image_text_hidden_size = 16
    theirs = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours, processor = make(theirs.vision_model)
    state = theirs.state_dict()
    ours.connector.load_state_dict({mine: state[name] for name, mine in retrieval_names(LAYERS).items()})
    heads = {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm_head": "itm_head"}
    for mine, name in heads.items():
        getattr(ours.heads, mine).load_state_dict(getattr(theirs, name).state_dict())
    inputs = batch(processor)
    with torch.no_grad():
        itc = theirs(**inputs).logits_per_image
        itm = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
        assert min(itc.std(), itm.std()) > 1e-3
        torch.testing.assert_close(ours.itc_scores(**inputs), itc, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.itm_scores(**inputs), itm, rtol=0, atol=1e-5)


# -- who sees whom ----------------------------------------------------------------------------------


def test_a_word_is_written_from_the_image_and_the_words_before_it() -> None:
    model, processor = make()
    inputs = batch(processor)
    with torch.no_grad():
        before = model.itg_logits(**inputs)
        for place in range(1, 12):
            ids = inputs["input_ids"].clone()
            ids[:, place] = (ids[:, place] + 7) % 20
            change = (model.itg_logits(**{**inputs, "input_ids": ids}) - before).abs().amax(-1)  # [B, T]
            assert not change[:, :place].any()
            seen = inputs["attention_mask"][:, place] == 1
            assert (change[seen, place] > 1e-4).all()
        other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
        assert ((model.itg_logits(**other) - before).abs().amax(-1) > 1e-4).all()


def test_writing_begins_with_dec_whatever_stands_first() -> None:
    model, processor = make()
    inputs = batch(processor)
    ids = inputs["input_ids"].clone()
    ids[:, 0] = 5
    with torch.no_grad():
        before = model.itg_logits(**inputs)
        assert torch.equal(model.itg_logits(**{**inputs, "input_ids": ids}), before)
        model.connector.qformer.word_embeddings.weight[model.config.dec_token_id].neg_()
        assert (model.itg_logits(**inputs) - before).abs().amax(-1).min() > 1e-4


def test_queries_never_see_the_text_they_are_contrasted_with() -> None:
    """In the pass that serves ITC and ITG at once they are what they are alone; in ITM they do see it."""
    model, processor = make()
    inputs = batch(processor)
    text = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        features = model.image_features(inputs["pixel_values"])
        alone = model.connector.qformer(model.connector.query.expand(4, -1, -1), features)
        torch.testing.assert_close(model.read_to_write(features, *text)[0], alone)
        assert (model.read_together(features, *text) - alone).abs().amax() > 1e-2


def test_text_is_contrasted_without_the_image_and_padding_changes_nothing() -> None:
    model, processor = make()
    inputs = batch(processor)
    noise = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 17)
    assert not torch.equal(noise, inputs["input_ids"])
    with torch.no_grad():
        for score in (model.itc_scores, model.itm_scores):
            torch.testing.assert_close(score(**{**inputs, "input_ids": noise}), score(**inputs))
        assert model(**{**inputs, "input_ids": noise}).losses["itg"] == model(**inputs).losses["itg"]


# -- the losses by hand -----------------------------------------------------------------------------


def smoothed(scores: Tensor, target: int) -> Tensor:
    """Cross-entropy with label smoothing 0.1, written out."""
    log = scores.log_softmax(-1)
    return -(0.9 * log[target] + 0.1 * log.mean())


def test_losses_and_gradients_by_plain_loops() -> None:
    model, processor = make()
    inputs = batch(processor)
    pixels, ids, mask = inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]
    scores = model.itc_scores(**inputs) / model.heads.temperature
    itc: Any = sum(smoothed(scores[i], i) + smoothed(scores[:, i], i) for i in range(4)) / 8

    generator = batch_generator(ids)
    images, texts = hard_negatives(scores.T, generator), hard_negatives(scores, generator)
    itm: Any = 0.0
    for i in range(4):
        for image, text, match in [(i, i, 1), (int(images[i]), i, 0), (i, int(texts[i]), 0)]:
            votes = model.itm_scores(pixels[[image]], ids[[text]], mask[[text]])
            itm = itm - votes[0].log_softmax(-1)[match] / 12

    logits = model.itg_logits(**inputs)
    places = [(i, t) for i in range(4) for t in range(1, int(mask[i].sum()))]
    itg = torch.stack([smoothed(logits[i, t - 1], int(ids[i, t])) for i, t in places]).mean()

    found = model(**inputs)
    for name, expected in {"itc": itc, "itm": itm, "itg": itg}.items():
        torch.testing.assert_close(found.losses[name], expected.detach(), rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    gradients = (
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for loss in (found.loss, itc + itm + itg)
    )
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_one_pair_has_no_negatives() -> None:
    model, processor = make()
    with pytest.raises(ConfigError, match=r"raise train\.per_device_batch_size"):
        model(**batch(processor, 1))


# -- two ranks --------------------------------------------------------------------------------------


def share(rank: int, world: int) -> dict[str, Any]:
    """Losses and gradients of this rank's rows of eight."""
    model, processor = make()
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    output = model.train()(**{name: x[own] for name, x in batch(processor, 8).items()})
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": output.losses, "gradients": gradients}


def test_two_ranks_compute_what_one_computes(tmp_path: Path) -> None:
    one, both = share(0, 1), on_ranks(share, 2, tmp_path)
    for name, loss in one["losses"].items():
        torch.testing.assert_close((both[0]["losses"][name] + both[1]["losses"][name]) / 2, loss)
    parts = {name.split(".")[0] for name in one["gradients"]}
    assert parts == {"vision_encoder", "connector", "heads"}
    for name, gradient in one["gradients"].items():
        mean = (both[0]["gradients"][name] + both[1]["gradients"][name]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# -- building and saving ----------------------------------------------------------------------------


def tiny_bert(**settings: Any) -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=len(bert_tokenizer()),
            max_position_embeddings=16,
            **{
                "hidden_size": WIDTH,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                **settings,
            },
        )
    ).eval()


def test_a_qformer_that_starts_from_bert_reads_text_as_bert_does() -> None:
    bert = tiny_bert()
    with torch.no_grad():
        bert.embeddings.token_type_embeddings.weight.zero_()  # which BLIP-2 leaves out
    model, processor = compose_qformer_pretraining(
        make_vision(),
        bert_tokenizer(),
        {"num_queries": 3},
        text_encoder=bert,
        image_processor=make_image_processor(),
    )
    qformer = model.connector.qformer
    text = processor(text=["two cats"])
    text = {name: x[:, :8] for name, x in text.items()}
    with torch.no_grad():
        torch.testing.assert_close(model.read_text(**text), bert(**text).last_hidden_state)
    for layer in qformer.layers:
        for new, old in zip(layer.query_mlp.parameters(), layer.text_mlp.parameters(), strict=True):
            assert torch.equal(new, old)
            assert new is not old
    assert len(qformer.word_embeddings.weight) == len(bert_tokenizer()) + 1
    assert model.config.dec_token_id == len(bert_tokenizer())


def test_a_bert_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="use a BERT of the connector's shape"):
        compose_qformer_pretraining(
            make_vision(),
            bert_tokenizer(),
            TINY,
            text_encoder=tiny_bert(),
            image_processor=make_image_processor(),
        )


def test_a_tokenizer_without_cls_is_refused() -> None:
    with pytest.raises(ConfigError, match="no special token in front"):
        compose_qformer_pretraining(
            make_vision(), make_tokenizer(), TINY, image_processor=make_image_processor()
        )


def test_save_and_load(tmp_path: Path) -> None:
    model, processor = make()
    save(model, processor, tmp_path / "c")
    again, reader = load(tmp_path / "c")
    inputs = batch(processor)
    for name, x in batch(reader).items():
        assert torch.equal(x, inputs[name])
    with torch.no_grad():
        for name, loss in model(**inputs).losses.items():
            assert again(**inputs).losses[name] == loss
    assert reader.tokenizer.bos_token == "[DEC]"


@pytest.mark.parametrize("head", ["vision_proj", "text_proj", "itm_head", "itg_dense", "temperature"])
def test_the_probe_depends_on_every_head(head: str) -> None:
    model, _ = make()
    with torch.no_grad():
        before = model.probe_logits(**model.probe_inputs())
        module = getattr(model.heads, head)
        for parameter in module.parameters() if isinstance(module, nn.Module) else [module]:
            parameter.add_(0.1 * torch.rand_like(parameter))
        assert (model.probe_logits(**model.probe_inputs()) - before).abs().max() > 1e-3
