"""Does a teacher fit the student: its files, its kind, its token ids, and which of them both really use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from llamafactory_sekd.errors import SekdError, TeacherError
from llamafactory_sekd.fingerprints import xxh3_of_json


# Text in the scripts that machine translation meets: merges and normalization differ where vocabularies agree.
SAMPLES: tuple[str, ...] = (
    "Translate the following sentences from English to German.",
    "### Instruction:\n\n### Input:\n\n### Response:",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "敏捷的棕色狐狸跳过了懒狗。",
    "いろはにほへと ちりぬるを",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "  two  spaces,\ttabs and 1,234.56 € — “quotes” 🙂\r\n",
)

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_teacher_files(teacher_model: str) -> None:
    """Check a local teacher folder; see :func:`check_model_files`."""
    check_model_files(teacher_model, "teacher_model", "teacher_model_adapters")


def check_model_files(model: str, key: str, adapters_key: str, error: type[SekdError] = TeacherError) -> None:
    """Check a local folder; a hub id passes.

    Args:
        model: the folder or hub id.
        key: the YAML's key that names it.
        adapters_key: the YAML's key for adapters.
        error: the class of the error.

    Raises:
        SekdError: of the class ``error``: the path does not exist, or holds an adapter without its base model.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        if _is_path(model):
            remedy = _near(model) or "give a folder with a model, or a hub id."
            raise error(f"`{key}: {model}` does not exist: {remedy}")
        return
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise error(
            f"`{key}: {model}` holds only an adapter: put the base model there and the adapter's path "
            f"under `{adapters_key}`."
        )
    if not (path / "config.json").is_file():
        raise error(f"`{key}: {model}` holds no config.json: give the folder of a saved model.")


def check_adapter_files(
    adapters: Iterable[str], key: str = "teacher_model_adapters", error: type[SekdError] = TeacherError
) -> None:
    """Check the local folders among a model's adapters; a hub id passes.

    Raises:
        SekdError: of the class ``error``: one of them holds no adapter.
    """
    for name in adapters:
        path = Path(name).expanduser()
        if path.is_dir() and not (path / "adapter_config.json").is_file():
            raise error(f"`{key}: {name}` holds no adapter_config.json: give the folder of a saved adapter.")
        if not path.is_dir() and _is_path(name):
            remedy = _near(name) or "give the folder of a saved adapter."
            raise error(f"`{key}: {name}` does not exist: {remedy}")


