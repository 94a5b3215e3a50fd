"""Deep fusions: sizes, first step, masks, routing, batches, cache, checkpoints, and what is refused."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    TEXT_CONFIGS,
    VISION_CONFIGS,
    make_image_processor,
    make_language_model,
    make_picture,
    make_tokenizer,
    make_vision,
    mixed_conversations,
    save_parts,
)
from torch import Tensor, nn
from transformers import BloomConfig, IdeficsConfig, LlamaConfig, PreTrainedModel, RwkvConfig, T5Config
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

import mllm
from mllm.config import TuneSection
from mllm.data.schema import user
from mllm.decoding import generate
from mllm.decoding.contrastive import two_branches
from mllm.errors import ConfigError
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.adapters import is_adapter
from mllm.model.checkpoint import save
from mllm.model.compose import compose
from mllm.model.fusion import FUSIONS, build_fusion
from mllm.model.fusion.base import image_slots
from mllm.model.fusion.gated_cross_attention import GatedBlock, GatedCrossAttention
from mllm.model.fusion.visual_expert import VisualExpert, linears
from mllm.model.language_model import decoder_layers
from mllm.training.tuning import apply_tuning

HIGH_CONFIG = {**VISION_CONFIGS["clip"]().to_dict(), "image_size": 48}
FUSION: dict[str, dict[str, Any]] = {
    "gated_cross_attention": {"every": 1, "heads": 2, "head_dim": 8},
    "visual_expert": {},
    "high_res_cross_attention": {
        "vision_config": HIGH_CONFIG,
        "image_size": 48,
        "vision_feature_layer": -2,
        "cross_dim": 16,
        "heads": 2,
    },
}
FUSION["stack"] = {
    "of": [
        {"type": "visual_expert", "shared_positions": False},
        {"type": "high_res_cross_attention", **FUSION["high_res_cross_attention"]},
    ]
}
CONNECTOR: dict[str, dict[str, Any]] = {
    "gated_cross_attention": {"type": "resampler", "project": False, "num_latents": 3, "depth": 1},
    "visual_expert": {"type": "glu", "intermediate": 32},
    "high_res_cross_attention": {"type": "linear"},
    "stack": {"type": "glu", "intermediate": 32},
}
WORKS_WITH = {
    "gated_cross_attention": ["llama", "qwen2", "mistral", "phi", "opt", "gpt2"],
    "visual_expert": ["llama", "qwen2", "mistral", "phi", "opt"],
    "high_res_cross_attention": ["llama", "qwen2", "mistral"],
    "stack": ["llama", "qwen2"],
}
CASES = [(fusion, text) for fusion, texts in WORKS_WITH.items() for text in texts]
every_case = pytest.mark.parametrize(("kind", "text"), CASES, ids=["-".join(case) for case in CASES])
every_fusion = pytest.mark.parametrize("kind", FUSION)
Made = tuple[MllmForConditionalGeneration, MllmProcessor, PreTrainedModel]


def make(kind: str, text: str = "llama", learned: bool = False, **settings: Any) -> Made:
    """A model with a fusion, its processor, and a copy of its language model as it was before.

    `learned` moves every tensor of the fusion, so that no gate is closed and no expert is a copy.
    """
    torch.manual_seed(0)
    language_model = make_language_model(text)
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.dim() == 1:  # norms and biases, which no copy may forget
                parameter.add_(torch.randn_like(parameter) * 0.1)
    bare = deepcopy(language_model)
    model, processor = compose(
        make_vision(),
        language_model,
        CONNECTOR[kind],
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
        fusion={"type": kind, **FUSION[kind], **settings},
    )
    if learned:
        with torch.no_grad():
            for parameter in model.fusion.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            for parameter in model.connector.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, processor, bare


@torch.no_grad()
def logits_of(model: Any, **batch: Any) -> Tensor:
    return model(**batch).logits


def training_batch(processor: MllmProcessor, conversations: list[Any]) -> dict[str, Tensor]:
    batch = dict(processor(conversations))
    unlearned = (batch["attention_mask"] == 0) | (batch["input_ids"] == processor.image_token_id)
    return {**batch, "labels": batch["input_ids"].masked_fill(unlearned, -100)}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


# -- sizes ------------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def vicuna(dim: int = 4096) -> LlamaConfig:
    return LlamaConfig(hidden_size=dim, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=2)


def layers(dim: int, depth: int = 1) -> LlamaConfig:
    return LlamaConfig(hidden_size=dim, num_hidden_layers=depth, num_attention_heads=1)


def test_sizes_are_those_of_the_published_models() -> None:
    with torch.device("meta"):
        for dim, size in ((4096, 139_476_994), (2048, 36_708_354)):
            flamingo: Any = GatedCrossAttention(vicuna(dim), 1024, 64, every=1)
            assert {count(block) for block in flamingo.blocks.values()} == {size}
        cogvlm: Any = VisualExpert(vicuna(), 4096, 1227)
        assert {count(experts) for experts in cogvlm.experts} == {202_375_168}
        high = {"type": "high_res_cross_attention", "vision_config": {**HIGH_CONFIG, "hidden_size": 1024}}
        cogagent: Any = build_fusion({**high, "image_size": 48}, vicuna(), 4096, 258)
        assert {count(layer) for layer in cogagent.layers} == {10_489_856}


@pytest.mark.parametrize(
    ("every", "first", "places"),
    [(1, False, "012345678"), (4, False, "37"), (4, True, "048"), (2, True, "02468")],
)
def test_where_gated_blocks_stand(every: int, first: bool, places: str) -> None:
    fusion = GatedCrossAttention(layers(8, 9), 8, 3, every=every, first=first)
    assert "".join(fusion.blocks) == places


# -- the first step ---------------------------------------------------------------------------------


@every_case
def test_the_first_step_computes_the_bare_language_model(kind: str, text: str) -> None:
    settings = {"shared_positions": False} if kind == "visual_expert" else {}
    model, processor, bare = make(kind, text, **settings)
    batch = processor(mixed_conversations())
    with torch.no_grad():
        embeds, _ = model.embed(**{k: v for k, v in batch.items() if k != "attention_mask"})
        mask = batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        want = bare(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    found = logits_of(model, **batch)
    if kind in ("visual_expert", "stack"):  # the same sums over fewer rows at a time
        torch.testing.assert_close(found, want, atol=2e-4, rtol=1e-4)
    else:
        assert torch.equal(found, want)


@pytest.mark.parametrize("kind", ["gated_cross_attention", "high_res_cross_attention"])
def test_a_language_model_in_half_precision_keeps_its_first_step(kind: str) -> None:
    model, processor, bare = make(kind)
    model.language_model.bfloat16()
    batch = processor(mixed_conversations())
    with torch.no_grad():
        embeds, _ = model.embed(**{k: v for k, v in batch.items() if k != "attention_mask"})
    assert embeds.dtype == torch.bfloat16
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    want = logits_of(bare.bfloat16(), inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    assert torch.equal(logits_of(model, **batch), want)


# -- batches, cache, decoding -----------------------------------------------------------------------


@every_case
def test_batch_equals_singles_and_cached_equals_uncached(kind: str, text: str) -> None:
    model, processor, _ = make(kind, text, learned=True)
    conversations = mixed_conversations()
    batch = processor(conversations)
    together = logits_of(model, **batch)
    steps = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    answers = model.generate(**batch, **steps)
    assert torch.equal(answers, model.generate(**batch, **steps, use_cache=False))
    for row, messages in enumerate(conversations):
        single = processor([messages])
        alone = logits_of(model, **single)[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, atol=5e-4, rtol=1e-3)
        assert torch.equal(answers[row, -5:], model.generate(**single, **steps)[0, -5:])


@every_case
def test_images_reach_their_own_row_only(kind: str, text: str) -> None:
    model, processor, _ = make(kind, text, learned=True)
    batch = processor(mixed_conversations())  # rows have 1, 0, 3 and 2 images
    before = logits_of(model, **batch)
    for name in ("pixel_values", "pixel_values_high"):
        if name in batch:
            batch[name][2] += 1.0  # the second image of the third row
    moved = (logits_of(model, **batch) - before).abs().amax(-1)  # [B, S]
    row = batch["input_ids"][2] == model.config.image_token_id
    starts = row.nonzero()[:: model.config.num_image_tokens, 0]
    assert moved[[0, 1, 3]].max() == 0
    assert moved[2, -1] > 1e-4
    if kind not in ("high_res_cross_attention", "stack"):
        assert moved[2, : starts[1]].max() == 0


@every_fusion
def test_right_padding_moves_nothing(kind: str) -> None:
    model, processor, _ = make(kind, learned=True)
    batch = processor(mixed_conversations()[2:3])
    wide = {
        **batch,
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 3), value=0),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 3), value=0),
    }
    torch.testing.assert_close(
        logits_of(model, **wide)[:, :-3], logits_of(model, **batch), atol=5e-4, rtol=1e-3
    )


@every_fusion
def test_contrastive_decoding(kind: str) -> None:
    model, processor, _ = make(kind, learned=True)
    batch = processor(mixed_conversations())
    greedy = generate(model, batch, "greedy", max_new_tokens=5)
    assert greedy.equal(generate(model, batch, "vcd,alpha=0", max_new_tokens=5))
    for name in ("pixel_values", "pixel_values_high"):
        if name in batch:
            clean, noised = two_branches(dict(batch), torch.neg)[name].chunk(2)
            assert torch.equal(noised, -clean)
    contrasted = generate(model, batch, "vcd,alpha=3", max_new_tokens=5)
    assert contrasted.equal(generate(model, batch, "vcd,alpha=3", max_new_tokens=5, use_cache=False))


@every_fusion
def test_a_model_left_in_training_mode_generates_the_same(kind: str) -> None:
    model, processor, _ = make(kind, learned=True)
    batch = processor(mixed_conversations())
    want = generate(model, batch, max_new_tokens=5)
    assert generate(model.train(), batch, max_new_tokens=5).equal(want)


# -- training and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", "ia3"])
@every_fusion
def test_adapters_compute_the_same_on_their_own_loaded_and_merged(
    kind: str, tuning: Any, tmp_path: Path
) -> None:
    model, processor, _ = make(kind, learned=True)
    apply_tuning(model, TuneSection(language_model=tuning))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    batch = processor(mixed_conversations())
    want = logits_of(model, **batch)
    loaded, _ = mllm.load(save(model, processor, tmp_path / "saved"))
    assert torch.equal(logits_of(loaded, **batch), want)
    apply_tuning(model, TuneSection(language_model="frozen"))
    assert not any(is_adapter(name) for name, _ in model.named_parameters())
    torch.testing.assert_close(logits_of(model, **batch), want, atol=1e-4, rtol=1e-4)


@every_fusion
def test_all_of_it_is_called_on_a_batch_of_text(kind: str) -> None:
    model, processor, _ = make(kind)
    apply_tuning(model, TuneSection(connector="full", fusion="full"))
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("fusion.") for name in trained)
    for conversations in ([[user("hello")], [user("the quick brown fox")]], mixed_conversations()):
        model(**training_batch(processor, conversations)).loss.backward()
        found = gradients(model)
        assert {name for name, gradient in found.items() if gradient is not None} == trained
        images = len(conversations) > 2
        # Text itself passes through a gated block's feed-forward part: it too may learn from it.
        silent = [n for n in trained if "feed_forward" not in n]
        assert any(found[name].abs().max() > 0 for name in silent) == images  # type: ignore[union-attr]


@every_fusion
def test_everything_learns(kind: str) -> None:
    model, processor, _ = make(kind)
    apply_tuning(model, TuneSection(connector="full", fusion="full"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-20)
    model.train()
    for _ in range(3):  # what lies behind a gate moves once the gate has opened
        model(**training_batch(processor, mixed_conversations())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        # A key's bias adds the same to every score of a query, and the softmax takes it away again.
        still = name.endswith("k_proj.bias")
        # Behind the last keys and values, image positions are read by none.
        still |= "experts.1." in name and not name.endswith(("k_proj.weight", "v_proj.weight"))
        if not still:
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("frozen", [False, True])
@every_fusion
def test_recomputing_layers_changes_no_gradient(kind: str, frozen: bool) -> None:
    model, processor, _ = make(kind, learned=True)
    model.language_model.requires_grad_(not frozen)
    model.train()
    first, second = (training_batch(processor, mixed_conversations()[n:]) for n in (0, 2))
    model(**first).loss.backward()
    model(**second).loss.backward()
    want = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    # Both forwards before a backward: what is recomputed must belong to the right one.
    (model(**first).loss + model(**second).loss).backward()
    for name, gradient in gradients(model).items():
        if want[name] is None:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, want[name], atol=1e-5, rtol=1e-4, msg=name)


@every_fusion
def test_saved_and_loaded_is_equal(kind: str, tmp_path: Path) -> None:
    model, processor, _ = make(kind, learned=True)
    save(model, processor, tmp_path / "saved")
    loaded, again = mllm.load(tmp_path / "saved")
    batch = again(mixed_conversations())
    assert set(batch) == set(processor(mixed_conversations()))
    assert torch.equal(logits_of(loaded, **batch), logits_of(model, **batch))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@every_fusion
def test_the_language_model_keeps_its_tree(kind: str) -> None:
    model, _, bare = make(kind)
    assert model.language_model.state_dict().keys() == bare.state_dict().keys()


@every_case
def test_bare_again_without_images(kind: str, text: str) -> None:
    """Also after a call with images: nothing of them may be left behind."""
    model, processor, bare = make(kind, text, learned=True)
    logits_of(model, **processor(mixed_conversations()))
    batch = processor([[user("hello")], [user("the quick brown fox")]])
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    want = logits_of(bare, **batch, position_ids=positions)
    equal = kind != "gated_cross_attention"  # its feed-forward blocks are for all text, as in Flamingo
    assert torch.equal(logits_of(model.language_model, **batch, position_ids=positions), want) == equal
    assert torch.equal(logits_of(model, **batch), want) == equal


# -- gated cross-attention --------------------------------------------------------------------------


def test_text_reads_its_latest_image() -> None:
    fusion = GatedCrossAttention(layers(8), 4, 3, every=1)
    is_image = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    _, media = fusion.prepare(is_image, torch.randn(3, 3, 4))
    text_time = [[0, 1, 1, 1, 2, 2], [0] * 6, [0, 0, 0, 0, 1, 1]]
    for row in range(3):
        for position in range(6):
            reads = media.mask[row, position].nonzero()[:, 0].tolist()
            time = text_time[row][position]
            assert reads == ([] if time == 0 else list(range(3 * time - 3, 3 * time)))


def test_images_find_their_rows() -> None:
    index, filled = image_slots(torch.tensor([2, 0, 1]), 3)
    assert index[filled].tolist() == [0, 1, 2]
    assert filled.tolist() == [[True, True], [False, False], [True, False]]
    index, filled = image_slots(torch.tensor([0, 0]), 1)
    assert index.tolist() == [[0], [0]]
    assert not filled.any()


def gated_in_loops(block: GatedBlock, x: Tensor, images: list[Tensor], is_image: Tensor) -> Tensor:
    """One row [S, D] through a block, position by position and head by head."""
    out = []
    seen = 0
    for position, vector in enumerate(x):
        seen += int(is_image[position])
        y = vector.clone()
        if seen:
            query = block.norm(vector) @ block.attention.query.weight.T
            key, value = (images[seen - 1] @ block.attention.key_value.weight.T).chunk(2, dim=-1)
            width = len(query) // block.attention.heads
            heads = []
            for head in range(block.attention.heads):
                part = slice(head * width, (head + 1) * width)
                scores = torch.stack([query[part] @ k[part] for k in key]) / width**0.5
                heads.append(sum(w * v[part] for w, v in zip(scores.softmax(0), value, strict=True)))
            y = y + torch.tanh(block.attention_gate) * (torch.cat(heads) @ block.attention.out.weight.T)
        y = y + torch.tanh(block.feed_forward_gate) * block.feed_forward(y)
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
@torch.no_grad()
def test_gated_block_against_loops(activation: str) -> None:
    fusion = GatedCrossAttention(layers(16), 12, 5, every=1, heads=3, head_dim=4, activation=activation)
    block: Any = fusion.blocks["0"]
    block.attention_gate.fill_(0.7)
    block.feed_forward_gate.fill_(-0.4)
    is_image = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    images, x = torch.randn(3, 5, 12), torch.randn(3, 6, 16)
    _, media = fusion.prepare(is_image, images)
    found = block(x, media.key_value["0"], media.mask)
    for row, own in enumerate(([images[0], images[1]], [], [images[2]])):
        want = gated_in_loops(block, x[row], own, is_image[row])
        torch.testing.assert_close(found[row], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gated_block_against_idefics() -> None:
    """The same mathematics, once its RMS norms and SwiGLU are replaced by our norms and feed-forward."""
    config = IdeficsConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    config.vision_config.embed_dim = 20
    theirs: Any = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    fusion = GatedCrossAttention(layers(32), 20, 5, every=1, heads=4, head_dim=8)
    block: Any = fusion.blocks["0"]
    for gate, alpha in (("attention_gate", "alpha_cross_attn"), ("feed_forward_gate", "alpha_dense")):
        getattr(block, gate).fill_(0.6)
        getattr(theirs, alpha).fill_(0.6)
    own, key_value = theirs.cross_attn, block.attention.key_value.weight
    block.attention.query.weight.copy_(own.q_proj.weight)
    key_value.copy_(torch.cat([own.k_proj.weight, own.v_proj.weight]))
    block.attention.out.weight.copy_(own.o_proj.weight)
    theirs.input_layernorm, theirs.post_attention_layernorm = block.norm, block.feed_forward[0]
    theirs.mlp = block.feed_forward[1:]
    is_image = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    images, x = torch.randn(2, 5, 20), torch.randn(2, 6, 32)
    _, media = fusion.prepare(is_image, images)
    gate = media.mask.any(-1)
    bias = torch.zeros(media.mask.shape).masked_fill(~media.mask, torch.finfo(torch.float32).min)
    want = theirs(
        x,
        image_hidden_states=images.flatten(0, 1).expand(2, -1, -1),
        image_attention_mask=bias.unsqueeze(1),
        cross_attention_gate=gate.float(),
    )
    torch.testing.assert_close(block(x, media.key_value["0"], media.mask), want, atol=1e-6, rtol=1e-5)


# -- visual expert ----------------------------------------------------------------------------------


def expert(**settings: Any) -> VisualExpert:
    return VisualExpert(TEXT_CONFIGS["llama"](64), 32, 5, **settings)


def test_positions_and_routing_of_cogvlm() -> None:
    fusion = expert()
    image = torch.tensor([[0, 1, 1, 1, 1, 1, 0]]).bool()  # BOS, BOI, three tokens, EOI, text
    ones = torch.ones(1, 7)
    assert fusion.position_ids(image, ones).tolist() == [[0, 1, 2, 2, 2, 3, 4]]  # type: ignore[union-attr]
    assert fusion.expert_mask(image).int().tolist() == [[0, 1, 1, 1, 1, 0, 0]]


def test_positions_with_padding_several_images_and_no_borders() -> None:
    fusion = expert()
    one, two = [1] * 5, [1] * 10
    image = torch.tensor([[0, *two, 0, 0], [0, 0, 0, 0, *one, 0, 0, 0, 0]]).bool()
    mask = torch.tensor([[1] * 13, [0] * 3 + [1] * 10])
    assert fusion.position_ids(image, mask).tolist() == [  # type: ignore[union-attr]
        [0, 1, 2, 2, 2, 3, 4, 5, 5, 5, 6, 7, 8],
        [0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7],
    ]
    assert fusion.expert_mask(image)[0].int().tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0]
    plain = expert(boi_eoi=False)
    assert plain.position_ids(image, mask)[0].tolist() == [0, *[1] * 5, *[2] * 5, 3, 4]  # type: ignore[index]
    assert torch.equal(plain.expert_mask(image), image)
    assert expert(shared_positions=False).position_ids(image, mask) is None


def test_generated_text_continues_from_the_shared_position() -> None:
    model, processor, _ = make("visual_expert")
    batch = processor(mixed_conversations())
    seen: list[Tensor] = []
    model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    images, per_image = torch.tensor([1, 0, 3, 2]), model.config.num_image_tokens
    last = batch["attention_mask"].sum(1) - 1 - images * (per_image - 3)
    assert [step[:, -1].tolist() for step in seen] == [(last + n).tolist() for n in range(3)]


def test_positions_after_an_image_are_not_guessed() -> None:
    model, processor, _ = make("visual_expert")
    batch = processor(mixed_conversations()[:1])
    output = model(**batch, use_cache=True)
    more = {"input_ids": torch.tensor([[5]]), "past_key_values": output.past_key_values}
    mask = nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    with pytest.raises(ValueError, match="give position_ids"):
        model(**more, attention_mask=mask)


class Both(nn.Module):
    """Every position through both linears, then a choice: the costly way to the same."""

    def __init__(self, linear: nn.Linear, own: nn.Linear, mask: Tensor):
        super().__init__()
        self.linear, self.own, self.mask = linear, own, mask

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask.reshape(*x.shape[:-1], 1), self.own(x), self.linear(x))


@pytest.mark.parametrize("text", WORKS_WITH["visual_expert"])
def test_routing_against_both_ways_for_all(text: str) -> None:
    model, processor, bare = make("visual_expert", text, learned=True)
    batch = processor(mixed_conversations())
    is_image = batch["input_ids"] == model.config.image_token_id
    mask = torch.zeros_like(is_image)
    for row, positions in enumerate(is_image):
        for n, position in enumerate(positions.nonzero()[:, 0].tolist()):
            per_image = model.config.num_image_tokens
            mask[row, position] = n % per_image != per_image - 1
    for layer, experts in zip(decoder_layers(bare), model.fusion.experts, strict=True):
        for (name, linear), own in zip(linears(layer).items(), experts.values(), strict=True):
            layer.set_submodule(name, Both(linear, own, mask))
    with torch.no_grad():
        embeds, _ = model.embed(batch["input_ids"], batch["pixel_values"])
    positions = model.position_ids(batch["input_ids"], batch["attention_mask"])
    want = logits_of(
        bare, inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions
    )
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits_of(model, **batch)[valid], want[valid], atol=5e-4, rtol=1e-3)


def test_each_position_is_computed_once() -> None:
    model, processor, _ = make("visual_expert")
    batch = processor(mixed_conversations())
    rows: dict[str, int] = {}
    layer: Any = decoder_layers(model.language_model)[0]
    for name, linear in (("text", layer.mlp.up_proj), ("image", model.fusion.experts[0]["mlp_up_proj"])):
        linear.register_forward_hook(lambda m, a, out, name=name: rows.update({name: len(out)}), prepend=True)
    logits_of(model, **batch)
    per_image = model.config.num_image_tokens - 1
    assert rows == {"image": 6 * per_image, "text": batch["input_ids"].numel() - 6 * per_image}


def test_experts_start_as_copies() -> None:
    model, _, bare = make("visual_expert", "qwen2")  # whose attention has biases
    for layer, experts in zip(decoder_layers(bare), model.fusion.experts, strict=True):
        for linear, own in zip(linears(layer).values(), experts.values(), strict=True):
            assert all(torch.equal(own.state_dict()[k], v) for k, v in linear.state_dict().items())


def test_text_alone_stays_bare_after_training() -> None:
    model, processor, bare = make("visual_expert")
    apply_tuning(model, TuneSection(connector="full", fusion="full"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(**training_batch(processor, mixed_conversations())).loss.backward()
        optimizer.step()
    model.eval()
    batch = processor([[user("hello")], [user("the quick brown fox")]])
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(logits_of(model, **batch), logits_of(bare, **batch, position_ids=positions))
    answer = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(model.generate(**batch, **answer), bare.generate(**batch, **answer, eos_token_id=1))


# -- high resolution --------------------------------------------------------------------------------


def test_processor_gives_the_larger_images_too() -> None:
    _, processor, _ = make("high_res_cross_attention")
    pictures = [make_picture(0), make_picture(1, (30, 90))]
    found = processor([[user("hello", *pictures)]])
    assert found["pixel_values"].shape == (2, 3, 32, 32)
    options = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    want = make_image_processor()(images=pictures, return_tensors="pt", **options)["pixel_values"]
    assert torch.equal(found["pixel_values_high"], want)
    assert torch.equal(found["pixel_values"], processor.pixels(pictures))


@torch.no_grad()
def test_high_resolution_layer_against_loops() -> None:
    model, processor, bare = make("high_res_cross_attention", learned=True)
    batch = processor(mixed_conversations()[2:])  # three and two images
    fusion = model.fusion
    features = model.fusion.encoder(batch["pixel_values_high"], output_hidden_states=True).hidden_states[-2]
    features = features[:, 1:] + fusion.positions
    embeds, _ = model.embed(**{k: v for k, v in batch.items() if k != "attention_mask"})
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for row, images in enumerate((features[:3], features[3:])):
        real = batch["attention_mask"][row].bool()
        x = embeds[row, real][None]
        media = images.flatten(0, 1)  # [T * N, D]
        rope = bare.model.rotary_emb(x, positions[row, real][None])
        causal = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
        for own, layer in zip(fusion.layers, bare.model.layers, strict=True):
            x = x + layer.self_attn(layer.input_layernorm(x), rope, causal)[0]
            normed = own.norm(x)[0]
            cross = []
            for vector in normed:
                query = own.attention.query(vector).unflatten(0, (2, -1))
                key, value = (
                    part.unflatten(1, (2, -1)) for part in own.attention.key_value(media).chunk(2, -1)
                )
                heads = [
                    (key[:, h] @ query[h] / query.shape[1] ** 0.5).softmax(0) @ value[:, h] for h in range(2)
                ]
                cross.append(own.attention.out(torch.cat(heads)))
            x = x + torch.stack(cross)[None]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        want = bare.lm_head(bare.model.norm(x))[0]
        torch.testing.assert_close(logits_of(model, **batch)[row, real], want, atol=5e-4, rtol=1e-3)


def test_norms_start_as_copies() -> None:
    model, _, bare = make("high_res_cross_attention")
    for own, layer in zip(model.fusion.layers, bare.model.layers, strict=True):
        assert type(own.norm) is type(layer.post_attention_layernorm)
        assert torch.equal(own.norm.weight, layer.post_attention_layernorm.weight)


def test_an_encoder_starts_from_a_published_one(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    settings = {**FUSION["high_res_cross_attention"], "vision_encoder": parts["vision_encoder"]}
    del settings["vision_config"]
    fusion = {"type": "high_res_cross_attention", **settings}
    model, processor = compose(**parts, connector="linear", fusion=fusion)
    published = model.vision_encoder.state_dict()
    assert all(torch.equal(v, published[k]) for k, v in model.fusion.encoder.state_dict().items())
    save(model, processor, tmp_path / "saved")
    loaded, _ = mllm.load(tmp_path / "saved")
    batch = processor(mixed_conversations())
    assert torch.equal(logits_of(loaded, **batch), logits_of(model, **batch))


@pytest.mark.parametrize("given", [None, 1])
def test_high_resolution_images_must_be_there(given: int | None) -> None:
    model, processor, _ = make("high_res_cross_attention")
    batch = processor(mixed_conversations())
    batch["pixel_values_high"] = None if given is None else batch["pixel_values_high"][:given]
    with pytest.raises(ValueError, match="pixel_values_high for 6 images"):
        model(**batch)


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "magic"}, f"unknown fusion type 'magic'; use one of {', '.join(FUSIONS)}"),
        ({"type": "visual_expert", "depth": 2}, "depth"),
        ({"type": "visual_expert"}, "an image has 2 tokens, its borders included"),
        ({"type": "gated_cross_attention", "every": 3}, "every is 3, but there are 2 layers"),
        ({"type": "gated_cross_attention", "activation": "tan"}, "unknown activation 'tan'"),
        ({"type": "high_res_cross_attention", "vision_config": HIGH_CONFIG, "heads": 3}, "multiple of heads"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_fusion(settings, TEXT_CONFIGS["llama"](64), 32, 2)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("visual_expert", "gpt2", "GPT2Block has no nn.Linear"),
        ("high_res_cross_attention", "gpt2", "GPT2Block is not made of"),
        ("high_res_cross_attention", "opt", "OPTDecoderLayer is not made of"),
        ("high_res_cross_attention", "phi", "PhiDecoderLayer is not made of"),
    ],
)
def test_layers_of_another_make(kind: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(kind, text)


def test_several_vision_encoders_beside_one_of_its_own() -> None:
    kind = "high_res_cross_attention"
    with pytest.raises(ConfigError, match="give one vision encoder, not several"):
        compose(
            [make_vision("clip"), make_vision("dinov2")],
            make_language_model(),
            tokenizer=make_tokenizer(),
            image_processor=[make_image_processor(), make_image_processor()],
            fusion={"type": kind, **FUSION[kind]},
        )


def test_encoder_decoders() -> None:
    with pytest.raises(ConfigError, match="for decoder-only language models; found t5"):
        build_fusion({"type": "gated_cross_attention"}, T5Config(), 32, 4)


@pytest.mark.parametrize("kind", ["gated_cross_attention", "visual_expert"])
def test_language_models_that_lose_the_images(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bloom = BloomConfig(vocab_size=len(make_tokenizer()), hidden_size=32, n_layer=2, n_head=4)
    monkeypatch.setitem(TEXT_CONFIGS, "bloom", lambda vocab_size: bloom)
    model, processor, _ = make(kind, "bloom")
    with pytest.raises(ConfigError, match="BloomForCausalLM does not pass keyword arguments down"):
        model(**processor([[user("hello")]]))


def test_layers_that_take_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rwkv = RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    monkeypatch.setitem(TEXT_CONFIGS, "rwkv", lambda vocab_size: rwkv)
    with pytest.raises(ConfigError, match="RwkvBlock takes no further keyword arguments"):
        make("visual_expert", "rwkv")
