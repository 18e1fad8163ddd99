"""Read parallel text: JSON records, two plain text files, or a TSV file; compressed with gzip, bzip2 or xz as well.

Every reader returns :class:`~llamafactory_sekd.data.checks.Pair` objects with the file name as it was given and the
line (in a JSON list: the record), counted from 1. Bytes that are not UTF-8 become lone surrogates, which
:func:`~llamafactory_sekd.data.checks.clean_pairs` finds; a file that cannot be right raises
:class:`~llamafactory_sekd.errors.DataError`.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.checks import Pair
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.errors import DataError, one_line


_PACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
}
_NO_TEXT: dict[bytes, str] = {
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "compressed with zstd (unpack it with `zstd -d`)",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"%PDF-": "a PDF document",
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS, not the data (fetch it with `git lfs pull`)",
}


def read_json_pairs(path: Path, direction: Direction, name: str | None = None, *, columns: bool = False) -> list[Pair]:
    """Read ALMA's format: records ``{"translation": {"de": …, "en": …}}``, one per line or as one JSON list.

    ``direction`` says which side is the source; ``name`` is the file's name in reports (default: its path). With
    ``columns``, records without ``translation`` may have the two sides themselves: ``{"de": …, "en": …}``.
    """
    name = name or str(path)
    text = _read_text(path)
    pairs = [
        pair_from_record(_nested(record) if columns else record, "translation", direction, name, number)
        for number, record in _json_records(text, name)
    ]
    return _not_empty(pairs, path)


def read_json_records(path: Path) -> list[tuple[int, Any]]:
    """Return the records of JSON Lines or of one JSON list, numbered from 1."""
    return list(_json_records(_read_text(path), str(path)))


def _nested(record: Any) -> Any:
    return record if not isinstance(record, dict) or "translation" in record else {"translation": record}


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


def read_tsv_pairs(path: Path, direction: Direction | None = None) -> list[Pair]:
    """Read lines of ``source<TAB>target``; another number of columns raises :class:`DataError`.

    A first line with the names of columns is refused, since which column is the source must not be guessed.
    ``direction`` adds its codes and languages to the names that are known.
    """
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        # A blank line is a finding, not another layout.
        columns = line.split("\t") if line.strip() else ["", ""]
        if len(columns) != 2:
            raise DataError(
                f"{path}:{number}: {len(columns)} columns instead of 2 (source, tab, target); "
                "keep the two that are needed, for example with `cut -f1,2`."
            )
        if number == 1 and _is_header(columns, direction):
            raise DataError(
                f"{path}:1: {columns[0]!r} and {columns[1]!r} look like the names of the columns, not like a pair: "
                "remove the line, for example with `tail -n +2`."
            )
        pairs.append(Pair(columns[0], columns[1], str(path), number))
    return _not_empty(pairs, path)


def _is_header(columns: list[str], direction: Direction | None) -> bool:
    known = {"source", "target", "src", "tgt", "trg", "source_text", "target_text", "sentence1", "sentence2"}
    if direction is not None:
        sides = (direction.source, direction.target, direction.source_language, direction.target_language)
        known |= {side.lower() for side in sides}
    return all(column.strip().strip('"').lower() in known for column in columns)


def read_lines(path: Path) -> list[str]:
    r"""Return the lines of a text file without their ends; only ``\n`` and ``\r\n`` end a line."""
    text = _read_text(path)
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _read_text(path: Path) -> str:
    data = _read_bytes(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _is_utf16(data):
        raise DataError(f"{path} is UTF-16: convert it to UTF-8, for example with `iconv -f UTF-16 -t UTF-8`.")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")


def _read_bytes(path: Path) -> bytes:
    """Return the content, unpacked where the first bytes are those of gzip, bzip2 or xz, whatever the file's name."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        for start, unpack in _PACKED.items():
            if data.startswith(start):
                data = unpack(data)
                break
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"Cannot unpack {path} ({one_line(str(error))}): copy or download it again.") from error
    for start, what in _NO_TEXT.items():
        if data.startswith(start):
            raise DataError(f"{path} is {what}: give plain text, TSV or JSON Lines.")
    if data[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{path} is an HTML page, probably a download's error message: download it again.")
    return data


def _is_utf16(data: bytes) -> bool:
    """Tell UTF-16 without a mark by its NUL bytes, nearly all at even or nearly all at odd places.

    Text in a Latin script with stray NUL characters has few of them; those pairs are findings.
    """
    head = data[:4096]
    even, odd = head[0::2].count(0), head[1::2].count(0)
    return max(even, odd) > 0.2 * len(head) and min(even, odd) <= 0.1 * max(even, odd)


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
