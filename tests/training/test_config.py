"""Recipes: what they may say, overrides, one clear line for each mistake, and the published settings."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import run_config

from mllm.config import RECIPES, RunConfig, SourceSection, load_recipe, shipped_recipes
from mllm.data.templates import TEMPLATES
from mllm.errors import ConfigError
from mllm.model.connectors import CONNECTORS
from mllm.training.arguments import training_arguments

MINIMAL: dict[str, Any] = {
    "stage": "align",
    "model": {"vision_encoder": "v", "language_model": "l"},
    "data": {"path": "rows.jsonl"},
    "train": {"output_dir": "out"},
}
SHIPPED = [
    "llava-1.5-7b/align",
    "llava-1.5-7b/instruct",
    "llava-1.5-7b/instruct_lora",
    "quickstart/align",
    "quickstart/instruct",
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def written(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({**MINIMAL, **sections}))
    return path


# -- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.lerning_rate=1e-4", "unknown key 'train.lerning_rate'; did you mean 'learning_rate'?"),
        ("model.vision_encodr=x", "unknown key 'model.vision_encodr'; did you mean 'vision_encoder'?"),
        ("tune.lora.rnk=3", "unknown key 'tune.lora.rnk'; did you mean 'r'?"),
        ("tune.conector=full", "unknown key 'tune.conector'; did you mean 'connector'?"),
        ("trian.max_steps=3", "unknown key 'trian'; did you mean 'train'?"),
        ("zzz=3", "unknown key 'zzz'; known: stage, model, tune, data, train"),
        ("train.output_dir=null", "train.output_dir: "),
        ("stage=allign", "stage: Input should be 'pretrain_vision', .* or 'instruct', found 'allign'"),
        ("tune.language_model=lorra", "tune.language_model: .*'frozen', 'full', 'lora', .*, found 'lorra'"),
        ("tune.vision_encoder=qlora", "tune: vision_encoder cannot be 'qlora': only the language model is"),
        ("tune.adapter.place=pfeiffer", "unknown key 'tune.adapter.place'; did you mean 'placement'?"),
        ("train.learning_rate=-1", "train.learning_rate: .*greater than 0, found -1"),
        ("train.learning_rate=fast", "train.learning_rate: .*valid number.*, found 'fast'"),
        ("train.learning_rates.projector=1e-4", "train.learning_rates.projector"),
        ("train.max_steps=2.5", "train.max_steps: .*found 2.5"),
        ("train.per_device_batch_size=0", "train.per_device_batch_size: .*found 0"),
        ("tune.lora.dropout=1", "tune.lora.dropout: .*less than 1, found 1"),
        ("model.vision_feature_layer=first", "model.vision_feature_layer"),
        ("model.dtype=float8", "model.dtype: .*found 'float8'"),
        ("model.image_aspect_ratio=crop", "model.image_aspect_ratio: .*'square' or 'pad', found 'crop'"),
        ("train", "override 'train' must look like section.key=value"),
        ("=3", "override '=3' must look like section.key=value"),
        ("stage.name=3", "override 'stage.name=3': 'stage' is a value, not a section"),
        ("data.path=[", r"override 'data.path=\[': not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(recipe: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        load_recipe(recipe, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["/no/such", "./no", "../no", "runs/no/such", "~/no", "mllm_no_such/a/b"])
def test_a_folder_of_a_model_that_is_not_there_is_no_name_on_the_hub(recipe: Path, place: str) -> None:
    for key, given in {"language_model": place, "vision_encoder": f"[v, {place}]"}.items():
        with pytest.raises(ConfigError, match=rf"recipe\.yaml: model\.{key}: there is no folder '{place}'"):
            load_recipe(recipe, [f"model.{key}={given}"])
    assert load_recipe(recipe, ["model.language_model=owner/name"]).model.language_model == "owner/name"


def test_a_home_folder_is_written_out(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llm").mkdir()
    with pytest.raises(ConfigError, match=f"no folder '~/llm'; write '{tmp_path}/llm'"):
        load_recipe(recipe, ["model.language_model=~/llm"])


@pytest.mark.parametrize("section", ["stage", "model", "data", "train"])
def test_a_missing_section_is_named(recipe: Path, section: str) -> None:
    recipe.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != section}))
    with pytest.raises(ConfigError, match=f"recipe.yaml: key '{section}' is missing"):
        load_recipe(recipe)


@pytest.mark.parametrize(("section", "key"), [("data", "path"), ("train", "output_dir")])
def test_a_missing_key_is_named(recipe: Path, section: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"recipe.yaml: key '{section}.{key}' is missing"):
        load_recipe(written(recipe, **{section: {}}))


@pytest.mark.parametrize("model", [{}, {"vision_encoder": "v"}, {"language_model": "l"}])
def test_a_model_needs_both_parts_or_a_checkpoint(recipe: Path, model: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"give model.init_from, or both model.vision_encoder and"):
        load_recipe(written(recipe, model=model))
    if model:
        with pytest.raises(ConfigError, match=r"is decided by the checkpoint of model\.init_from"):
            load_recipe(written(recipe, model={**model, "init_from": "c"}))
    assert load_recipe(written(recipe, model={"init_from": "c"})).model.init_from == "c"


@pytest.mark.parametrize("section", ["model", "tune", "data", "train"])
def test_an_empty_section_is_named(recipe: Path, section: str) -> None:
    with pytest.raises(ConfigError, match=section) as error:
        load_recipe(written(recipe, **{section: None}), [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[", "a: b: c", "- a\n- b", "", "just words", "\tstage: align"])
def test_a_file_that_is_no_recipe(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as error:
        load_recipe(recipe)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'llava-1.5-7b/align'"):
        load_recipe("llava-1.5-7b/aling")
    (tmp_path / "mine.yaml").write_text("stage: align")
    with pytest.raises(ConfigError, match=r"did you mean '.*mine.yaml'"):
        load_recipe(tmp_path / "mine.yam")
    with pytest.raises(
        ConfigError, match=r"neither a file nor a shipped recipe; shipped: .*quickstart/align"
    ):
        load_recipe("zzzzz")


PAIRS = {"vision_encoder": "v", "text_encoder": "t", "tokenizer": "t"}
ALIGN: dict[str, Any] = MINIMAL["model"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        # Keys that nothing would read.
        *(
            (
                {"stage": stage, "model": {**PAIRS, key: value}},
                f"model.{key} means nothing in the stage {stage}",
            )
            for stage in ("pretrain_vision", "pretrain_qformer")
            for key, value in {
                "template": "plain",
                "fusion": {"type": "visual_expert"},
                "image_size": 9,
            }.items()
        ),
        (
            {"stage": "pretrain_vision", "model": {**PAIRS, "connector": {"type": "mlp"}}},
            "model.connector means",
        ),
        (
            {"stage": "pretrain_qformer", "model": {"init_from": "c", "attn_implementation": "sdpa"}},
            "model.attn_implementation means nothing",
        ),
        (
            {"stage": "pretrain_qformer", "model": {**PAIRS, "pretraining": {"objective": "clip"}}},
            "objective is of the stage pretrain_vision",
        ),
        (
            {"stage": "pretrain_vision", "model": PAIRS, "data": {"path": "a", "max_length": 9}},
            "max_text_length",
        ),
        ({"stage": "pretrain_vision", "model": {**PAIRS, "vision_encoder": ["v", "w"]}}, "give no list"),
        ({"model": {**ALIGN, "text_encoder": "t"}}, "model.text_encoder means nothing in the stage align"),
        (
            {"model": {**ALIGN, "pretraining": {"embed_dim": 8}}},
            "model.pretraining means nothing in the stage",
        ),
        ({"tune": {"lora": {"r": 4}}}, "tune: lora has settings, but no part is tuned as lora or qlora"),
        ({"tune": {"language_model": "ia3", "lora": {"target_modules": ["q"]}}}, "no part is tuned as lora"),
        ({"tune": {"language_model": "lora", "adapter": {"size": 4}}}, "no part is tuned as adapter"),
        ({"data": {"path": "a", "mixing": "sqrt"}}, "one data set, which mixing 'sqrt' means nothing for"),
        ({"data": {"path": [{"path": "a", "weight": 2}]}}, "one data set, which weight means nothing for"),
        (
            {"train": {"output_dir": "o", "save_total_limit": 2}},
            r"save_total_limit is given, but nothing is saved .*give train\.save_steps or val\.keep_best",
        ),
        # Values that cannot be.
        ({"data": {"path": []}}, "data.path: List should have at least 1 item"),
        (
            {"data": {"path": ["a", {"path": "b", "weight": 0}]}},
            "data.path.1.weight: .* greater than 0, found 0",
        ),
        (
            {"data": {"path": ["a", {"path": "b", "wieght": 1}]}},
            "'data.path.1.wieght'; did you mean 'weight'",
        ),
        ({"model": {**ALIGN, "connector": {"depth": 2}}}, "model: connector is .* needs a 'type'"),
        ({"model": {**ALIGN, "fusion": {}}}, "model: fusion is {}; it needs a 'type'"),
        (
            {"model": {**ALIGN, "tiling": {"type": "anyres"}, "image_aspect_ratio": "pad"}},
            "tiling pads images",
        ),
        ({"model": {**ALIGN, "vision_encoder": []}}, "vision_encoder is an empty list"),
        ({"model": {**ALIGN, "image_processor": ["a", "b"]}}, "image_processor: 2 for 1 vision encoders"),
        ({"model": {"init_from": "o"}, "train": {"output_dir": "o"}}, "'o' is what the run starts from"),
        ({"train": {"output_dir": ""}}, "train.output_dir: String should have at least 1 character"),
        ({"train": {"output_dir": "o", "bf16": True, "fp16": True}}, "bf16 and fp16 are both true"),
        (
            {"tune": {"language_model": "qlora"}, "train": {"output_dir": "o", "fsdp": True}},
            "train.fsdp does not divide weights in 4 bit, .* use .*train.deepspeed=ds_configs/zero2.json",
        ),
        (
            {"train": {"output_dir": "o", "max_steps": 0}},
            "train.max_steps: .*greater than or equal to 1, found 0",
        ),
        (
            {"train": {"output_dir": "o", "learning_rates": {"connector": 0}}},
            "learning_rates.connector: .*found 0",
        ),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(recipe: Path, change: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        load_recipe(written(recipe, **change))
    assert "\n" not in str(error.value)


def test_what_was_said_can_be_said_again() -> None:
    """A manifest keeps the recipe in this form; every shipped one must load from it."""
    for name in shipped_recipes():
        config = load_recipe(name)
        assert RunConfig.model_validate(config.model_dump(exclude_unset=True)) == config


# -- overrides --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=2E-5", 2e-5),
        ("train.learning_rate=0.5", 0.5),
        ("train.max_steps=10", 10),
        ("train.bf16=true", True),
        ("train.learning_rates={connector: 2e-5}", {"connector": 2e-5}),
        ("train.learning_rates.connector=2e-5", {"connector": 2e-5}),
        ("train.resume=runs/x/checkpoint-5", "runs/x/checkpoint-5"),
        ("train.resume=true", True),
        ("train.warmup_steps=null", None),
        ("train.report_to=[tensorboard]", ["tensorboard"]),
        ("data.path=a=b.jsonl", [SourceSection(path="a=b.jsonl")]),
        ("data.path=[a.jsonl, b.jsonl]", [SourceSection(path="a.jsonl"), SourceSection(path="b.jsonl")]),
        ("data.image_root='007'", "007"),
        ("model.vision_feature_layer=last", "last"),
        ("model.vision_feature_layer=-1", -1),
        ("tune.lora.r=8", 8),
        ("model.fusion=visual_expert", {"type": "visual_expert"}),
    ],
)
def test_overrides(recipe: Path, override: str, value: Any) -> None:
    config: Any = load_recipe(recipe, ["train.warmup_steps=1", "tune.language_model=lora", override])
    key = override.partition("=")[0].removesuffix(".connector")
    for step in key.split("."):
        config = getattr(config, step)
    assert config == value
    assert type(config) is type(value)


def test_a_number_with_an_exponent_is_a_number_in_a_file_too(recipe: Path) -> None:
    """YAML 1.1 reads `1e-4` as a string."""
    recipe.write_text(
        yaml.safe_dump(MINIMAL) + "  learning_rate: 1e-4\n  learning_rates: {connector: 2e-5}\n"
    )
    train = load_recipe(recipe).train
    assert (train.learning_rate, train.learning_rates) == (1e-4, {"connector": 2e-5})


def test_the_last_override_wins(recipe: Path) -> None:
    assert load_recipe(recipe, ["train.seed=1", "train.seed=2"]).train.seed == 2


# -- shipped recipes --------------------------------------------------------------------------------


def test_what_is_shipped() -> None:
    assert set(SHIPPED) <= set(shipped_recipes())
    assert len(list(RECIPES.rglob("*.yaml"))) == len(shipped_recipes()), (
        "a recipe lies where nothing finds it"
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_parses_and_starts(name: str) -> None:
    config = load_recipe(name)
    assert config.stage == name.split("/")[1].split("_")[0]
    assert config.model.connector["type"] in CONNECTORS
    assert config.model.template in TEMPLATES
    assert config.train.output_dir == f"runs/{name}"
    if config.stage == "instruct":
        assert config.model.init_from == f"runs/{name.split('/')[0]}/align"
    if config.train.deepspeed:
        assert (Path(__file__).parents[2] / config.train.deepspeed).is_file()


def published(stage: str) -> RunConfig:
    return load_recipe(f"llava-1.5-7b/{stage}")


@pytest.mark.parametrize(
    ("stage", "rate", "batch", "template", "aspect", "tuning"),
    [
        ("align", 1e-3, 32, "plain", "square", ("frozen", "full", "frozen")),
        ("instruct", 2e-5, 16, "vicuna_v1", "pad", ("frozen", "full", "full")),
        ("instruct_lora", 2e-4, 16, "vicuna_v1", "pad", ("frozen", "full", "lora")),
    ],
)
def test_the_settings_are_llava_1_5s(
    stage: str, rate: float, batch: int, template: str, aspect: str, tuning: tuple[str, str, str]
) -> None:
    """arXiv 2310.03744 and the scripts published with it; 8 devices."""
    config = published(stage)
    train, tune = config.train, config.tune
    assert (train.learning_rate, train.per_device_batch_size) == (rate, batch)
    assert (config.model.template, config.model.image_aspect_ratio) == (template, aspect)
    assert (tune.vision_encoder, tune.connector, tune.language_model) == tuning
    assert (train.lr_scheduler_type, train.warmup_ratio, train.weight_decay) == ("cosine", 0.03, 0.0)
    assert (train.num_train_epochs, train.max_steps, train.gradient_accumulation_steps) == (1, None, 1)
    assert (train.bf16, train.gradient_checkpointing, config.data.max_length) == (True, True, 2048)


def test_the_parts_are_llava_1_5s() -> None:
    model = published("align").model
    assert model.vision_encoder == "openai/clip-vit-large-patch14-336"
    assert model.language_model == "lmsys/vicuna-7b-v1.5"
    assert model.connector == {"type": "mlp"}
    assert (model.vision_feature_layer, model.vision_feature_select) == (-2, "patch")


def test_lora_is_llava_1_5s() -> None:
    config = published("instruct_lora")
    assert (config.tune.lora.r, config.tune.lora.alpha, config.tune.lora.dropout) == (128, 256, 0.05)
    assert config.train.learning_rates == {"connector": 2e-5}


# -- Hugging Face's arguments -----------------------------------------------------------------------


def test_arguments_reach_the_trainer(tmp_path: Path) -> None:
    options = {
        "learning_rate": 2e-4,
        "per_device_batch_size": 3,
        "gradient_accumulation_steps": 5,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "max_steps": 100,
        "seed": 7,
    }
    arguments = training_arguments(
        run_config(tmp_path, tmp_path / "run", ("frozen", "full", "frozen"), **options), rows=100
    )
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (2e-4, 0.1, 0.5)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 5)
    assert arguments.get_warmup_steps(100) == 10
    assert (arguments.seed, arguments.save_strategy, arguments.remove_unused_columns) == (7, "no", False)