def _is_path(name: str) -> bool:
    """Tell a path that names no folder from a hub id, which has one slash at most."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _near(name: str) -> str:
    """Return the question whether a folder of nearly the same name was meant; empty where there is none."""
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        return ""
    close = get_close_matches(path.name, [item.name for item in path.parent.iterdir() if item.is_dir()], n=1)
    return f"did you mean {str(Path(name).with_name(close[0]))!r}?" if close else ""


def check_is_causal(teacher_model: str, config: Any) -> None:
    """Check that a configuration belongs to a causal language model.

    Args:
        teacher_model: the teacher's name, for the message.
        config: its transformers configuration.

    Raises:
        TeacherError: it belongs to something else.
    """
    causal = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known_classes = {name for names in causal.values() for name in ([names] if isinstance(names, str) else names)}
    architectures = list(getattr(config, "architectures", None) or [])
    own_code = bool(getattr(config, "auto_map", None))
    is_causal = own_code or (
        config.model_type in causal
        and not getattr(config, "is_encoder_decoder", False)
        and (not architectures or any(name in known_classes for name in architectures))
    )
    if not is_causal:
        kind = ", ".join(architectures) or config.model_type
        raise TeacherError(
            f"`teacher_model: {teacher_model}` is a {kind}, not a causal language model: choose a decoder-only model "
            "with the student's tokenizer."
        )


def positions_line(teacher_model: str, config: Any, cutoff_len: int) -> str:
    """Return what a teacher's positions mean for examples of up to ``cutoff_len`` tokens; empty where nothing.

    Args:
        teacher_model: the teacher's name.
        config: its transformers configuration.
        cutoff_len: the run's.
    """
    text = config.get_text_config()
    found = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None)
    scaling = found if isinstance(found, Mapping) else {}
    kind = scaling.get("rope_type", scaling.get("type"))
    limit = getattr(text, "max_position_embeddings", None)
    if kind == "longrope":
        limit = getattr(text, "original_max_position_embeddings", None) or limit
    if not limit or cutoff_len <= limit:
        return ""
    if kind in ("dynamic", "longrope"):
        return (
            f"Beyond {int(limit):,} tokens the positions of `teacher_model: {teacher_model}` depend on the longest "
            f"example of a batch (`rope_type: {kind}`): its answers to the same example differ from batch to batch, "
            f"and a cache keeps those of its own batches. With `cutoff_len: {int(limit)}` they are always the same."
        )
    return (
        f"`cutoff_len: {cutoff_len}` goes beyond the {int(limit):,} positions of `teacher_model: {teacher_model}`: "
        "what it answers there is a guess. Use a smaller `cutoff_len`, or a teacher with a longer context."
    )


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Check that two tokenizers give the same ids to the same text.

    The teacher may know tokens beyond the student's (an added padding token, say); the student may not.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.

    Raises:
        TeacherError: they differ; the message shows the first difference.
    """
    teacher_vocabulary = teacher.get_vocab()
    for token, token_id in sorted(student.get_vocab().items(), key=lambda item: item[1]):
        if teacher_vocabulary.get(token) != token_id:
            there = teacher_vocabulary.get(token)
            found = "does not know it" if there is None else f"gives it the id {there}"
            raise _mismatch(f"the student's token {token!r} has the id {token_id}, and the teacher {found}")

    for text in SAMPLES:
        ours = student.encode(text, add_special_tokens=False)
        theirs = teacher.encode(text, add_special_tokens=False)
        if ours != theirs:
            raise _mismatch(
                f"{text!r} is {_show(student, ours, theirs)} for the student and "
                f"{_show(teacher, theirs, ours)} for the teacher"
            )

    for name in _SPECIAL:
        ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
        if ours is not None and theirs is not None and ours != theirs and name != "pad_token":
            raise _mismatch(f"the student's {name} is {ours!r} and the teacher's is {theirs!r}")


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """Return the digest of the vocabulary, the special and the added tokens, and what becomes of `SAMPLES`."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    added = [
        [number, token.content, token.lstrip, token.rstrip, token.single_word, token.normalized, token.special]
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in SAMPLES]
    return xxh3_of_json([sorted(tokenizer.get_vocab().items()), special, added, encoded])


def _show(tokenizer: Any, ids: list[int], others: list[int]) -> str:
    """Return the ids around the first difference, with their tokens."""
    first = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
    part = ids[first : first + 4]
    return f"{part} ({' '.join(map(repr, tokenizer.convert_ids_to_tokens(part)))}) from token {first}"


def _mismatch(difference: str) -> TeacherError:
    return TeacherError(
        f"the teacher's tokenizer is not the student's: {difference}. Distillation compares probabilities id by id: "
        "choose a teacher and a student of one model family."
    )


def used_ids(tokenizer: Any) -> int:
    """How many ids the tokenizer uses: its largest and one."""
    return max(tokenizer.get_vocab().values()) + 1


def readable_rows(used: int, rows: int, padding: Iterable[torch.Tensor]) -> int:
    """Return how many rows of a teacher's head are answers: all of them, or those that the tokenizer uses.

    Padding takes part in the softmax as it does in the model itself, unless it is not finite: -inf there says that an
    id is impossible, and `reverse_kl` to a student that has not learned so is infinite.

    Args:
        used: ids of the tokenizer.
        rows: rows of the head.
        padding: the rest of its weight and bias, empty where they are on other ranks.
    """
    return rows if all(bool(part.isfinite().all()) for part in padding) else min(used, rows)


def _check_tokens_of_every_response(tokenizer: Any, rows: int) -> None:
    """Refuse an end or padding token without a row: the models' embeddings would fail in the middle of the first step.

    Other tokens without a row do no harm as long as no text has them, and some published tokenizers have such.
    """
    for name in ("eos_token", "pad_token"):
        token_id = getattr(tokenizer, f"{name}_id", None)
        if token_id is not None and token_id >= rows:
            raise TeacherError(
                f"the models have {rows:,} rows and the {name} {getattr(tokenizer, name)!r} has the id {token_id}: "
                "choose a `template` whose tokens both models know, or fine-tune both with `resize_vocab: true` first."
            )


def common_vocabulary(student_tokenizer: Any, student_rows: int, *teachers_rows: int) -> tuple[int | None, str]:
    """Decide how many rows of the heads the objective reads.

    Model families pad their vocabulary differently (Qwen 2.5: 151,936 and 152,064 rows for 151,665 tokens). Where
    heads differ, all are cut to the ids that the tokenizer really uses, and the probabilities are renormalized there.

    Args:
        student_tokenizer: the student's tokenizer; every one of its tokens is known to the teachers.
        student_rows: rows of the student's head.
        teachers_rows: rows of each teacher's head.

    Returns:
        The number of rows to read, None where all heads have equally many; and a line for the log, empty then.

    Raises:
        TeacherError: a head is smaller than the tokenizer, or has no row for the end or padding token.
    """
    others = [rows for rows in teachers_rows if rows != student_rows]
    if not others:
        _check_tokens_of_every_response(student_tokenizer, student_rows)
        return None, ""
    used = used_ids(student_tokenizer)
    teacher_rows = min(others)
    for who, rows in (("student", student_rows), ("teacher", teacher_rows)):
        if rows < used:
            raise TeacherError(
                f"the {who}'s head has {rows:,} rows and the tokenizer uses {used:,} ids: set `resize_vocab: true` "
                "when that model is fine-tuned, or choose another one."
            )

    return used, (
        f"The student's head has {student_rows:,} rows and the teacher's answers are over {teacher_rows:,} ids; the "
        f"tokenizer uses {used:,}: the objective reads the first {used:,} of both and renormalizes; the rest is "
        "padding that no token means."
    )
