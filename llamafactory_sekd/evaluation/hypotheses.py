"""Translations as files: one per line, nothing lost and nothing added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamafactory_sekd.errors import EvaluationError, one_line


def read_hypotheses(path: Path, expected: int) -> list[str]:
    r"""Return the translations of ``path``, one per line, checked to be ``expected`` in number.

    Only ``\\n`` and ``\\r\\n`` end a line. Raises :class:`EvaluationError` for a missing file, a wrong number of lines
    or bytes that are not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise EvaluationError(f"The hypotheses {path} do not exist: one translation per line is expected.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise EvaluationError(f"The hypotheses {path} are not UTF-8 (line {line}).") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if len(lines) != expected:
        raise EvaluationError(f"The hypotheses {path} have {len(lines)} lines, but the test set has {expected}.")
    return [one_line(line) for line in lines]


def split_thought(line: str, words: Sequence[str]) -> tuple[str, bool]:
    """Return a translation without the thoughts before it, and whether there were any.

    ``words`` open and close them. A thought that does not end is all that there is; the opening word may be part of
    the prompt, so that only the closing one is here.
    """
    opening, closing = (word.strip() for word in words)
    _, found, after = line.rpartition(closing)
    if found:
        return after.strip(), True
    if opening in line:
        return line.partition(opening)[0].strip(), True
    return line, False
