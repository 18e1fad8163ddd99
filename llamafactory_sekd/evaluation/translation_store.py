"""Translations on disk: what is finished, what is under way, and what may be used again.

Each system and direction has ``<direction>.txt`` and next to it ``<direction>.meta.json``, which says what made the
translations (the fingerprint). While a model translates, every rank appends its finished sentences to a hidden file of
its own; a killed run loses the batch it was in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.testsets import TestSet
from llamafactory_sekd.errors import EvaluationError, one_line
from llamafactory_sekd.evaluation.evaluation_settings import Settings
from llamafactory_sekd.evaluation.systems import Translation
from llamafactory_sekd.files import locked, read_json, write_atomic, write_json, write_lines
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


# What encloses a model's thoughts, whatever template it is used with: Qwen and DeepSeek, Kimi, Magistral, Seed,
# gpt-oss (harmony), Gemma, Command A.
THOUGHT_WORDS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
# Harmony's words as they are left where another tool took out the special tokens.
_HARMONY = ("analysis", "assistantfinal")


def read_hypotheses(path: Path, expected: int) -> list[str]:
    r"""Return the translations of ``path``, one per line, checked to be ``expected`` in number.

    Only ``\\n`` and ``\\r\\n`` end a line. Raises :class:`EvaluationError` for a missing file, a wrong number of lines
    or bytes that are not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise EvaluationError(f"The hypotheses {path} do not exist: one translation per line is expected.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise EvaluationError(f"The hypotheses {path} are not UTF-8 (line {line}).") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if len(lines) != expected:
        raise EvaluationError(f"The hypotheses {path} have {len(lines)} lines, but the test set has {expected}.")
    return [one_line(line) for line in lines]


def split_thought(line: str, own: tuple[str, str] | None = None) -> tuple[str, bool]:
    """Return a translation without the thoughts before it, and whether there were any.

    ``own`` are the words of the model's template that open and close them; those of :data:`THOUGHT_WORDS` count as
    well. A thought that does not end is all that there is; the opening word may be part of the prompt, so that only
    the closing one is here.
    """
    kinds = [(opening.strip(), closing.strip()) for opening, closing in (*([own] if own else []), *THOUGHT_WORDS)]
    for _, closing in kinds:
        _, found, after = line.rpartition(closing)
        if found:
            return after.strip(), True
    if line.startswith(_HARMONY[0]) and _HARMONY[1] in line:
        return line.rpartition(_HARMONY[1])[2].strip(), True
    for opening, _ in kinds:
        if opening in line:
            return line.partition(opening)[0].strip(), True
    return line, False


def aligned(text: str, count: int) -> list[str] | None:
    """Return the ``count`` lines of a document's translation, empty lines left out; None where it has another number.

    One sentence is one line, whatever was written.
    """
    if count == 1:
        return [one_line(text)]
    lines = [one_line(line) for line in text.split("\n") if line.strip()]
    return lines if len(lines) == count else None


_CONFIGURATION = "evaluation.json"


@contextmanager
def open_workspace(settings: Settings, test_sets: Mapping[Any, TestSet]) -> Iterator[None]:
    """Hold ``save_dir`` for the length of the block; ``test_sets`` maps the directions to their test sets.

    Systems and directions may be added to an
    evaluation; what all systems share may not change. Raises :class:`EvaluationError` when ``save_dir`` holds
    something else, when it was made with another configuration, or when another run is at work in it.
    """
    folder = settings.save_dir
    check_workspace(settings, test_sets)
    busy = f"Another evaluation is running in `save_dir` {folder}: wait for it to end."
    with locked(folder / ".lock", busy, error=EvaluationError):
        known = (read_json(folder / _CONFIGURATION) or {}).get("test_sets", {})
        now = {str(direction): test_set.fingerprint for direction, test_set in test_sets.items()}
        write_json(folder / _CONFIGURATION, {**_shared(settings), "test_sets": {**known, **now}})
        yield


def check_workspace(settings: Settings, test_sets: Mapping[Any, TestSet]) -> None:
    """Raise :class:`EvaluationError` when ``save_dir`` cannot take this evaluation."""
    folder = settings.save_dir
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"`save_dir` {folder} is a file, not a directory.")
    before = read_json(folder / _CONFIGURATION)
    if before is None:
        # Hidden files are ours: the lock, and what a killed run was writing.
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise EvaluationError(f"`save_dir` {folder} holds something other than an evaluation: use another one.")
        return
    for key, value in _shared(settings).items():
        if before.get(key) != value:
            raise _other_configuration(folder, f"`{key}` {before.get(key)}", str(value))
    for direction, test_set in test_sets.items():
        if before["test_sets"].get(str(direction), test_set.fingerprint) != test_set.fingerprint:
            raise _other_configuration(folder, f"another {direction} test set", settings.task_dir.as_posix())


def _other_configuration(folder: Path, before: str, now: str) -> EvaluationError:
    return EvaluationError(
        f"`save_dir` {folder} holds an evaluation with {before}, and this one has {now}: use another `save_dir`."
    )


def _shared(settings: Settings) -> dict[str, Any]:
    return {"task": settings.task, "template": settings.template, **settings.decoding.model_dump()}
