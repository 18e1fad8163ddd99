"""``sekd data pairs``: a user's own parallel text as instruction records, in as little memory for any size."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.checks import Block, Findings, Pair, Problem, check_languages, clean_block
from llamafactory_sekd.data.heldout import HeldOut, hold_out
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.products import (
    DATASET_INFO,
    Product,
    ResumableFile,
    Written,
    check_entries,
    merge_entries,
    plain_files,
    read_manifest,
    same_request,
    verify,
    write_product,
)
from llamafactory_sekd.data.prompts import PARROT, PLAIN, Prompt
from llamafactory_sekd.data.readers import Meter, json_pairs, text_blocks, tsv_pairs
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.files import locked
from llamafactory_sekd.fingerprints import sha256_of


# What is done, bytes read, bytes in all, pairs read.
Progress = Callable[[str, int, int, int], None]

_BLOCK = 5000  # pairs between two writes and two reports
_FEW = 10  # pairs from which on it says something that all are alike
_NOTED = 500_000  # pairs between two notes of how far it is


@dataclass(frozen=True)
class Corpus:
    """The files of a parallel corpus: two plain text files, one TSV file, or one file of JSON records."""

    files: tuple[Path, ...]
    json: bool = False
    quoted: bool = False

    @classmethod
    def of(
        cls,
        source: Path | None,
        target: Path | None,
        tsv: Path | None,
        json_file: Path | None = None,
        *,
        quoted: bool = False,
    ) -> Corpus:
        """Take the options ``--src``, ``--tgt``, ``--tsv``, ``--json`` and ``--quoted``.

        Raises:
            ArgumentError: they do not go together.
        """
        if quoted and tsv is None:
            raise ArgumentError("--quoted is about the quotation marks of a --tsv FILE, which is missing.")
        match (source, target, tsv, json_file):
            case (Path(), Path(), None, None):
                return cls((source, target))
            case (None, None, Path(), None):
                return cls((tsv,), quoted=quoted)
            case (None, None, None, Path()):
                return cls((json_file,), json=True)
        raise ArgumentError("Give either --src FILE and --tgt FILE, or --tsv FILE, or --json FILE.")

    def blocks(self, direction: Direction, meter: Meter | None = None, encoding: str = "utf-8") -> Iterator[Block]:
        """Give the pairs of the files, many at a time; only of two files with another encoding of the blocks."""
        if len(self.files) == 2:
            source, target = self.files
            names = source.name, target.name
            yield from text_blocks(source, target, _BLOCK, names, meter=meter, encoding=encoding)
            return
        if self.json:
            pairs = json_pairs(self.files[0], direction, self.files[0].name, columns=True, meter=meter)
        else:
            pairs = tsv_pairs(self.files[0], direction, quoted=self.quoted, meter=meter)
        while block := list(islice(pairs, _BLOCK)):
            yield Block.of(block)

    @property
    def may_hold_quotes(self) -> bool:
        """Whether the quotation marks of a spreadsheet would be taken for text."""
        return len(self.files) == 1 and not self.json and not self.quoted

    @property
    def size(self) -> int:
        """The bytes of the files."""
        return sum(path.stat().st_size for path in self.files)

    def identity(self) -> list[dict[str, str]]:
        """Return the names and digests of the files, for the manifest."""
        for path in self.files:
            if path.exists() and not path.is_file():
                kind = "a folder" if path.is_dir() else "a pipe, and is read more than once"
                raise DataError(f"{path} is {kind}: give a file.")
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
    valid: int = 0,
    test: int = 0,
    progress: Progress = lambda *_: None,
) -> tuple[dict[str, Any], bool]:
    """Write ``out/NAME.jsonl`` and its manifest and declare it in ``out/dataset_info.json``, or verify an earlier run.

    An interrupted run is continued. Raises :class:`ArgumentError` and :class:`DataError`.

    Args:
        corpus: the files.
        direction: what they hold.
        name: the data set's name.
        out: where it goes.
        overwrite: whether what is there is replaced.
        prompt: words the records.
        both: whether each pair becomes a record of the opposite direction as well.
        valid: pairs to hold out as the data set and test set ``NAME_valid``.
        test: pairs to hold out as the test set ``NAME_test``.
        progress: called now and then.

    Returns:
        The manifest, and whether the data was made now.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ArgumentError(f"--name {name!r} must consist of letters, digits, '-' and '_'.")
    request: dict[str, Any] = {"command": "pairs", "source": corpus.identity(), "direction": str(direction)}
    # Only what differs from the usual: data of earlier versions is still the same request.
    request |= {} if prompt == PARROT else {"prompt": prompt.name if prompt == PLAIN else prompt.text}
    names = [direction.source_name, direction.target_name]
    request |= {"names": names} if any(names) else {}
    others = {"both": both, "quoted": corpus.quoted, "valid": valid, "test": test}
    request |= {key: value for key, value in others.items() if value}
    path = out / f"{name}.manifest.json"
    with locked(out / ".sekd.lock"):
        manifest = read_manifest(path)
        fresh = manifest is None or overwrite
        if manifest is not None and not overwrite:
            same_request(path, manifest.get("request"), request)
            verify(path, manifest)
            entries = _entries(manifest["files"])
        else:
            build = _Build(corpus, direction, prompt, both, progress)
            entries = _entries([f"{name}.jsonl", *([f"{name}_valid.jsonl"] if valid else [])])
            check_entries(out / DATASET_INFO, entries, overwrite)
            manifest = build.make(path, request, overwrite, valid, test)
        merge_entries(out / DATASET_INFO, entries, overwrite)
        return manifest, fresh


