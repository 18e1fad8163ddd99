"""Translations on disk: what is finished, what is under way, and what may be used again.

Each system and direction has ``<direction>.txt`` and next to it ``<direction>.meta.json``, which says what made the
translations (the fingerprint). While a model translates, every rank appends its finished sentences to a hidden file of
its own; a killed run loses the batch it was in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.hypotheses import read_hypotheses, split_thought
from llamafactory_sekd.evaluation.translator import Translation
from llamafactory_sekd.files import read_json, write_atomic, write_json, write_lines
from llamafactory_sekd.fingerprints import sha256_of


@dataclass(frozen=True)
class Hypotheses:
    """All translations of one system in one direction.

    ``hit_limit`` (per sentence) and ``seconds`` (of decoding, by all ranks together; ``ranks`` at last) are unknown,
    None, for translations that are only scored; ``peak_memory`` (bytes of one GPU) is also where there is no GPU.
    ``thoughts`` tells before which lines there was a thought, which is no part of them; ``unaligned``, which
    sentences were translated by themselves because their document came back with another number of lines, None where
    no documents were asked for.
    """

    lines: list[str]
    fingerprint: str
    hit_limit: list[bool] | None = None
    seconds: float | None = None
    ranks: int = 1
    thoughts: list[bool] | None = None
    peak_memory: int | None = None
    unaligned: list[bool] | None = None


@dataclass(frozen=True)
class Record:
    """One finished sentence: its place in the test set, its translation, its share of the batch's seconds.

    Of a document, whose thoughts are off already: whether there were any, and whether the sentence had to be
    translated by itself.
    """

    index: int
    translation: Translation
    seconds: float
    thought: bool = False
    unaligned: bool | None = None


class Store:
    """The translations of one system in one direction, below ``folder``; ``size`` is the test set's.

    ``thought_words`` enclose what a model may write before a translation; it is taken off.
    """

    def __init__(self, folder: Path, direction: str, size: int, thought_words: tuple[str, str] | None = None) -> None:
        self.folder = folder
        self._thought_words = thought_words
        self.size = size
        self.text_path = folder / f"{direction}.txt"
        self._meta_path = folder / f"{direction}.meta.json"
        self._partial = f".{direction}.partial"

    def finished(self, fingerprint: str) -> Hypotheses | None:
        """Return the finished translations that ``fingerprint`` made, if they lie here unchanged."""
        meta = read_json(self._meta_path)
        if not isinstance(meta, dict) or meta.get("fingerprint") != fingerprint or not self.text_path.is_file():
            return None
        if sha256_of(self.text_path) != meta["text_sha256"]:
            return None
        hit, thought = set(meta["hit_limit"]), set(meta.get("thoughts", []))
        # Versions before 0.2 kept the thoughts in the file.
        lines, more = self._without_thoughts(read_hypotheses(self.text_path, self.size))
        return Hypotheses(
            lines=lines,
            fingerprint=fingerprint,
            hit_limit=[index in hit for index in range(self.size)],
            seconds=meta["seconds"],
            ranks=meta["ranks"],
            thoughts=[index in thought or more[index] for index in range(self.size)],
            peak_memory=meta.get("peak_memory"),
            unaligned=self._flags(meta.get("unaligned")),
        )

    def _flags(self, indices: list[int] | None) -> list[bool] | None:
        return None if indices is None else [index in set(indices) for index in range(self.size)]

    def resume(self, fingerprint: str) -> list[int]:
        """Gather what earlier runs of the same ``fingerprint`` left and return the indices still to translate.

        Afterwards one file holds all of it: a line that a kill tore is gone, and ranks may append files of their own.
        """
        records = self._records(fingerprint)
        merged = self.folder / f"{self._partial}.jsonl"
        if records:
            # Written before its sources are removed: a full disk or a kill in between loses nothing.
            lines = [_header(fingerprint), *(_line(record) for record in records.values())]
            write_atomic(merged, "".join(lines))
        self._remove_partials(keep=merged if records else None)
        return [index for index in range(self.size) if index not in records]

    def open_part(self, fingerprint: str, rank: int) -> Part:
        """Return the file to which ``rank`` appends."""
        return Part(self.folder / f"{self._partial}.{rank}.jsonl", fingerprint)

    def _without_thoughts(self, lines: Iterable[str]) -> tuple[list[str], list[bool]]:
        found = [split_thought(line, self._thought_words) for line in lines]
        return [text for text, _ in found], [thought for _, thought in found]

    def finish(self, fingerprint: str, ranks: int, peak_memory: int | None = None) -> Hypotheses:
        """Put the finished sentences of all ranks together, in the order of the test set."""
        records = self._records(fingerprint)
        missing = [index for index in range(self.size) if index not in records]
        if missing:
            raise RuntimeError(f"{self.text_path}: {len(missing)} sentences were not translated, first {missing[0]}")
        ordered = [records[index] for index in range(self.size)]
        lines, thoughts = self._without_thoughts(record.translation.text for record in ordered)
        done = Hypotheses(
            lines=lines,
            fingerprint=fingerprint,
            hit_limit=[record.translation.hit_limit for record in ordered],
            seconds=sum(record.seconds for record in ordered),
            ranks=ranks,
            thoughts=[found or record.thought for found, record in zip(thoughts, ordered, strict=True)],
            peak_memory=peak_memory,
            unaligned=(
                None
                if all(record.unaligned is None for record in ordered)
                else [bool(record.unaligned) for record in ordered]
            ),
        )
        write_lines(self.text_path, done.lines)
        write_json(self._meta_path, self._meta(done, sum(record.translation.tokens for record in ordered)))
        self._remove_partials()
        return done

    def _meta(self, done: Hypotheses, tokens: int) -> dict[str, Any]:
        return {
            "fingerprint": done.fingerprint,
            "text_sha256": sha256_of(self.text_path),
            "seconds": done.seconds,
            "ranks": done.ranks,
            "generated_tokens": tokens,
            "hit_limit": [index for index, hit in enumerate(done.hit_limit or []) if hit],
            "thoughts": [index for index, thought in enumerate(done.thoughts or []) if thought],
            "peak_memory": done.peak_memory,
            "unaligned": None if done.unaligned is None else [i for i, alone in enumerate(done.unaligned) if alone],
        }

    def _partials(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self._partial}*.jsonl"))

    def _remove_partials(self, keep: Path | None = None) -> None:
        for path in self._partials():
            if path != keep:
                path.unlink()

    def _records(self, fingerprint: str) -> dict[int, Record]:
        records: dict[int, Record] = {}
        for path in self._partials():
            header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            if header + "\n" == _header(fingerprint):
                # The last piece is empty, or the line that a kill tore.
                records.update((record.index, record) for record in map(_parse, lines[:-1]))
        return records


class Part:
    """A rank's own file of finished sentences, opened with the first of them."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._start = _header(fingerprint)

    def append(self, records: Iterable[Record]) -> None:
        """Append records, each as one line.

        Raises:
            EvaluationError: the system refuses; what was appended before is kept.
        """
        lines = self._start + "".join(_line(record) for record in records)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8", newline="\n") as file:
                file.write(lines)
        except OSError as error:
            raise EvaluationError(
                f"Cannot write {self._path}: {error.strerror}. The same command continues from here."
            ) from error
        self._start = ""


def _header(fingerprint: str) -> str:
    return json.dumps({"fingerprint": fingerprint}) + "\n"


def _line(record: Record) -> str:
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"


def _parse(line: str) -> Record:
    fields = json.loads(line)
    return Record(**{**fields, "translation": Translation(**fields["translation"])})
