"""A run that adds to a cache: one lock, and one writer per rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.files import locked
from llamafactory_sekd.objectives import LogitTransform
from llamafactory_sekd.ranks import position, wait_for_all
from llamafactory_sekd.teacher.cache.cache_manifest import MANIFEST, Manifest
from llamafactory_sekd.teacher.cache.cache_opening import Fingerprints, Settings, head_damage, open_for_writing
from llamafactory_sekd.teacher.cache.formats import written_transform
from llamafactory_sekd.teacher.cache.record_store import ShardReader, ShardWriter
from llamafactory_sekd.teacher.cache.recorded_teacher import HEAD
from llamafactory_sekd.teacher.cache.records import write_tensors


class Admitted(Protocol):
    """What a cache asks of a teacher before its first record, wherever the teacher computes."""

    def logit_transform(self, inputs: dict[str, Any]) -> LogitTransform | None:
        """Return what makes its logits of its head times its hidden states; None where nothing does."""

    def head_parameters(self) -> AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight ``[vocab, width]`` and bias ``[vocab]`` (or None) of the head, for the duration."""


class Session:
    """Opens a cache for writing, or says that there is none yet; all ranks construct it together.

    Args:
        directory: of the cache, shared by all ranks.
        run: this run's fingerprints.
        settings: what a new cache keeps and an old one must keep; None for whatever an old one keeps.

    Attributes:
        manifest: None until there is one.
        reader: of what is there.

    Raises:
        TeacherError: another run writes to it, or it was built with something else.
    """

    def __init__(self, directory: Path, run: Fingerprints, settings: Settings | None = None) -> None:
        self.directory = directory
        self.run = run
        self.settings = settings or Settings()
        self.rank, self.ranks = position()
        self._stack = ExitStack()
        try:
            if self.rank == 0:
                self._lock()
                open_for_writing(directory, run, settings)

            wait_for_all()
            self.manifest = Manifest.load(directory) if (directory / MANIFEST).is_file() else None
            self.head_is_intact = self.manifest is not None and head_damage(directory, self.manifest) is None
            self.reader = ShardReader(directory)
            wait_for_all()  # so that all ranks have seen the same before any of them writes
        except BaseException:
            self.close()
            raise

    def admit(
        self, teacher: Admitted, vocab_size: int, probe: dict[str, Any], autocast: torch.dtype | None = None
    ) -> Manifest:
        """Take a teacher in, placed: write its head and the manifest where they are not there yet.

        Args:
            teacher: the teacher that will compute the records.
            vocab_size: ids that the tokenizer uses.
            probe: any batch, to find out whether the head says it all.
            autocast: the type of the products where it is not the head's: hidden states in it lose nothing, but for
                a CPU that does such products in float32.

        Raises:
            TeacherError: hidden states are to be kept of a teacher whose logits are more than its head's product.
        """
        kind = self.manifest.format if self.manifest is not None else self.settings.format
        transform = teacher.logit_transform(probe)
        if kind == "hidden" and transform is None:
            raise TeacherError(
                "the teacher's logits are more than a product of its LM head, scaled or capped (adapter, "
                "quantization), so hidden states do not keep them: build the cache with `sekd cache … --format topk`."
            )

        if not self.head_is_intact:
            with teacher.head_parameters() as (weight, bias):
                if self.rank == 0:
                    self._create(weight, bias, vocab_size, kind, transform, autocast or weight.dtype)

            wait_for_all()
            self.head_is_intact = True

        self.manifest = Manifest.load(self.directory)
        return self.manifest

    def writer(self, **limits: Any) -> ShardWriter:
        """Return the writer of this rank; see :class:`ShardWriter` for the limits."""
        return ShardWriter(self.directory, self.rank, **limits)

    def close(self) -> None:
        """Let other runs write."""
        self._stack.close()

    def _create(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        vocab_size: int,
        kind: str,
        transform: LogitTransform | None,
        product_type: torch.dtype,
    ) -> None:
        entry = None
        if kind == "hidden":
            tensors = {"weight": weight.detach().cpu()}
            if bias is not None:
                tensors["bias"] = bias.detach().cpu()
            entry = write_tensors(self.directory / HEAD, tensors)

        if self.manifest is None:
            manifest = self.settings.manifest(
                vocab_size=vocab_size,
                rows=weight.shape[0],
                width=weight.shape[1],
                computed_in=product_type,
                head=entry,
                transform=None if entry is None or transform is None else written_transform(transform),
                data=self.run.data,
                teacher=self.run.teacher() if self.run.teacher is not None else {},
                software=self.run.software,
            )
            manifest.save(self.directory)
        elif entry != self.manifest.head:
            raise TeacherError(
                f"{self.directory / HEAD} was damaged, and this teacher's head does not match: build a new cache."
            )

    def _lock(self) -> None:
        self._stack.enter_context(locked(self.directory / ".sekd.lock", error=TeacherError))
