"""The configuration of one run: what a recipe may say, checked before anything is loaded.

A recipe is a YAML file with the sections `model`, `tune`, `data` and `train`. Command-line overrides
(`train.learning_rate=1e-4`) are laid over it. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mllm.errors import ConfigError

Tuning = Literal["frozen", "full", "lora"]
RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """Base of all sections: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)


class ModelSection(Section):
    """What the model is made of, or which checkpoint it starts from."""

    init_from: str | None = Field(None, description="checkpoint of an earlier stage; the parts come from it")
    vision_encoder: str | None = Field(None, description="directory or Hub name")
    language_model: str | None = Field(None, description="directory or Hub name")
    tokenizer: str | None = Field(None, description="default: with the language model")
    image_processor: str | None = Field(None, description="default: with the vision encoder")
    connector: dict[str, Any] = Field({"type": "mlp"}, description="type and its arguments")
    vision_feature_layer: int | Literal["last"] = Field(-2, description="hidden state, or `last`")
    vision_feature_select: Literal["patch", "full"] = Field("patch", description="drop or keep class tokens")
    template: str | None = Field(None, description="chat template of this stage")
    image_aspect_ratio: Literal["square", "pad"] | None = Field(None, description="pad pictures to a square?")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of frozen weights")
    attn_implementation: str | None = Field(None, description="sdpa, eager, flash_attention_2, ...")

    @model_validator(mode="after")
    def _complete(self) -> ModelSection:
        if self.init_from is None and (self.vision_encoder is None or self.language_model is None):
            raise ValueError("give model.init_from, or both model.vision_encoder and model.language_model")
        return self


class LoraSection(Section):
    """LoRA on every linear layer of the parts tuned with it; the defaults are LLaVA-1.5's."""

    r: int = Field(128, ge=1, description="rank")
    alpha: int = Field(256, ge=1, description="scale is alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="on the input of A")


class TuneSection(Section):
    """How each part is trained."""

    vision_encoder: Tuning = "frozen"
    connector: Tuning = "full"
    language_model: Tuning = "frozen"
    lora: LoraSection = LoraSection()


class DataSection(Section):
    """One data set, or several that are joined."""

    path: str | list[str] = Field(description="JSON or JSONL file(s)")
    format: str = Field("auto", description="llava, coco_captions, messages or auto")
    image_root: str | None = Field(None, description="folder that relative image paths start from")
    max_length: int | None = Field(2048, ge=8, description="tokens a row, after image expansion")

    @property
    def paths(self) -> list[str]:
        """The files as a list."""
        return [self.path] if isinstance(self.path, str) else self.path


class TrainSection(Section):
    """Optimisation; the names are Hugging Face's `TrainingArguments` where they have one."""

    output_dir: str
    learning_rate: float = Field(1e-3, gt=0, description="of every part without a rate of its own")
    learning_rates: dict[Literal["vision_encoder", "connector", "language_model"], float] = Field(
        default_factory=dict, description="rate per part"
    )
    per_device_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, description="overrides the epochs when positive")
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    save_steps: int = Field(0, ge=0, description="0 saves at the end only")
    save_total_limit: int | None = Field(None, ge=1)
    logging_steps: int = Field(10, ge=1)
    seed: int = 42
    num_workers: int = Field(0, ge=0)
    deepspeed: str | None = Field(None, description="a file of ds_configs/")
    report_to: list[str] = Field(default_factory=list, description="tensorboard, wandb, ...")
    resume: bool | str = Field(False, description="true continues the last checkpoint of output_dir")


class RunConfig(Section):
    """One stage of training."""

    stage: Literal["align", "instruct"]
    model: ModelSection
    tune: TuneSection = TuneSection()
    data: DataSection
    train: TrainSection


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and lay overrides over it.

    Args:
        recipe: a YAML file, or the name of a shipped recipe such as `llava-1.5-7b/align`.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ConfigError: one line that names the file, the key and what is allowed.
    """
    path = find_recipe(recipe)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping with the sections model, tune, data and train")
    for override in overrides:
        _apply(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from error


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given as a path or a shipped name."""
    for path in (Path(recipe), RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(str(recipe), shipped_recipes(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(shipped_recipes())}"
    raise ConfigError(f"recipe {str(recipe)!r} is neither a file nor a shipped recipe; {hint}")


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.glob("*/*.yaml"))


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must look like section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        # YAML 1.1 reads `1e-4` as a string; the field's type makes it a number, in a file as here.
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not valid YAML: {' '.join(str(error).split())}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        return f"unknown key {where!r}; " + (
            f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"key {where!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where or 'recipe'}: {message}" + (
        f", found {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
    )


def _fields_at(loc: Sequence[Any]) -> list[str]:
    model: Any = RunConfig
    for step in loc:
        model = model.model_fields[step].annotation if hasattr(model, "model_fields") else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []
