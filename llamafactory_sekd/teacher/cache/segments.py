"""What the cache knows an example by: its token ids and the positions that predict its response."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.objectives import IGNORE_INDEX


Key = tuple[int, int]
MEDIA = ("images", "videos", "audios")
# Of two responses, in a message of one line.
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a sequence in which no token attends to anything outside.

    An unpacked example is one segment, and so is a sequence of ``packing: true``, whose examples see each other.
    ``neat_packing`` keeps examples apart: each is a segment of its own, the same as unpacked.

    Attributes:
        ids: token ids ``[length]``, int32, without padding.
        rows: ``[length]`` bool, the positions that predict a response token.
        positions: position ids ``[length]``, int32, or None where they count from zero.
    """

    ids: np.ndarray
    rows: np.ndarray
    positions: np.ndarray | None

    @property
    def tokens(self) -> int:
        """The number of response tokens."""
        return int(np.count_nonzero(self.rows))

    def key(self) -> Key:
        """Return a 128-bit digest as two int64: equal for equal ids, response positions and position ids only."""
        digest = hashlib.blake2b(len(self.ids).to_bytes(8, "little"), digest_size=16)
        digest.update(self.ids.astype("<i4").tobytes())
        digest.update(np.packbits(self.rows).tobytes())
        if self.positions is not None:
            digest.update(self.positions.astype("<i4").tobytes())

        high, low = np.frombuffer(digest.digest(), dtype="<i8")
        return int(high), int(low)


def segments(example: Mapping[str, Any]) -> list[Segment]:
    """Split an example of the host's data set into its segments, in order; those without a response are left out.

    Args:
        example: ``input_ids`` and ``labels``, lists of equal length, and where the host has them ``attention_mask``
            (numbered by example under ``neat_packing``) and ``position_ids``.

    Raises:
        TeacherError: the example holds images, videos or audio, which its token ids do not tell apart.
    """
    for name in MEDIA:
        if example.get(name):
            raise TeacherError(
                f"`teacher_cache` keeps text alone, and an example has {name}: use `teacher_model` without a cache."
            )

    ids, labels = _array(example["input_ids"]), _array(example["labels"])
    rows = np.zeros(len(ids), dtype=bool)
    rows[:-1] = labels[1:] != IGNORE_INDEX
    mask = example.get("attention_mask")
    mask = np.ones(len(ids), dtype=np.int32) if mask is None else _array(mask)
    positions = example.get("position_ids")
    edges = np.flatnonzero(np.diff(mask, prepend=mask[:1] - 1, append=mask[-1:] - 1)).tolist()
    found = []
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        if mask[start] and rows[part].any():
            found.append(Segment(ids[part], rows[part], _unusual(positions, part)))

    return found


def segments_of_each(features: Sequence[Mapping[str, Any]]) -> list[list[Segment]]:
    """Return the segments of each example; for generation, where labels are not under their ids, there are none."""
    return [segments(item) if len(item["input_ids"]) == len(item["labels"]) else [] for item in features]


def _array(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def _unusual(positions: Sequence[int] | None, part: slice) -> np.ndarray | None:
    if positions is None:
        return None
    cut = _array(positions[part])
    return None if np.array_equal(cut, np.arange(len(cut))) else cut


def questions(example: Mapping[str, Any], informed: Mapping[str, Any] | None = None) -> list[tuple[Key, Segment]]:
    """Return what the teacher is asked for an example: the student's key, and the segment that the teacher reads.

    Args:
        example: the student's.
        informed: the same example with the teacher's own prompt, checked by :func:`check_responses`; None where the
            teacher reads the student's.
    """
    own = segments(example)
    if informed is None or not own:
        return [(segment.key(), segment) for segment in own]
    (student,), (teacher,) = own, segments(informed)
    places = np.flatnonzero(teacher.rows)[: student.tokens]  # the student's response may have been cut
    rows = np.zeros_like(teacher.rows)
    rows[places] = True
    stop = int(places[-1]) + 1
    return [(student.key(), Segment(teacher.ids[:stop], rows[:stop], None))]


def check_responses(
    students: Sequence[Any], teachers: Sequence[Any], decode: Callable[[list[int]], str], longest: int | None
) -> str:
    """Check that two data sets have the same responses, and return a digest of what the teacher reads.

    Args:
        students: the student's examples.
        teachers: the same with the teacher's prompts.
        decode: token ids to text, for messages.
        longest: how many tokens the teacher reads, None where that is not known.

    Raises:
        TeacherError: a response differs, the numbers of examples do, or a prompt is too long.
    """
    if len(students) != len(teachers):
        raise TeacherError(
            f"the teacher's data sets have {len(teachers):,} examples and the student's {len(students):,}: each of "
            "the student's needs one with the same response, in the same order."
        )
    digest = hashlib.blake2b(digest_size=16)
    for number, (student, teacher) in enumerate(zip(students, teachers, strict=True), 1):
        ours, theirs = _response(student), _response(teacher)
        if ours != theirs[: len(ours)]:
            shown = " and ".join(repr(" ".join(decode(ids).split())[:_SHOWN]) for ids in (ours, theirs))
            raise TeacherError(
                f"example {number:,} has different responses for the student and for the teacher, {shown}: the "
                "teacher's data set needs the student's responses in the same order, and a template with the same end."
            )
        length = len(teacher["input_ids"])
        if longest is not None and length > longest:
            raise TeacherError(
                f"example {number:,} has {length:,} tokens with the teacher's prompt, and the teacher reads "
                f"{longest:,}: shorten the prompt."
            )
        digest.update(np.asarray(teacher["input_ids"], dtype="<i4").tobytes())
        digest.update(len(theirs).to_bytes(8, "little"))

    return digest.hexdigest()


def _response(example: Mapping[str, Any]) -> list[int]:
    return [int(token) for segment in segments(example) for token in segment.ids[1:][segment.rows[:-1]]]
