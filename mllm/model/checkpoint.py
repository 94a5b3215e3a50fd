"""Save and load: one directory, complete at every save, checked at every load.

    config.json, generation_config.json           what the model is
    processor_config.json, tokenizer*, chat_template.jinja    how prompts and pixels are made
    model*.safetensors                            every tensor that differs from the base models
    adapter/                                      PEFT's adapters, in its layout; a folder a kind if several
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
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.initialization import no_init_weights

from mllm.errors import CheckpointError, ConfigError
from mllm.model.adapters import adapted_layer, canonical_name, inject, insert, is_adapter
from mllm.model.added_tokens import resize_embeddings
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parted import PartedModel
from mllm.model.parts import BASE_LOADERS, Base, fingerprint
from mllm.model.pretraining.dual_encoder import DualEncoder
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.model.pretraining.qformer_pretraining import QFormerForPretraining
from mllm.model.probe import check_probe, probe
from mllm.model.processing import MllmProcessor

MANIFEST = "mllm_manifest.json"
ADAPTER_DIR = "adapter"
FORMAT = 1
# Model and processor classes by the model type in `config.json`.
MODELS: dict[str, tuple[type[PartedModel], type[ProcessorMixin]]] = {
    "mllm": (MllmForConditionalGeneration, MllmProcessor),
    "mllm_dual_encoder": (DualEncoder, PairProcessor),
    "mllm_qformer_pretraining": (QFormerForPretraining, PairProcessor),
}
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."


@dataclass
class Origin:
    """What a model object remembers of its making, so that a save can leave out what has not changed.

    Attributes:
        base: for each part, the base it was loaded from; a part without one is saved whole.
        changed: names of tensors that differ from their base, as this or an earlier run trained them.
        parent: directory and manifest hash of the checkpoint that training started from.
        adapters: for each part that carries PEFT's adapters, their configuration as PEFT writes it.
    """

    base: dict[str, Base] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    parent: dict[str, str] | None = None
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)


def origin_of(model: PartedModel) -> Origin:
    """The model's origin; a model composed of objects has an empty one and is saved whole."""
    if not hasattr(model, "origin"):
        model.origin = Origin()
    return model.origin


def part_of(name: str) -> str:
    """The part that a tensor belongs to."""
    return name.split(".", 1)[0]


# -- save -------------------------------------------------------------------------------------------


