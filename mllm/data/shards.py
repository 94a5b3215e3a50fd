"""Shards: .tar files in the WebDataset layout, read row by row in any order.

A sample is the members of one shard that share a name up to its first dot: `000012.json`, `000012.jpg`. Its
text is a .json (a row of any of our formats) or a .txt (a caption); its images are all its pictures. One pass
over the headers of a shard tells where each member's bytes lie. With that, shards are a data set like a file
of rows: shuffling, packing, mixtures, ranks, workers and exact resume need nothing of their own, and no row
can come twice or be lost. What the pass found is kept beside each shard, under the shard's size and time.

Layout: https://github.com/webdataset/webdataset (README, "The WebDataset Format").
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import pairwise
from pathlib import Path
from tarfile import BLOCKSIZE, TarError
from tarfile import open as open_tar
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mllm.data.files import atomic_path, track
from mllm.data.sources import parse_json, stamp_of
from mllm.data.stored import FileSpan, place_images
from mllm.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TEXTS = ("json", "txt")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
# Type bytes of a tar header: a file (the second as in archives of long ago), a folder.
_FILE, _FOLDER = (b"0", b"\0"), b"5"


@dataclass(frozen=True)
class ShardIndex:
    """Where the M members of a shard lie, and which of them each of its N samples begins with.

    Attributes:
        names: all names, one after the other; `name_ends` [M].
        offsets, sizes: [M], of the members' bytes.
        first: [N + 1], a sample's first member; members of a sample stand together.
    """

    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    first: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first) - 1

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(name, offset, size) of each member of a sample."""
        found = []
        for member in range(int(self.first[sample]), int(self.first[sample + 1])):
            start = int(self.name_ends[member - 1]) if member else 0
            name = self.names[start : int(self.name_ends[member])].tobytes().decode()
            found.append((name, int(self.offsets[member]), int(self.sizes[member])))
        return found


class ShardSource:
    """Raw rows of shards; see `sources.FileSource` for what a source is."""

    format: str | None = None
    hashed = "index"

    def __init__(self, paths: Sequence[Path], show: bool = True) -> None:
        self.paths = list(paths)
        self.path = self.paths[0]  # what is kept beside the data goes beside the first
        self.stamps = [stamp_of(path) for path in self.paths]
        shards = track(self.paths, "reading shards", len(self.paths), show and len(self.paths) > 1)
        self.shards = [shard_index(path) for path in shards]
        self.starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def left_out(self) -> Mapping[str, int]:
        """Members that are neither text nor picture, by their kind."""
        kinds: Counter[str] = Counter()
        for shard in self.shards:
            for sample in range(len(shard)):
                kinds.update(kind for name, _, _ in shard.members(sample) if (kind := kind_of(name)))
        return {f".{kind}": count for kind, count in kinds.items() if kind not in (*TEXTS, *PICTURES)}

    def where(self, index: int) -> str:
        """Where the row stands, for messages: `shard#key`."""
        shard, sample = self._place(index)
        return f"{self.paths[shard]}#{key_of(self.shards[shard].members(sample)[0][0])}"

    def raw(self, index: int) -> Any:
        """Read and parse the row; its images are spans of the shard.

        Raises:
            DataError: the shard has changed, or text and images do not go together.
        """
        shard, sample = self._place(index)
        path = self.paths[shard]
        if stamp_of(path) != self.stamps[shard]:
            raise DataError(f"{path} has changed since it was opened; start again")
        members = self.shards[shard].members(sample)
        spans = [FileSpan(str(path), offset, size, name) for name, offset, size in members]
        key = key_of(members[0][0])
        where = f"{path}#{key}"
        images = {span.name.rpartition("/")[2]: span for span in spans if kind_of(span.name) in PICTURES}
        texts = {kind_of(span.name): span.read() for span in spans if kind_of(span.name) in TEXTS}
        return place_images({"id": key, **_row_of(texts, where)}, images, where)

    def identity(self) -> str:
        """A hash of all members' names, places and sizes: not of their content, which may be terabytes."""
        digest = hashlib.sha256()
        for shard in self.shards:
            for part in (shard.names, shard.offsets, shard.sizes):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])


def is_shards(path: str) -> bool:
    """Whether a path means shards: a name, pattern or braces ending in .tar, or a folder of such files."""
    return path.endswith(".tar") or bool(_in_folder(Path(path)))


def find_shards(path: str) -> list[Path]:
    """The shards of a folder, of a pattern (`*`), or of braces: `mix-{000..099}.tar`, `{a,b}.tar`.

    Raises:
        DataError: a shard of the braces that is not there, or a pattern that nothing fits.
    """
    if Path(path).is_dir():
        return _in_folder(Path(path))
    found: list[Path] = []
    for name in expand_braces(path):
        here = sorted(Path(p) for p in glob(name)) if any(c in name for c in "*?[") else [Path(name)]
        if not here or not all(p.is_file() for p in here):
            raise DataError(f"{name}: there is no such shard; fix data.path")
        found += here
    return found


def _in_folder(folder: Path) -> list[Path]:
    # A name with a dot in front is of a shard that is being written.
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith(".")) if folder.is_dir() else []


def expand_braces(path: str) -> list[str]:
    """`{000..010}` counts, keeping its zeros; `{a,b}` lists; several multiply."""
    match = _BRACES.search(path)
    if match is None:
        return [path]
    start, end, listed = match.groups()
    if listed is not None:
        words = listed.split(",")
    else:
        words = [str(number).zfill(len(start)) for number in range(int(start), int(end) + 1)]
        if not words:
            raise DataError(f"{path}: {match.group()} counts down; give the smaller number first")
    before, after = path[: match.start()], path[match.end() :]
    return [before + word + rest for word in words for rest in expand_braces(after)]


