"""How difficult the right and the wrong references of the demo are to its students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory_sekd.data.noise import Pair
from llamafactory_sekd.data.prompts import prompt
from llamafactory_sekd.demo.data import DIRECTION


# Of each kind this many references are read: enough for a mean, and a few seconds.
MOST = 400
BATCH_SIZE = 32


@dataclass(frozen=True)
class Difficulties:
    """Equation 5 of every token of some references, ``[tokens]`` in nats, those of right and of wrong ones apart."""

    right: np.ndarray
    wrong: np.ndarray


@dataclass(frozen=True)
class References:
    """What teacher and students make of the student's text.

    ``surprise`` is the teacher's -log p_y, of right and of wrong references; ``students`` holds each one's
    difficulties by its name.
    """

    surprise: Difficulties
    students: Mapping[str, Difficulties]


def measure(pairs: Sequence[Pair], wrong: Sequence[int], teacher: Path, students: Mapping[str, Path]) -> References:
    """Read the first right and the first wrong references with the teacher and each student."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llamafactory_sekd.teacher import Teacher
    from llamafactory_sekd.teacher.doubts import judge

    is_wrong = set(wrong)
    chosen = [index for index in range(len(pairs)) if index not in is_wrong][:MOST] + list(wrong)[:MOST]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    examples = [_example(tokenizer, *pairs[index]) for index in chosen]
    accelerator = Accelerator()

    def loaded(folder: Path) -> Teacher:
        return Teacher(AutoModelForCausalLM.from_pretrained(folder), accelerator)

    flags = [index in is_wrong for index in chosen]
    told: dict[str, Difficulties] = {}
    surprise = None
    for name, folder in students.items():
        verdicts = judge(examples, loaded(teacher), loaded(folder), batch_size=BATCH_SIZE, device=accelerator.device)
        told[name] = _apart([verdict.difficulty for verdict in verdicts], flags)
        surprise = _apart([verdict.surprise for verdict in verdicts], flags)
    assert surprise is not None
    return References(surprise, told)


def _example(tokenizer: Any, source: str, target: str) -> Any:
    """Return prompt and reference as training sees them."""
    from llamafactory_sekd.teacher.cache.segments import Segment

    before = tokenizer.encode(prompt(source, DIRECTION))
    ids = np.array([*before, *tokenizer.encode(target), tokenizer.eos_token_id], dtype=np.int32)
    rows = np.zeros(len(ids), dtype=bool)
    rows[len(before) - 1 : -1] = True
    return Segment(ids, rows, None)


def _apart(columns: Sequence[np.ndarray | None], wrong: Sequence[bool]) -> Difficulties:
    known = [column for column in columns if column is not None]
    right = [column for column, is_wrong in zip(known, wrong, strict=True) if not is_wrong]
    return Difficulties(
        np.concatenate(right), np.concatenate([c for c, is_wrong in zip(known, wrong, strict=True) if is_wrong])
    )