def _entries(files: Any) -> dict[str, dict[str, str]]:
    return {Path(name).stem: {"file_name": name} for name in files if name.endswith((".json", ".jsonl"))}


@dataclass(frozen=True)
class _Build:
    corpus: Corpus
    direction: Direction
    prompt: Prompt
    both: bool
    progress: Progress

    def make(self, manifest: Path, request: dict[str, Any], overwrite: bool, valid: int, test: int) -> dict[str, Any]:
        """Write everything; return the manifest."""
        name = manifest.name.removesuffix(".manifest.json")
        out = manifest.parent
        with _without_cycles(), ResumableFile(out / f"{name}.jsonl", request) as train:
            if train.path.exists() and not overwrite:
                raise DataError(
                    f"{train.path} exists without a manifest: add --overwrite to replace it, or choose another --out."
                )
            held = hold_out(self._read("Choosing", encoding="latin-1"), valid + test) if valid + test else None
            findings = Findings.from_json(train.noted.get("findings", []))
            written, records = self._train(train, held, findings)
            files: dict[str, tuple[bytes | Written, int]] = {f"{name}.jsonl": (written, records)}
            if held is not None:
                files |= self._held_out(f"{name}_valid", held.pairs[:valid], with_records=True)
                files |= self._held_out(f"{name}_test", held.pairs[valid:], with_records=False)
            product = Product(files, findings, {"kind": "files", "revision": None}, "the owner's")
            made = write_product(manifest, request, product, overwrite)
            train.discard()
            return made

    def _read(self, what: str, skip: int = 0, encoding: str = "utf-8") -> Iterator[Block]:
        """Give the pairs after the first ``skip``, a block at a time."""
        meter, total = Meter(), self.corpus.size
        done = 0
        for block in self.corpus.blocks(self.direction, meter, encoding):
            done += len(block)
            if done > skip:
                yield block[max(0, skip - (done - len(block))) :]
            self.progress(what, meter.position(), total, done)
        self.progress(what, total, total, done)

    def _train(self, train: ResumableFile, held: HeldOut | None, findings: Findings) -> tuple[Written, int]:
        held_lines = {pair.line for pair in held.pairs} if held is not None else set()
        done, records = train.noted.get("pairs", 0), train.noted.get("records", 0)
        for block in self._read("Writing" if not done else f"Continuing at pair {done:,}", skip=done):
            usable = self._usable(block, held_lines, findings)
            number = done // _BLOCK + 1
            if number & (number - 1) == 0:  # the first, second, fourth, eighth, …: few, and in all parts of a corpus
                check_languages(usable, self.direction, findings)
            before, done = done, done + len(block)
            for piece in usable.pieces():
                lines = self._lines(piece, held, findings)
                train.write("\n".join([*lines, ""]).encode())
                records += len(lines)
            if done // _NOTED > before // _NOTED:
                train.note({"pairs": done, "records": records, "findings": findings.as_json()})

        if not records:
            raise DataError(f"{self.corpus.files[0]} has no usable pair: {findings.summary()}.")
        return train.finish({"pairs": done, "records": records, "findings": findings.as_json()}), records

    def _lines(self, block: Block, held: HeldOut | None, findings: Findings) -> list[str]:
        """Return the records of the pairs that are not near to those that are held out."""
        if held is not None:
            is_near = held.near(block)
            for place in compress(range(len(block)), is_near):
                findings.add(Problem.NEAR_DUPLICATE, block[place])
            block = block.only([not near for near in is_near])
        lines = self.prompt.lines(block.sources, block.targets, self.direction)
        if self.both:
            opposite = self.prompt.lines(block.targets, block.sources, self.direction.reversed)
            lines = [line for both in zip(lines, opposite, strict=True) for line in both]
        return lines

    def _usable(self, block: Block, held_lines: set[int], findings: Findings) -> Block:
        """Return the pairs of a block that can be learned from, but for those that are held out."""
        if self.corpus.may_hold_quotes:
            all_in_marks = len(block) >= _FEW and all(map(_in_marks, block))
            for pair in block:
                if all_in_marks or _is_quoted(pair.source) or _is_quoted(pair.target):
                    findings.add(Problem.QUOTED, pair)
        if not held_lines.isdisjoint(block.lines):
            block = block.only([line not in held_lines for line in block.lines])
        return clean_block(block, findings)

    def _held_out(self, name: str, pairs: list[Pair], *, with_records: bool) -> dict[str, tuple[bytes, int]]:
        """Return a test set in the evaluation's layout and, to validate on in training, the same as a data set."""
        files: dict[str, tuple[bytes, int]] = {}
        if not pairs:
            return files
        sides = {self.direction: pairs}
        if self.both:
            sides[self.direction.reversed] = [pair.reversed for pair in pairs]
        for direction, oriented in sides.items():
            files |= plain_files(name, direction, oriented)
        if with_records:
            lines = []
            for direction, oriented in sides.items():
                block = Block.of(oriented)
                lines += self.prompt.lines(block.sources, block.targets, direction)
            files[f"{name}.jsonl"] = "".join(f"{line}\n" for line in lines).encode(), len(lines)
        return files


@contextmanager
def _without_cycles() -> Iterator[None]:
    """Switch the search for cycles off, of which pairs have none: it looks at all of a block again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _is_quoted(text: str) -> bool:
    return len(text) > 3 and text[0] == text[-1] == '"' and '""' in text[1:-1]


def _in_marks(pair: Pair) -> bool:
    """Whether both sides are in quotation marks: one pair may be quoted speech, and not all of them."""
    return all(len(side) > 1 and side[0] == side[-1] == '"' for side in (pair.source, pair.target))
