"""Save and load: one directory, complete at every save, checked at every load.

    config.json, generation_config.json           what the model is
    processor_config.json, tokenizer*, chat_template.jinja    how prompts and pixels are made
    model*.safetensors                            every tensor that differs from the base models
    adapter/                                      LoRA tensors, in PEFT's own layout
    mllm_manifest.json                            base models, tensor list, stage, data, versions, probe

A base model that was loaded from a directory or the Hub and not trained is named, not copied: a stage-1
checkpoint of a 7B model is 40 MB. Loading looks at nothing but the directory's contents.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mllm.errors import CheckpointError, ConfigError
from mllm.model.configuration import MllmConfig
from mllm.model.connectors import build_connector
from mllm.model.lora import canonical_name, inject_lora, is_adapter
from mllm.model.modeling import PARTS, MllmForConditionalGeneration
from mllm.model.parts import BASE_LOADERS, Base, fingerprint
from mllm.model.probe import check_probe, probe
from mllm.model.processing import MllmProcessor

MANIFEST = "mllm_manifest.json"
ADAPTER_DIR = "adapter"
FORMAT = 1
PEFT_PREFIX = "base_model.model."


@dataclass
class Origin:
    """What a model object remembers of its making, so that a save can leave out what has not changed.

    Attributes:
        base: for each part, the base it was loaded from; a part without one is saved whole.
        changed: names of tensors that differ from their base, as this or an earlier run trained them.
        parent: directory and manifest hash of the checkpoint that training started from.
        lora: the LoRA configuration whose adapters are in the model, as PEFT writes it.
    """

    base: dict[str, Base] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    parent: dict[str, str] | None = None
    lora: dict[str, Any] | None = None


def origin_of(model: MllmForConditionalGeneration) -> Origin:
    """The model's origin; a model composed of objects has an empty one and is saved whole."""
    if not hasattr(model, "origin"):
        model.origin = Origin()  # type: ignore[assignment]
    return model.origin  # type: ignore[return-value]


def part_of(name: str) -> str:
    """The part that a tensor belongs to."""
    return name.split(".", 1)[0]


# -- save -------------------------------------------------------------------------------------------


def save(
    model: MllmForConditionalGeneration,
    processor: MllmProcessor,
    path: str | Path,
    *,
    record: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    probed: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint directory; it appears under its name only when it is complete.

    Args:
        model: the model, with or without LoRA adapters.
        processor: its processor.
        path: the directory; replaced if it is there.
        record: what else the manifest should tell (stage, tune, data, ...).
        state_dict: the model's tensors, where a distributed run had to gather them; default: its own.
        probed: the probe, where all ranks had to compute it together; default: computed here.

    Returns:
        The directory.
    """
    path = Path(path)
    origin = origin_of(model)
    with atomic_directory(path) as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        weights, adapter = tensors_to_save(model, state_dict or model.state_dict())
        save_torch_state_dict(weights, folder, max_shard_size="5GB")
        if adapter:
            _save_adapter(adapter, origin, folder / ADAPTER_DIR)
        for file in folder.rglob("*.safetensors"):  # written readable by their owner alone
            file.chmod((folder / "config.json").stat().st_mode)
        manifest = {
            "format": FORMAT,
            "base": {part: asdict(base) for part, base in needed_bases(model, weights).items()},
            "parent": origin.parent,
            "weights": {name: describe(tensor) for name, tensor in sorted(weights.items())},
            "adapter": {name: describe(tensor) for name, tensor in sorted(adapter.items())},
            "probe": probed or probe(model),
            "versions": {name: _version(name) for name in ("mllm", "torch", "transformers", "peft")},
            **(record or {}),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return path


def tensors_to_save(
    model: MllmForConditionalGeneration, state_dict: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, adapter): what differs from the base models, under canonical names; tied tensors once."""
    trained = {canonical_name(name) for name, p in model.named_parameters() if p.requires_grad}
    weights: dict[str, torch.Tensor] = {}
    adapter: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    origin = origin_of(model)
    for name, tensor in state_dict.items():
        plain = canonical_name(name)
        if is_adapter(name):
            adapter[plain] = tensor.detach().contiguous()
        elif (
            plain in trained | origin.changed or part_of(name) not in origin.base
        ) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[plain] = tensor.detach().contiguous()
    return weights, adapter


def needed_bases(model: MllmForConditionalGeneration, weights: Mapping[str, Any]) -> dict[str, Base]:
    """The bases of parts with parameters that are not among the saved weights, and in which dtype."""
    needed = {}
    for part, base in origin_of(model).base.items():
        for name, parameter in getattr(model, part).named_parameters():
            plain = canonical_name(f"{part}.{name}")
            if plain not in weights and not is_adapter(plain):
                needed[part] = replace(base, dtype=dtype_name(parameter))
                break
    return needed


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, dtype and checksum of a tensor, for the manifest."""
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor), "sum": int(checksum(tensor))}


def dtype_name(tensor: torch.Tensor) -> str:
    """`float32`, ..."""
    return str(tensor.dtype).removeprefix("torch.")


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over the bits, so that no change is too small to show."""
    flat = tensor.detach().contiguous().view(-1)
    # Whole words are hundreds of times faster to sum than the halves or bytes they hold.
    whole = all(n * flat.element_size() % 8 == 0 for n in (flat.numel(), flat.storage_offset()))
    size = 8 if whole else flat.element_size()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return flat.view(integer).sum(dtype=torch.int64)


def _save_adapter(adapter: Mapping[str, torch.Tensor], origin: Origin, folder: Path) -> None:
    folder.mkdir()
    tensors = {PEFT_PREFIX + name.replace(".default.", "."): tensor for name, tensor in adapter.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(origin.lora, indent=1) + "\n", encoding="utf-8")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to write into, whose files appear at `path` together when the block ends well.

    A new directory appears by one rename. In one that is there already (a run's `output_dir` also holds
    its logs and intermediate checkpoints) the old manifest goes first and the new one comes last, so that
    a directory with a manifest is always whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = path.parent / f".{path.name}.tmp-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with suppress(OSError):  # raised where a directory stands that is not empty
        folder.rename(path)
        return
    (path / MANIFEST).unlink(missing_ok=True)
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    shutil.rmtree(path / ADAPTER_DIR, ignore_errors=True)
    for new in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):
        new.replace(path / new.name)
    folder.rmdir()


