"""Translations as files: one per line, nothing lost and nothing added."""

from __future__ import annotations

from pathlib import Path

from llamafactory_sekd.errors import EvaluationError, one_line


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
