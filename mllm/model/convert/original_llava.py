"""What LLaVA's own code writes: a projector and perhaps LoRA adapters, without the models they stand on.

    mm_projector.bin             stage 1: the projector
    non_lora_trainables.bin      stage 2 with LoRA: the projector and what else was trained
    adapter_model.*              the adapters, in PEFT's layout
    config.json                  mm_vision_tower, mm_projector_type, ...

No class of transformers reads it, so the result is compared with a plain forward written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mllm.errors import CheckpointError, ConfigError
from mllm.model.checkpoint import assign, load, new_directory, part_of, save
from mllm.model.compose import compose
from mllm.model.convert.family import demand
from mllm.model.convert.proof import GREEDY, Observed, Proof, observe, prompts, prove
from mllm.model.convert.stock import rename

PROJECTOR_FILES = ("mm_projector.bin", "non_lora_trainables.bin")
_ADAPTER = "adapter_config.json"
_PROJECTOR = "mm_projector."
# LLaVA's name of what is taken from the vision encoder, and ours.
_SELECT = {"patch": "patch", "cls_patch": "full"}


def is_original(source: str | Path) -> bool:
    """Whether a directory has files that no model of transformers comes with."""
    return any((Path(source) / name).is_file() for name in (*PROJECTOR_FILES, _ADAPTER))


def import_original(
    source: str | Path,
    out: str | Path,
    template: str = "vicuna_v1",
    language_model: str | Path | None = None,
    vision_encoder: str | Path | None = None,
) -> Proof:
    """Turn LLaVA's own layout into a checkpoint of ours; adapters are merged.

    Args:
        source: the directory.
        out: where to write; must not be there.
        template: chat template, see `mllm.data.templates`.
        language_model: the base language model; default: the one that the directory names.
        vision_encoder: the vision encoder; default: the one that `config.json` names.

    Raises:
        ConfigError: a setting that our model does not have, or a base model that cannot be found.
        CheckpointError: a file is broken or holds more than tensors, or the result computes something else.
    """
    source = Path(source)
    config = _read_json(source / "config.json")
    # The second file is only written beside adapters: without them the model would be another, unnoticed.
    adapter = _read_json(source / _ADAPTER) if (source / _ADAPTER).is_file() else {}
    adapted = [*source.glob("adapter_model.*"), *source.glob(PROJECTOR_FILES[1])]
    if adapted and not adapter:
        raise CheckpointError(f"{source}: {adapted[0].name} belongs to adapters, but {_ADAPTER} is missing")
    ratio: Any = config.get("image_aspect_ratio") or "square"
    demand(
        "LLaVA's own layout is read",
        image_aspect_ratio=(ratio, "pad" if ratio == "pad" else "square"),
        mm_use_im_start_end=(config.get("mm_use_im_start_end", False), False),
    )
    layer, select = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature", "patch")
    if select not in _SELECT:
        raise ConfigError(f"mm_vision_select_feature is {select!r}; {', '.join(_SELECT)} are read")
    tensors = _read_tensors(source)
    projector, connector = _projector(config, source)
    own = {name.removeprefix(_PROJECTOR): t for name, t in tensors.items() if name.startswith(_PROJECTOR)}
    _load(projector, own, source)
    model, processor = compose(
        vision_encoder or _setting(config, "mm_vision_tower", source, "--vision-encoder"),
        language_model
        or adapter.get("base_model_name_or_path")
        or _setting(config, "_name_or_path", source, "--language-model"),
        connector,
        template=template,
        vision_feature_layer=layer,
        vision_feature_select=_SELECT[select],
        image_aspect_ratio=ratio,
    )
    names = rename(tensors, _names(connector), "LLaVA's own layout")
    weights = {names[name]: tensor.float() for name, tensor in tensors.items()}
    for part, module in model.named_parts():
        mine = {name.removeprefix(f"{part}."): t for name, t in weights.items() if part_of(name) == part}
        assign(module, mine, part, complete=part == "connector")
    model.origin.changed |= set(weights)
    batches = prompts(processor, model.config.text_config)
    text = _with_adapters(model.language_model, source) if adapter else model.language_model
    prefix = model.config.num_prefix_tokens
    before = [
        _observe_plainly(
            model.vision_encoder, projector, text, layer, prefix, batch, processor.image_token_id
        )
        for batch in batches
    ]
    if adapter:
        model.language_model = text.merge_and_unload(safe_merge=True)
        model.origin.base.pop("language_model")  # now it is another, and saved whole
    model.requires_grad_(False)  # what is trainable would be saved, be it the base's own
    with new_directory(out) as folder:
        save(model, processor, folder, record={"imported": {"from": str(source), "class": "LLaVA"}})
        del model, text
        written, _ = load(folder)
        return prove(before, observe(written, batches, processor.image_token_id), str(source))


def _names(connector: Mapping[str, Any]) -> list[tuple[str, str]]:
    ours = "connector.proj." if connector["type"] == "linear" else "connector.layers."
    return [
        (_PROJECTOR, ours),
        ("vision_tower.vision_tower.vision_model.", "vision_encoder."),
        ("lm_head.", "language_model.lm_head."),
        ("", "language_model.model."),
    ]


def _setting(config: Mapping[str, Any], name: str, source: Path, option: str = "") -> Any:
    if name not in config:
        fix = f"; give {option}" if option else ""
        raise CheckpointError(f"{source}: config.json has no {name!r}{fix}")
    return config[name]


def _projector(config: Mapping[str, Any], source: Path) -> tuple[nn.Module, dict[str, Any]]:
    """LLaVA's projector, and our connector that is the same."""
    kind = config.get("mm_projector_type", "linear")
    width, text_width = (_setting(config, name, source) for name in ("mm_hidden_size", "hidden_size"))
    if kind == "linear":
        return nn.Linear(width, text_width), {"type": "linear"}
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if found is None:
        raise ConfigError(f"mm_projector_type is {kind!r}; 'linear' and 'mlp2x_gelu' (any depth) are read")
    depth = int(found[1])
    layers: list[nn.Module] = [nn.Linear(width, text_width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(text_width, text_width)]
    return nn.Sequential(*layers), {"type": "mlp", "depth": depth}


def _load(projector: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    try:
        projector.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: the projector is not what config.json says: {reason}") from error


def _with_adapters(language_model: Any, source: Path) -> Any:
    """The language model with its adapters beside its weights."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ConfigError("adapters need peft; run: pip install 'mllm[train]'") from error
    safe = source / "adapter_model.safetensors"
    try:
        saved = load_file(safe) if safe.is_file() else read_bin(source / "adapter_model.bin")
        adapted = PeftModel.from_pretrained(language_model, str(source))
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: the adapters cannot be read: {reason}") from error
    if odd := sorted(set(saved) ^ set(get_peft_model_state_dict(adapted))):
        raise CheckpointError(f"{source}: adapter tensor {odd[0]!r} does not fit the language model")
    return adapted


@torch.no_grad()
def _observe_plainly(
    vision: Any,
    projector: nn.Module,
    language_model: Any,
    layer: int,
    prefix: int,
    batch: Mapping[str, torch.Tensor],
    image_token_id: int,
) -> Observed:
    """LLaVA's forward on one prompt: features in the place of the placeholders."""
    hidden = vision(batch["pixel_values"], output_hidden_states=True).hidden_states[layer]
    soft = projector(hidden[:, prefix:])[0]  # [M, Dt]
    ids = batch["input_ids"][0]
    at = ids == image_token_id
    embeds = language_model.get_input_embeddings()(ids.masked_fill(at, 0)).clone()  # [S, Dt]
    embeds[at] = soft
    inputs = {"inputs_embeds": embeds[None], "attention_mask": batch["attention_mask"]}
    logits = language_model(**inputs).logits[0]
    answer = language_model.generate(**inputs, **GREEDY, suppress_tokens=[image_token_id])[0]
    return Observed(logits, answer.tolist())


def _read_tensors(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of both files, without the names of what was wrapped around LLaVA's model."""
    tensors: dict[str, torch.Tensor] = {}
    for name in PROJECTOR_FILES:
        if (source / name).is_file():
            tensors |= read_bin(source / name)
    if not tensors:
        raise CheckpointError(f"{source}: no projector, which {' or '.join(PROJECTOR_FILES)} would hold")
    return {re.sub(r"^(base_model\.)?(model\.)*", "", name): tensor for name, tensor in tensors.items()}


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """A pickled dictionary of tensors, without running what else a pickle may ask for.

    Raises:
        CheckpointError: it is broken, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: broken, or holds more than tensors; it is not read") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path}: is no dictionary of tensors")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return content
