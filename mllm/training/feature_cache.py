"""The features of a frozen vision encoder, computed once before training and kept on disk.

They are kept under a name that follows from all that decides on them: the encoder's weights, the feature
layer, the image processor, the padding, the precision. What is read in training is bit by bit what the
encoder would have computed then, as far as its matrix products do not round otherwise in another batch.

When it pays: with several epochs, several runs over the same pictures, or a small language model behind a
large encoder. In one epoch every picture is seen once, and computing it before takes as long as computing it
then (`mllm explain` says what share of the arithmetic it is).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from mllm.config import RunConfig
from mllm.data.feature_store import FeatureStore, Key, image_key
from mllm.data.files import track, write_atomic
from mllm.data.mixture import Mixture
from mllm.data.schema import images_of, name_of
from mllm.errors import ConfigError, DataError
from mllm.training.saving import amount

FORMAT = 1
BATCH = 32  # pictures that the encoder sees at a time
BLOCK_BYTES = 2**28  # of a file: what a process that is killed has to compute again
Features = Callable[[torch.Tensor], torch.Tensor]  # [I, C, H, W] -> [I, N, Dv]


def cached_features(
    config: RunConfig, args: TrainingArguments, model: Any, processor: Any, rows: Any
) -> FeatureStore:
    """The features of all pictures of a run, computed where they are missing, every rank doing a share.

    Args:
        config: the run, with `data.feature_cache`.
        args: of the Trainer; their device is where the encoder computes.
        model: built and tuned.
        processor: makes the pixels.
        rows: all that will be trained on, a `Mixture`.

    Raises:
        ConfigError: features of this model cannot be kept, the disk is too small, or ranks do not share it.
        DataError: a picture cannot be read; names the row.
    """
    check_cacheable(model)
    if not isinstance(rows, Mixture):
        raise ConfigError(
            "data.feature_cache goes through all rows before training; set data.streaming=false"
        )
    folder = _folder_of(config)
    with encoder_in_training(model, args) as features:
        store = open_store(folder, model, processor, args, features)
        keys, missing = _to_compute(store, rows, args)
        _check_room(store, len(missing) * args.world_size)
        fill(store, features, processor, missing, config.train.num_workers, show=args.should_save)
    PartialState().wait_for_everyone()
    store.refresh()
    if any(key not in store for key in keys):
        raise ConfigError(
            f"data.feature_cache: {str(folder)!r} does not hold what all ranks have computed; name a folder "
            "on a disk that they share"
        )
    return store


def try_cache(config: RunConfig, args: TrainingArguments, model: Any, processor: Any, rows: Mixture) -> str:
    """Compute the features of a few pictures, and say how much disk and time all will take.

    Arguments and errors as of `cached_features`. What is computed stays for the run.
    """
    check_cacheable(model)
    with encoder_in_training(model, args) as features:
        store = open_store(_folder_of(config), model, processor, args, features)
        keys, missing = _to_compute(store, rows, args)
        lacking = sum(key not in store for key in keys)
        _check_room(store, lacking)
        few = dict(itertools.islice(missing.items(), BATCH))
        begun = time.perf_counter()
        fill(store, features, processor, few)
        seconds = (time.perf_counter() - begun) * len(missing) / max(1, len(few))
    return (
        f"{lacking:,} of {len(keys):,} pictures are to be computed before step 1: "
        f"{amount(lacking * store.image_bytes)}, about {timedelta(seconds=math.ceil(seconds))} where one "
        f"process a rank decodes them; {len(few)} were tried"
    )


def _folder_of(config: RunConfig) -> Path:
    choice = config.data.feature_cache
    return Path(config.train.output_dir) / "feature_cache" if choice is True else Path(str(choice))


def check_cacheable(model: Any) -> None:
    """Raise `ConfigError` for a model whose features change, or are not all that it takes of a picture."""
    obstacle = None
    if learning := [name for name, p in model.vision_encoder.named_parameters() if p.requires_grad]:
        obstacle = f"the vision encoder learns ({learning[0]}), so that its features change"
    elif model.tiling is not None:
        obstacle = "this model tiles its pictures, and views are not kept"
    elif model.fusion is not None and model.fusion.high_res_size:
        obstacle = "its fusion reads the pixels with an encoder of its own"
    if obstacle:
        raise ConfigError(f"data.feature_cache cannot be used here: {obstacle}; set data.feature_cache=false")


@contextmanager
def encoder_in_training(model: Any, args: TrainingArguments) -> Iterator[Features]:
    """What makes features of pixels, where and in the precision that training would.

    DeepSpeed casts the whole model; without it, mixed precision is autocast around the weights as they are,
    which FSDP has cast as well (`sharded.fsdp_settings`).
    """
    mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    cast, autocast = (mixed, None) if args.deepspeed else (None, mixed)
    if args.fsdp:
        cast = torch.bfloat16 if args.bf16 else torch.float32
    own = model.vision_encoder
    if own.device != args.device or cast not in (None, own.dtype):
        model.vision_encoder = copy.deepcopy(own).to(args.device, cast)
    model.vision_encoder.eval()

    @torch.no_grad()
    def features(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(args.device.type, autocast, enabled=autocast is not None):
            return model.vision_features(pixel_values.to(args.device))

    try:
        yield features
    finally:
        model.vision_encoder = own


def open_store(
    folder: Path, model: Any, processor: Any, args: TrainingArguments, features: Features
) -> FeatureStore:
    """The store of exactly these features, with a note of what they are."""
    text = json.dumps(_facts(model, processor, args), indent=1, sort_keys=True, default=str) + "\n"
    place = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    one = features(torch.zeros(1, *model.config.pixel_shape))  # [1, N, Dv]
    store = FeatureStore(place, (one.shape[1], one.shape[2]), one.dtype)
    write_atomic(place / "features.json", text)
    return store


def _facts(model: Any, processor: Any, args: TrainingArguments) -> dict[str, Any]:
    """All that decides on the features; the encoder is the one that computes, cast if it is."""
    config, encoder = model.config, model.vision_encoder
    weights = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        weights.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "format": FORMAT,
        "encoder": type(encoder).__name__,
        "weights": weights.hexdigest(),
        "attention": getattr(encoder.config, "_attn_implementation", None),
        "autocast": [args.bf16 and not args.deepspeed, args.fp16 and not args.deepspeed],
        "layer": config.vision_feature_layer,
        "tokens dropped in front": config.num_prefix_tokens,
        "image processor": processor.image_processor.to_dict(),
        "image_aspect_ratio": processor.image_aspect_ratio,
        "transformers": transformers.__version__,
    }


def _to_compute(
    store: FeatureStore, rows: Mixture, args: TrainingArguments
) -> tuple[set[Key], dict[Key, tuple[Any, str]]]:
    """(keys of all pictures, those that are missing and this rank's to compute, each with its row's name).

    Which rank computes a picture follows from its key, so that ranks need not agree on a list.
    """
    keys: set[Key] = set()
    missing: dict[Key, tuple[Any, str]] = {}
    for row in track(_drawn(rows), "pictures", len(rows), args.should_save):
        for image in images_of(row["messages"]):
            try:
                key = image_key(image)
            except DataError as error:
                raise DataError(f"{name_of(row)}: {error}") from error
            if key not in keys and key not in store and key[0] % args.world_size == args.process_index:
                missing[key] = (image, name_of(row))
            keys.add(key)
    return keys, missing


def _drawn(rows: Mixture) -> Iterator[Any]:
    """Every row that is trained on, once, in the order of the files."""
    for number, data in enumerate(rows.datasets):
        for index in np.unique(rows.row[rows.source == number]):
            yield data[int(index)]


def _check_room(store: FeatureStore, images: int) -> None:
    free, needed = shutil.disk_usage(store.folder).free, images * store.image_bytes
    if needed > free:
        raise ConfigError(
            f"data.feature_cache: the features of some {images:,} pictures take {needed / 1e9:,.1f} GB, and "
            f"{str(store.folder)!r} has {free / 1e9:,.1f} GB left; name a folder on a larger disk, or set it "
            "to false"
        )


def fill(
    store: FeatureStore,
    features: Features,
    processor: Any,
    missing: Mapping[Key, tuple[Any, str]],
    workers: int = 0,
    show: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Compute features and write them, a block of `block_bytes` at a time.

    Raises:
        DataError: a picture cannot be read; names the row.
    """
    size = max(1, block_bytes // store.image_bytes)
    chunks: Any = DataLoader(_Chunks(list(missing.values()), processor), batch_size=None, num_workers=workers)
    keys, waiting = iter(missing), list[torch.Tensor]()

    def write(count: int) -> None:
        done = torch.cat(waiting)
        store.add([next(keys) for _ in done[:count]], done[:count])
        waiting[:] = [done[count:]]

    for pixels in track(chunks, "features of pictures", len(chunks), show):
        if isinstance(pixels, DataError):
            raise pixels
        waiting.append(features(pixels).cpu())
        while sum(map(len, waiting)) >= size:
            write(size)
    if any(len(rest) for rest in waiting):
        write(size)


class _Chunks(Dataset[Any]):
    """Pixels [BATCH, C, H, W] of pictures, in their order; the last chunk may be smaller."""

    def __init__(self, images: list[tuple[Any, str]], processor: Any):
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return math.ceil(len(self.images) / BATCH)

    def __getitem__(self, chunk: int) -> torch.Tensor | DataError:
        pixels = []
        for image, row in self.images[chunk * BATCH : (chunk + 1) * BATCH]:
            try:
                pixels.append(self.processor.image_inputs([image])["pixel_values"])
            except DataError as error:  # raised in a worker it would arrive as a page of traceback
                return DataError(f"{row}: {error}")
        return torch.cat(pixels)
