"""Errors that a user can act on: one line that says where, what and the fix.

The command line prints them without a traceback (`--debug` shows it). Everything else that is raised
is a bug of ours and keeps its traceback.
"""


class MllmError(ValueError):
    """Base of every error that the user can mend."""


class ConfigError(MllmError):
    """A recipe or an option is wrong."""


class DataError(MllmError):
    """A data file, a row or an image is wrong; the message names file, row and field."""


class CheckpointError(MllmError):
    """A checkpoint directory is incomplete, foreign or not what its manifest says."""


class TrainingStoppedError(MllmError):
    """The run was stopped because going on would have trained on nonsense, or lost what it learnt."""
