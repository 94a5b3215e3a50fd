"""What README says is true: its tree, its commands, its recipes, its Python."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import make_model, make_picture

from mllm.config import RunConfig, shipped_recipes
from mllm.model import save

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
UNLISTED = re.compile(r"(^tests/|__init__\.py$|py\.typed$|^\.|quickstart/backbones/)")


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


def tree_paths() -> set[str]:
    """Paths in README's tree, where a name is indented under its folder by two spaces a level."""
    tree = next(block for block in blocks("") if block.startswith("pyproject.toml"))
    paths, folders = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name.rstrip("/")]
        paths.add("/".join(folders[: depth + 1]) + ("/" if name.endswith("/") else ""))
    return paths


def test_the_tree_lists_every_file_and_nothing_else() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    listed = {path for path in tree_paths() if not path.endswith("/")}
    assert listed - files == set(), "README lists what is not there"
    missing = {name for name in files - listed if not UNLISTED.search(name)}
    assert missing == set(), "README does not list these"


def test_the_recipe_is_valid() -> None:
    recipe, more = blocks("yaml")
    assert RunConfig.model_validate(yaml.safe_load(recipe)).tune.language_model == "lora"
    both = RunConfig.model_validate({**yaml.safe_load(recipe), **yaml.safe_load(more)})
    assert both.val is not None
    assert both.eval is not None
    assert len(recipe.strip().splitlines()) <= 10


def test_shipped_recipes_are_named_as_they_are() -> None:
    for name in re.findall(r"(?:llava-1\.5-7b|quickstart)/(?:align|instruct)\w*", README):
        assert name in shipped_recipes()


def test_the_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(*make_model(), tmp_path / "runs" / "mine")
    make_picture().save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
