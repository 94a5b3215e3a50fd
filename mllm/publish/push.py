"""A checkpoint to the Hub, when it is asked for: nothing here is called by training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, filter_repo_objects, validate_repo_id

from mllm.errors import CheckpointError, ConfigError
from mllm.model.checkpoint import MANIFEST, has_manifest, read_manifest, saved_tensors
from mllm.publish.card import CARD, write_card
from mllm.publish.secrets import has_secret

# What a run leaves beside its checkpoint: other checkpoints, logs, caches; and pickles, which execute code
# where they are loaded.
IGNORED = (
    *("checkpoint-*/*", "global_step*/*", "runs/*", "wandb/*", "trackio/*", "feature_cache/*", ".*", "*/.*"),
    *("eval/*", "watchdog/*", "stopped.rank*.json", "preflight*.json"),
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npy", "*.tmp"),
    *("trainer_state.json", "zero_to_fp32.py", "latest"),
)
# Whatever HTTP client the Hub's library has, its errors are the bases of the library's own; and bad names or
# metadata, and a file that was not taken.
_REFUSALS: Any = (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)
_TEXT = (".json", ".jsonl", ".md", ".jinja", ".txt", ".yaml")


@dataclass(frozen=True)
class Upload:
    """What was uploaded, or would be.

    Attributes:
        repo_id: on the Hub.
        files: path and bytes of each.
        notes: what others will lack.
        url: of the commit; None of a dry run.
    """

    repo_id: str
    files: list[tuple[str, int]]
    notes: list[str]
    url: str | None


def push(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Upload a checkpoint directory, with its model card.

    The token is the one of the environment (`HF_TOKEN`) or of the Hub's own login; none is taken here.

    Args:
        checkpoint: a checkpoint directory.
        repo_id: `owner/name`; made if it is not there.
        private: where it is made.
        revision: a branch; made if it is not there. Default: main.
        dry_run: only say what would be uploaded; the network is not used.

    Raises:
        CheckpointError: no checkpoint, or a broken one.
        ConfigError: a file holds a secret, or the Hub refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"the Hub does not take {repo_id!r}: {_one_line(error)}") from error
    path = Path(checkpoint)
    if not has_manifest(path):
        raise CheckpointError(f"{path}: no {MANIFEST} here; give the directory of a checkpoint saved by mllm")
    saved_tensors(path)  # as they were written, or this raises
    if not (path / CARD).is_file():
        write_card(path)
    files = upload_files(path)
    _check_secrets(path, [name for name, _ in files])
    notes = _notes(path)
    if dry_run:
        return Upload(repo_id, files, notes, None)
    api = HfApi(library_name="mllm")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=path,
            revision=revision,
            allow_patterns=[name for name, _ in files],
            commit_message=f"Upload {path.resolve().name} with mllm",
        )
    except _REFUSALS as error:
        raise ConfigError(f"the Hub does not take {repo_id!r}: {_one_line(error)}") from error
    return Upload(repo_id, files, notes, done.commit_url)


def upload_files(path: Path) -> list[tuple[str, int]]:
    """Path and bytes of every file that belongs to the checkpoint."""
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    kept = filter_repo_objects(names, ignore_patterns=list(IGNORED))
    return [(name, (path / name).stat().st_size) for name in kept]


def _check_secrets(path: Path, names: Sequence[str]) -> None:
    for name in names:
        # Vocabularies hold every kind of string, and no settings.
        if not name.endswith(_TEXT) or any(word in name for word in ("token", "vocab", "merges")):
            continue
        if has_secret((path / name).read_text(encoding="utf-8", errors="replace")):
            raise ConfigError(f"{path / name} holds what looks like an access token; remove it first")


def _notes(path: Path) -> list[str]:
    local = {
        part: base["source"]
        for part, base in read_manifest(path)["base"].items()
        if Path(base["source"]).is_absolute()
    }
    return [
        f"{part} needs its base model, which others do not find at {place}; "
        "'mllm merge --whole' writes it too"
        for part, place in local.items()
    ]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:300]}..." if len(text) > 300 else text


def as_json(upload: Upload) -> str:
    """The upload for scripts."""
    files = [{"path": name, "bytes": size} for name, size in upload.files]
    return json.dumps({"repo_id": upload.repo_id, "files": files, "notes": upload.notes, "url": upload.url})
