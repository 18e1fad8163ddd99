"""Data sets of ``dataset_info.json`` as prompts and answers: alpaca records, and conversations of one turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.products import DATASET_INFO
from llamafactory_sekd.data.readers import read_json_records
from llamafactory_sekd.errors import DataError, suggestion
from llamafactory_sekd.files import read_json


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
