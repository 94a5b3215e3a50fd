"""Stock directories in and out again: tensors, logits, answers and processors stay equal."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    IMAGE_SIZE,
    MORE_VISION_CONFIGS,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    make_image_processor,
    make_language_model,
    make_model,
    make_picture,
    make_tokenizer,
    make_vision,
    save_parts,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizer_styles import STYLES
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from typer.testing import CliRunner

from mllm.cli import app
from mllm.data.schema import image_part, images_of, text_part
from mllm.errors import CheckpointError, ConfigError
from mllm.model.adapters import inject, linear_names
from mllm.model.checkpoint import load, origin_of, save
from mllm.model.compose import compose
from mllm.model.convert import export_stock, import_weights, original_llava, stock
from mllm.model.convert.proof import TOLERANCE

VOCAB = 330  # rows of the embedding, more than the tokenizer has
POINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
CLOSE = {"atol": TOLERANCE, "rtol": TOLERANCE}


# Two rows of different lengths, pictures of odd sizes.
def question(text: str, picture: Any) -> list[Any]:
    return [{"role": "user", "content": [image_part(picture), text_part(text)]}]


QUESTIONS = [
    question("What is it?", make_picture(1, (77, 31))),
    question("Describe the quick brown fox, please.", make_picture(2, (40, 95))),
]
# A tiny Llama's configuration and its tokenizer do not agree on what ends an answer.
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": [1, 2]}
# transformers' name of an input for each of ours that it calls otherwise.
THEIRS = {"instruction_ids": "qformer_input_ids", "instruction_mask": "qformer_attention_mask"}


def randomise(model: Any) -> Any:
    """Weights large enough that pictures matter, none of them zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.dim() > 1 else 0.02))
    return model.eval()


def tokenizer_with_image() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def make_bert_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    """BERT's, with one word a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz?."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **more)


# -- stock directories ------------------------------------------------------------------------------


def llava(
    folder: Path, vision: str = "clip", text: str = "llama", strategy: str = "default", **more: Any
) -> Any:
    tokenizer = tokenizer_with_image()
    config = LlavaConfig(
        vision_config=VISION_CONFIGS[vision](),
        text_config=TEXT_CONFIGS[text](VOCAB),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
        **more,
    )
    model = randomise(LlavaForConditionalGeneration(config))
    LlavaProcessor(
        make_image_processor(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(vision == "clip"),
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def llava_next(folder: Path) -> Any:
    tokenizer = tokenizer_with_image()
    config = LlavaNextConfig(
        vision_config=VISION_CONFIGS["clip"](),
        text_config=TEXT_CONFIGS["llama"](VOCAB),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=POINTS,
    )
    model = randomise(LlavaNextForConditionalGeneration(config))
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=crop, image_grid_pinpoints=POINTS
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


QFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 70,
    "max_position_embeddings": 128,
}


def blip(folder: Path, text: str, instruct: bool = False, vocab_size: int = VOCAB) -> Any:
    tokenizer = tokenizer_with_image()
    config_class: Any = InstructBlipConfig if instruct else Blip2Config
    model_class: Any = InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration
    config = config_class(
        vision_config=MORE_VISION_CONFIGS["instructblip" if instruct else "blip2"]().to_dict(),
        qformer_config=QFORMER,
        text_config=TEXT_CONFIGS[text](vocab_size),
        num_query_tokens=5,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    parts: list[Any] = [make_image_processor(), tokenizer]
    if instruct:
        InstructBlipProcessor(*parts, make_bert_tokenizer(), num_query_tokens=5).save_pretrained(folder)
    else:
        Blip2Processor(*parts, num_query_tokens=5).save_pretrained(folder)
    model = randomise(model_class(config))
    model.save_pretrained(folder)
    return model


STOCK: dict[str, Callable[[Path], Any]] = {
    "llava": llava,
    "llava-full": lambda folder: llava(folder, strategy="full"),
    "llava-siglip-qwen2": lambda folder: llava(folder, "siglip", "qwen2", "full", vision_feature_layer=-1),
    "llava-next": llava_next,
    "blip2-opt": lambda folder: blip(folder, "opt"),
    "blip2-t5": lambda folder: blip(folder, "t5"),
    "instructblip-llama": lambda folder: blip(folder, "llama", instruct=True),
    "instructblip-t5": lambda folder: blip(folder, "t5", instruct=True),
}


@pytest.fixture(scope="module", params=STOCK)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(stock model, our model and processor imported from it, directory exported again)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = STOCK[request.param](folder / "stock")
    arrived = import_weights(folder / "stock", folder / "ours")
    left = export_stock(folder / "ours", folder / "back")
    assert max(arrived.difference, left.difference) <= TOLERANCE
    assert min(arrived.answered, left.answered) >= 2
    assert arrived.notes == left.notes == ()  # pixels and token ids are the same ones
    return theirs, *load(folder / "ours"), folder / "back"


def run(model: Any, batch: dict[str, Any], theirs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and greedy answers."""
    inputs = {THEIRS.get(name, name) if theirs else name: tensor for name, tensor in batch.items()}
    begun = {}
    if model.config.text_config.is_encoder_decoder:
        start = model.config.text_config.decoder_start_token_id
        begun = {"decoder_input_ids": torch.tensor([[start, 5, 9]] * len(batch["input_ids"]))}
    with torch.no_grad():
        logits = model(**inputs, **begun).logits
        answer = model.generate(**inputs, **GREEDY)
    return logits, answer[:, -6:]


