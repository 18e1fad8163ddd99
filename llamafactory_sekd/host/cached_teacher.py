"""A training run whose teacher comes from a cache, and the fingerprints by which a cache is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from llamafactory_sekd.argument_checks import mixing_weights
from llamafactory_sekd.arguments import cache_folders
from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.fingerprints import xxh3_of_json, xxh3_of_model, xxh3_of_models
from llamafactory_sekd.formula import Formula
from llamafactory_sekd.host.run_arguments import HostArguments
from llamafactory_sekd.host.teacher_loading import teacher_identity, teacher_model_arguments
from llamafactory_sekd.ranks import on_any_rank
from llamafactory_sekd.teacher import Teacher, readable_rows, used_ids
from llamafactory_sekd.teacher.cache.cache_manifest import Fingerprints, open_for_reading
from llamafactory_sekd.teacher.cache.filling import Session
from llamafactory_sekd.teacher.cache.formats import TopKFormat
from llamafactory_sekd.teacher.cache.recorded_teacher import (
    CacheCollator,
    CachedTeacher,
    FillingTeacher,
    OpenCache,
    first_unanswered,
    open_caches,
    padding_of_head,
    unanswered,
)
from llamafactory_sekd.teacher.compatibility import fingerprint_of_tokenizer
from llamafactory_sekd.teacher.source import TeacherSource


logger = logging.get_logger(__name__)


# What a template makes of this tells two templates of one name apart.
_CONVERSATION = (
    {"role": "user", "content": "Translate the following sentences from English to German.\n\n### Input:\nA dog."},
    {"role": "assistant", "content": "Ein Hund."},
    {"role": "user", "content": "And this one:\nTwo cats."},
    {"role": "assistant", "content": "Zwei Katzen."},
)
PROMPTS = "prompts"  # in the fingerprint: what the teacher reads where it is not the student's


def fingerprints_of(tokenizer: Any, template: Any, run: HostArguments) -> Fingerprints:
    """Return what decides the examples' ids and, where the run names a teacher, the teacher's answers."""
    data_args = run.data
    encoded = template.encode_multiturn(tokenizer, [dict(message) for message in _CONVERSATION], None, None)
    return Fingerprints(
        data={
            "tokenizer": fingerprint_of_tokenizer(tokenizer),
            "template": data_args.template,
            "template_text": xxh3_of_json(encoded),
            "cutoff_len": data_args.cutoff_len + bool(data_args.packing),  # the host takes one off for packing
            "train_on_prompt": bool(data_args.train_on_prompt),
            "mask_history": bool(data_args.mask_history),
            # Examples that are packed apart are the same as unpacked ones.
            "packing": bool(data_args.packing) and not data_args.neat_packing,
        },
        teacher=(
            lambda: teacher_fields(
                *teacher_identity(run.model, run.finetuning), teacher_model_arguments(run.model, run.finetuning)
            )
        )
        if run.finetuning.teacher_model
        else None,
    )


def teacher_fields(model: str, adapters: str | None, quantization_bit: int | None, model_args: Any) -> dict[str, Any]:
    """Return what decides a teacher's answers, as a cache's manifest records it."""
    return {
        "teacher_weights": weights_of(model),
        "teacher_adapters": xxh3_of_models([Path(name.strip()) for name in (adapters or "").split(",") if name]),
        "teacher_model_quantization_bit": quantization_bit,
        "compute_dtype": str(model_args.compute_dtype).removeprefix("torch."),
        PROMPTS: None,  # the student's
        "rope_scaling": str(getattr(model_args.rope_scaling, "value", model_args.rope_scaling)),
    }


def weights_of(name: str) -> str:
    """Return the content of a local folder; of a hub id the commit, which identifies the content."""
    if Path(name).expanduser().is_dir():
        return xxh3_of_model(Path(name).expanduser())
    from transformers.utils.hub import cached_file, extract_commit_hash

    config = cached_file(name, "config.json")
    return f"{name}@{extract_commit_hash(config, None)}"


def autocast_type(accelerator: Any) -> torch.dtype | None:
    """Return the type that products are cast to in mixed precision; None without."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