# -- load -------------------------------------------------------------------------------------------


def has_manifest(path: Any) -> bool:
    """Whether `path` is a checkpoint directory of ours."""
    return (Path(path) / MANIFEST).is_file()


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    base: Mapping[str, str | Path] | None = None,
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """Load a checkpoint directory: `model, processor = mllm.load("runs/instruct")`.

    Args:
        path: the directory.
        device: where to put the model.
        dtype: weights are cast to it; default: as they were saved.
        base: other places of base models that have moved, by part.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape, a base model is not what it
            was, or the loaded model does not compute what the saved one did.
    """
    path = Path(path)
    if not has_manifest(path):
        raise CheckpointError(f"{path}: no {MANIFEST} here; give the directory of a checkpoint saved by mllm")
    processor = MllmProcessor.from_pretrained(path)
    return load_model(path, device=device, dtype=dtype, base=base), processor


def load_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    base: Mapping[str, str | Path] | None = None,
) -> MllmForConditionalGeneration:
    """The model of a checkpoint directory; see `load`."""
    path = Path(path)
    manifest = read_manifest(path)
    weights = _checked_tensors(path, sorted(path.glob("model*.safetensors")), manifest["weights"])
    config = MllmConfig.from_pretrained(path)
    bases = {part: Base(**entry) for part, entry in manifest["base"].items()}
    for part, source in (base or {}).items():
        if part not in bases:
            raise CheckpointError(f"{path}: {part!r} is saved whole, it has no base model to replace")
        bases[part] = replace(bases[part], source=str(source))
    model = _build(config, bases, weights)
    model.generation_config = GenerationConfig.from_pretrained(path)
    model.origin = Origin(base=bases, changed=set(weights), parent=manifest.get("parent"))  # type: ignore[assignment]
    if manifest["adapter"]:
        _load_adapter(model, path / ADAPTER_DIR, manifest["adapter"])
    if dtype is not None:
        nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    nn.Module.to(model, device or "cpu").eval()
    check_probe(model, manifest["probe"], path)
    return model


def restore(model: MllmForConditionalGeneration, path: Path) -> None:
    """Copy a checkpoint's tensors into a model of the same make (to resume a run)."""
    manifest = read_manifest(path)
    weights = _checked_tensors(path, sorted(path.glob("model*.safetensors")), manifest["weights"])
    own = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    wanted, adapter = tensors_to_save(model, model.state_dict())
    for saved, here in ((set(weights), set(wanted)), (set(manifest["adapter"]), set(adapter))):
        if odd := sorted(saved ^ here):
            side = "this run does not train it" if odd[0] in saved else "the checkpoint lacks it"
            raise CheckpointError(f"{path}: cannot resume, {odd[0]!r}: {side}; resume with the same 'tune'")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    if manifest["adapter"]:
        _copy_adapter(model, path / ADAPTER_DIR, manifest["adapter"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: unreadable, or of a format that this version does not know.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}; "
            "use the mllm version that wrote it"
        )
    return manifest


