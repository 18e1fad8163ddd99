"""A teacher that reads another prompt than the student, with the same response: its rows, and under which key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.cache.record_store import Key
from llamafactory_sekd.teacher.cache.segments import Segment, segments


# Of two responses, in a message of one line.
_SHOWN = 80


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