class CacheOfRun:
    """The cache of one training run, or its several caches.

    Without ``teacher_model`` every example of the run must be in one of them (in one only, unless ``teacher_mix`` is
    set), and this is checked here. With it there is one cache, the teacher is needed only where an example is missing,
    and what it computes is kept.

    Args:
        run: its arguments.
        trainer_arguments: what the host hands to its trainer: tokenizer, data sets, collator.

    Attributes:
        needs_model: whether the teacher has to be loaded.

    Raises:
        TeacherError: a cache is of something else, is damaged, or no cache or several hold an example.
    """

    def __init__(self, run: HostArguments, trainer_arguments: dict[str, Any]) -> None:
        self.directories = [Path(name) for name in cache_folders(run.finetuning.teacher_cache)]
        self.weights = mixing_weights(run.finetuning)
        self.device = run.training.device
        self.tokenizer = trainer_arguments["tokenizer"]
        template = trainer_arguments["data_collator"].template
        fingerprints = fingerprints_of(self.tokenizer, template, run)
        datasets = _datasets(trainer_arguments, run.training)
        self.session: Session | None = None
        self.caches: list[OpenCache] = []
        if run.finetuning.teacher_model:
            self._open_for_filling(fingerprints, datasets)
        else:
            self._open_for_reading(fingerprints, datasets, verify=run.is_first_rank)

    @property
    def needs_model(self) -> bool:
        """Whether anything is missing."""
        return self.session is not None

    @property
    def vocab_sizes(self) -> list[int]:
        """How many ids each teacher's answers are over; none for a cache that is not there yet."""
        used = used_ids(self.tokenizer)
        return [readable_rows(used, cache.vocab_size, padding_of_head(cache, used)) for cache in self.caches]

    def make_teacher(self, make_online: Callable[[Any], Teacher] | None, accelerator: Any) -> TeacherSource:
        """Return the teacher that the trainer asks; `make_online` makes the one needed where something is missing."""
        if self.session is None:
            return CachedTeacher(self.caches, self.device, self._text, self.weights)
        assert make_online is not None
        online = make_online(accelerator)
        probe = {"input_ids": torch.zeros(1, 8, dtype=torch.int64, device=self.device)}
        manifest = self.session.admit(online, used_ids(self.tokenizer), probe, autocast_type(accelerator))
        self.caches = open_caches(self.directories, [manifest])
        return FillingTeacher(self.caches[0], self.device, self._text, online=online, writer=self.session.writer())

    def attach(self, trainer: Any) -> None:
        """Let the trainer's batches bring the teacher's answers, and keep what it computes."""
        self._warn_of_missing_tail(trainer.formula)
        trainer.data_collator = CacheCollator(trainer.data_collator, self.caches)
        if self.session is not None:
            trainer.add_callback(_Keep(trainer.teacher))

    def _warn_of_missing_tail(self, formula: Formula) -> None:
        cut = [str(cache.directory) for cache in self.caches if isinstance(cache.kept, TopKFormat)]
        names = sorted({name for side in formula.sides for name, _ in side.divergences} - {"kl"})
        if cut and names:
            logger.warning_once(
                f"{', '.join(cut)} keeps the teacher's most probable entries and spreads the rest evenly: "
                f"{', '.join(names)} looks at the entries that the student prefers, which may be among the rest. "
                "Compare with an exact cache (`--format hidden`) on a few steps."
            )

    def close(self) -> None:
        """Let other runs write to the cache."""
        if self.session is not None:
            self.session.close()

    def _open_for_reading(self, fingerprints: Any, datasets: list[Any], *, verify: bool) -> None:
        manifests = [open_for_reading(directory, fingerprints, verify=verify) for directory in self.directories]
        self.caches = open_caches(self.directories, manifests)
        readers = [cache.reader for cache in self.caches]
        found = first_unanswered(datasets, readers, mixes=self.weights is not None)
        if found is not None:
            segment, holders = found
            raise TeacherError(unanswered(self.directories, holders, self._text(torch.from_numpy(segment.ids))))

    def _open_for_filling(self, fingerprints: Any, datasets: list[Any]) -> None:
        session = Session(self.directories[0], fingerprints)
        if session.manifest is not None:
            self.caches = open_caches(self.directories, [session.manifest])

        lacks = not session.head_is_intact or not datasets or first_unanswered(datasets, [session.reader]) is not None
        if on_any_rank(torch.tensor(lacks, device=self.device)):
            self.session = session
        else:
            session.close()

    def _text(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)


class _Keep(TrainerCallback):
    """Writes what the teacher computed whenever the trainer itself comes to rest."""

    def __init__(self, teacher: FillingTeacher) -> None:
        self.teacher = teacher

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()

    on_epoch_end = on_evaluate = on_train_end = on_save


def _datasets(trainer_arguments: dict[str, Any], training_args: Any) -> list[Any]:
    """Return the data sets that the run will ask the teacher about; none where they are streamed."""
    found = [trainer_arguments.get("train_dataset")] if training_args.do_train else []
    evaluation = trainer_arguments.get("eval_dataset")
    if training_args.do_eval and not training_args.predict_with_generate:
        found += list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]

    return [dataset for dataset in found if hasattr(dataset, "__len__")]
