"""Data sets of Hugging Face's `datasets`, read row by row in any order from their memory-mapped tables.

`hf:` and then a place: a folder of `save_to_disk`, a folder or file of parquet, arrow or JSON Lines (also
.gz), or a name on the Hub; and, behind colons, a configuration and a split: `hf:PLACE`, `hf:PLACE:SPLIT`,
`hf:PLACE:CONFIGURATION:SPLIT`. The split is `train` if none is named.

A row is told by its columns: `conversations` (LLaVA), `messages`, `texts` (pairs of user and assistant, as
the Cauldron has them) or `caption`, with `image` or `images` beside them. Other columns are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mllm.data.stored import ImageBytes, place_images
from mllm.errors import ConfigError, DataError, MllmError

HF = "hf:"
TEXT_COLUMNS = ("conversations", "messages", "texts", "caption")
IMAGE_COLUMNS = ("images", "image")
_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys((".jsonl", ".json", ".jsonl.gz", ".json.gz"), "json"),
}
_NOTES = ("dataset_info.json", "dataset_infos.json")  # what the Hub keeps about the rows beside them


@dataclass(frozen=True)
class HfPlace:
    """What `hf:...` names."""

    place: str
    configuration: str | None
    split: str

    def __str__(self) -> str:
        return ":".join(filter(None, (HF + self.place, self.configuration, self.split)))


def parse_hf(path: str) -> HfPlace:
    """The place, configuration and split of `hf:...`."""
    place, *rest = path.removeprefix(HF).split(":")
    if not place or len(rest) > 2:
        raise ConfigError(f"{path!r}: write hf:PLACE, hf:PLACE:SPLIT or hf:PLACE:CONFIGURATION:SPLIT")
    split = rest.pop() if rest else "train"
    return HfPlace(place, rest[0] if rest else None, split)


def is_local(path: str) -> bool:
    """Whether `hf:...` names a folder or a file that is there."""
    return Path(parse_hf(path).place).exists()


class HfSource:
    """Raw rows of a `datasets.Dataset`; see `sources.Source`."""

    format: str | None = None
    hashed = "fingerprint"
    left_out: Mapping[str, int] = {}

    def __init__(self, place: HfPlace, data: Any) -> None:
        self.place = place
        # As arrow: image columns stay encoded, wherever in a row they are, and no feature is decoded.
        self.data = data.with_format("arrow")
        self.columns = check_columns(data.column_names, str(place))
        self.path = _beside(place)

    def __len__(self) -> int:
        return len(self.data)

    def where(self, index: int) -> str:
        """Where the row stands, for messages."""
        return f"{self.place} row {index}"

    def raw(self, index: int) -> Any:
        """Read the row; its images are paths, or bytes that are not decoded yet."""
        where = self.where(index)
        with readable(f"{where}:", DataError):
            (row,) = self.data[index : index + 1].to_pylist()
        return row_of({name: row[name] for name in self.columns}, where)

    def identity(self) -> str:
        """For files, a hash of their names and sizes and of the columns; else the library's fingerprint."""
        return identity(self.place, self.data)


def open_hf(path: str) -> HfSource:
    """Open a data set for access by number.

    Raises:
        ConfigError: a place that cannot be read, or the library is not installed.
        DataError: no column has text.
    """
    place = parse_hf(path)
    return HfSource(place, load(place, streaming=False))


def load(place: HfPlace, streaming: bool) -> Any:
    """A `datasets.Dataset`, or with `streaming` an `IterableDataset`."""
    if find_spec("datasets") is None:
        raise ConfigError(f"{place}: the library `datasets` is not installed; run: pip install 'mllm[train]'")
    # It takes a second to import, and most runs read plain files.
    from datasets import Dataset, load_dataset

    with readable(str(place), ConfigError):
        saved = _saved(place)
        if saved is not None:
            parts = max(1, len(saved.cache_files))
            return saved.to_iterable_dataset(num_shards=parts) if streaming else saved
        if Path(place.place).exists():
            builder, files = data_files(place)
            data = load_dataset(builder, data_files=files, split="train", streaming=streaming)
        else:
            data = load_dataset(place.place, place.configuration, split=place.split, streaming=streaming)
    if not streaming and not isinstance(data, Dataset):
        raise ConfigError(f"{place} has several splits; name one behind a colon")
    return data