def manifest_hash(path: str | Path) -> str:
    """SHA-256 of a checkpoint's manifest, which names every tensor and the probe."""
    return hashlib.sha256((Path(path) / MANIFEST).read_bytes()).hexdigest()


def _checked_tensors(
    path: Path, files: list[Path], expected: Mapping[str, Mapping[str, Any]], prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Tensors of safetensors files, which must be exactly those that the manifest lists."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors.update({name.removeprefix(prefix): t for name, t in load_file(file).items()})
        except Exception as error:  # safetensors raises its own error type for a broken file
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        raise CheckpointError(
            f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all); copy the checkpoint again"
        )
    if extra:
        raise CheckpointError(f"{path}: tensor {extra[0]!r} is not in the manifest ({len(extra)} in all)")
    for name, tensor in tensors.items():
        found, wanted = describe(tensor), dict(expected[name])
        sums = found.pop("sum"), wanted.pop("sum")
        if found != wanted:
            raise CheckpointError(f"{path}: tensor {name!r} is {found}, the manifest says {wanted}")
        if sums[0] != sums[1]:
            raise CheckpointError(
                f"{path}: tensor {name!r} has changed since it was saved; copy the checkpoint again"
            )
    return tensors


def _build(
    config: MllmConfig, bases: Mapping[str, Base], weights: Mapping[str, torch.Tensor]
) -> MllmForConditionalGeneration:
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    for part in PARTS:
        own = {
            name.removeprefix(f"{part}."): tensor for name, tensor in weights.items() if part_of(name) == part
        }
        module = _from_base(part, bases[part]) if part in bases else _empty(config, part)
        _assign(module, own, part, complete=part not in bases)
        setattr(model, part, module)
    return model


def _empty(config: MllmConfig, part: str) -> Any:
    """A part with its buffers in place and its weights not yet set."""
    with no_init_weights():
        if part == "vision_encoder":
            return AutoModel.from_config(config.vision_config)
        if part == "language_model":
            language_model = AutoModelForCausalLM.from_config(config.text_config)
            language_model.tie_weights()  # skipped together with the initialisation
            return language_model
        return build_connector(config.connector, config.vision_dim, config.text_config.hidden_size)


def _from_base(part: str, base: Base) -> PreTrainedModel:
    try:
        module = BASE_LOADERS[part](base.source, getattr(torch, base.dtype))
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint needs its base model; {error}; {_moved(part)}") from error
    if fingerprint(base.source, module) != base.fingerprint:
        raise CheckpointError(
            f"base model of {part} at {base.source!r} is not the one this checkpoint was trained on; "
            + _moved(part)
        )
    return module


def _moved(part: str) -> str:
    return f"if it has moved, load with base={{{part!r}: <its place>}}"


def _assign(module: Any, tensors: dict[str, torch.Tensor], part: str, complete: bool) -> None:
    """Copy tensors into a part; with `complete`, every tensor of the part must be among them."""
    own = module.state_dict()
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise CheckpointError(f"tensor '{part}.{unknown[0]}' has no place in the model")
    if complete:
        # A tied tensor is saved once, under the first of its names.
        filled = {own[name].data_ptr() for name in tensors}
        missing = sorted(name for name, tensor in own.items() if tensor.data_ptr() not in filled)
        if missing:
            raise CheckpointError(f"tensor '{part}.{missing[0]}' is not in the checkpoint")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor '{part}.{name}' has shape {list(tensor.shape)}, the model {list(own[name].shape)}"
            )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            # Trained tensors may be float32 beside frozen ones of a lower precision.
            if name in parameters:
                parameters[name].data = tensor
            else:
                own[name].copy_(tensor)


def _load_adapter(model: MllmForConditionalGeneration, folder: Path, expected: Mapping[str, Any]) -> None:
    """Insert the adapters that a checkpoint was saved with."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / 'adapter_config.json'}: cannot be read: {error}") from error
    origin_of(model).lora = inject_lora(model, settings)
    _copy_adapter(model, folder, expected)


def _copy_adapter(model: MllmForConditionalGeneration, folder: Path, expected: Mapping[str, Any]) -> None:
    # PEFT's file leaves out the adapter's name, which stands in the model's own tensor names.
    listed = {name.replace(".default.", "."): entry for name, entry in expected.items()}
    tensors = _checked_tensors(folder, [folder / "adapter_model.safetensors"], listed, PEFT_PREFIX)
    places = {
        canonical_name(name).replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    if set(places) != set(tensors):
        odd = sorted(set(places) ^ set(tensors))[0]
        raise CheckpointError(f"{folder}: adapter tensor {odd!r} stands on one side only")
    for name, tensor in tensors.items():  # in the dtype they were trained in, whatever the base has
        places[name].data = tensor.to(places[name].device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