def save(
    model: PartedModel,
    processor: ProcessorMixin,
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
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        tensors = state_dict or model.state_dict()
        model.save_products(folder, processor, tensors)
        weights, adapter = tensors_to_save(model, tensors)
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
    model: PartedModel, state_dict: Mapping[str, torch.Tensor]
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


def needed_bases(model: PartedModel, weights: Mapping[str, Any]) -> dict[str, Base]:
    """The bases of parts with parameters that are not among the saved weights, and in which dtype."""
    needed = {}
    for part, base in origin_of(model).base.items():
        for name, parameter in getattr(model, part).named_parameters():
            plain = canonical_name(f"{part}.{name}")
            if plain not in weights and not is_adapter(plain):
                # A weight in 4 bit is bytes; it remembers what it was.
                kind = getattr(parameter, "quant_state", parameter)
                needed[part] = replace(base, dtype=dtype_name(kind))
                break
    return needed


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, dtype and checksum of a tensor, for the manifest."""
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor), "sum": int(checksum(tensor))}


def dtype_name(tensor: Any) -> str:
    """`float32`, ... of a tensor."""
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
    """One folder as PEFT lays it out, or, where parts are adapted in different ways, one for each way."""
    kinds: dict[str, dict[str, Any]] = {}
    for config in origin.adapters.values():
        joined = kinds.setdefault(adapter_kind(config), {})
        for key, value in config.items():
            is_layers = key in ("target_modules", "feedforward_modules")
            joined[key] = sorted([*joined.get(key, []), *value]) if is_layers else value
    for kind, config in kinds.items():
        place = folder / kind if len(kinds) > 1 else folder
        place.mkdir(parents=True)
        layers = set(config["target_modules"])
        tensors = {
            PEFT_PREFIX + _name_on_disk(name): tensor
            for name, tensor in adapter.items()
            if adapted_layer(name) in layers
        }
        save_file(tensors, place / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (place / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def adapter_kind(config: Mapping[str, Any]) -> str:
    """`lora`, `dora`, `rslora` or `ia3`, by a configuration of PEFT's."""
    if config["peft_type"] == "IA3":
        return "ia3"
    return "dora" if config["use_dora"] else "rslora" if config["use_rslora"] else "lora"


def _name_on_disk(name: str) -> str:
    """An adapter tensor's name in PEFT's files, which leave out the name of the adapter itself."""
    return name.replace(".default.", ".").removesuffix(".default")


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
    shutil.rmtree(path / ADAPTER_DIR, ignore_errors=True)  # the new one may have none
    for new in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):
        if new.is_dir():  # a directory that is not empty cannot be replaced
            shutil.rmtree(path / new.name, ignore_errors=True)
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
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """Load a checkpoint directory: `model, processor = mllm.load("runs/instruct")`.

    Args:
        path: the directory.
        device: where to put the model.
        dtype: weights are cast to it; default: as they were saved.
        base: other places of base models that have moved, by part.
        quantization: `nf4` loads the untrained base of the language model in 4 bit, to train on it.

    Raises:
        ConfigError: a language model that is not as its base any more should be loaded in 4 bit.
        CheckpointError: a tensor is missing, superfluous or of another shape, a base model is not what it
            was, or the loaded model does not compute what the saved one did.
    """
    path = Path(path)
    if not has_manifest(path):
        raise CheckpointError(f"{path}: no {MANIFEST} here; give the directory of a checkpoint saved by mllm")
    processor = MODELS[model_class(path).config_class.model_type][1].from_pretrained(path)
    return load_model(path, device=device, dtype=dtype, base=base, quantization=quantization), processor


def load_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    base: Mapping[str, str | Path] | None = None,
    quantization: str | None = None,
) -> Any:
    """The model of a checkpoint directory; see `load`."""
    path = Path(path)
    manifest = read_manifest(path)
    weights = saved_tensors(path)
    bases = {part: Base(**entry) for part, entry in manifest["base"].items()}
    for part, source in (base or {}).items():
        if part not in bases:
            raise CheckpointError(f"{path}: {part!r} is saved whole, it has no base model to replace")
        bases[part] = replace(bases[part], source=str(source))
    own = bases.get("language_model")
    requantised = quantization is not None and (own is None or own.quantization != quantization)
    if requantised:
        changed = sorted(n for n in {**weights, **manifest["adapter"]} if part_of(n) == "language_model")
        if own is None or changed:
            raise ConfigError(
                f"{path}: its language model was trained ({changed[0]!r} differs from the base), and only an "
                "untrained base is loaded in 4 bit; tune it as 'lora', or export it and start from the export"
            )
        compute = str(dtype or own.dtype).removeprefix("torch.")
        bases["language_model"] = replace(own, quantization=quantization, dtype=compute)
    cls = model_class(path)
    model = assemble(cls, cls.config_class.from_pretrained(path), bases, weights)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.origin = Origin(base=bases, changed=set(weights), parent=manifest.get("parent"))
    if manifest["adapter"]:
        _load_adapters(model, path / ADAPTER_DIR, manifest["adapter"])
    if dtype is not None:
        nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    nn.Module.to(model, device or "cpu").eval()
    if not requantised:  # else it computes something else on purpose
        check_probe(model, manifest["probe"], path)
    return model


def restore(model: PartedModel, path: Path) -> None:
    """Copy a checkpoint's tensors into a model of the same make (to resume a run)."""
    manifest = read_manifest(path)
    weights = saved_tensors(path)
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
        folder = path / ADAPTER_DIR
        _set_adapters(model, _adapter_tensors(folder, manifest["adapter"]), folder)


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


