"""Save and load: one directory, complete at every save, checked at every load.

    config.json, generation_config.json           what the model is
    processor_config.json, tokenizer*, chat_template.jinja    how prompts and pixels are made
    model*.safetensors                            every tensor that differs from the base models
    adapter/                                      PEFT's adapters, in its layout; a folder a kind if several
    mllm_manifest.json                            base models, tensor list, stage, data, versions, probe

A base model that was loaded from a directory or the Hub and not trained is named, not copied: a stage-1
checkpoint of a 7B model is 40 MB. Loading looks at nothing but the directory's contents.

Files in the order of use: origin, manifest, adapter_files, directory, saving; assembly, loading.
"""

from mllm.model.checkpoint.assembly import assemble, assign
from mllm.model.checkpoint.directory import atomic_directory, check_new, finish_save, new_directory
from mllm.model.checkpoint.loading import check_grounds, load, load_model, model_class, restore
from mllm.model.checkpoint.manifest import (
    MANIFEST,
    checksum,
    has_manifest,
    manifest_hash,
    read_manifest,
    saved_tensors,
)
from mllm.model.checkpoint.origin import Origin, origin_of, part_of
from mllm.model.checkpoint.saving import save

__all__ = [
    "MANIFEST",
    "Origin",
    "assemble",
    "assign",
    "atomic_directory",
    "check_grounds",
    "check_new",
    "checksum",
    "finish_save",
    "has_manifest",
    "load",
    "load_model",
    "manifest_hash",
    "model_class",
    "new_directory",
    "origin_of",
    "part_of",
    "read_manifest",
    "restore",
    "save",
    "saved_tensors",
]
