"""Reading and writing the small files of an evaluation. Writes are atomic."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import EvaluationError


# Everything that some tool takes for the end of a line: a translation must stay on one.
_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]\s*")


def one_line(text: str) -> str:
    """Return ``text`` on a single line, without white space around it."""
    return _LINE_BREAKS.sub(" ", text.strip())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either all of it or what it held before."""
    content = text.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the parsed file, or None when there is none or it does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_lines(path: Path, lines: list[str]) -> None:
    """Write one line per entry."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_hypotheses(path: Path, expected: int) -> list[str]:
    r"""Return the translations of ``path``, one per line, checked to be ``expected`` in number.

    Only ``\n`` and ``\r\n`` end a line. Raises :class:`EvaluationError` for a missing file, a wrong number of lines
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