def saved_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint directory without those of its adapter, checked against its manifest."""
    return _checked_tensors(path, sorted(path.glob("model*.safetensors")), read_manifest(path)["weights"])


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


def model_class(path: Path) -> type[Any]:
    """The class of the model in a checkpoint directory, as its `config.json` says."""
    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in MODELS:
        raise CheckpointError(f"{path / 'config.json'}: model type {kind!r} is none of {', '.join(MODELS)}")
    return MODELS[kind][0]


def assemble(
    cls: type[Any], config: Any, bases: Mapping[str, Base], weights: Mapping[str, torch.Tensor]
) -> Any:
    """A model whose tensors are those given, and for parts in `bases` also those of their bases.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape, or a base has changed.
    """
    with torch.device("meta"):
        model = cls(config)
    for part, _ in list(model.named_parts()):
        own = {
            name.removeprefix(f"{part}."): tensor for name, tensor in weights.items() if part_of(name) == part
        }
        module = _from_base(part, bases[part], model.config) if part in bases else _empty(model, part)
        if part == "language_model":
            resize_embeddings(module, model.config.text_config.vocab_size)
        if spec := getattr(model.config, "inserted", {}).get(part):
            insert(module, part, spec)
        assign(module, own, part, complete=part not in bases)
        setattr(model, part, module)
    model.connect()
    return model


def _empty(model: Any, part: str) -> Any:
    """A part with its buffers in place and its weights not yet set."""
    with no_init_weights():
        module = model.build_part(model.config, part)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()  # skipped together with the initialisation
    return module


def _from_base(part: str, base: Base, config: Any) -> PreTrainedModel:
    # The feature layer decides on the class: CLIP's projection is in one of its own.
    options: dict[str, Any] = {"layer": config.vision_feature_layer} if part == "vision_encoder" else {}
    if base.quantization:
        options["quantization"] = base.quantization
    try:
        module = BASE_LOADERS[part](base.source, getattr(torch, base.dtype), **options)
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


def assign(module: Any, tensors: dict[str, torch.Tensor], part: str, complete: bool) -> None:
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
    written: set[int] = set()
    with torch.no_grad():
        for name in (name for name in own if name in tensors):
            if name not in parameters:
                own[name].copy_(tensors[name])
            elif id(parameters[name]) not in written:
                # Trained tensors may be float32 beside frozen ones of a lower precision.
                parameters[name].data = tensors[name]
                written.add(id(parameters[name]))
            else:  # tied by the configuration, but not in truth: the head of every Flan-T5
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, nn.Parameter(tensors[name]))


def _load_adapters(model: PartedModel, folder: Path, expected: Mapping[str, Any]) -> None:
    """Insert the adapters that a checkpoint was saved with."""
    tensors = _adapter_tensors(folder, expected)
    for place in _adapter_folders(folder):
        try:
            settings = json.loads((place / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{place / ADAPTER_CONFIG}: cannot be read: {error}") from error
        names = [name.removeprefix(PEFT_PREFIX) for name in load_file(place / ADAPTER_WEIGHTS)]
        layers = sorted({adapted_layer(name) for name in names})
        scaled_inside = settings.get("feedforward_modules") or []
        for part, module in model.named_parts():
            own = [name.removeprefix(f"{part}.") for name in layers if part_of(name) == part]
            inner = [name.removeprefix(f"{part}.") for name in scaled_inside if part_of(name) == part]
            if own:
                origin_of(model).adapters[part] = inject(module, part, settings, own, inner)
    _set_adapters(model, tensors, folder)


def _adapter_tensors(folder: Path, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    listed = {_name_on_disk(name): entry for name, entry in expected.items()}
    files = [place / ADAPTER_WEIGHTS for place in _adapter_folders(folder)]
    return _checked_tensors(folder, files, listed, PEFT_PREFIX)


def _adapter_folders(folder: Path) -> list[Path]:
    return sorted({file.parent for file in folder.rglob("adapter_*")})


def _set_adapters(model: PartedModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    places = {
        _name_on_disk(canonical_name(name)): parameter
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
