"""The section `train`: optimisation, saving and how a run is spread over ranks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mllm.config.section import Section
from mllm.errors import ConfigError

Part = Literal["vision_encoder", "connector", "fusion", "language_model", "text_encoder", "heads"]
Rate = Annotated[float, Field(gt=0)]
Checkpointing = bool | Literal["selective"]


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