def seen(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """The logits that no padding has made: [places, V]."""
    if logits.shape[1] != batch["input_ids"].shape[1]:  # of a decoder, which has none here
        return logits.flatten(0, 1)
    return logits[batch["attention_mask"].bool()]


def test_imported_equals_stock_in_a_padded_batch(trip: Any) -> None:
    theirs, ours, processor, _ = trip
    ours.generation_config.suppress_tokens = None
    batch = dict(processor(QUESTIONS))
    assert not batch["attention_mask"].all()
    mine, answer = run(ours, batch, theirs=False)
    other, their_answer = run(theirs, batch, theirs=True)
    assert seen(other, batch).std() > 0.3
    torch.testing.assert_close(seen(mine, batch), seen(other, batch), **CLOSE)
    assert torch.equal(answer, their_answer)


def test_a_batch_equals_its_rows(trip: Any) -> None:
    _, ours, processor, _ = trip
    batch = dict(processor(QUESTIONS))
    together, answers = run(ours, batch, theirs=False)
    for row, messages in enumerate(QUESTIONS):
        single, answer = run(ours, dict(processor([messages])), theirs=False)
        inside = (
            together[row] if len(together[row]) == 3 else together[row][batch["attention_mask"][row].bool()]
        )
        torch.testing.assert_close(inside, single[0], **CLOSE)
        assert torch.equal(answers[row], answer[0])


def test_pictures_and_questions_matter(trip: Any) -> None:
    _, ours, processor, _ = trip
    base, _ = run(ours, dict(processor([QUESTIONS[0]])), theirs=False)
    other = question("What is it?", make_picture(9, (77, 31)))
    changed, _ = run(ours, dict(processor([other])), theirs=False)
    assert (base - changed).abs().max() > 100 * TOLERANCE


def test_exported_has_every_tensor_of_the_source(trip: Any) -> None:
    theirs, _, _, back = trip
    again = type(theirs).from_pretrained(back)
    found, wanted = again.state_dict(), theirs.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for setting in ("image_token_index", "num_query_tokens", "vision_feature_layer", "image_grid_pinpoints"):
        assert getattr(again.config, setting, None) == getattr(theirs.config, setting, None)


def test_exported_processor_and_model_answer_without_code_of_ours(trip: Any) -> None:
    theirs, ours, processor, back = trip
    ours.generation_config.suppress_tokens = None
    classes = {
        "LlavaForConditionalGeneration": LlavaProcessor,
        "LlavaNextForConditionalGeneration": LlavaNextProcessor,
        "Blip2ForConditionalGeneration": Blip2Processor,
        "InstructBlipForConditionalGeneration": InstructBlipProcessor,
    }
    their_processor = classes[type(theirs).__name__].from_pretrained(back)
    [image] = images_of(QUESTIONS[0])
    if their_processor.chat_template:
        text = their_processor.apply_chat_template(QUESTIONS[0], add_generation_prompt=True, tokenize=False)
        assert text == processor.prompt_text(QUESTIONS[0])
        inputs = their_processor(text=text, images=image, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = their_processor(text="What is it? ", images=image, return_tensors="pt")
    again = type(theirs).from_pretrained(back)
    speaks = [model.language_model if "Blip" in type(model).__name__ else model for model in (again, theirs)]
    ends = [model.generation_config.eos_token_id for model in speaks]
    assert set(ends[0]) == set(ours.generation_config.eos_token_id) == {1, ends[1] or 1}
    with torch.no_grad():
        answer = again.generate(**inputs, **GREEDY)[:, -6:]
    _, mine = run(ours, dict(processor([QUESTIONS[0]])), theirs=False)
    assert torch.equal(answer, mine)


# -- names on disk, templates, tokens ---------------------------------------------------------------


def rename_on_disk(folder: Path, new_names: dict[str, str]) -> None:
    """Write the weights again, prefixes replaced."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in new_names if name.startswith(prefix)), "")
        renamed[new_names.get(old, "") + name.removeprefix(old)] = tensor
    assert set(renamed) != set(tensors)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("make", [llava, llava_next])
def test_old_and_new_names_on_disk_are_the_same_model(tmp_path: Path, make: Any) -> None:
    wanted = make(tmp_path / "new").state_dict()
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    on_disk = set(load_file(tmp_path / "old" / "model.safetensors"))
    assert "language_model.lm_head.weight" in on_disk  # what transformers writes to this day
    before = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    }
    rename_on_disk(tmp_path / "new", before)
    assert set(load_file(tmp_path / "new" / "model.safetensors")) >= {"lm_head.weight"}
    for name in ("old", "new"):
        import_weights(tmp_path / name, tmp_path / f"ours-{name}")
    one, two = (load(tmp_path / f"ours-{name}")[0].state_dict() for name in ("old", "new"))
    assert set(one) == set(two)
    assert len(one) == len(wanted)
    assert all(torch.equal(one[name], two[name]) for name in one)


def edit_json(file: Path, **changes: Any) -> None:
    """Write settings into a file; None takes one out."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("text", "instruct", "vocab_size"),
    [("opt", False, VOCAB), ("t5", False, len(make_tokenizer())), ("llama", True, len(make_tokenizer()))],
)
def test_blip2_of_the_time_before_placeholders_had_an_id(
    tmp_path: Path, text: str, instruct: bool, vocab_size: int
) -> None:
    """The placeholder is added to the tokenizer on the way, and may have no row in the embedding."""
    blip(tmp_path / "stock", text, instruct, vocab_size)
    edit_json(tmp_path / "stock" / "config.json", image_token_index=None)
    edit_json(tmp_path / "stock" / "processor_config.json", num_query_tokens=None)
    assert import_weights(tmp_path / "stock", tmp_path / "ours").notes == ()
    assert export_stock(tmp_path / "ours", tmp_path / "back").notes == ()


@pytest.mark.parametrize("make", [llava, llava_next])
def test_processors_of_the_time_before_they_counted(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "stock")
    counts = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    edit_json(tmp_path / "stock" / "processor_config.json", **dict.fromkeys(counts))
    assert import_weights(tmp_path / "stock", tmp_path / "ours").notes == ()


def test_a_head_is_tied_where_the_whole_models_configuration_says_so(tmp_path: Path) -> None:
    theirs = llava(tmp_path / "stock", tie_word_embeddings=True)
    assert not theirs.config.text_config.tie_word_embeddings
    import_weights(tmp_path / "stock", tmp_path / "ours")
    export_stock(tmp_path / "ours", tmp_path / "back")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert back.lm_head.weight is back.get_input_embeddings().weight
    assert torch.equal(back.lm_head.weight, theirs.lm_head.weight)


def test_the_sources_own_template_is_taken_unless_one_is_named(tmp_path: Path) -> None:
    llava(tmp_path / "stock")
    processor = LlavaProcessor.from_pretrained(tmp_path / "stock")
    processor.chat_template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}</s>{% endgeneration %}"
        "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    processor.save_pretrained(tmp_path / "stock")
    for template, wanted in (
        (None, "USER: <image>\nWhat is it? ASSISTANT: "),
        ("llava_llama_2", "[INST] <<SYS>>"),
    ):
        out = tmp_path / f"ours-{template}"
        import_weights(tmp_path / "stock", out, template)
        assert load(out)[1].prompt_text(QUESTIONS[0]).startswith(wanted)
    assert export_stock(tmp_path / "ours-None", tmp_path / "back").notes == ()
    back = LlavaProcessor.from_pretrained(tmp_path / "back")
    assert back.chat_template == processor.chat_template


