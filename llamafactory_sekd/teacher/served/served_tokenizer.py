"""A teacher's tokenizer, described over HTTP in as much as the comparison with the student's reads."""

from __future__ import annotations

from typing import Any

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.vocabulary import SAMPLES, check_tokenizers


_SPECIAL = ("bos_token", "eos_token", "unk_token")


def describe(tokenizer: Any) -> dict[str, Any]:
    """Return the vocabulary, the special tokens and what becomes of the samples."""
    return {
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: getattr(tokenizer, name, None) for name in _SPECIAL},
        "samples": [tokenizer.encode(text, add_special_tokens=False) for text in SAMPLES],
    }


class DescribedTokenizer:
    """What :func:`describe` said, with the methods that ``check_tokenizers`` calls."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._vocabulary = {str(token): int(number) for token, number in description["vocabulary"].items()}
        self._tokens = {number: token for token, number in self._vocabulary.items()}
        self._samples = [[int(number) for number in ids] for ids in description["samples"]]
        self.bos_token, self.eos_token, self.unk_token = (description["special"].get(name) for name in _SPECIAL)

    def get_vocab(self) -> dict[str, int]:
        """Return token to id."""
        return self._vocabulary

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the ids of one of the samples."""
        return self._samples[SAMPLES.index(text)]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Return the tokens of some ids."""
        return [self._tokens.get(number, "?") for number in ids]


def check_served_tokenizer(student: Any, description: dict[str, Any], url: str) -> None:
    """Check that the server's tokenizer is the student's, after the run's template has acted on the student's.

    Raises:
        TeacherError: it is another one.
    """
    try:
        teacher = DescribedTokenizer(description)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TeacherError(f"`teacher_server: {url}` describes its tokenizer in a way that cannot be read.") from error

    # The server knows no template. A chat template writes its end token into the student's tokenizer; the texts end
    # with that one, and the vocabularies are compared token by token anyway.
    if teacher.get_vocab().get(student.eos_token) == student.eos_token_id:
        teacher.eos_token = student.eos_token
    check_tokenizers(student, teacher)
