"""The configuration of one run: what a recipe may say, checked before anything is loaded.

A recipe is a YAML file with the sections `model`, `tune`, `data` and `train`, and if wanted `val`, `eval`
and, for the model card, `card`. Command-line overrides (`train.learning_rate=1e-4`) are laid over it. An
unknown key is an error that names the nearest one.

section.py   what all sections have in common
model.py     what the model is made of
tune.py      how each part is trained
data.py      which rows
train.py     optimisation, saving, ranks
beside.py    validation, questions, the model card
run.py       all of them together, and what they must agree on
recipe.py    a file and overrides -> a run
"""

from mllm.config.beside import CardSection, EvalSection, ValSection
from mllm.config.data import DataSection, SourceSection
from mllm.config.model import AFTER_INIT, ModelSection
from mllm.config.recipe import RECIPES, find_recipe, load_recipe, shipped_recipes, summary_of
from mllm.config.run import RunConfig
from mllm.config.train import Checkpointing, Part, TrainSection
from mllm.config.tune import USERS, LoraSection, TuneSection

__all__ = [
    "AFTER_INIT",
    "RECIPES",
    "USERS",
    "CardSection",
    "Checkpointing",
    "DataSection",
    "EvalSection",
    "LoraSection",
    "ModelSection",
    "Part",
    "RunConfig",
    "SourceSection",
    "TrainSection",
    "TuneSection",
    "ValSection",
    "find_recipe",
    "load_recipe",
    "shipped_recipes",
    "summary_of",
]
