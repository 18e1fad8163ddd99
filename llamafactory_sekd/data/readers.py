"""Read parallel text: ALMA's JSON, two plain text files, or a TSV file.

Every reader returns :class:`~llamafactory_sekd.data.checks.Pair` objects with the file name as it was given and the
line (in a JSON list: the record), counted from 1. Bytes that are not UTF-8 become lone surrogates, which
:func:`~llamafactory_sekd.data.checks.clean_pairs` finds; a file that as a whole cannot be right raises
:class:`~llamafactory_sekd.errors.DataError`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.checks import Pair
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.errors import DataError


def read_json_pairs(path: Path, direction: Direction, name: str | None = None) -> list[Pair]:
    """Read ALMA's format: records ``{"translation": {"de": …, "en": …}}``, one per line or as one JSON list.

    ``direction`` says which side is the source; ``name`` stands for the file in reports (default: its path).
    """
    name = name or str(path)
    text = _read_text(path)
    pairs = [
        pair_from_record(record, "translation", direction, name, number)
        for number, record in _json_records(text, name)
    ]
    return _not_empty(pairs, path)


def pair_from_record(record: Any, key: str, direction: Direction, name: str, number: int) -> Pair:
    """Take the two sides out of ``{key: {"de": …, "en": …}}``; :class:`DataError` when it is anything else."""
    sides = record.get(key) if isinstance(record, dict) else None
    if isinstance(sides, dict):
        source, target = sides.get(direction.source), sides.get(direction.target)
        if isinstance(source, str) and isinstance(target, str):
            return Pair(source, target, name, number)
    raise DataError(
        f'{name}:{number}: expected {{"{key}": {{"{direction.source}": text, "{direction.target}": text}}}}, '
        f"got {record!r:.80}."
    )


def read_text_pairs(source: Path, target: Path, names: tuple[str, str] | None = None) -> list[Pair]:
    """Read two files with one sentence per line; different numbers of lines raise :class:`DataError`."""
    source_lines, target_lines = read_lines(source), read_lines(target)
    if len(source_lines) != len(target_lines):
        raise DataError(
            f"Misaligned files: {source} has {len(source_lines)} lines and {target} has {len(target_lines)}; "
            "line n of one must be the translation of line n of the other."
        )
    name = " / ".join(names or (str(source), str(target)))
    lines = enumerate(zip(source_lines, target_lines, strict=True), start=1)
    return _not_empty([Pair(left, right, name, number) for number, (left, right) in lines], source)


def read_tsv_pairs(path: Path) -> list[Pair]:
    """Read lines of ``source<TAB>target``; another number of columns raises :class:`DataError`."""
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        # A blank line is a finding, not another layout.
        columns = line.split("\t") if line.strip() else ["", ""]
        if len(columns) != 2:
            raise DataError(
                f"{path}:{number}: {len(columns)} columns instead of 2 (source, tab, target); "
                "keep the two that are needed, for example with `cut -f1,2`."
            )
        pairs.append(Pair(columns[0], columns[1], str(path), number))
    return _not_empty(pairs, path)


def read_lines(path: Path) -> list[str]:
    r"""Return the lines of a text file without their ends; only ``\n`` and ``\r\n`` end a line."""
    text = _read_text(path)
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16: convert it to UTF-8, for example with `iconv -f UTF-16 -t UTF-8`.")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")


def _json_records(text: str, name: str) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        yield from enumerate(_parse(text, name, 1), start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(line, name, number)


def _parse(text: str, name: str, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{number + error.lineno - 1}: not valid JSON ({error.msg}).") from error


def _not_empty(pairs: list[Pair], path: Path) -> list[Pair]:
    if not pairs:
        raise DataError(f"{path} holds no sentences.")
    return pairs