@contextmanager
def readable(what: str, kind: type[MllmError]) -> Iterator[None]:
    """Whatever the library raises in the block, as an error of ours."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except MllmError:
        raise
    except (DatasetsError, OSError, ValueError) as error:  # those of arrow and of UTF-8 are a `ValueError`
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise kind(f"{what} cannot be read ({reason})") from None


def _saved(place: HfPlace) -> Any:
    """What `save_to_disk` wrote there, or None."""
    from datasets import load_from_disk

    folder = Path(place.place)
    if (folder / "dataset_dict.json").is_file():
        splits = load_from_disk(str(folder))
        if place.split not in splits:
            raise ConfigError(f"{place}: the data set has the splits {', '.join(splits)}; name one of them")
        return splits[place.split]
    if not (folder / "state.json").is_file():
        return None
    if place.split != "train":
        raise ConfigError(f"{place}: the data set was saved without splits; leave {place.split!r} out")
    return load_from_disk(str(folder))


def data_files(place: HfPlace) -> tuple[str, list[str]]:
    """The builder and the files of a local folder or file: those that begin with the split, or all."""
    root = Path(place.place)
    every = root.rglob("*") if root.is_dir() else [root]
    found = sorted(path for path in every if _builder(path) and path.name not in _NOTES)
    kinds = {str(_builder(path)) for path in found}
    if len(kinds) != 1:
        has = f"files of the kinds {', '.join(sorted(kinds))}" if kinds else "no parquet, arrow or JSON files"
        raise ConfigError(f"{place}: the folder has {has}; one kind is read at a time")
    of_split = [path for path in found if path.name.startswith(place.split)]
    if not of_split and place.split != "train":
        raise ConfigError(f"{place}: no file's name begins with {place.split!r}; name another split")
    return kinds.pop(), [str(path) for path in of_split or found]


def _builder(path: Path) -> str | None:
    return next((kind for ending, kind in _BUILDERS.items() if path.name.endswith(ending)), None)


def identity(place: HfPlace, data: Any) -> str:
    """What tells a data set from others; the tables may be terabytes, so they are not read for it."""
    digest = hashlib.sha256(f"{place.configuration} {place.split} {sorted(data.features or ())}".encode())
    root = Path(place.place)
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root] * root.is_file()
    for path in files:
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    if not files:
        digest.update(f"{place.place} {getattr(data, '_fingerprint', None)}".encode())
    return digest.hexdigest()


def _beside(place: HfPlace) -> Path:
    """A name beside a local data set, or in the library's cache."""
    from datasets.config import HF_DATASETS_CACHE

    root = Path(place.place).absolute()
    named = "-".join(filter(None, (root.name or "root", place.configuration, place.split)))
    return root.parent / named if root.exists() else Path(HF_DATASETS_CACHE) / named


def check_columns(columns: list[str], where: str) -> list[str]:
    """The columns to read: `id`, that of the text, that of the images."""
    text = next((name for name in TEXT_COLUMNS if name in columns), None)
    if text is None:
        raise DataError(
            f"{where}: none of the columns {', '.join(columns)[:200]} has text; a row has one of "
            f"{', '.join(TEXT_COLUMNS)}: rename a column, or write the rows as JSON Lines"
        )
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    return [name for name in ("id", text, image) if name is not None and name in columns]


def row_of(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A raw row for the readers, of the columns that `check_columns` has chosen."""
    row = {name: value for name, value in columns.items() if value is not None}
    field = next((name for name in IMAGE_COLUMNS if name in row), None)
    value = row.pop(field) if field else []
    listed = value if isinstance(value, list) else [value]
    images = {f"{field} {i}": _image(one, f"{where} image {i}") for i, one in enumerate(listed)}
    if "texts" in row:
        row["messages"] = _turns(row.pop("texts"), images, where)
    if "messages" in row and images:
        return place_images(row, images, where)
    return {**row, "image": list(images.values())} if images else row


def _image(value: Any, name: str) -> Any:
    """A path as it is; bytes, alone or as `datasets.Image` encodes to them, under a name."""
    if isinstance(value, bytes):
        return ImageBytes(value, name)
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else ImageBytes(value["bytes"], name)
    return value


def _turns(texts: Any, images: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The Cauldron's pairs of texts as messages; its images all stand in front of the first."""
    messages: list[dict[str, Any]] = []
    for pair in texts:
        if not isinstance(pair, Mapping) or not isinstance(pair.get("user"), str):
            raise DataError(
                f"{where}: column 'texts' must be a list of 'user' and 'assistant', found {pair!r:.80}"
            )
        shown = [{"type": "image"}, {"type": "text", "text": "\n"}] * (0 if messages else len(images))
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": pair["user"]}]})
        messages.append({"role": "assistant", "content": pair.get("assistant")})
    return messages
