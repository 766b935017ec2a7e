"""The exceptions that stand for bad input."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: one line that names the argument and the remedy.

    The command line prints the message to stderr and exits with status 2; from Python it is a ``ValueError``.
    """


class TrainingDivergedError(InputError):
    """The training loss became NaN or infinite; the message names the stage, the step and the last good checkpoint."""
