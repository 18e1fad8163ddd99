"""What a file is that should be text, told by its first bytes: its name may say anything."""

from __future__ import annotations

import codecs
from pathlib import Path

from llamafactory_sekd.errors import DataError


_NO_TEXT: dict[bytes, str] = {
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"SQLite format 3": "a database of SQLite",
    b"\x93NUMPY": "an array of NumPy",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive (unpack it first)",
    b"Rar!": "a RAR archive (unpack it first)",
    b"\x04\x22\x4d\x18": "compressed with lz4 (unpack it with `lz4 -d`)",
    b"\xd0\xcf\x11\xe0": "a document of an old Office",
    b"{\\rtf": "an RTF document",
    b"\x89PNG": "an image",
    b"\x28\xb5\x2f\xfd": "compressed with zstd (unpack it with `zstd -d`)",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"%PDF-": "a PDF document",
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS, not the data (fetch it with `git lfs pull`)",
}
_TAR = slice(257, 262)  # where a tar archive, which begins with a file's name, says what it is


def refuse_what_is_no_text(path: Path, start: bytes) -> None:
    """Raise :class:`DataError` with the kind of a file whose first bytes, ``start``, are not those of text."""
    for mark, what in _NO_TEXT.items():
        if start.startswith(mark):
            raise DataError(f"{path} is {what}: give plain text, TSV or JSON Lines.")
    if start[_TAR] == b"ustar":
        raise DataError(f"{path} is a tar archive: unpack it first, for example with `tar -xf`.")
    if start[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{path} is an HTML page, probably a download's error message: download it again.")
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or start.count(0) > 0.6 * len(start):
        raise DataError(f"{path} is UTF-32: convert it to UTF-8, for example with `iconv -f UTF-32 -t UTF-8`.")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _is_utf16(start):
        raise DataError(f"{path} is UTF-16: convert it to UTF-8, for example with `iconv -f UTF-16 -t UTF-8`.")


def _is_utf16(head: bytes) -> bool:
    """Tell UTF-16 without a mark by its NUL bytes, nearly all at even or nearly all at odd places.

    Text in a Latin script with stray NUL characters has few of them; those pairs are findings.
    """
    even, odd = head[0::2].count(0), head[1::2].count(0)
    return max(even, odd) > 0.2 * len(head) and min(even, odd) <= 0.1 * max(even, odd)
