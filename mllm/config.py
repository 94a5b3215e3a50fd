"""The configuration of one run: what a recipe may say, checked before anything is loaded.

A recipe is a YAML file with the sections `model`, `tune`, `data` and `train`, and if wanted `val`, `eval`
and, for the model card, `card`. Command-line overrides (`train.learning_rate=1e-4`) are laid over it. An
unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mllm.data.mixture import Cap
from mllm.errors import ConfigError

Tuning = Literal["frozen", "full", "lora", "qlora", "dora", "rslora", "prefix", "prompt", "ia3", "adapter"]
Part = Literal["vision_encoder", "connector", "fusion", "language_model", "text_encoder", "heads"]
# A directory or Hub name of published weights, or `{model_type: ..., setting: value}` for fresh ones.
Source = str | dict[str, Any]
Rate = Annotated[float, Field(gt=0)]
Checkpointing = bool | Literal["selective"]
Layer = int | Literal["last", "pooled", "projected"]
RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """Base of all sections: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)


class PretrainingSection(Section):
    """Settings of the stages `pretrain_vision` and `pretrain_qformer`."""

    objective: Literal["clip", "siglip"] = Field("clip", description="of pretrain_vision")
    embed_dim: int = Field(256, ge=1, description="width in which images and texts are compared")
    max_text_length: int = Field(32, ge=4, description="tokens a caption")


# What a stage on pairs takes of the section `model`; the other stages take all but ONLY_PAIRS.
ONLY_PAIRS = {"text_encoder", "pretraining"}
PAIRS = {"init_from", "vision_encoder", "tokenizer", "image_processor", "dtype"} | ONLY_PAIRS
TAKES = {
    "pretrain_vision": PAIRS,
    "pretrain_qformer": PAIRS | {"connector", "vision_feature_layer", "vision_feature_select"},
}
# What a stage may say of a model that an earlier stage has made.
AFTER_INIT = {
    *("init_from", "template", "image_size", "image_aspect_ratio", "tiling", "dtype"),
    "attn_implementation",
}


class ModelSection(Section):
    """What the model is made of, or which checkpoint it starts from."""

    init_from: str | None = Field(None, description="checkpoint of an earlier stage; the parts come from it")
    vision_encoder: Source | list[Source] | None = Field(None, description="place, settings, or several")
    language_model: Source | None = Field(None, description="place, or settings for fresh weights")
    tokenizer: str | None = Field(None, description="default: with the language model")
    image_processor: str | list[str] | None = Field(None, description="default: with the vision encoder")
    instruction_tokenizer: str | None = Field(None, description="of a connector that reads the instruction")
    connector: dict[str, Any] = Field({"type": "mlp"}, description="type and its arguments")
    fusion: dict[str, Any] | None = Field(None, description="deep fusion: type and its arguments")
    tiling: dict[str, Any] | None = Field(None, description="images as several views: type and its arguments")
    vision_feature_layer: Layer | list[Layer] = Field(
        -2, description="hidden state, `last`, `pooled` or `projected`; of several encoders also one each"
    )
    vision_feature_select: Literal["patch", "full"] = Field("patch", description="drop or keep class tokens")
    added_tokens: list[str] = Field(default_factory=list, description="new words, such as <c{0..511}>")
    template: str | None = Field(None, description="chat template of this stage")
    image_size: int | None = Field(None, ge=1, description="side of a picture; default: the processor's")
    image_aspect_ratio: Literal["square", "pad"] | None = Field(None, description="pad pictures to a square?")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of frozen weights")
    attention: Literal["causal", "prefix"] = Field(
        "causal", description="prefix: prompts see themselves whole"
    )
    attn_implementation: str | None = Field(None, description="sdpa, eager, flash_attention_2, ...")
    connector_from: str | None = Field(
        None, description="checkpoint whose connector the new one starts from, all but its last projection"
    )
    text_encoder: Source | None = Field(None, description="of pretraining; for a Q-Former, the BERT it is")
    pretraining: PretrainingSection = PretrainingSection()

    @property
    def given(self) -> set[str]:
        """The keys that a recipe gives a value; null is none."""
        return {key for key in self.model_fields_set if getattr(self, key) is not None}

    @model_validator(mode="after")
    def _possible(self) -> ModelSection:
        for key in ("connector", "fusion", "tiling"):
            settings = getattr(self, key)
            if settings is not None and "type" not in settings:
                raise ValueError(f"{key} is {settings}; it needs a 'type'")
        if self.vision_encoder == []:
            raise ValueError("vision_encoder is an empty list; name one, or several")
        if self.tiling and self.image_aspect_ratio == "pad":
            raise ValueError("image_aspect_ratio is 'pad', but tiling pads images itself; remove it")
        if isinstance(self.image_processor, list):
            encoders = len(self.vision_encoder) if isinstance(self.vision_encoder, list) else 1
            if len(self.image_processor) != encoders or encoders == 1:
                raise ValueError(
                    f"image_processor: {len(self.image_processor)} for {encoders} vision encoders; "
                    "give one each, or one that is no list"
                )
        return self


