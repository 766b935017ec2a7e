"""The exception that stands for bad input to a benchmark command."""

from __future__ import annotations


class InputError(ValueError):
    """One line that names the flag or file and what was expected; the command prints it and exits with status 2."""
