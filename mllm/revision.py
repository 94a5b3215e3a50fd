"""Which code this is: the version, and the git commit where it runs from a working tree."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import mllm


def code_state() -> dict[str, Any]:
    """`{"mllm": version, "commit": hash or None, "changed": whether the tree differs from it}`."""
    state: dict[str, Any] = {"mllm": mllm.__version__, "commit": None, "changed": False}
    # An installed package may lie inside somebody's repository, which then says nothing about it.
    if _git("ls-files", "--error-unmatch", "__init__.py") is not None:
        state["commit"] = (_git("rev-parse", "HEAD") or "").strip() or None
        state["changed"] = bool((_git("status", "--porcelain", "--untracked-files=no") or "").strip())
    return state


def _git(*arguments: str) -> str | None:
    """What git says, or None where there is none or it refuses."""
    folder = Path(mllm.__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
