"""``sekd data pairs``: a user's own parallel text as instruction records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.alma import DATASET_INFO, alpaca_file
from llamafactory_sekd.data.checks import Findings, Pair, clean_pairs
from llamafactory_sekd.data.dataset_info import check_entries, merge_entries
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.manifest import Product, read_manifest, same_request, verify, write_product
from llamafactory_sekd.data.readers import read_text_pairs, read_tsv_pairs
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.files import locked, sha256_of


@dataclass(frozen=True)
class Corpus:
    """The files of a parallel corpus: two plain text files, or one TSV file."""

    files: tuple[Path, ...]

    @classmethod
    def of(cls, source: Path | None, target: Path | None, tsv: Path | None) -> Corpus:
        """Take the options ``--src``, ``--tgt`` and ``--tsv``; raises :class:`ArgumentError`."""
        if tsv is not None and source is None and target is None:
            return cls((tsv,))
        if tsv is None and source is not None and target is not None:
            return cls((source, target))
        raise ArgumentError("Give either --src FILE and --tgt FILE, or --tsv FILE.")

    def read(self) -> list[Pair]:
        """Return the pairs of the files."""
        if len(self.files) == 1:
            return read_tsv_pairs(self.files[0])
        source, target = self.files
        return read_text_pairs(source, target, names=(source.name, target.name))

    def identity(self) -> list[dict[str, str]]:
        """Return the names and digests of the files, for the manifest."""
        return [{"name": path.name, "sha256": sha256_of(path)} for path in self.files]


def prepare_pairs(
    corpus: Corpus, direction: Direction, name: str, out: Path, overwrite: bool = False
) -> tuple[dict[str, Any], bool]:
    """Write ``out/NAME.json`` and its manifest and declare it in ``out/dataset_info.json``, or verify an earlier run.

    Returns the manifest and whether the data was made now. Raises :class:`ArgumentError` and :class:`DataError`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ArgumentError(f"--name {name!r} must consist of letters, digits, '-' and '_'.")
    request = {"command": "pairs", "source": corpus.identity(), "direction": str(direction)}
    entries = {name: {"file_name": f"{name}.json"}}
    path = out / f"{name}.manifest.json"
    with locked(out / ".sekd.lock"):
        check_entries(out / DATASET_INFO, entries, overwrite)
        manifest = read_manifest(path)
        fresh = manifest is None or overwrite
        if manifest is not None and not overwrite:
            same_request(path, manifest.get("request"), request)
            verify(path, manifest)
        else:
            manifest = write_product(path, request, _build(corpus, direction, name), overwrite)
        merge_entries(out / DATASET_INFO, entries, overwrite)
        return manifest, fresh


def _build(corpus: Corpus, direction: Direction, name: str) -> Product:
    findings = Findings()
    pairs = clean_pairs(corpus.read(), findings)
    if not pairs:
        raise DataError(f"{corpus.files[0]} has no usable pair: {findings.summary()}.")
    source = {"kind": "files", "revision": None}
    return Product({f"{name}.json": alpaca_file({direction: pairs})}, findings, source, "the owner's")
