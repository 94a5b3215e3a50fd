"""Encoders beyond CLIP, SigLIP and DINOv2; pooled features; fused encoders; fresh weights; other sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    IMAGE_SIZE,
    MORE_VISION_CONFIGS,
    VISION_CONFIGS,
    make_image_processor,
    make_language_model,
    make_model,
    make_picture,
    make_tokenizer,
    make_vision,
    mixed_conversations,
)
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    PreTrainedModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import mllm
from mllm.config import ModelSection, TuneSection
from mllm.errors import ConfigError
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.checkpoint import read_manifest, save
from mllm.model.compose import change_resolution
from mllm.model.fused_vision import FusedImageProcessor, FusedVisionEncoder
from mllm.model.parts import load_image_processor, load_vision_config, load_vision_encoder
from mllm.model.vision_encoder import build_vision_encoder, feature_shape, patch_features
from mllm.training.build import build, build_processor
from mllm.training.tuning import apply_tuning

PATCHES = (IMAGE_SIZE // 8) ** 2
NORMAL = {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.3, 0.2, 0.1]}
Composed = tuple[MllmForConditionalGeneration, MllmProcessor]


def pixels(count: int = 2, side: int = IMAGE_SIZE, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, side, side)


def other_image_processor(side: int = IMAGE_SIZE) -> BitImageProcessorPil:
    """DINOv2's kind, with another crop, resampling and normalisation than `make_image_processor`'s."""
    return BitImageProcessorPil(
        size={"shortest_edge": side + 8}, crop_size={"height": side, "width": side}, resample=2, **NORMAL
    )


def compose(vision: Any, **kwargs: Any) -> Composed:
    torch.manual_seed(0)
    parts = {"language_model": make_language_model(), "tokenizer": make_tokenizer()}
    parts |= {"image_processor": make_image_processor(), "connector": "linear"}
    return MllmForConditionalGeneration.from_components(vision_encoder=vision, **parts | kwargs)


def clip_pair(folder: Path) -> CLIPModel:
    """A CLIP model whose two towers are 32 wide and whose common space is 24 wide."""
    text = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    vision = VISION_CONFIGS["clip"]().to_dict() | {"projection_dim": 24}
    pair = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=24)).eval()
    pair.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    return pair


# -- each encoder, composed -------------------------------------------------------------------------

# name: (encoder, feature layer, selection, tokens, width)
CASES: dict[str, tuple[Any, Any, str, int, int]] = {
    "blip2": ("blip2", "last", "full", PATCHES + 1, 32),
    "instructblip": ("instructblip", "last", "full", PATCHES + 1, 32),
    "blip2 patches": ("blip2", -2, "patch", PATCHES, 32),
    "siglip2": ("siglip2", "last", "patch", PATCHES, 32),
    "siglip2 block": ("siglip2", -2, "patch", PATCHES, 32),
    "siglip2 pooled": ("siglip2", "pooled", "patch", 1, 32),
    "registers": ("dinov2_registers", "last", "patch", PATCHES, 32),
    "registers kept": ("dinov2_registers", -2, "full", PATCHES + 5, 32),
    "clip pooled": ("clip", "pooled", "full", 1, 32),
    "dinov2 pooled": ("dinov2", "pooled", "patch", 1, 32),
    "bit": ("bit", "pooled", "patch", 1, 32),
    "resnet": ("resnet", "pooled", "patch", 1, 32),
    "fused": (["dinov2", "siglip"], [-2, "last"], "patch", PATCHES, 64),
    "fused three": (["clip", "siglip2", "dinov2_registers"], -2, "patch", PATCHES, 96),
}


@pytest.fixture(scope="module", params=CASES)
def composed(request: pytest.FixtureRequest) -> tuple[str, Composed]:
    name, layer, select, _, _ = CASES[request.param]
    torch.manual_seed(0)
    fused = isinstance(name, list)
    vision = [make_vision(each) for each in name] if fused else make_vision(name)
    processors = [other_image_processor(), make_image_processor(), other_image_processor()]
    images = processors[: len(name)] if fused else make_image_processor()
    kwargs = {"vision_feature_layer": layer, "vision_feature_select": select, "image_processor": images}
    return request.param, compose(vision, **kwargs)


def test_counts_are_those_of_the_encoder(composed: tuple[str, Composed]) -> None:
    case, (model, processor) = composed
    *_, tokens, width = CASES[case]
    features = model.encode_images(processor.pixels([make_picture()]))
    assert features.shape == (1, tokens, model.config.text_config.hidden_size)
    assert (model.config.num_patches, model.config.vision_dim) == (tokens, width)
    assert processor.num_image_tokens == tokens


def test_a_batch_is_its_rows_one_by_one(composed: tuple[str, Composed]) -> None:
    _, (model, processor) = composed
    together = model(**processor(mixed_conversations())).logits[:, -1]
    for row, conversation in enumerate(mixed_conversations()):
        alone = model(**processor([conversation])).logits[0, -1]
        torch.testing.assert_close(alone, together[row], atol=1e-4, rtol=1e-5)


def test_pictures_make_a_difference(composed: tuple[str, Composed]) -> None:
    _, (model, processor) = composed
    one, two = model.encode_images(processor.pixels([make_picture(0), make_picture(1)]))
    assert (one - two).abs().max() > 1e-4


def test_a_saved_model_is_the_same_model(composed: tuple[str, Composed], tmp_path: Path) -> None:
    _, (model, processor) = composed
    save(model, processor, tmp_path / "saved")
    loaded, loaded_processor = mllm.load(tmp_path / "saved")
    expected = model(**processor(mixed_conversations())).logits
    assert torch.equal(loaded(**loaded_processor(mixed_conversations())).logits, expected)


def test_what_the_features_use_is_what_trains(composed: tuple[str, Composed]) -> None:
    _, (model, _) = composed
    tune = TuneSection(vision_encoder="full", connector="frozen", language_model="frozen")
    report = {r.part: r for r in apply_tuning(model, tune)}["vision_encoder"]
    model.encode_images(torch.randn(1, *model.config.pixel_shape)).square().sum().backward()
    for name, parameter in model.vision_encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert report.trainable


# -- EVA-CLIP as BLIP-2 and InstructBLIP carry it ---------------------------------------------------


def blip(cls: type[PreTrainedModel], config_class: Any, vision: str, folder: Path) -> Any:
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    text = OPTConfig(vocab_size=99, ffn_dim=64, word_embed_proj_dim=32, **small | {"intermediate_size": 64})
    config = config_class(
        vision_config=MORE_VISION_CONFIGS[vision]().to_dict(),
        qformer_config={**small, "encoder_hidden_size": 32, "vocab_size": 99},
        text_config=text.to_dict(),
    )
    whole = cls(config).eval()
    whole.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    return whole


@pytest.mark.parametrize(
    ("cls", "config_class", "vision"),
    [
        (Blip2ForConditionalGeneration, Blip2Config, "blip2"),
        (InstructBlipForConditionalGeneration, InstructBlipConfig, "instructblip"),
    ],
    ids=["blip2", "instructblip"],
)
def test_the_vision_half_feeds_what_the_q_former_is_fed(
    cls: Any, config_class: Any, vision: str, tmp_path: Path
) -> None:
    whole = blip(cls, config_class, vision, tmp_path / "whole")
    fed: list[torch.Tensor] = []
    whole.qformer.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    images = pixels()
    questions = {"qformer_input_ids": torch.ones(2, 3, dtype=torch.long)} if vision == "instructblip" else {}
    whole.get_image_features(images, **questions)
    for source in (whole, tmp_path / "whole"):
        half = load_vision_encoder(source)
        with torch.no_grad():
            features = patch_features(half, images, "last", 0)
            hidden = half(images, output_hidden_states=True).hidden_states[-1]
        assert (features - fed[0]).abs().max() <= 1e-6
        # Normalised exactly once, class token included: ln_vision is HF's `post_layernorm`.
        assert (half.post_layernorm(hidden) - features).abs().max() <= 1e-6
        assert (hidden - features).abs().max() > 0.1
        assert features.shape == (2, PATCHES + 1, 32)


def test_a_checkpoint_names_the_blip2_directory_as_its_base(tmp_path: Path) -> None:
    blip(Blip2ForConditionalGeneration, Blip2Config, "blip2", tmp_path / "whole")
    model, processor = compose(
        str(tmp_path / "whole"), vision_feature_layer="last", vision_feature_select="full"
    )
    apply_tuning(model, TuneSection())
    save(model, processor, tmp_path / "saved")
    manifest = read_manifest(tmp_path / "saved")
    assert "vision_encoder" in manifest["base"]
    assert not any(name.startswith("vision_encoder") for name in manifest["weights"])
    loaded, _ = mllm.load(tmp_path / "saved")
    images = pixels()
    assert torch.equal(loaded.encode_images(images), model.encode_images(images))


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    half = make_vision("blip2")
    del half.post_layernorm
    half.save_pretrained(tmp_path / "half")
    with pytest.raises(ConfigError, match=r"no weights for 'post_layernorm.bias' \(2 missing\)"):
        load_vision_encoder(tmp_path / "half")


# -- SigLIP 2 ---------------------------------------------------------------------------------------


def test_siglip2_of_fixed_size_is_siglip() -> None:
    # google/siglip2-*-patch16-{224,256,384,512} say `model_type: siglip`; only `*-naflex` has its own.
    assert VISION_CONFIGS["siglip"]().model_type == "siglip_vision_model"
    assert MORE_VISION_CONFIGS["siglip2"]().model_type == "siglip2_vision_model"


@pytest.mark.parametrize("layer", ["last", -2, "pooled"])
def test_naflex_is_what_its_own_image_processor_makes_of_it(layer: Any, tmp_path: Path) -> None:
    own = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=PATCHES, **NORMAL)
    own.save_pretrained(tmp_path)
    picture = make_picture(size=(48, 48))
    encoder = make_vision("siglip2")
    fixed = load_image_processor(str(tmp_path))(images=[picture], return_tensors="pt")["pixel_values"]
    assert fixed.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        inputs = own(images=[picture], return_tensors="pt")
        output = encoder(**inputs, output_hidden_states=True)
        ours = patch_features(encoder, fixed, layer, 0)
    theirs = {"last": output.last_hidden_state, -2: output.hidden_states[-2]}.get(layer)
    theirs = output.pooler_output[:, None] if theirs is None else theirs
    assert (ours - theirs).abs().max() <= 1e-5


def test_naflex_takes_another_grid_than_square() -> None:
    encoder = make_vision("siglip2")
    images = torch.randn(2, 3, 16, 40)
    features = patch_features(encoder, images, "last", 0)
    assert features.shape == (2, 10, 32)
    torch.testing.assert_close(features[:1], patch_features(encoder, images[:1], "last", 0))


# -- two encoders fused -----------------------------------------------------------------------------


def fused() -> FusedVisionEncoder:
    return FusedVisionEncoder.of([make_vision("dinov2"), make_vision("siglip")], [-2, "last"])


def test_fused_features_are_those_of_each_side_by_side() -> None:
    encoder, images = fused(), pixels(channels=6)
    dinov2, siglip = encoder.encoders
    with torch.no_grad():
        features = patch_features(encoder, images, "last", 0)
        first = dinov2(images[:, :3], output_hidden_states=True).hidden_states[-2][:, 1:]
        second = siglip(images[:, 3:]).last_hidden_state
    assert torch.equal(features, torch.cat([first, second], dim=-1))


def test_fused_pixels_are_those_of_each_image_processor(tmp_path: Path) -> None:
    each = [other_image_processor(), make_image_processor()]
    both = FusedImageProcessor(each)
    both.save_pretrained(tmp_path)
    pictures = [make_picture(0), make_picture(1, (64, 30))]
    expected = torch.cat([p(images=pictures, return_tensors="pt")["pixel_values"] for p in each], dim=1)
    for processor in (both, AutoImageProcessor.from_pretrained(tmp_path)):
        found = processor(images=pictures, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)
        assert found.shape == (2, 6, IMAGE_SIZE, IMAGE_SIZE)


def test_a_recipe_fuses_directories(tmp_path: Path) -> None:
    for name, images in (("dinov2", other_image_processor()), ("siglip", make_image_processor())):
        make_vision(name).save_pretrained(tmp_path / name)
        images.save_pretrained(tmp_path / name)
    make_language_model().save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    section = ModelSection(
        vision_encoder=[str(tmp_path / "dinov2"), str(tmp_path / "siglip")],
        language_model=str(tmp_path / "text"),
        vision_feature_layer=[-2, "last"],
    )
    model, processor = build(section)
    assert model.config.pixel_shape == [6, IMAGE_SIZE, IMAGE_SIZE]
    picture = [make_picture()]
    assert torch.equal(build_processor(section).pixels(picture), processor.pixels(picture))
    # Its weights lie in two places, so a fused encoder is saved whole.
    apply_tuning(model, TuneSection())
    save(model, processor, tmp_path / "saved")
    assert set(read_manifest(tmp_path / "saved")["base"]) == {"language_model"}
    loaded, _ = mllm.load(tmp_path / "saved")
    assert torch.equal(
        loaded.encode_images(processor.pixels(picture)), model.encode_images(processor.pixels(picture))
    )


def test_what_cannot_be_fused_is_refused() -> None:
    pair = [make_vision("dinov2"), make_vision("siglip")]
    images = [make_image_processor(), other_image_processor()]
    with pytest.raises(ConfigError, match="these give"):
        compose(pair, image_processor=[make_image_processor(), other_image_processor(IMAGE_SIZE * 2)])
    coarse = build_vision_encoder(type(pair[0].config)(**{**pair[0].config.to_dict(), "patch_size": 16}))
    with pytest.raises(ConfigError, match=r"these give \[4, 16\] patches"):
        compose([coarse, pair[1]], image_processor=images)
    with pytest.raises(ConfigError, match="3 layers for 2 vision encoders"):
        compose(pair, image_processor=images, vision_feature_layer=[-2, -2, -2])
    with pytest.raises(ConfigError, match="1 layers for 1 vision encoders"):
        compose(pair[0], vision_feature_layer=[-2])
    with pytest.raises(ConfigError, match="patches only"):
        compose(pair, image_processor=images, vision_feature_select="full")


# -- pooled and projected ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "bit", "resnet"])
def test_pooled_is_the_pooler_output(name: str) -> None:
    encoder, images = make_vision(name), pixels()
    with torch.no_grad():
        expected = encoder(images).pooler_output.reshape(2, -1)
        assert torch.equal(patch_features(encoder, images, "pooled", 0)[:, 0], expected)


def test_projected_is_clips_image_embedding(tmp_path: Path) -> None:
    pair = clip_pair(tmp_path / "pair")
    model, processor = compose(str(tmp_path / "pair"), vision_feature_layer="projected", image_processor=None)
    images = processor.pixels([make_picture(0), make_picture(1)])
    with torch.no_grad():
        found = patch_features(model.vision_encoder, images, "projected", 0)
        assert (found[:, 0] - pair.get_image_features(images).pooler_output).abs().max() <= 1e-6
    assert found.shape == (2, 1, 24)
    apply_tuning(model, TuneSection())
    save(model, processor, tmp_path / "saved")
    assert set(read_manifest(tmp_path / "saved")["base"]) == {"vision_encoder"}
    loaded, _ = mllm.load(tmp_path / "saved")
    assert torch.equal(loaded.encode_images(images), model.encode_images(images))


def test_features_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    make_vision("clip").save_pretrained(tmp_path / "half")
    with pytest.raises(ConfigError, match=r"no weights for 'visual_projection.weight'"):
        compose(str(tmp_path / "half"), vision_feature_layer="projected")
    with pytest.raises(ConfigError, match="needs a CLIPVisionModelWithProjection, found a CLIPVisionModel"):
        compose(make_vision("clip"), vision_feature_layer="projected")
    with pytest.raises(ConfigError, match="'projected' is for clip_vision_model"):
        compose(make_vision("siglip"), vision_feature_layer="projected")
    with pytest.raises(ConfigError, match="feature maps, no tokens; use vision_feature_layer: pooled"):
        compose(make_vision("bit"), vision_feature_layer="last")
    headless = build_vision_encoder(type(make_vision("siglip").config)(vision_use_head=False))
    with pytest.raises(ConfigError, match="has no pooled features"):
        compose(headless, vision_feature_layer="pooled")


# -- fresh weights ----------------------------------------------------------------------------------


def test_a_recipe_starts_an_encoder_and_a_language_model_from_scratch(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    make_image_processor().save_pretrained(tmp_path / "images")
    text = make_language_model().config.to_dict()
    settings = {
        "vision_encoder": {"model_type": "bit", "hidden_sizes": [128], "depths": [1]},
        "language_model": {"model_type": "llama", **text},
        "vision_feature_layer": "pooled",
        "connector": {"type": "linear"},
    }
    places = {"tokenizer": str(tmp_path / "tokenizer"), "image_processor": str(tmp_path / "images")}
    section = ModelSection(**settings, **places)
    torch.manual_seed(1)
    model, processor = build(section)
    torch.manual_seed(2)
    again, _ = build(section)
    assert build_processor(section).num_image_tokens == processor.num_image_tokens == 1
    for part in ("vision_encoder", "language_model"):
        pairs = zip(getattr(model, part).parameters(), getattr(again, part).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), part
    save(model, processor, tmp_path / "saved")
    assert read_manifest(tmp_path / "saved")["base"] == {}
    loaded, _ = mllm.load(tmp_path / "saved")
    images = pixels()
    assert torch.equal(loaded.encode_images(images), model.encode_images(images))
    for missing in places:
        kept = {key: place for key, place in places.items() if key != missing}
        for make in (build, build_processor):
            with pytest.raises(ConfigError, match=f"{missing}: say which one; .* a configuration"):
                make(ModelSection(**settings, **kept))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"hidden_size": 8}, "model_type"),
        ({"model_type": "bitt"}, "bitt"),
        ({"model_type": "bit", "depths": "many"}, "depths"),
    ],
    ids=["no type", "unknown type", "wrong value"],
)
def test_a_configuration_that_is_none_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"vision_encoder: .*{told}"):
        load_vision_config(settings, "pooled")


# -- another resolution than the pretrained one -----------------------------------------------------


@pytest.mark.parametrize("name", ["blip2", "instructblip", "clip", "siglip"])
def test_positions_are_interpolated_as_transformers_does(name: str) -> None:
    encoder, large, native = make_vision(name), pixels(side=2 * IMAGE_SIZE), pixels()
    with torch.no_grad():
        expected = encoder(large, interpolate_pos_encoding=True).last_hidden_state
        assert torch.equal(patch_features(encoder, large, "last", 0), expected)
        assert torch.equal(patch_features(encoder, native, "last", 0), encoder(native).last_hidden_state)
    kept = 0 if name == "siglip" else 1
    assert feature_shape(encoder.config, (3, 64, 64), "last") == (4 * PATCHES + kept, kept, 32)


def test_a_model_runs_at_twice_the_size() -> None:
    images = make_image_processor()
    images.size = {"shortest_edge": 2 * IMAGE_SIZE}
    images.crop_size = {"height": 2 * IMAGE_SIZE, "width": 2 * IMAGE_SIZE}
    model, processor = compose(make_vision("blip2"), image_processor=images)
    assert processor.num_image_tokens == 4 * PATCHES
    assert model(**processor(mixed_conversations())).logits.isfinite().all()


def test_whether_to_interpolate_is_asked_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_model("clip")
    inner: Callable[..., Any] = model.vision_encoder.forward
    monkeypatch.setattr(model.vision_encoder, "forward", lambda **kwargs: inner(**kwargs), raising=False)
    features = patch_features(model.vision_encoder, pixels(side=2 * IMAGE_SIZE), "last", 1)
    assert features.shape[1] == 4 * PATCHES


# -- another resolution -----------------------------------------------------------------------------


@pytest.mark.parametrize("vision", ["clip", "siglip", "blip2"])
def test_a_picture_can_be_larger_from_the_start_or_from_a_stage_on(vision: str, tmp_path: Path) -> None:
    """Both ways give the same model of the same weights, and it saves and loads."""
    layer = {"vision_feature_layer": "last"}
    model, processor = make_model(vision, **layer)
    large, large_processor = make_model(vision, image_size=48, **layer)
    assert (model.config.num_patches, large.config.num_patches) == (16, 36)
    change_resolution(model.config, processor, 48)
    batch, large_batch = processor(mixed_conversations()), large_processor(mixed_conversations())
    assert batch["pixel_values"].shape[1:] == (3, 48, 48)
    for name, tensor in batch.items():
        assert torch.equal(tensor, large_batch[name]), name
    with torch.no_grad():
        want = large(**large_batch).logits
        assert torch.equal(model(**batch).logits, want)
    save(model, processor, tmp_path / "saved")
    loaded, loaded_processor = mllm.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(**loaded_processor(mixed_conversations())).logits, want)
