"""The section `data`: which rows a run learns from, and how batches are made of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mllm.config.section import Section
from mllm.data.mixture import Cap


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
