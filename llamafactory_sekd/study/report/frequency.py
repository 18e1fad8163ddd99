"""Do the systems get the rare words? Recall of the references' words by their frequency in the training text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import instruction
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.study.report.cells import Cell, Group, Study, Summary, summarize
from llamafactory_sekd.study.report.sentence_texts import Texts


# The smallest frequency of each bucket.
BUCKETS = {"0": 0, "1–4": 1, "5–19": 5, "20–99": 20, "100–999": 100, "1,000+": 1000}


@dataclass(frozen=True)
class Recall:
    """Per bucket: how many words of the references fall into it, and of them each group's share (0 to 1)."""

    words: tuple[int, ...]
    shares: tuple[tuple[Summary | None, ...], ...]


@dataclass(frozen=True)
class _Words:
    """A direction's references: per sentence its words with their counts, and how often training has each word."""

    split: Callable[[str], list[str]]
    references: Sequence[Counter[str]]
    training: Mapping[str, int]

    def hits(self, hypotheses: Sequence[str] | None) -> list[int]:
        """Return per bucket how many words of the references stand in the translations; None counts them all."""
        found = [0] * len(BUCKETS)
        for index, reference in enumerate(self.references):
            common = reference if hypotheses is None else reference & Counter(self.split(hypotheses[index]))
            for word, count in common.items():
                found[_bucket(self.training.get(word, 0))] += count
        return found


def word_recall(study: Study, texts: Texts, groups: Sequence[Group]) -> Recall:
    """Return the recall over all directions together, one row of shares per group.

    A word is a token of BLEU's tokenizer with a letter or a digit in it. It counts as often as it appears in both the
    reference and the translation of a sentence. Raises :class:`DataError` where the training text cannot be read.
    """
    records = training_records(study.groups[0])
    words = {direction: _words(texts, records, direction) for direction in study.directions}
    totals = _summed(one.hits(None) for one in words.values())

    def shares(cell: Cell) -> list[float | None]:
        hits = _summed(one.hits(texts.hypotheses(cell, direction)) for direction, one in words.items())
        return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]

    by_group = [[shares(cell) for cell in group.cells.values()] for group in groups]
    return Recall(
        tuple(totals),
        tuple(tuple(summarize(seeds) for seeds in zip(*cells, strict=True)) for cells in by_group),
    )


def training_records(group: Group) -> list[Mapping[str, Any]]:
    """Return the records that a group was trained on, in LLaMA-Factory's alpaca format, from its local files.

    Raises :class:`DataError` for a data set from elsewhere, in another format, or that is not there.
    """
    config = next(iter(group.cells.values()))["config"]
    folder = Path(config.get("dataset_dir") or "data")
    records: list[Mapping[str, Any]] = []
    for name in str(config.get("dataset") or "").split(","):
        try:
            entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name.strip()]
            text = (folder / entry["file_name"]).read_text(encoding="utf-8")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"The training text {name!r} cannot be read below {folder} ({error!r:.120}).") from None
        column = (entry.get("columns") or {}).get("response", "output")
        loaded = _parsed(text)
        if not all(isinstance(record, dict) and isinstance(record.get(column), str) for record in loaded):
            raise DataError(f"The training text {name!r} has records without a text in {column!r}.")
        records += [{**record, "output": record[column]} for record in loaded]
    return records


def _parsed(text: str) -> list[Any]:
    """Read a JSON list, or one record per line."""
    try:
        lines = [line for line in text.split("\n") if line.strip()]  # `splitlines` would cut sentences at U+2028
        content = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, lines))
    except ValueError:
        return [None]
    return content


def _words(texts: Texts, records: Sequence[Mapping[str, Any]], direction: str) -> _Words:
    tokenizer = texts.metric("bleu", direction).tokenizer

    def split(text: str) -> list[str]:
        return [token for token in tokenizer(text).split() if any(map(str.isalnum, token))]

    wanted = instruction(parse_direction(direction))
    own = [record["output"] for record in records if record.get("instruction") == wanted]
    training = Counter(word for target in own or [record["output"] for record in records] for word in split(target))
    references = [Counter(split(reference)) for reference in texts.test_set(direction).references]
    return _Words(split, references, training)


def _bucket(frequency: int) -> int:
    return max(index for index, low in enumerate(BUCKETS.values()) if frequency >= low)


def _summed(rows: Any) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]
