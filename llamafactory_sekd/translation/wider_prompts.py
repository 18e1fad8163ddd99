"""``sekd data informed``: a data set's records with more before them, for a better informed teacher."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.checks import Findings, Problem, unusable_text
from llamafactory_sekd.data.products import (
    DATASET_INFO,
    Product,
    check_entries,
    merge_entries,
    read_manifest,
    same_request,
    verify,
    write_product,
)
from llamafactory_sekd.data.readers import read_json_records, read_lines
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.evaluation.scores import Nearest
from llamafactory_sekd.evaluation.systems import same_text
from llamafactory_sekd.files import locked
from llamafactory_sekd.fingerprints import sha256_of
from llamafactory_sekd.translation.source_texts import declared


@dataclass(frozen=True)
class Widening:
    """What comes before the instruction of a record.

    Attributes:
        previous: so many sentences before its own, from the same document.
        examples: so many translations of sentences like its own, from the same data set.
        pool: the records of each instruction that examples are taken from, the first ones.
    """

    previous: int = 0
    examples: int = 0
    pool: int = 2000


@dataclass(frozen=True)
class _Record:
    instruction: str
    source: str
    target: str
    document: str


def write_informed(
    name: str,
    folder: Path,
    informed_name: str,
    widening: Widening,
    documents: Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], bool]:
    """Write ``folder/INFORMED.json`` and declare it, or verify what an earlier run wrote.

    The records, their order and their responses are those of the data set.

    Args:
        name: the data set, of `dataset_info.json` in `folder`.
        folder: the dataset_dir.
        informed_name: of the new data set.
        widening: what its prompts have in addition.
        documents: a line for each record, the name of its document; None where all are of one.
        overwrite: whether what is there is replaced.
        progress: called with the records done and their number.

    Returns:
        The manifest, and whether the data was made now.

    Raises:
        ArgumentError: nothing is asked for.
        DataError: the data set cannot be read, or the folder holds something else under that name.
    """
    if not (widening.previous or widening.examples):
        raise ArgumentError("Nothing is added to the prompts: give --previous N, --examples N, or both.")

    data_set = declared(name, folder)
    columns, path = data_set.columns, data_set.path
    if not data_set.is_alpaca:
        raise DataError(f"Data set {name!r}: prompts can be widened in files of alpaca format alone.")
    request: dict[str, Any] = {"command": "informed", "source": {"name": path.name, "sha256": sha256_of(path)}}
    request |= asdict(widening) | ({"documents": sha256_of(documents)} if documents is not None else {})
    entries = {informed_name: {**data_set.entry, "file_name": f"{informed_name}.json"}}
    made = folder / f"{informed_name}.manifest.json"
    with locked(folder / ".sekd.lock"):
        manifest = read_manifest(made)
        if manifest is not None and not overwrite:
            same_request(made, manifest.get("request"), request)
            verify(made, manifest)
            merge_entries(folder / DATASET_INFO, entries)
            return manifest, False

        check_entries(folder / DATASET_INFO, entries, overwrite)
        raw = [record for _, record in read_json_records(path)]
        records = _read(raw, columns, path, documents)
        lines = []
        for number, (record, prompt) in enumerate(zip(raw, prompts(records, widening), strict=True), start=1):
            lines.append(json.dumps({**record, columns["prompt"]: prompt}, ensure_ascii=False))
            progress(number, len(raw))
        data = ("[\n" + ",\n".join(lines) + "\n]\n").encode()
        product = Product(
            {f"{informed_name}.json": (data, len(lines))}, Findings(), request["source"], "that of the data set"
        )
        manifest = write_product(made, request, product, overwrite)
        merge_entries(folder / DATASET_INFO, entries, overwrite)
        return manifest, True


def prompts(records: Sequence[_Record], widening: Widening) -> Iterator[str]:
    """Yield the instruction of each record with what comes before it.

    Examples are never the record itself: none has its source or its target, in whatever case and spacing.
    """
    places: dict[str, list[int]] = defaultdict(list)  # of each instruction: sentences of one direction
    rank: list[int] = []
    for place, record in enumerate(records):
        rank.append(len(places[record.instruction]))
        places[record.instruction].append(place)

    pools = {
        instruction: ([records[place] for place in found[: widening.pool]]) for instruction, found in places.items()
    }
    nearest = {
        instruction: Nearest([record.source for record in pool] if widening.examples else [])
        for instruction, pool in pools.items()
    }
    for place, record in enumerate(records):
        parts = []
        if widening.examples:
            shots = _examples(record, pools[record.instruction], nearest[record.instruction], widening.examples)
            parts += [f"{shot.source}\n{shot.target}" for shot in shots]
        before = places[record.instruction][max(0, rank[place] - widening.previous) : rank[place]]
        previous = [records[other].source for other in before if records[other].document == record.document]
        if previous:
            parts.append("\n".join(previous))
        yield "\n\n".join([*parts, record.instruction])


def _examples(record: _Record, pool: Sequence[_Record], nearest: Nearest, count: int) -> list[_Record]:
    """Return the records of the pool that are most like a record, the nearest last."""
    own = same_text(record.source), same_text(record.target)
    found: list[_Record] = []
    for place in nearest.order(record.source):
        other = pool[place]
        if same_text(other.source) != own[0] and same_text(other.target) != own[1]:
            found.append(other)
        if len(found) == count:
            break
    return found[::-1]


def _read(raw: Sequence[Any], columns: dict[str, str], path: Path, documents: Path | None) -> list[_Record]:
    names = [""] * len(raw) if documents is None else list(read_lines(documents))
    if len(names) != len(raw):
        raise DataError(f"{documents} has {len(names):,} lines and {path} {len(raw):,} records: give one for each.")
    found = []
    for number, (record, document) in enumerate(zip(raw, names, strict=True), start=1):
        texts = [record.get(columns[key]) if isinstance(record, dict) else None for key in ("prompt", "query")]
        target = record.get(columns["response"]) if isinstance(record, dict) else None
        if not all(isinstance(text, str) and text for text in (*texts, target)):
            raise DataError(
                f"{path}:{number}: the sentence must be in {columns['query']!r}, apart from {columns['prompt']!r}, "
                f"and its translation in {columns['response']!r}."
            )
        if Problem.WRONG_ENCODING in map(unusable_text, (*map(str, texts), str(target))):
            raise DataError(f"{path}:{number}: {Problem.WRONG_ENCODING.words}: remove the record.")
        found.append(_Record(str(texts[0]), str(texts[1]), str(target), document))
    if not found:
        raise DataError(f"{path} holds no records.")
    return found
