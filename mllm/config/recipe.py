"""A recipe's file and the overrides behind it -> `RunConfig`, or one line that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from mllm.config.model import PLACES, ModelSection
from mllm.config.run import RunConfig
from mllm.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and lay overrides over it.

    Args:
        recipe: a YAML file, or the name of a shipped recipe such as `llava-1.5-7b/align`.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ConfigError: one line that names the file, the key and what is allowed.
    """
    path = find_recipe(recipe)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping with the sections model, tune, data and train")
    for override in overrides:
        _apply(raw, override)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from error
    _check_places(config.model, path)
    return config


def _check_places(section: ModelSection, path: Path) -> None:
    """A folder that is not there is told before anything is loaded, and not as a name that the Hub lacks."""
    for key in PLACES:
        given = getattr(section, key)
        for place in given if isinstance(given, list) else [given]:
            if isinstance(place, str) and _is_absent_folder(place):
                whole = Path(place).expanduser()  # libraries take `~` for a name
                fix = f"write {str(whole)!r}" if whole.exists() else "give a model's folder or Hub name"
                raise ConfigError(f"{path}: model.{key}: there is no folder {place!r}; {fix}")


def _is_absent_folder(place: str) -> bool:
    """Whether this can only be a path, as a name on the Hub has one slash at most, and there is none such."""
    path = place.startswith(("/", ".", "~")) or place.count("/") > 1
    return path and not place.startswith("mllm://") and not Path(place).exists()


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given as a path or a shipped name."""
    for path in (Path(recipe), RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    beside = [str(path) for path in Path(recipe).parent.glob("*.y*ml")]
    near = difflib.get_close_matches(str(recipe), [*beside, *shipped_recipes()], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(shipped_recipes())}"
    raise ConfigError(f"recipe {str(recipe)!r} is neither a file nor a shipped recipe; {hint}")


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.glob("*/*.yaml"))


def summary_of(name: str) -> str:
    """The first sentence of the comment that a shipped recipe begins with."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return comment.split(": ")[0].split(". ")[0].rstrip(".")


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must look like section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        # YAML 1.1 reads `1e-4` as a string; the field's type makes it a number, in a file as here.
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not valid YAML: {' '.join(str(error).split())}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        return f"unknown key {where!r}; " + (
            f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"key {where!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}{': ' if where else ''}{message}" + (
        f", found {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
    )


def _fields_at(loc: Sequence[Any]) -> list[str]:
    model: Any = RunConfig
    for step in loc:
        if isinstance(step, int):  # of a list of sections
            model = get_args(model)[0]
        else:
            model = model.model_fields[step].annotation if hasattr(model, "model_fields") else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []
