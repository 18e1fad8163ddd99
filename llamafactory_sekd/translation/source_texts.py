"""What is to be translated: lines, columns, records of a data set or of ALMA, each with its place in its file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.alma import alma_files, alma_root, read_alma
from llamafactory_sekd.data.checks import Problem, unusable_text
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.products import DATASET_INFO
from llamafactory_sekd.data.prompts import AlpacaRecord, Prompt, prompt_in_manifest
from llamafactory_sekd.data.readers import read_json_records, read_lines
from llamafactory_sekd.errors import DataError, one_line, suggestion
from llamafactory_sekd.files import read_json
from llamafactory_sekd.fingerprints import sha256_of


STDIN = Path("/dev/stdin")
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Sentence:
    """One thing to translate.

    ``source`` is None where a record does not have the sentence apart from its prompt, ``direction`` where nothing
    says it, ``reference`` where there is none. With a ``problem`` it is not translated, nor where it keeps the
    reference.
    """

    record: AlpacaRecord
    source: str | None
    direction: Direction | None
    reference: str | None
    file: str
    line: int
    problem: Problem | None = None
    keeps_reference: bool = False

    @property
    def is_translated(self) -> bool:
        """Tell whether the model is asked."""
        return self.problem is None and not self.keeps_reference

    @property
    def message(self) -> str:
        """Return the user's turn as LLaMA-Factory builds it from the record."""
        return "\n".join(part for part in (self.record["instruction"], self.record["input"]) if part)


@dataclass(frozen=True)
class Texts:
    """All sentences in their order, the digests of their files, and the name of the prompt for the manifest."""

    sentences: list[Sentence]
    files: dict[str, str]
    prompt: str


def read_file(path: Path, directions: Sequence[Direction], prompt: Prompt) -> Texts:
    """Read plain lines, TSV (a second column is the reference) or JSON Lines, by the file's name; packed ones too.

    JSON records have the sides as ALMA's do: ``{"translation": {"en": …, "de": …}}`` or ``{"en": …}``; a target side
    is a reference. ``directions`` share the text: each sentence is translated into all of them.
    """
    suffix = next((part for part in reversed(path.suffixes) if part not in (".gz", ".bz2", ".xz")), "")
    sentences = []
    for direction in directions:
        if suffix in (".json", ".jsonl"):
            rows = [(number, *_sides(record, direction, path, number)) for number, record in read_json_records(path)]
        elif suffix == ".tsv":
            rows = [(number, *_columns(line, path, number)) for number, line in enumerate(read_lines(path), start=1)]
        else:
            rows = [(number, line, None) for number, line in enumerate(read_lines(path), start=1)]
        sentences += [_sentence(*row, direction, str(path), prompt) for row in rows]
    if not sentences:
        raise DataError(f"{path} holds no sentences.")
    digest = "" if path == STDIN else sha256_of(path)
    return Texts(sentences, {path.name: digest}, _prompt_name(prompt))


def read_alma_split(folder: Path, split: str, directions: Sequence[Direction], prompt: Prompt) -> Texts:
    """Read a split of a clone of ALMA; its other side is the reference."""
    root = alma_root(folder)
    sentences: list[Sentence] = []
    files: dict[str, str] = {}
    for direction in directions:
        sentences += [
            _sentence(pair.line, pair.source, pair.target, direction, pair.file, prompt)
            for pair in read_alma(root, direction, split)
        ]
        files |= {path.name: sha256_of(path) for path in alma_files(root, direction, split)}
    return Texts(sentences, files, _prompt_name(prompt))


def read_dataset(name: str, folder: Path, target: str | None) -> Texts:
    """Read the records of a data set of ``dataset_info.json``; their prompts stay as they are.

    ``target`` is the code of the language of all of them; without it, the wording of our own prompts says it.
    """
    data = declared(name, folder)
    path = data.path
    made_for = prompt_in_manifest(path)
    sentences = []
    for number, order, sentence, answer in data.records():
        direction = _direction_of(order, target)
        plain = Sentence(
            {"instruction": order, "input": sentence, "output": ""}, None, direction, None, path.name, number
        )
        problem = _unusable(plain.message)
        sentences.append(replace(plain, source=sentence or None, reference=answer or None, problem=problem))
    if not sentences:
        raise DataError(f"{path} holds no records.")
    return Texts(sentences, {path.name: sha256_of(path)}, made_for or "that of the records")


def mixed(texts: Texts, share: float, seed: int) -> Texts:
    """Let all but a ``share`` of the sentences keep their reference.

    A hash of seed and prompt decides, so that the same sentence is always on the same side.

    Raises:
        DataError: a sentence has no reference.
    """
    sentences = []
    for sentence in texts.sentences:
        if sentence.reference is None and sentence.problem is None:
            raise DataError(f"{sentence.file}:{sentence.line} has no reference to mix with: remove --mix.")
        digest = hashlib.blake2b(f"{seed} {sentence.message}".encode("utf-8", "replace"), digest_size=8).digest()
        keeps = sentence.problem is None and int.from_bytes(digest, "big") >= share * 2**64
        sentences.append(replace(sentence, keeps_reference=keeps))
    return replace(texts, sentences=sentences)


def _sentence(
    number: int, source: str, reference: str | None, direction: Direction, file: str, prompt: Prompt
) -> Sentence:
    problem = _unusable(source)
    text = "" if problem is not None else one_line(source)
    answer = one_line(reference) if reference and unusable_text(reference) is None else None
    return Sentence(prompt.record(text, "", direction), text, direction, answer, file, number, problem)


def _unusable(text: str) -> Problem | None:
    found = unusable_text(text)
    return Problem.EMPTY_SIDE if found is Problem.BLANK else found


def _columns(line: str, path: Path, number: int) -> tuple[str, str | None]:
    columns = line.split("\t")
    if len(columns) > 2:
        raise DataError(
            f"{path}:{number}: {len(columns)} columns, and at most 2 are read (source, reference); keep them, for "
            "example with `cut -f1,2`."
        )
    return columns[0], columns[1] if len(columns) == 2 else None


def _sides(record: Any, direction: Direction, path: Path, number: int) -> tuple[str, str | None]:
    sides = record.get("translation", record) if isinstance(record, dict) else None
    source = sides.get(direction.source) if isinstance(sides, dict) else None
    if not isinstance(sides, dict) or not isinstance(source, str):
        raise DataError(f'{path}:{number}: expected {{"{direction.source}": text, …}}, got {record!r:.80}.')
    reference = sides.get(direction.target)
    return source, reference if isinstance(reference, str) else None


def _prompt_name(prompt: Prompt) -> str:
    return prompt.name if prompt.name in ("parrot", "plain") else prompt.text


_ORDER = re.compile(r"Translate the following sentences from (.+?) to (.+?)\.(?:\n|$)")


def _direction_of(instruction: str, target: str | None) -> Direction | None:
    """Return the direction that the wording of our own prompts names; ``target`` is what the user said."""
    found = _ORDER.match(instruction)
    codes = [_code_of(name) for name in found.groups()] if found else [None, None]
    wanted = target or codes[1]
    return Direction(codes[0] or "und", wanted) if wanted is not None else None


@cache
def _code_of(name: str) -> str | None:
    from langcodes import find

    try:
        return str(find(name))
    except LookupError:
        return None


# As LLaMA-Factory fills in what an entry leaves out.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
_CONVERSATIONS = ("sharegpt", "openai")


@dataclass(frozen=True)
class Declared:
    """An entry of ``dataset_info.json``, the names of its columns with their defaults, and its file."""

    name: str
    entry: dict[str, Any]
    columns: dict[str, str]
    path: Path

    @property
    def is_alpaca(self) -> bool:
        """Whether its records are in alpaca format."""
        return self.entry.get("formatting", "alpaca") == "alpaca"

    def records(self) -> Iterator[tuple[int, str, str, str]]:
        """Yield the number of each record, its instruction, its input and its answer; those that lack are empty.

        Raises:
            DataError: a record is none, or a conversation of more than a question and its answer.
        """
        for number, record in read_json_records(self.path):
            where = f"{self.path}:{number}"
            if self.is_alpaca:
                if not isinstance(record, dict):
                    raise DataError(f"{where}: expected a record with {self.columns['prompt']!r}, got {record!r:.80}.")
                texts = [record.get(self.columns[key]) or "" for key in _ALPACA]
                if not all(isinstance(text, str) for text in texts):
                    raise DataError(f"{where}: expected texts, got {texts!r:.80}.")
                yield number, texts[0], texts[1], texts[2]
            else:
                yield number, *self._only_turn(record, where)

    def _only_turn(self, record: Any, where: str) -> tuple[str, str, str]:
        tags = {**_TAGS, **(self.entry.get("tags") or {})}
        turns = record.get(self.columns["messages"]) if isinstance(record, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise DataError(f"{where}: expected a record with {self.columns['messages']!r}, got {record!r:.80}.")
        roles = [turn.get(tags["role_tag"]) for turn in turns]
        if roles not in ([tags["user_tag"]], [tags["user_tag"], tags["assistant_tag"]]):
            found = ", ".join(map(str, roles)) or "no turn"
            raise DataError(
                f"{where}: what is translated is a question of {tags['user_tag']!r} and an answer of "
                f"{tags['assistant_tag']!r}, and this conversation has {found}."
            )
        texts = [str(turn.get(tags["content_tag"]) or "") for turn in turns]
        return texts[0], "", texts[1] if len(texts) > 1 else ""


def declared(name: str, folder: Path) -> Declared:
    """Return a data set of the ``dataset_info.json`` in a folder.

    Raises:
        DataError: there is none of that name in a local file, or it has columns that are not passed on.
    """
    info = read_json(folder / DATASET_INFO)
    entry = info.get(name) if isinstance(info, dict) else None
    if not isinstance(entry, dict):
        known = info if isinstance(info, dict) else {}
        raise DataError(f"{folder / DATASET_INFO} declares no data set {name!r}{suggestion(name, known)}")
    if entry.get("formatting", "alpaca") not in ("alpaca", *_CONVERSATIONS):
        raise DataError(f"Data set {name!r}: `formatting: {entry['formatting']}` is not one of LLaMA-Factory's.")
    if not all(isinstance(entry.get(key) or {}, Mapping) for key in ("columns", "tags")):
        raise DataError(f"Data set {name!r}: `columns` and `tags` of {folder / DATASET_INFO} must be mappings.")
    if not isinstance(entry.get("file_name"), str):
        raise DataError(f"Data set {name!r} is not in a file: give its text with --in.")
    columns = {**_ALPACA, "messages": "conversations", **(entry.get("columns") or {})}
    for key in ("system", "history", "tools", "images"):
        if columns.get(key):
            raise DataError(f"Data set {name!r} has a column for {key!r}, which the translator does not pass on.")
    return Declared(name, entry, columns, folder / entry["file_name"])