@pytest.mark.parametrize("settings", [{}, {"image_aspect_ratio": "pad"}, {"vision_feature_layer": "last"}])
def test_placeholder_beyond_the_vocabulary_gets_a_row_that_never_wins(tmp_path: Path, settings: Any) -> None:
    model, processor = make_model("clip", "mlp", "llama", **settings)
    vocab_size = model.config.text_config.vocab_size
    assert processor.image_token_id >= vocab_size
    save(model, processor, tmp_path / "ours")
    proof = export_stock(tmp_path / "ours", tmp_path / "back")
    assert proof.notes == ()  # the same pixels, padded or not, and the same ids
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert back.config.text_config.vocab_size == processor.image_token_id + 1
    batch = dict(processor([QUESTIONS[0]]))
    with torch.no_grad():
        mine, other = model(**batch).logits, back(**batch).logits
    torch.testing.assert_close(other[..., :vocab_size], mine, **CLOSE)
    new = other[..., vocab_size:]
    torch.testing.assert_close(new, mine.mean(-1, keepdim=True).expand_as(new), **CLOSE)


@pytest.mark.parametrize(("style", "notes"), [("sp_legacy", 0), ("sp_new", 1), ("bpe_bos", 0)])
def test_tokens_that_transformers_cuts_otherwise_are_reported(tmp_path: Path, style: str, notes: int) -> None:
    """Vicuna's tokenizer gives the same ids on both sides; one that looks over an image's edge does not."""
    tokenizer = STYLES[style].build()
    model, processor = compose(
        make_vision("clip"),
        make_language_model("llama", vocab_size=len(tokenizer) + 8),
        "mlp",
        tokenizer=tokenizer,
        image_processor=make_image_processor(),
    )
    save(model, processor, tmp_path / "ours")
    for proof in (
        export_stock(tmp_path / "ours", tmp_path / "back"),
        import_weights(tmp_path / "back", tmp_path / "again"),
    ):
        assert len(proof.notes) == notes
        assert str(proof).count("input_ids (2 of 2 prompts)") == notes


