"""Load a test set for evaluation, whatever layout the user has it in, or by its name in sacrebleu's list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llamafactory_sekd.data.alma import TASKS, alma_documents, alma_files, alma_root, read_alma
from llamafactory_sekd.data.checks import Findings, Outcome, Pair, Problem, check_languages, clean_pairs
from llamafactory_sekd.data.languages import Direction, parse_direction
from llamafactory_sekd.data.products import text_files
from llamafactory_sekd.data.readers import read_json_records, read_lines, read_text_pairs
from llamafactory_sekd.errors import DataError, EvaluationError, one_line
from llamafactory_sekd.fingerprints import sha256


@dataclass(frozen=True)
class TestSet:
    """Sentences to translate and what is known of them, aligned; no sentence contains a line break.

    ``references`` is empty for a text that nobody has translated; ``more_references`` are further sets of them.
    ``documents`` and ``domains`` have one name per sentence, or are empty. ``origin`` says where it was read and
    ``notes`` what a reader of scores has to know. ``fingerprint`` is the SHA-256 of sources and references: the same
    for the same text in any layout.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    task: str
    direction: Direction
    sources: tuple[str, ...]
    references: tuple[str, ...]
    fingerprint: str
    more_references: tuple[tuple[str, ...], ...] = ()
    documents: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    origin: str = field(default="", compare=False)
    notes: tuple[str, ...] = ()

    @property
    def reference_sets(self) -> tuple[tuple[str, ...], ...]:
        """Return all sets of references; none for a text that nobody has translated."""
        return (self.references, *self.more_references) if self.references else ()


@dataclass(frozen=True)
class _Found:
    """A test set as it was read; ``pairs`` hold the source twice where there are no references."""

    pairs: Sequence[Pair]
    origin: str
    more_references: tuple[tuple[str, ...], ...] = ()
    documents: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    has_references: bool = True
    notes: tuple[str, ...] = ()


def load_test_set(
    task: str, task_dir: str | Path, direction: str | Direction, needs_references: bool = True
) -> TestSet:
    """Load ``task`` in ``direction`` (``en-de``) from ``task_dir``, or from what sacrebleu has or can download.

    Looked for, in that order: a folder named ``task`` in ``task_dir``; ALMA's files (``wmt22``, ``wmt21_valid``);
    files in ``task_dir`` itself; a test set of sacrebleu by that name. Folders hold ``<src>-<tgt>.<lang>`` files
    (further references: ``<src>-<tgt>.<tgt>.2`` and so on; names of documents and domains: ``<src>-<tgt>.docid`` and
    ``.domain``), WMT24++'s ``<src>-<tgt>.jsonl``, or FLORES-200's ``<code>.dev`` and ``<code>.devtest``.

    Without ``needs_references``, a file of sources alone will do. Raises :class:`EvaluationError` for an unknown task
    and :class:`DataError` for an unknown direction, missing, misaligned or empty files, and sentences that are empty
    or not UTF-8.
    """
    directory = Path(task_dir)
    parsed = direction if isinstance(direction, Direction) else parse_direction(direction)
    if not directory.is_dir() and not _is_known_to_sacrebleu(task):
        raise DataError(f"task_dir {task_dir} is not a directory: make it with `sekd data alma --out {task_dir}`.")
    found = _find(task, directory, parsed)
    if needs_references and not found.has_references:
        raise DataError(
            f"{text_files(Path(), parsed)[1]} is missing next to its partner: a test set needs both files."
        )
    findings = Findings()
    pairs = clean_pairs(found.pairs, findings)
    # Training data can do without a bad pair; a score over fewer sentences than announced would be a false one.
    for problem, file, line in findings.items:
        if problem.outcome is Outcome.LEFT_OUT:
            raise DataError(f"{file}:{line}: {problem.words}; a test set must be complete: fix it or remove the pair.")
    noted = Findings([item for item in findings.items if item[0] is Problem.VERY_LONG])
    noted.counts.update((problem, file) for problem, file, _ in noted.items)
    if found.has_references:
        check_languages(pairs, parsed, noted)
    if noted.items:
        found = replace(found, notes=(*found.notes, f"{noted.summary()}."))
    return _test_set(task, parsed, pairs, found)


def _find(task: str, directory: Path, direction: Direction) -> _Found:
    root = alma_root(directory)
    found = _read_folder(directory / task, direction)
    is_almas = task in TASKS and "en" in (direction.source, direction.target)  # one side of all its pairs
    if found is None and is_almas and alma_files(root, direction, TASKS[task]):
        pairs, documents = read_alma(root, direction, TASKS[task]), alma_documents(root, direction, TASKS[task])
        if len(documents) not in (0, len(pairs)):
            raise DataError(f"{root}: {task} {direction} has {len(documents)} names of documents, not {len(pairs)}.")
        found = _Found(pairs, f"{root}, ALMA's files", documents=documents)
    found = found or _read_folder(directory, direction)
    if found is None and _is_known_to_sacrebleu(task):
        found = _read_sacrebleu(task, direction)
    if found is not None:
        return found
    if task not in TASKS and not (directory / task).is_dir():
        raise EvaluationError(
            f"Unknown task {task!r}: use one of {', '.join(TASKS)}, a test set of sacrebleu (`sacrebleu --list`), or "
            "a folder in `task_dir`."
        )
    own, plain = text_files(directory / task, direction), text_files(directory, direction)
    raise DataError(
        f"No {task} test set for {direction} in {directory}: `sekd data alma` makes {task}/{own[0].name} and "
        f"{task}/{own[1].name}; a clone of ALMA, or {plain[0].name} and {plain[1].name}, will do too."
    )