class LoraSection(Section):
    """LoRA on every linear layer of the parts tuned with it; the defaults are LLaVA-1.5's."""

    r: int = Field(128, ge=1, description="rank")
    alpha: int = Field(256, ge=1, description="scale is alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="on the input of A")
    target_modules: list[str] | None = Field(None, description="names of layers; null: all but the head")


class PrefixSection(Section):
    """Prefix tuning: learned keys and values in front of every layer's."""

    length: int = Field(20, ge=1, description="learned tokens")
    hidden: int | None = Field(None, ge=1, description="width of a layer that computes them; null: none")


class PromptSection(Section):
    """Prompt tuning: learned embeddings in front of the sequence; the length is Lester et al.'s."""

    length: int = Field(100, ge=1, description="learned tokens")
    init: Literal["vocab", "random"] = Field("vocab", description="embeddings of random tokens, or noise")


class AdapterSection(Section):
    """Bottleneck adapters; the size is Houlsby et al.'s."""

    size: int = Field(64, ge=1, description="width of the bottleneck")
    placement: Literal["houlsby", "pfeiffer"] = Field("houlsby", description="in both blocks, or in the last")


# Which tunings read each section of settings.
USERS = {
    "lora": ("lora", "qlora", "dora", "rslora"),
    "prefix": ("prefix",),
    "prompt": ("prompt",),
    "adapter": ("adapter",),
}


class TuneSection(Section):
    """How each part is trained."""

    vision_encoder: Tuning = "frozen"
    connector: Tuning = "full"
    fusion: Literal["frozen", "full"] = "full"
    language_model: Tuning = "frozen"
    text_encoder: Literal["frozen", "full"] = "full"
    heads: Literal["frozen", "full"] = "full"
    overrides: dict[str, Literal["frozen", "full"]] = Field(
        default_factory=dict, description="modules or parameters tuned otherwise than their part"
    )
    lora: LoraSection = Field(LoraSection(), description="also of qlora, dora and rslora")
    prefix: PrefixSection = PrefixSection()
    prompt: PromptSection = PromptSection()
    adapter: AdapterSection = AdapterSection()

    @model_validator(mode="after")
    def _settings_are_used(self) -> TuneSection:
        tunings = {self.vision_encoder, self.connector, self.language_model}
        for name, users in USERS.items():
            if getattr(self, name).model_fields_set and not tunings & set(users):
                raise ValueError(
                    f"{name} has settings, but no part is tuned as {' or '.join(users)}; remove them "
                    f"(tune.{name}={{}} after a recipe's name)"
                )
        return self

    @model_validator(mode="after")
    def _possible(self) -> TuneSection:
        for part in ("vision_encoder", "connector"):
            tuning = getattr(self, part)
            if tuning == "qlora":
                raise ValueError(
                    f"{part} cannot be 'qlora': only the language model is loaded in 4 bit; use 'lora'"
                )
            if tuning in ("prefix", "prompt"):
                raise ValueError(
                    f"{part} cannot be {tuning!r}: there is no sequence of text for learned tokens to stand "
                    "in front of; use 'lora', 'ia3' or 'adapter'"
                )
        return self


class SourceSection(Section):
    """One data set of several."""

    path: str = Field(description="see data.path")
    format: str | None = Field(None, description="default: data.format")
    image_root: str | None = Field(None, description="default: data.image_root")
    weight: float = Field(1.0, gt=0, description="factor on its share, see data.mixing")
    license: str | None = Field(None, description="default: data.license")
    max_rows: int | str | None = Field(
        None, description="3000 or 10% of its rows, drawn with the seed; first:3000 or first:10%"
    )
    epochs: float = Field(1.0, gt=0, description="with mixing concat: how often it comes in an epoch of all")

    @field_validator("max_rows")
    @classmethod
    def _is_cap(cls, max_rows: int | str | None) -> int | str | None:
        if max_rows is not None:
            Cap.parse(max_rows)
        return max_rows

    @property
    def cap(self) -> Cap | None:
        """`max_rows`, parsed."""
        return None if self.max_rows is None else Cap.parse(self.max_rows)


class ReplaySection(Section):
    """A general data set that is mixed in, so that what was learnt before is not forgotten."""

    path: str = Field(description="see data.path")
    share: float = Field(gt=0, lt=1, description="of all rows of an epoch, itself included")
    format: str | None = Field(None, description="default: data.format")
    image_root: str | None = Field(None, description="default: data.image_root")
    license: str | None = Field(None, description="default: data.license")
    max_rows: int | str | None = Field(None, description="as of a data set of data.path")


class DataSection(Section):
    """One data set, or several that are joined or mixed."""

    path: list[SourceSection] = Field(
        min_length=1, description="JSON or JSONL file(s), shards ({000..099}.tar), hf:NAME_OR_FOLDER[:SPLIT]"
    )
    format: str = Field("auto", description="llava, coco_captions, messages or auto")
    image_root: str | None = Field(None, description="folder that relative image paths start from")
    license: str | None = Field(None, description="of the data, for the model card")
    mixing: Literal["concat", "sqrt", "weights"] = Field(
        "concat", description="every row once; by the root of the sizes (InstructBLIP); by the weights alone"
    )
    replay: ReplaySection | None = Field(None, description="a general set mixed in at a share of the whole")
    streaming: bool = Field(False, description="read hf:... in its own order, not by number; needs max_steps")
    shuffle_buffer: int = Field(512, ge=1, description="of streaming: rows that are shuffled at a time")
    max_length: int | None = Field(2048, ge=8, description="tokens a row, after image expansion")
    grouping: Literal["none", "modality_length"] = Field(
        "none", description="batches of one modality and, over ranks, of like length (LLaVA)"
    )
    packing: bool = Field(False, description="rows one after the other, ranks balanced, in place of padding")
    pack_length: int | None = Field(None, ge=8, description="tokens that a pack may have; null: any number")
    feature_cache: bool | str = Field(
        False, description="keep a frozen vision encoder's features in this folder; true: in output_dir"
    )
    longest_first: bool = Field(
        True, description="try the longest rows, forward and backward, before step 1; losses do not change"
    )

    @field_validator("path", mode="before")
    @classmethod
    def _listed(cls, path: Any) -> Any:
        """A file or several, each by its path alone or with settings of its own."""
        listed = path if isinstance(path, list) else [path]
        return [{"path": source} if isinstance(source, str) else source for source in listed]

    @model_validator(mode="after")
    def _packed(self) -> DataSection:
        if self.pack_length is not None and not self.packing:
            raise ValueError("pack_length is of packs, and packing is false; remove it")
        return self

    @model_validator(mode="after")
    def _mixed(self) -> DataSection:
        weighted = any("weight" in source.model_fields_set for source in self.path)
        if self.mixing != "concat" and any(source.epochs != 1 for source in self.path):
            raise ValueError(
                f"epochs of a data set are for mixing 'concat'; with {self.mixing!r}, give weight"
            )
        if len(self.path) == 1 and (self.mixing != "concat" or weighted):
            key = "weight" if weighted else f"mixing {self.mixing!r}"
            raise ValueError(f"path has one data set, which {key} means nothing for; remove it")
        return self

    @model_validator(mode="after")
    def _streamed(self) -> DataSection:
        if not self.streaming:
            if "shuffle_buffer" in self.model_fields_set:
                raise ValueError(
                    "shuffle_buffer is of streaming; all rows are shuffled without it: remove it"
                )
            return self
        if len(self.path) > 1 or self.replay or self.path[0].max_rows or self.path[0].epochs != 1:
            raise ValueError("streaming reads one data set as it comes; mix and cap without streaming")
        if not self.path[0].path.startswith("hf:"):
            raise ValueError(
                "streaming is for hf:...; files and shards are read by number at no cost: set streaming=false"
            )
        if self.packing or self.grouping != "none":
            raise ValueError("packing and grouping need the lengths of all rows; set streaming=false")
        return self

    @property
    def sources(self) -> list[SourceSection]:
        """The data sets, each with its format and image folder; one that is replayed is the last."""
        shared = {"format": self.format, "image_root": self.image_root, "license": self.license}
        given: list[dict[str, Any]] = [source.model_dump(exclude_none=True) for source in self.path]
        if self.replay:
            given.append(self.replay.model_dump(exclude_none=True, exclude={"share"}))
        return [SourceSection(**{**shared, **source}) for source in given]


class TrainSection(Section):
    """Optimisation; the names are Hugging Face's `TrainingArguments` where they have one."""

    output_dir: str = Field(min_length=1)
    learning_rate: float = Field(1e-3, gt=0, description="of every part without a rate of its own")
    learning_rates: dict[Part, Rate] = Field(default_factory=dict, description="rate per part")
    per_device_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    global_batch_size: int | None = Field(
        None, ge=1, description="rows a step over all ranks; gradient_accumulation_steps follows from it"
    )
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="overrides the epochs")
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="of the schedule, such as min_lr of cosine_with_min_lr"
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    warmup_steps: int | None = Field(None, ge=0, description="overrides the ratio")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: Checkpointing = Field(
        False, description="compute layers again (true), or only what is cheap in them (selective)"
    )
    compile: bool = Field(False, description="torch.compile of each layer of the language model")
    kernels: Literal["liger"] | None = Field(None, description="fused kernels, on a GPU")
    vision_batch_size: int | None = Field(
        None, ge=1, description="images that a frozen vision encoder computes at a time; null: all"
    )
    optim: str | None = Field(None, description="Hugging Face's name; null: AdamW, paged for qlora on a GPU")
    save_steps: int = Field(0, ge=0, description="0 saves at the end only")
    save_total_limit: int | None = Field(None, ge=1)
    logging_steps: int = Field(10, ge=1)
    seed: int = 42
    num_workers: int = Field(0, ge=0)
    deepspeed: str | None = Field(None, description="a file of ds_configs/")
    fsdp: bool = Field(False, description="weights, gradients and optimiser over ranks by torch's FSDP2")
    watchdog_seconds: float = Field(
        600, ge=0, description="a micro-step without progress for so long ends the run; 0: never"
    )
    report_to: list[str] = Field(default_factory=list, description="tensorboard, wandb, ...")
    rehearsal: bool = Field(
        True, description="before step 1: write a checkpoint, read it back, compare, count the disk"
    )
    resume: bool | str = Field(
        False, description="auto, true: from output_dir's newest complete checkpoint, if any; or a path"
    )

    @model_validator(mode="after")
    def _possible(self) -> TrainSection:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true; choose one")
        if self.compile and self.gradient_checkpointing == "selective":
            raise ValueError(
                "compile and gradient_checkpointing 'selective' are both given; the compiler chooses what to "
                "compute again by itself: remove one"
            )
        if self.deepspeed and self.fsdp:
            raise ValueError("deepspeed and fsdp are both given; choose one")
        if self.save_total_limit and not self.save_steps:
            raise ValueError(
                "save_total_limit is given, but nothing is saved before the end; give save_steps"
            )
        return self

    def accumulation(self, ranks: int) -> int:
        """Micro-batches a step on so many ranks.

        Raises:
            ConfigError: the global batch cannot be divided so.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        together = ranks * self.per_device_batch_size
        steps, left = divmod(self.global_batch_size, together)
        if left:
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} is no multiple of {ranks} ranks x "
                f"train.per_device_batch_size {self.per_device_batch_size}; change one of them"
            )
        said = "gradient_accumulation_steps" in self.model_fields_set
        if said and self.gradient_accumulation_steps != steps:
            raise ConfigError(
                f"train.gradient_accumulation_steps is {self.gradient_accumulation_steps}, but "
                f"global_batch_size {self.global_batch_size} on {ranks} ranks needs {steps}; remove the one"
            )
        return steps


class CardSection(Section):
    """What the model card says that a run cannot know; `mllm card` writes it."""

    title: str | None = Field(None, description="default: the name of output_dir")
    description: str | None = Field(None, description="a sentence or two on what the model is for")
    license: str | None = Field(None, description="of the weights, as the Hub names it: apache-2.0, llama2")
    languages: list[str] = Field(default_factory=list, description="ISO 639 codes: en, de")
    base_models: list[str] = Field(default_factory=list, description="Hub names of parts from local folders")
    datasets: list[str] = Field(default_factory=list, description="Hub names of the data")
    tags: list[str] = Field(default_factory=list, description="more tags")


class ValSection(Section):
    """Validation during training: the loss with each row's own images, with others' and with blank ones."""

    path: str = Field(description="a JSON or JSONL file of rows that are not trained on")
    format: str = Field("auto", description="as data.format")
    image_root: str | None = Field(None, description="default: data.image_root")
    every: int = Field(500, ge=1, description="steps")
    rows: int = Field(256, ge=1, description="at most so many, evenly over the file")
    batch_size: int | None = Field(None, ge=1, description="default: train.per_device_batch_size")
    image_gap: float = Field(
        0.01, ge=0, description="warn when others' images raise the loss a token by less than this"
    )
    keep_best: bool = Field(False, description="save at every lowest loss, and keep that checkpoint")
    patience: int | None = Field(None, ge=1, description="stop after so many validations without a lower one")


class EvalSection(Section):
    """Questions of a benchmark that the model is asked during training."""

    task: Literal["pope"] = "pope"
    questions: str = Field(description="question file")
    image_root: str = Field(description="folder of its images")
    every: int = Field(1000, ge=1, description="steps")
    rows: int = Field(100, ge=1, description="how many questions, from the first on")
    decode: str = Field("greedy", description="greedy, sample, vcd; with settings: vcd,alpha=1")
    batch_size: int = Field(16, ge=1)
    max_new_tokens: int = Field(16, ge=1)


class RunConfig(Section):
    """One stage of training."""

    stage: Literal["pretrain_vision", "pretrain_qformer", "align", "instruct"]
    model: ModelSection
    tune: TuneSection = TuneSection()
    data: DataSection
    train: TrainSection
    val: ValSection | None = None
    eval: EvalSection | None = None
    card: CardSection = CardSection()

    @property
    def on_pairs(self) -> bool:
        """Whether the stage learns from image-caption pairs, before there is a language model."""
        return self.stage in ("pretrain_vision", "pretrain_qformer")

    @model_validator(mode="after")
    def _complete(self) -> RunConfig:
        model = self.model
        other = {"pretrain_vision": "text_encoder", "pretrain_qformer": "tokenizer"}
        needed = other.get(self.stage, "language_model")
        if model.init_from is None and (model.vision_encoder is None or getattr(model, needed) is None):
            raise ValueError(f"give model.init_from, or both model.vision_encoder and model.{needed}")
        if self.train.output_dir in (model.init_from, model.connector_from):
            raise ValueError(
                f"train.output_dir {self.train.output_dir!r} is what the run starts from; change it"
            )
        return self

    @model_validator(mode="after")
    def _packed_weights_stay_whole(self) -> RunConfig:
        """FSDP2 leaves weights in 4 bit out, so that nothing is saved; on a GPU they would stay behind."""
        if self.train.fsdp and self.tune.language_model == "qlora":
            raise ValueError(
                "train.fsdp does not divide weights in 4 bit, and tune.language_model is 'qlora'; use "
                "train.fsdp=false train.deepspeed=ds_configs/zero2.json"
            )
        return self

    @model_validator(mode="after")
    def _stream_ends(self) -> RunConfig:
        if self.data.streaming and self.train.max_steps is None:
            raise ValueError("data.streaming: a stream has no end that is known; give train.max_steps")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> RunConfig:
        """A key that this stage does not read is a mistake."""
        model = self.model
        if ignored := sorted(model.given - TAKES.get(self.stage, {*ModelSection.model_fields} - ONLY_PAIRS)):
            raise ValueError(f"model.{ignored[0]} means nothing in the stage {self.stage}; remove it")
        if model.init_from and (given := sorted(model.given - AFTER_INIT)):
            raise ValueError(
                f"model.{given[0]} is decided by the checkpoint of model.init_from; remove one of the two"
            )
        if self.stage == "pretrain_qformer" and "objective" in model.pretraining.model_fields_set:
            raise ValueError("model.pretraining.objective is of the stage pretrain_vision; remove it")
        if self.on_pairs and "max_length" in self.data.model_fields_set:
            raise ValueError("data.max_length is for conversations; give model.pretraining.max_text_length")
        if self.on_pairs and (self.data.packing or self.data.grouping != "none"):
            raise ValueError("data.packing and data.grouping are for conversations; remove them")
        return self

    @model_validator(mode="after")
    def _features_are_fixed(self) -> RunConfig:
        if not self.data.feature_cache:
            return self
        if self.on_pairs:
            raise ValueError("data.feature_cache is for conversations; remove it")
        if self.tune.vision_encoder != "frozen":
            raise ValueError(
                f"data.feature_cache keeps what a frozen vision encoder computes, and tune.vision_encoder is "
                f"{self.tune.vision_encoder!r}; remove one of the two"
            )
        if self.data.streaming:
            raise ValueError("data.feature_cache goes through all rows before training; set streaming=false")
        if self.model.tiling:
            raise ValueError("data.feature_cache does not keep the views of model.tiling; remove it")
        return self

    @model_validator(mode="after")
    def _pairs_are_not_asked(self) -> RunConfig:
        for name in ("val", "eval"):
            if self.on_pairs and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for conversations; a loss on pairs depends on what else is in the batch, and "
                    "such a model says nothing; remove it"
                )
        return self

    @model_validator(mode="after")
    def _vision_is_whole(self) -> RunConfig:
        if self.stage == "pretrain_vision" and isinstance(self.model.vision_encoder, list):
            raise ValueError("model.vision_encoder: pretrain_vision trains one encoder; give no list")
        if self.stage == "pretrain_vision" and self.tune.vision_encoder not in ("frozen", "full"):
            raise ValueError(
                f"tune.vision_encoder is {self.tune.vision_encoder!r}; pretrain_vision hands on whole "
                "weights, use 'full'"
            )
        return self


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
    beside = [str(path) for path in Path(recipe).parent.glob("*.y*ml")]
    near = difflib.get_close_matches(str(recipe), [*beside, *shipped_recipes()], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(shipped_recipes())}"
    raise ConfigError(f"recipe {str(recipe)!r} is neither a file nor a shipped recipe; {hint}")


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.glob("*/*.yaml"))


def summary_of(name: str) -> str:
    """The first sentence of the comment that a shipped recipe begins with."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return comment.split(": ")[0].split(". ")[0].rstrip(".")


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
    return f"{where}{': ' if where else ''}{message}" + (
        f", found {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
    )


def _fields_at(loc: Sequence[Any]) -> list[str]:
    model: Any = RunConfig
    for step in loc:
        if isinstance(step, int):  # of a list of sections
            model = get_args(model)[0]
        else:
            model = model.model_fields[step].annotation if hasattr(model, "model_fields") else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []
