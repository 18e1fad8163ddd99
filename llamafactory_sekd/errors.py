"""Errors that a user can mend.

Each message is one line that says what is wrong, which value, and what to do. The command lines print it without a
traceback and exit with status 2; everything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations


class SekdError(Exception):
    """Base of every error that a user can mend. Its message is one line, whatever the values that it names."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class ArgumentError(SekdError, ValueError):
    """A key of the YAML file or of the command line has a value that cannot work."""


class DataError(SekdError, ValueError):
    """A data file is missing, malformed or does not match its partner."""


class TeacherError(SekdError, ValueError):
    """The teacher cannot be loaded or does not fit the student."""


class EvaluationError(SekdError, ValueError):
    """An evaluation cannot be run as it was asked for."""


class StudyError(SekdError, ValueError):
    """A study file asks for something that cannot be run."""


class HostError(SekdError, RuntimeError):
    """LLaMA-Factory is of another version, or was imported in an order, that we do not support."""