def key_of(name: str) -> str:
    """What a sample's members share: the name up to the first dot behind its folder."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def kind_of(name: str) -> str:
    """A member's last suffix, in small letters."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _row_of(texts: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The row that a sample's texts say: that of the .json, or a caption from the .txt."""
    row: Any = parse_json(texts["json"], where) if "json" in texts else {}
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, found {type(row).__name__}")
    if "txt" in texts and not {"conversations", "messages"} & row.keys():
        # Beside a .txt, a .json is what a downloader noted of the picture.
        try:
            return {"caption": texts["txt"].decode()}
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: the .txt is not UTF-8 ({error.reason}); save it as UTF-8") from None
    return row


# -- the index of a shard ---------------------------------------------------------------------------------


def index_path(shard: Path) -> Path:
    """Where the index of a shard is kept."""
    return shard.with_name(f".{shard.name}.index.npz")


def shard_index(path: Path) -> ShardIndex:
    """The index of a shard, from beside it if it is of the same shard still."""
    kept, stamp = index_path(path), np.array(stamp_of(path))
    try:
        with np.load(kept) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, BadZipFile):  # none, or one that was copied in part
        arrays = {}
    if np.array_equal(arrays.pop("stamp", ()), stamp):
        return ShardIndex(**arrays)
    index = make_index(list(scan(path)), path)
    if os.access(path.parent, os.W_OK):  # else the data are on a read-only disk: scanned every time
        save_index(index, path)
    return index


def save_index(index: ShardIndex, shard: Path) -> None:
    """Keep an index beside its shard, which must not change any more."""
    with atomic_path(index_path(shard)) as partial:
        np.savez(partial, stamp=np.array(stamp_of(shard)), **vars(index))


def make_index(members: Sequence[tuple[str, int, int]], path: Path) -> ShardIndex:
    """The index of members (name, offset, size) in the order of the shard.

    Raises:
        DataError: a shard without samples, a sample without text, or one whose members do not stand together.
    """
    first, seen, key = array("q"), set(), None
    for number, (name, _, _) in enumerate(members):
        if key_of(name) != key:
            key = key_of(name)
            if key in seen:
                raise DataError(
                    f"{path}: the members of sample {key!r} do not stand together; write it again"
                )
            seen.add(key)
            first.append(number)
    if not members:
        raise DataError(f"{path}: there are no samples in the shard; remove it")
    first.append(len(members))
    for start, end in pairwise(first):
        kinds = [kind_of(name) for name, _, _ in members[start:end]]
        texts = [kind for kind in kinds if kind in TEXTS]
        if not texts or len(texts) > len(set(texts)):
            fault = "more than one .json or .txt" if texts else "no .json and no .txt"
            raise DataError(f"{path}: sample {key_of(members[start][0])!r} has {fault}; mend it")
    try:
        encoded = [name.encode() for name, _, _ in members]
    except UnicodeEncodeError:
        raise DataError(f"{path}: a member's name is not UTF-8; write the shard again") from None
    return ShardIndex(
        names=np.frombuffer(b"".join(encoded), np.uint8),
        name_ends=np.cumsum([len(name) for name in encoded]),
        offsets=np.array([offset for _, offset, _ in members]),
        sizes=np.array([size for _, _, size in members]),
        first=np.frombuffer(first, np.int64),
    )


def scan(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each file in a shard, from its headers alone.

    Raises:
        DataError: not a tar, a compressed one, or one that is cut off.
    """
    plain = _scan_plain(path)
    if plain is not None:
        return iter(plain)
    return _scan_any(path)


def _scan_plain(path: Path) -> list[tuple[str, int, int]] | None:
    """The members of a shard of plain headers alone, several times as fast as `tarfile`; else None."""
    members: list[tuple[str, int, int]] = []
    with path.open("rb") as file:
        at = 0
        while True:
            file.seek(at)
            header = file.read(BLOCKSIZE)
            if header.count(0) == BLOCKSIZE == len(header):
                return members
            plain = len(header) == BLOCKSIZE and header[257:262] == b"ustar" and header[124] < 128
            kind = header[156:157]
            if not plain or kind not in (*_FILE, _FOLDER) or header[345:346] != b"\0":
                return None
            size = int(header[124:136].strip(b" \0") or b"0", 8)
            if kind in _FILE:
                name = header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
                members.append((name, at + BLOCKSIZE, size))
            at += BLOCKSIZE + -(-size // BLOCKSIZE) * BLOCKSIZE


def _scan_any(path: Path) -> Iterator[tuple[str, int, int]]:
    """The same by the standard library, which knows every kind of header."""
    try:
        with open_tar(path, "r:") as tar:
            end = 0
            for member in tar:
                if member.isfile():
                    yield member.name, member.offset_data, member.size
                end = member.offset_data + -(-member.size // BLOCKSIZE) * BLOCKSIZE
    except (TarError, OSError) as error:
        raise DataError(f"{path}: not a readable, uncompressed .tar ({error}); make it again") from None
    with path.open("rb") as file:
        file.seek(end)
        if file.read(BLOCKSIZE) != bytes(BLOCKSIZE):
            raise DataError(f"{path}: the shard is cut off; copy or download it again")