def test_the_dtype_of_the_source_is_kept(tmp_path: Path) -> None:
    llava(tmp_path / "stock").bfloat16().save_pretrained(tmp_path / "stock")
    for source, out, convert in (("stock", "ours", import_weights), ("ours", "back", export_stock)):
        assert convert(tmp_path / source, tmp_path / out).difference <= TOLERANCE
        tensors = load_file(tmp_path / out / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("text", "instruct"), [("opt", False), ("llama", True)])
def test_what_transformers_keeps_in_float32_may_stay_so(tmp_path: Path, text: str, instruct: bool) -> None:
    """Of a model in half precision it loads the queries, and BLIP-2's whole Q-Former, in float32."""
    theirs = blip(tmp_path / "stock", text, instruct).half()
    theirs.save_pretrained(tmp_path / "stock")
    import_weights(tmp_path / "stock", tmp_path / "ours")
    model, processor = load(tmp_path / "ours")
    assert {p.dtype for p in model.parameters()} == {torch.float16, torch.float32}
    run(model, dict(processor(QUESTIONS)), theirs=False)  # without an error
    export_stock(tmp_path / "ours", tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(back[name].half(), tensor) for name, tensor in theirs.state_dict().items())


def test_adapters_are_merged(tmp_path: Path) -> None:
    model, processor = make_model("clip", "mlp", "llama")
    layers = list(linear_names(model.language_model, model.get_output_embeddings()))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_dropout": 0.1}
    origin_of(model).adapters["language_model"] = inject(
        model.language_model, "language_model", settings, layers
    )
    randomise(model)
    with torch.no_grad():
        wanted = model(**processor([QUESTIONS[0]])).logits
    save(model, processor, tmp_path / "ours")
    export_stock(tmp_path / "ours", tmp_path / "back")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        found = back(**processor([QUESTIONS[0]])).logits
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, **CLOSE)


