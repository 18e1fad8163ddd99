"""Errors that a user can fix.

Each message says in one line what is wrong, which value, and what to do. The command lines print it without a
traceback and exit with status 2; everything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import re


# Everything that some tool takes for the end of a line.
_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]\s*")


def one_line(text: str) -> str:
    """Return ``text`` on a single line, without white space around it: for text of others that a message quotes."""
    return _LINE_BREAKS.sub(" ", text.strip())


class SekdError(Exception):
    """Base of every error that a user can fix. Whoever raises it quotes foreign text by :func:`one_line`."""


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
    """LLaMA-Factory has an unsupported version or was imported too early."""
