"""Read parallel text: JSON records, two plain text files, or a TSV file; compressed with gzip, bzip2 or xz as well.

Every reader gives :class:`~llamafactory_sekd.data.checks.Pair` objects, or blocks of them, with the file name as it
was given and the line (in a JSON list: the record), counted from 1, and holds no more of a file in memory than needed.
Bytes that are not UTF-8 become lone surrogates, which :func:`~llamafactory_sekd.data.checks.clean_pairs` finds; a file
that cannot be right raises :class:`~llamafactory_sekd.errors.DataError`.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TextIO, TypeVar, cast

from llamafactory_sekd.data.checks import Block, Pair
from llamafactory_sekd.data.file_kinds import refuse_what_is_no_text
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.errors import DataError, one_line


_PACKED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_SPACE = re.compile(r"[ \t\n\r]*")
_HEAD = 4096  # bytes that tell what a file is
_CHUNK = 1 << 18  # characters that are read at a time
_PAIRS = 5000  # the same of pairs
# A line, or a record of a JSON list, of more characters is none: it would be kept in memory, however long it is.
LONGEST_LINE = 1 << 25


_Found = TypeVar("_Found")


class Meter:
    """How far the files that are being read have been read, in bytes on the disk."""

    def __init__(self) -> None:
        self._streams: list[tuple[IO[bytes], int]] = []

    def watch(self, stream: IO[bytes], size: int) -> None:
        """Add a file that is read from now on."""
        self._streams.append((stream, size))

    def position(self) -> int:
        """Return the bytes that were read of all files together."""
        return sum(size if stream.closed else stream.tell() for stream, size in self._streams)


def json_pairs(
    path: Path, direction: Direction, name: str | None = None, *, columns: bool = False, meter: Meter | None = None
) -> Iterator[Pair]:
    """Read ALMA's format: records ``{"translation": {"de": …, "en": …}}``, one per line or as one JSON list.

    ``direction`` says which side is the source; ``name`` is the file's name in reports (default: its path). With
    ``columns``, records without ``translation`` may have the two sides themselves: ``{"de": …, "en": …}``.
    """
    name = name or str(path)

    def pairs() -> Iterator[Pair]:
        for number, record in _json_records(path, name, meter):
            if columns and isinstance(record, dict) and "translation" not in record:
                record = {"translation": record}
            yield pair_from_record(record, "translation", direction, name, number)

    return _not_empty(pairs(), path)


def read_json_records(path: Path) -> list[tuple[int, Any]]:
    """Return the records of JSON Lines or of one JSON list, numbered from 1."""
    return list(_json_records(path, str(path), None))


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
    """Return the pairs of :func:`text_blocks` as a list."""
    return list(chain.from_iterable(text_blocks(source, target, _PAIRS, names)))


def text_blocks(
    source: Path,
    target: Path,
    size: int,
    names: tuple[str, str] | None = None,
    *,
    meter: Meter | None = None,
    encoding: str = "utf-8",
) -> Iterator[Block]:
    """Read two files with one sentence per line; different numbers of lines raise :class:`DataError` at their end.

    ``encoding`` is that of the :class:`~llamafactory_sekd.data.checks.Block` objects.
    """
    name = " / ".join(names or (str(source), str(target)))
    return _not_empty(_side_by_side(source, target, size, name, meter, encoding), source)


def _side_by_side(
    source: Path, target: Path, size: int, name: str, meter: Meter | None, encoding: str
) -> Iterator[Block]:
    sides = iterate_lines(source, meter, encoding), iterate_lines(target, meter, encoding)
    first: list[list[str]] = []
    done = 0
    while True:
        lefts, rights = (list(islice(side, size)) for side in sides)
        first = first or [lefts[:1], rights[:1]]
        for path, texts in zip((source, target), first, strict=True):
            # One carriage return in the first line may be text, unless the numbers of lines differ.
            if any(text.count("\r") > (len(lefts) == len(rights)) for text in texts):
                raise _carriage_returns(path, 1)
        if len(lefts) != len(rights):
            raise _misaligned(source, target)
        if not lefts:
            return
        yield Block(lefts, rights, name, range(done + 1, done + 1 + len(lefts)), encoding)
        done += len(lefts)


def _carriage_returns(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}:{number}: the lines end with carriage returns alone: convert them, for example with `tr '\\r' '\\n'`."
    )


def _misaligned(source: Path, target: Path) -> DataError:
    lines, others = (sum(1 for _ in iterate_lines(path)) for path in (source, target))
    return DataError(
        f"Misaligned files: {source} has {lines} lines and {target} has {others}; "
        "line n of one must be the translation of line n of the other."
    )


def tsv_pairs(
    path: Path, direction: Direction | None = None, *, quoted: bool = False, meter: Meter | None = None
) -> Iterator[Pair]:
    """Read lines of ``source<TAB>target``; another number of columns raises :class:`DataError`.

    A first line with the names of columns is refused, since which column is the source must not be guessed.
    ``direction`` adds its codes and languages to the names that are known. Quotation marks are text, except with
    ``quoted``: then they are those that a spreadsheet writes.
    """
    rows = _quoted_rows(path, meter) if quoted else _plain_rows(path, meter)
    return _not_empty(_two_columns(rows, path, direction), path)


def _plain_rows(path: Path, meter: Meter | None) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(iterate_lines(path, meter), start=1):
        # A blank line is a finding, not another layout.
        yield number, line.split("\t") if line.strip() else ["", ""]


def _quoted_rows(path: Path, meter: Meter | None) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((f"{line}\n" for line in iterate_lines(path, meter)), delimiter="\t", strict=True)
    number = 1
    try:
        for row in reader:
            yield number, row or ["", ""]
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{number}: the quotation marks are not those of a spreadsheet ({error}): leave out --quoted, or "
            "fix the line."
        ) from error


def _two_columns(rows: Iterator[tuple[int, list[str]]], path: Path, direction: Direction | None) -> Iterator[Pair]:
    name = str(path)
    for number, columns in rows:
        if any("\r" in column for column in columns) and len(columns) != 2:
            raise _carriage_returns(path, number)
        if len(columns) == 1:
            raise DataError(
                f"{path}:{number}: 1 column instead of 2 (source, tab, target): convert CSV, TMX or XLIFF first."
            )
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
        yield Pair(columns[0], columns[1], name, number)


def _is_header(columns: list[str], direction: Direction | None) -> bool:
    known = {"source", "target", "src", "tgt", "trg", "source_text", "target_text", "sentence1", "sentence2"}
    if direction is not None:
        sides = (direction.source, direction.target, direction.source_language, direction.target_language)
        known |= {side.lower() for side in sides}
    return all(column.strip().strip('"').lower() in known for column in columns)


def read_lines(path: Path) -> list[str]:
    """Return the lines of :func:`iterate_lines` as a list."""
    return list(iterate_lines(path))


def iterate_lines(path: Path, meter: Meter | None = None, encoding: str = "utf-8") -> Iterator[str]:
    r"""Read the lines of a text file without their ends; only ``\n`` and ``\r\n`` end a line."""

    def blocks() -> Iterator[list[str]]:
        with _open_text(path, meter, encoding) as text:
            yield from _line_blocks(text, "", str(path))

    return chain.from_iterable(blocks())


def _line_blocks(text: TextIO, start: str, name: str) -> Iterator[list[str]]:
    """Give the lines of an open file that begins with ``start``, as many at a time as a chunk holds."""
    chunk, number = start or text.read(_CHUNK), 1
    rest: list[str] = []
    while chunk:
        if "\n" not in chunk:
            rest.append(chunk)
            if len(rest) * _CHUNK > LONGEST_LINE:
                raise DataError(
                    f"{name}:{number}: a line of more than {LONGEST_LINE:,} characters: give a text with one sentence "
                    "on each line."
                )
        else:
            joined = "".join((*rest, chunk))
            lines = joined.split("\n")
            rest = [lines.pop()]
            if "\r" in joined:
                lines = [line.removesuffix("\r") for line in lines]
            number += len(lines)
            yield lines
        chunk = text.read(_CHUNK)
    last = "".join(rest)
    if last:
        yield [last.removesuffix("\r")]


@contextmanager
def _open_text(path: Path, meter: Meter | None = None, encoding: str = "utf-8") -> Iterator[TextIO]:
    """Open a text file, unpacked where its first bytes are those of gzip, bzip2 or xz, whatever its name."""
    packed = False
    try:
        with ExitStack() as open_files:
            raw = open_files.enter_context(open(path, "rb"))
            if meter is not None:
                meter.watch(raw, path.stat().st_size)
            stream: Any = raw
            start = raw.peek(_HEAD)[:_HEAD]
            for mark, unpack in _PACKED.items():
                if start.startswith(mark):
                    packed = True
                    stream = open_files.enter_context(unpack(raw))
                    start = stream.peek(_HEAD)[:_HEAD]
                    break
            refuse_what_is_no_text(path, start)
            if start.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            yield open_files.enter_context(
                io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="\n")
            )
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if packed:
            raise DataError(f"Cannot unpack {path} ({one_line(str(error))}): copy or download it again.") from error
        raise DataError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error


def _json_records(path: Path, name: str, meter: Meter | None) -> Iterator[tuple[int, Any]]:
    with _open_text(path, meter) as text:
        head = text.read(_CHUNK)
        while head.isspace() and (more := text.read(_CHUNK)):
            head += more
        if head.lstrip().startswith("["):  # a list may be one line, so it is not read by lines
            yield from enumerate(_list_items(text, head, name, 1), start=1)
            return
        for number, line in enumerate(chain.from_iterable(_line_blocks(text, head, name)), start=1):
            if line.strip():
                yield number, _parse(line, name, number)


def _list_items(text: TextIO, first: str, name: str, line: int) -> Iterator[Any]:
    """Read a JSON list item by item, with one item and a chunk of the file in memory."""
    decode = json.JSONDecoder().raw_decode
    buffer, at, ended = first, first.index("[") + 1, False

    def skip_space() -> None:
        nonlocal buffer, at, line, ended
        while True:
            end = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
            if end < len(buffer) or ended:
                at = end
                return
            line += buffer.count("\n")
            more = text.read(_CHUNK)
            buffer, at, ended = more, 0, not more

    def wrong(words: str, place: int) -> DataError:
        return DataError(f"{name}:{line + buffer.count(chr(10), 0, place)}: not valid JSON ({words}).")

    skip_space()
    while not buffer.startswith("]", at):
        while True:
            try:
                item, at = decode(buffer, at)
                break
            except RecursionError:
                raise wrong("lists or objects inside each other without end", at) from None
            except json.JSONDecodeError as error:
                more = text.read(max(_CHUNK, len(buffer) - at)) if len(buffer) - at <= LONGEST_LINE else ""
                if not more:
                    raise wrong(error.msg, error.pos) from error
                line += buffer.count("\n", 0, at)
                buffer, at = buffer[at:] + more, 0
        yield item
        skip_space()
        if buffer.startswith(",", at):
            at += 1
            skip_space()
            if buffer.startswith("]", at):
                raise wrong("Expecting value", at)
        elif not buffer.startswith("]", at):
            raise wrong("Expecting ',' delimiter", at)
    at += 1
    skip_space()
    if at < len(buffer):
        raise wrong("Extra data", at)


def _parse(text: str, name: str, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{number}: not valid JSON ({error.msg}).") from error
    except RecursionError:
        raise DataError(
            f"{name}:{number}: not a record, but lists or objects inside each other without end."
        ) from None


def _not_empty(found: Iterator[_Found], path: Path) -> Iterator[_Found]:
    first = next(found, None)
    if first is None:
        raise DataError(f"{path} holds no sentences.")
    yield first
    yield from found