# -- refusals ---------------------------------------------------------------------------------------


def test_a_model_without_a_stock_class_is_refused_by_name(tmp_path: Path) -> None:
    tiles = {"type": "anyres", "pinpoints": POINTS}
    fusion = {"type": "gated_cross_attention", "every": 1}
    for number, (parts, settings, words) in enumerate(
        [
            (("clip", "linear", "llama"), {}, "connector 'linear' has no class in transformers"),
            (("clip", {"type": "mlp", "depth": 3}, "llama"), {}, "depth is 3"),
            (("clip", "resampler", "llama"), {"fusion": fusion}, "connector 'resampler'"),
            (("clip", "mlp", "llama"), {"attention": "prefix"}, "prefix_attention is True"),
            (("clip", "mlp", "llama"), {"tiling": tiles}, "model.tiling.order=hf"),
            (("dinov2", "mlp", "llama"), {}, "CLIP or SigLIP encoder, found 'dinov2'"),
            (("siglip", "mlp", "llama"), {"vision_feature_layer": "last"}, "vision_feature_layer is 'last'"),
            (("clip", "mlp", "gpt2"), {}, "cannot hold a language model of type 'gpt2'"),
            (("clip", "mlp", "phi"), {}, "has no tensor 'lm_head.bias'"),
            (("clip", "qformer", "llama"), {"vision_feature_layer": "last"}, "EVA-CLIP"),
            (("blip2", "qformer", "opt"), {"template": "bare"}, "vision_feature_layer is -2"),
            (
                ("blip2", "qformer", "opt"),
                {"vision_feature_layer": "last", "vision_feature_select": "full"},
                "puts the image in front",
            ),
        ]
    ):
        vision, connector, text = parts
        small = (
            {"type": connector, "layers": 2, "width": 24, "heads": 4} if connector == "qformer" else connector
        )
        model, processor = compose(
            make_vision(vision),
            make_language_model(text),
            small,
            tokenizer=make_tokenizer(),
            image_processor=make_image_processor(),
            **settings,
        )
        save(model, processor, tmp_path / str(number))
        with pytest.raises(ConfigError, match=re.escape(words)) as caught:
            export_stock(tmp_path / str(number), tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {str(i) for i in range(number + 1)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\], several layers"),
        ({"vision": "siglip"}, "needs 'full'"),
    ],
)
def test_a_source_that_our_model_cannot_be_is_refused(tmp_path: Path, settings: Any, words: str) -> None:
    llava(tmp_path / "stock", **settings)
    with pytest.raises(ConfigError, match=words):
        import_weights(tmp_path / "stock", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_foreign_and_broken_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        import_weights(tmp_path, tmp_path / "ours")
    make_vision("clip").save_pretrained(tmp_path / "vision")
    with pytest.raises(CheckpointError, match="cannot import 'CLIPVisionModel'"):
        import_weights(tmp_path / "vision", tmp_path / "ours")
    llava(tmp_path / "stock")
    with pytest.raises(ConfigError, match="--language-model"):
        import_weights(tmp_path / "stock", tmp_path / "ours", language_model="x")
    with pytest.raises(ConfigError, match="is there already"):
        import_weights(tmp_path / "stock", tmp_path / "vision")
    file = tmp_path / "stock" / "model.safetensors"
    whole = load_file(file)
    name = "language_model.lm_head.weight"
    for tensors, words in (
        ({k: v for k, v in whole.items() if k != name}, "lm_head.weight is missing"),
        ({**whole, "language_model.extra": torch.ones(2)}, "extra is unexpected"),
        ({**whole, name: whole[name][:-1].clone()}, "lm_head.weight.*mismatched"),
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            import_weights(tmp_path / "stock", tmp_path / "ours")
    for name, words in (("model.safetensors", "header too small"), ("config.json", "cannot be read")):
        (tmp_path / "stock" / name).write_text("[1]")
        with pytest.raises(CheckpointError, match=words):
            import_weights(tmp_path / "stock", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_blip2_that_reads_text_in_its_qformer_is_refused(tmp_path: Path) -> None:
    blip(tmp_path / "stock", "opt")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    config["qformer_config"]["use_qformer_text_input"] = True
    theirs = Blip2ForConditionalGeneration(Blip2Config.from_dict(config))
    theirs.save_pretrained(tmp_path / "stock")
    with pytest.raises(ConfigError, match="use_qformer_text_input is True"):
        import_weights(tmp_path / "stock", tmp_path / "ours")


class Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_no_pickle_is_run(tmp_path: Path) -> None:
    llava(tmp_path / "stock")
    (tmp_path / "stock" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, tmp_path / "stock" / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        import_weights(tmp_path / "stock", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stock"]


def corrupted(build: Any, name: str) -> Any:
    """`build` with one number changed in one of the tensors that it is given."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        for tensors in (arg for arg in args if isinstance(arg, dict) and name in arg):
            bias = tensors[name].clone()
            bias[3] += 0.05
            tensors[name] = bias
        return build(*args, **kwargs)

    return changed


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("assemble", "connector.layers.0.bias"),
        ("assign", "model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_what_does_not_compute_the_same_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    llava(tmp_path / "stock")
    import_weights(tmp_path / "stock", tmp_path / "ours")
    before = {path.name for path in tmp_path.iterdir()}
    convert, source = (import_weights, "stock") if step == "assemble" else (export_stock, "ours")
    monkeypatch.setattr(stock, step, corrupted(getattr(stock, step), name))
    with pytest.raises(CheckpointError, match=r"do not compute the same: logits differ by 0\."):
        convert(tmp_path / source, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_processor_that_sees_another_image_is_refused(tmp_path: Path) -> None:
    llava(tmp_path / "stock")
    import_weights(tmp_path / "stock", tmp_path / "ours")
    _, processor = load(tmp_path / "ours")
    processor.image_aspect_ratio = "pad"
    blind = export_blindly(processor)
    with pytest.raises(CheckpointError, match="see different images"):
        stock._compare_processors(stock.Llava(), processor, blind, from_template=True)


def export_blindly(processor: Any) -> Any:
    """A stock processor that does not pad."""
    return LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )


# -- BLIP-2's first stage ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_qformer_comes_from_image_text_retrieval(tmp_path: Path, dtype: torch.dtype) -> None:
    tokenizer = make_bert_tokenizer(bos_token="[DEC]")
    config = Blip2Config(
        vision_config=MORE_VISION_CONFIGS["blip2"]().to_dict(),
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        num_query_tokens=5,
        image_text_hidden_size=16,
    )
    theirs = randomise(Blip2ForImageTextRetrieval(config)).to(dtype)
    theirs.save_pretrained(tmp_path / "stock")
    theirs.float()
    Blip2Processor(make_image_processor(), tokenizer).save_pretrained(tmp_path / "stock")
    assert import_weights(tmp_path / "stock", tmp_path / "ours").difference <= TOLERANCE
    model, processor = load(tmp_path / "ours", dtype="float32")
    batch = processor(images=[make_picture(1), make_picture(2)], text=["a cat", "the long dog?"])
    with torch.no_grad():
        matching = theirs(**batch, use_image_text_matching_head=True).logits_per_image
        assert matching.std() > 1e-2
        torch.testing.assert_close(model.itm_scores(**batch), matching, **CLOSE)
        torch.testing.assert_close(model.itc_scores(**batch), theirs(**batch).logits_per_image, **CLOSE)
    with pytest.raises(ConfigError, match="is a QFormerForPretraining"):
        export_stock(tmp_path / "ours", tmp_path / "back")
    assert model.config.dec_token_id == processor.tokenizer.convert_tokens_to_ids("[DEC]")


# -- LLaVA's own layout -----------------------------------------------------------------------------


def original(folder: Path, kind: str = "mlp2x_gelu", lora: bool = False, **settings: Any) -> dict[str, str]:
    """Files as LLaVA's training writes them; returns the base models' directories."""
    bases = save_parts(folder / "base")
    source = folder / "original"
    source.mkdir()
    config = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": 32,
        "mm_hidden_size": 32,
        "mm_vision_tower": bases["vision_encoder"],
        "_name_or_path": bases["language_model"],
        "mm_projector_type": kind,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        **settings,
    }
    (source / "config.json").write_text(json.dumps(config))
    layers = [""] if kind == "linear" else ["0.", "2."]
    sizes = {"weight": (32, 32), "bias": (32,)}
    tensors = {f"model.mm_projector.{i}{leaf}": torch.randn(sizes[leaf]) for i in layers for leaf in sizes}
    if not lora:
        torch.save(tensors, source / "mm_projector.bin")
        return bases
    trained = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    torch.save(trained, source / "non_lora_trainables.bin")
    adapted = get_peft_model(
        make_language_model("llama"),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    randomise(adapted).save_pretrained(source)
    adapter = json.loads((source / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = bases["language_model"]
    (source / "adapter_config.json").write_text(json.dumps(adapter))
    return bases


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projector_of_stage_1_beside_its_base_models(tmp_path: Path, kind: str) -> None:
    original(tmp_path, kind)
    proof = import_weights(tmp_path / "original", tmp_path / "ours")
    assert proof.difference <= TOLERANCE
    assert proof.answered > 2
    model, processor = load(tmp_path / "ours")
    saved = torch.load(tmp_path / "original" / "mm_projector.bin")
    found = [tensor for _, tensor in model.connector.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, saved.values(), strict=True))
    assert processor.image_aspect_ratio == "pad"
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(weights) == {f"connector.{name}" for name, _ in model.connector.named_parameters()}


def test_lora_of_stage_2_is_merged_into_another_base(tmp_path: Path) -> None:
    bases = original(tmp_path, lora=True, mm_vision_tower="/no/such/tower")
    with pytest.raises(ConfigError, match="vision_encoder: cannot load '/no/such/tower'"):
        import_weights(tmp_path / "original", tmp_path / "ours")
    proof = import_weights(tmp_path / "original", tmp_path / "ours", **bases)
    assert proof.difference <= TOLERANCE
    model, _ = load(tmp_path / "ours")
    base = AutoModelForCausalLM.from_pretrained(bases["language_model"]).state_dict()
    changed = {n for n, t in model.language_model.state_dict().items() if not torch.allclose(t, base[n])}
    assert changed == {n for n in base if "q_proj" in n or "down_proj" in n}
    assert export_stock(tmp_path / "ours", tmp_path / "back").notes == ()


@pytest.mark.parametrize("prefix", ["", "model.model.", "base_model.model.", "base_model.model.model."])
def test_names_of_what_was_wrapped_around_the_model_do_not_matter(tmp_path: Path, prefix: str) -> None:
    original(tmp_path)
    file = tmp_path / "original" / "mm_projector.bin"
    saved = torch.load(file)
    torch.save({prefix + name.removeprefix("model."): tensor for name, tensor in saved.items()}, file)
    import_weights(tmp_path / "original", tmp_path / "ours")
    connector = load(tmp_path / "ours")[0].connector
    assert torch.equal(connector.layers[2].weight, saved["model.mm_projector.2.weight"])


def test_the_class_token_is_taken_where_llava_took_it(tmp_path: Path) -> None:
    original(tmp_path, mm_vision_select_feature="cls_patch")
    import_weights(tmp_path / "original", tmp_path / "ours")
    assert load(tmp_path / "ours")[0].config.num_image_tokens == (IMAGE_SIZE // 8) ** 2 + 1


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        ("adapter_config.json", "belongs to adapters, but adapter_config.json is missing"),
        ("adapter_model.safetensors", r"adapter_model.bin: is missing"),
        ("non_lora_trainables.bin", "no projector"),
        ("config.json", "cannot be read"),
    ],
)
def test_no_file_of_an_original_may_be_missing(tmp_path: Path, absent: str, words: str) -> None:
    original(tmp_path, lora=True)
    (tmp_path / "original" / absent).unlink()
    with pytest.raises(CheckpointError, match=words):
        import_weights(tmp_path / "original", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_no_setting_of_an_original_may_be_missing(tmp_path: Path) -> None:
    bases = original(tmp_path)
    file = tmp_path / "original" / "config.json"
    whole = file.read_text()
    for name, option in {
        "mm_vision_tower": "; give --vision-encoder",
        "_name_or_path": "; give --language-model",
        "hidden_size": "",
    }.items():
        edit_json(file, **{name: None})
        with pytest.raises(CheckpointError, match=f"config.json has no '{name}'{option}$"):
            import_weights(tmp_path / "original", tmp_path / "ours")
        file.write_text(whole)
    edit_json(file, mm_vision_tower=None, _name_or_path=None)
    import_weights(tmp_path / "original", tmp_path / "ours", **bases)


def test_originals_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (settings, words) in enumerate(
        [
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
            ({"kind": "cabstract"}, "mm_projector_type is 'cabstract'"),
            ({"mm_hidden_size": 48}, "the projector is not what config.json says"),
            ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'; patch, cls_patch"),
        ]
    ):
        original(tmp_path / str(number), **settings)
        with pytest.raises((ConfigError, CheckpointError), match=words) as caught:
            import_weights(tmp_path / str(number) / "original", tmp_path / "ours")
        assert "\n" not in str(caught.value)
    original(tmp_path / "bomb")
    torch.save(
        {"model.mm_projector.0.bias": Bomb(tmp_path / "ran")}, tmp_path / "bomb/original/mm_projector.bin"
    )
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        import_weights(tmp_path / "bomb" / "original", tmp_path / "ours")
    original(tmp_path / "changed")
    monkeypatch.setattr(original_llava, "assign", corrupted(original_llava.assign, "layers.0.bias"))
    with pytest.raises(CheckpointError, match="do not compute the same"):
        import_weights(tmp_path / "changed" / "original", tmp_path / "ours")
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("*ours*"))


# -- command line -----------------------------------------------------------------------------------


def test_commands_print_what_was_measured(tmp_path: Path) -> None:
    llava(tmp_path / "stock")
    for arguments in (["import", "stock", "ours"], ["export", "ours", "back"]):
        paths = [str(tmp_path / name) for name in arguments[1:]]
        result = CliRunner().invoke(app, [arguments[0], *paths])
        assert result.exit_code == 0, result.output
        assert re.search(
            r"logits differ by \d\.\de.\d+ of their size, \d+ greedy tokens agree", result.output
        )
        assert result.output.strip().endswith(paths[1])
