"""The sections of what goes on beside training: `val`, `eval` and `card`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mllm.config.section import Section


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


class CardSection(Section):
    """What the model card says that a run cannot know; `mllm card` writes it."""

    title: str | None = Field(None, description="default: the name of output_dir")
    description: str | None = Field(None, description="a sentence or two on what the model is for")
    license: str | None = Field(None, description="of the weights, as the Hub names it: apache-2.0, llama2")
    languages: list[str] = Field(default_factory=list, description="ISO 639 codes: en, de")
    base_models: list[str] = Field(default_factory=list, description="Hub names of parts from local folders")
    datasets: list[str] = Field(default_factory=list, description="Hub names of the data")
    tags: list[str] = Field(default_factory=list, description="more tags")
