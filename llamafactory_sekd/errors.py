"""Errors that a user can fix.

Each message says in one line what is wrong, which value, and what to do. The command lines print it without a
traceback and exit with status 2; everything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


# Everything that some tool takes for the end of a line.
_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]\s*")
# More words than this are no help in a message.
_LISTED = 30


def one_line(text: str) -> str:
    """Return ``text`` on a single line, without white space around it: for text of others that a message quotes."""
    return _LINE_BREAKS.sub(" ", text.strip())


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return how a message about an unknown ``word`` ends: with the known one that is close, or with a short list."""
    words = list(known)
    close = get_close_matches(word, words, n=1)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": use one of {', '.join(words)}." if len(words) <= _LISTED else "."


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
