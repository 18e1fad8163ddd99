"""Translations as files: text, line by line as it was read, or a data set of LLaMA-Factory."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.products import (
    DATASET_INFO,
    Product,
    check_entries,
    merge_entries,
    read_manifest,
    write_product,
)
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.files import locked, write_atomic
from llamafactory_sekd.translation.choosing import Chosen, Result, findings


FORMS = (".txt", ".tsv", ".jsonl")


def form_of(path: Path | None) -> str:
    """Return the form that a file's name asks for: ``.tsv``, ``.jsonl``, or plain lines."""
    suffixes = [part for part in path.suffixes if part != ".gz"] if path is not None else []
    return suffixes[-1] if suffixes and suffixes[-1] in FORMS else ".txt"


def write_text(results: Sequence[Result], path: Path | None, stream: Any = None) -> None:
    """Write a line for each sentence, in the order of the input; ``path`` None is the ``stream``."""
    form = form_of(path)
    text = "".join(f"{_line(result, form)}\n" for result in results)
    data = text.encode("utf-8", "replace")
    if path is None:
        out = stream or sys.stdout.buffer
        out.write(data)
        out.flush()
        return
    write_atomic(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_dataset(
    results: Sequence[Result],
    name: str,
    folder: Path,
    request: dict[str, Any],
    source: dict[str, Any],
    overwrite: bool,
) -> dict[str, Any]:
    """Write ``folder/NAME.json`` and its manifest, and declare it in ``dataset_info.json``; return the manifest.

    Translations with a problem are left out, and the manifest has the lines of them.

    Raises:
        DataError: nothing is left, or the folder holds something else under that name.
    """
    records = [
        json.dumps({**result.sentence.record, "output": chosen.text}, ensure_ascii=False)
        for result in results
        for chosen in result.chosen
        if chosen.problem is None
    ]
    found = findings(results)
    if not records:
        raise DataError(f"Nothing is left for the data set {name!r}: {found.summary()}.")
    data = ("[\n" + ",\n".join(records) + "\n]\n").encode("utf-8", "replace")
    product = Product({f"{name}.json": (data, len(records))}, found, source, "that of the sources and of the model")
    entries = {name: {"file_name": f"{name}.json"}}
    path = folder / f"{name}.manifest.json"
    with locked(folder / ".sekd.lock"):
        check_entries(folder / DATASET_INFO, entries, overwrite)
        manifest = read_manifest(path)
        if manifest is not None and not overwrite and manifest.get("request") == request:
            overwrite = True  # of the same request: another version of a package may word a finding differently
        manifest = write_product(path, request, product, overwrite)
        merge_entries(folder / DATASET_INFO, entries, overwrite)
    return manifest


def _line(result: Result, form: str) -> str:
    best = result.chosen[0]
    sentence = result.sentence
    if form == ".txt":
        return best.text
    source = sentence.source if sentence.source is not None else sentence.message
    if form == ".tsv":
        return "\t".join(" ".join(text.replace("\t", " ").split("\n")) for text in (source, best.text))
    entry: dict[str, Any] = {"source": source, "translation": best.text}
    if sentence.direction is not None:
        entry["direction"] = str(sentence.direction)
    if sentence.reference is not None:
        entry["reference"] = sentence.reference
    if len(result.chosen) > 1 or best.score is not None:
        entry["candidates"] = [_candidate(chosen) for chosen in result.chosen]
    if best.problem is not None:
        entry["problem"] = best.problem.key
    return json.dumps(entry, ensure_ascii=False)


def _candidate(chosen: Chosen) -> dict[str, Any]:
    return {"text": chosen.text, **({"score": round(chosen.score, 4)} if chosen.score is not None else {})}
