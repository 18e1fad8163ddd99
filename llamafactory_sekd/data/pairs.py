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
from llamafactory_sekd.data.prompts import PARROT, PLAIN, Prompt
from llamafactory_sekd.data.readers import read_json_pairs, read_text_pairs, read_tsv_pairs
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.files import locked, sha256_of


@dataclass(frozen=True)
class Corpus:
    """The files of a parallel corpus: two plain text files, one TSV file, or one file of JSON records."""

    files: tuple[Path, ...]
    json: bool = False

    @classmethod
    def of(cls, source: Path | None, target: Path | None, tsv: Path | None, json_file: Path | None = None) -> Corpus:
        """Take the options ``--src``, ``--tgt``, ``--tsv`` and ``--json``; raises :class:`ArgumentError`."""
        match (source, target, tsv, json_file):
            case (Path(), Path(), None, None):
                return cls((source, target))
            case (None, None, Path(), None):
                return cls((tsv,))
            case (None, None, None, Path()):
                return cls((json_file,), json=True)
        raise ArgumentError("Give either --src FILE and --tgt FILE, or --tsv FILE, or --json FILE.")

    def read(self, direction: Direction) -> list[Pair]:
        """Return the pairs of the files."""
        if self.json:
            return read_json_pairs(self.files[0], direction, self.files[0].name, columns=True)
        if len(self.files) == 1:
            return read_tsv_pairs(self.files[0], direction)
        source, target = self.files
        return read_text_pairs(source, target, names=(source.name, target.name))

    def identity(self) -> list[dict[str, str]]:
        """Return the names and digests of the files, for the manifest."""
        return [{"name": path.name, "sha256": sha256_of(path)} for path in self.files]


def prepare_pairs(
    corpus: Corpus,
    direction: Direction,
    name: str,
    out: Path,
    overwrite: bool = False,
    *,
    prompt: Prompt = PARROT,
    both: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Write ``out/NAME.json`` and its manifest and declare it in ``out/dataset_info.json``, or verify an earlier run.

    ``prompt`` words the records; ``both`` adds the opposite direction, pair by pair as many records again. Returns the
    manifest and whether the data was made now. Raises :class:`ArgumentError` and :class:`DataError`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ArgumentError(f"--name {name!r} must consist of letters, digits, '-' and '_'.")
    request: dict[str, Any] = {"command": "pairs", "source": corpus.identity(), "direction": str(direction)}
    # Only what differs from the usual: data of earlier versions is still the same request.
    request |= {} if prompt == PARROT else {"prompt": prompt.name if prompt == PLAIN else prompt.text}
    request |= {"both": True} if both else {}
    names = [direction.source_name, direction.target_name]
    request |= {"names": names} if any(names) else {}
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
            manifest = write_product(path, request, _build(corpus, direction, name, prompt, both), overwrite)
        merge_entries(out / DATASET_INFO, entries, overwrite)
        return manifest, fresh


def _build(corpus: Corpus, direction: Direction, name: str, prompt: Prompt, both: bool) -> Product:
    findings = Findings()
    pairs = clean_pairs(corpus.read(direction), findings)
    if not pairs:
        raise DataError(f"{corpus.files[0]} has no usable pair: {findings.summary()}.")
    source = {"kind": "files", "revision": None}
    sides = {direction: pairs}
    if both:
        sides[direction.reversed] = [pair.reversed for pair in pairs]
    return Product({f"{name}.json": alpaca_file(sides, prompt)}, findings, source, "the owner's")