def _read_folder(folder: Path, direction: Direction) -> _Found | None:
    """Read whatever layout ``folder`` has; None where it has nothing for ``direction``."""
    source, target = text_files(folder, direction)
    if source.exists() or target.exists():
        return _read_texts(folder, source, target, direction)
    records = folder / f"{direction}.jsonl"
    if records.is_file():
        return _read_wmt24pp(records)
    for part in ("devtest", "dev"):
        left, right = (folder / f"{code}.{part}" for code in (direction.source, direction.target))
        if folder.name == part and left.is_file() and right.is_file():
            return _Found(read_text_pairs(left, right), f"{folder}, FLORES's {part}")
    return None


def _read_texts(folder: Path, source: Path, target: Path, direction: Direction) -> _Found:
    if not source.is_file():
        raise DataError(f"{source} is missing next to its partner: a test set needs both files.")
    pairs = read_text_pairs(source, target if target.is_file() else source)
    more: list[tuple[str, ...]] = []
    while (path := folder / f"{target.name}.{len(more) + 2}").is_file():
        more.append(_aligned(path, len(pairs)))
    return _Found(
        pairs,
        str(folder),
        tuple(more),
        documents=_names(folder / f"{direction}.docid", len(pairs)),
        domains=_names(folder / f"{direction}.domain", len(pairs)),
        has_references=target.is_file(),
    )


def _names(path: Path, count: int) -> tuple[str, ...]:
    return _aligned(path, count) if path.is_file() else ()


def _aligned(path: Path, count: int) -> tuple[str, ...]:
    lines = read_lines(path)
    if len(lines) != count:
        raise DataError(f"{path} has {len(lines)} lines, and the sources have {count}.")
    return tuple(" ".join(line.split()) for line in lines)


def _read_wmt24pp(path: Path) -> _Found:
    """Read a file of WMT24++, whose authors leave out the sources that they marked as bad."""
    kept, bad = [], 0
    for number, record in read_json_records(path):
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("source", "target")):
            raise DataError(
                f"{path}:{number}: expected a record of WMT24++ with source and target, got {record!r:.80}."
            )
        if record.get("is_bad_source"):
            bad += 1
        else:
            kept.append((number, record))
    return _Found(
        [Pair(record["source"], record["target"], str(path), number) for number, record in kept],
        str(path),
        documents=tuple(str(record.get("document_id", record.get("doc", ""))) for _, record in kept),
        domains=tuple(str(record.get("domain", "")) for _, record in kept),
        notes=(f"{bad} sources that WMT24++ marks as bad are left out.",) if bad else (),
    )


def _is_known_to_sacrebleu(task: str) -> bool:
    """Tell whether sacrebleu is to be asked; of ALMA's tasks, only where it has been downloaded before."""
    from sacrebleu.dataset import DATASETS
    from sacrebleu.utils import SACREBLEU_DIR

    return task in DATASETS and (task not in TASKS or (Path(SACREBLEU_DIR) / task).is_dir())


def _read_sacrebleu(task: str, direction: Direction) -> _Found:
    """Read what the command ``sacrebleu -t TASK -l DIRECTION`` scores against."""
    from sacrebleu.dataset import DATASETS

    data_set = DATASETS[task]
    if str(direction) not in data_set.langpairs:
        raise DataError(f"sacrebleu's {task} has no {direction}, but {', '.join(sorted(data_set.langpairs))}.")
    try:
        files = dict(zip(data_set.fieldnames(str(direction)), data_set.get_files(str(direction)), strict=True))
        sources = Path(data_set.get_source_file(str(direction)))
        references = [Path(path) for path in data_set.get_reference_files(str(direction))]
    except (Exception, SystemExit) as error:
        # Downloading and unpacking raise whatever the network, the archive and the XML do.
        raise DataError(
            f"sacrebleu's {task} {direction} is neither in ~/.sacrebleu (or $SACREBLEU) nor can be downloaded "
            f"({one_line(str(error))[:160]}): run `sacrebleu -t {task} -l {direction} --echo src` where there is a "
            "network, and copy the folder."
        ) from None
    pairs = read_text_pairs(sources, references[0])
    return _Found(
        pairs,
        f"sacrebleu's {task}",
        tuple(_aligned(path, len(pairs)) for path in references[1:]),
        documents=_names(Path(files["docid"]), len(pairs)) if "docid" in files else (),
        domains=_names(Path(files["domain"]), len(pairs)) if "domain" in files else (),
    )


def _test_set(task: str, direction: Direction, pairs: list[Pair], found: _Found) -> TestSet:
    sources = tuple(pair.source for pair in pairs)
    references = tuple(pair.target for pair in pairs) if found.has_references else ()
    content = json.dumps([sources, references, *found.more_references], ensure_ascii=False)
    return TestSet(
        task,
        direction,
        sources,
        references,
        sha256(content),
        found.more_references,
        found.documents,
        found.domains,
        found.origin,
        found.notes,
    )
