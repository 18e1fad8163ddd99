"""A teacher behind a server on the host's side: does it fit, the training that asks it, the cache that it fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llamafactory_sekd.arguments import KEYS, DistillationArguments
from llamafactory_sekd.errors import ArgumentError, TeacherError
from llamafactory_sekd.host.cache import TeacherPrompts, Tokenized, filling, run_session, tokenized, with_prompts
from llamafactory_sekd.host.run_arguments import HostArguments
from llamafactory_sekd.teacher import used_ids
from llamafactory_sekd.teacher.cache.cache_manifest import Settings
from llamafactory_sekd.teacher.cache.filling import Plan, Session
from llamafactory_sekd.teacher.cache.formats import DTYPES, Format, HiddenFormat, TopKFormat
from llamafactory_sekd.teacher.served.connection import Connection, NoAnswerError, speaks_our_protocol
from llamafactory_sekd.teacher.served.live_teacher import Answering, ServedTeacher, TicketCollator, fill_from_server
from llamafactory_sekd.teacher.served.protocol import check_served_tokenizer
from llamafactory_sekd.teacher.served.vllm_teacher import VllmConnection


# What says where a teacher is that this process would load; a server has its own.
_OF_A_LOADED_TEACHER = frozenset(key for key in KEYS if key.startswith("teacher_model")) | {
    "teacher_offload",
    "teacher_deepspeed",
}
_A_FEW_SECONDS = 3.0


def connect(run: HostArguments, *, hidden: bool, model: str | None = None) -> Answering:
    """Reach the server of a run and check its tokenizer, before any weight is read.

    Args:
        run: the arguments.
        hidden: whether hidden states will be asked for: vLLM returns them where it was started for it.
        model: the served model on this machine, which vLLM's hidden states need; None for what the server calls it.

    Raises:
        TeacherError: it cannot be reached, or its teacher does not fit.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    tokenizer = load_tokenizer(run.model)["tokenizer"]
    get_template_and_fix_tokenizer(tokenizer, run.data)
    server = _reach(str(run.finetuning.teacher_server), run.finetuning.teacher_server_patience, tokenizer)
    if hidden and isinstance(server, VllmConnection):
        server.offer_hidden_states(tokenizer, model)
    return server


def server_problem(url: str, model: str | None) -> str:
    """Return what keeps a server from being a student's teacher, as far as a few seconds show it; "" for nothing.

    Args:
        url: of the server.
        model: the student, whose tokenizer is compared where it is on this machine.
    """
    from transformers import AutoTokenizer

    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True) if model else None
        except (OSError, ValueError):  # not here yet, or none: the run says so
            tokenizer = None
        if tokenizer is None:
            speaks_our_protocol(url, _A_FEW_SECONDS)
        else:
            _reach(url, _A_FEW_SECONDS, tokenizer).close()
    except NoAnswerError as error:
        return f"`teacher_server: {url}` {error.problem}: start it before the run, or correct the address."
    except TeacherError as error:
        return str(error)
    return ""


def _reach(url: str, patience: float, tokenizer: Any) -> Answering:
    """Reach a server, whatever it speaks, and compare its tokenizer with the student's."""
    if not speaks_our_protocol(url, patience):
        vllm = VllmConnection(url, patience, used_ids(tokenizer))
        vllm.check_tokenizer(tokenizer)
        return vllm
    server = Connection(url, patience)
    try:
        check_served_tokenizer(tokenizer, server.tokenizer(), server.url)
    except BaseException:
        server.close()
        raise

    return server


class ServerOfRun:
    """The server of one training run.

    Args:
        server: from :func:`connect`.
        run: its arguments.

    Attributes:
        fingerprint: what a checkpoint records of the teacher.

    Raises:
        ArgumentError: a key cannot go with it.
    """

    def __init__(self, server: Answering, run: HostArguments) -> None:
        workers = run.training.dataloader_num_workers
        if workers:
            raise ArgumentError(
                f"`dataloader_num_workers: {workers}` cannot be used with `teacher_server`, whose answers are fetched "
                "ahead by the process that trains: set it to 0."
            )
        self.server = server
        self.keys: DistillationArguments = run.finetuning
        self.fingerprint = f"server {server.info.fingerprint}"
        self.teacher: ServedTeacher | None = None

    def make_teacher(self, accelerator: Any, tokenizer: Any) -> ServedTeacher:
        """Return the teacher that the trainer asks."""
        kept = self._kept(used_ids(tokenizer))
        self.teacher = ServedTeacher(self.server, kept, accelerator.device)
        return self.teacher

    def vocab_size(self, tokenizer: Any) -> int:
        """Return how many ids the answers are over."""
        asks_for_topk = self.keys.teacher_server_topk is not None
        return used_ids(tokenizer) if asks_for_topk else self.server.info.rows

    def attach(self, trainer: Any) -> None:
        """Let the server be asked about a batch as soon as it is put together.

        Own samples are not known then: the trainer announces them when they are.
        """
        if self.teacher is not None and not self.keys.kd_on_policy:
            trainer.data_collator = TicketCollator(trainer.data_collator, self.teacher)

    def close(self) -> None:
        """Give up what is still under way."""
        if self.teacher is not None:
            self.teacher.close()
        self.server.close()

    def _kept(self, vocab_size: int) -> Format:
        info, k = self.server.info, self.keys.teacher_server_topk
        if k is not None:
            return TopKFormat(min(k, info.max_k), torch.float32, vocab_size)
        if not info.hidden:
            raise TeacherError(
                f"`teacher_server: {self.server.url}` does not return hidden states of {info.model}: "
                f"set `teacher_server_topk`, for example to {min(64, info.max_k)}."
            )
        return info.hidden_format()


def build_from_server(
    config: dict[str, Any],
    out: Path,
    settings: Settings,
    url: str,
    *,
    batch_size: int | None = None,
    in_flight: int = 4,
    prompts: TeacherPrompts | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Let a server compute what a cache lacks of the data sets of a training configuration.

    Args:
        config: the training YAML's keys; a teacher that it names is not loaded (of one behind vLLM, the last layers).
        out, settings, batch_size, prompts, say: as for :func:`llamafactory_sekd.host.cache.build_cache`.
        url: of the server.
        in_flight: requests at a time.

    Raises:
        ArgumentError: the configuration is not one of the stage.
        TeacherError: the server does not fit or stays away, the cache is of something else, the disk is too small.
    """
    model = config.get("teacher_model")
    config = {key: value for key, value in config.items() if key not in _OF_A_LOADED_TEACHER}
    servers: list[Answering] = []

    def check(run: HostArguments) -> None:
        if not servers:  # the data sets of the teacher's own prompts are read after the student's
            servers.append(connect(run, hidden=settings.format == HiddenFormat.name, model=model))

    def read(keys: dict[str, Any], tell: Callable[[str], None]) -> Tokenized:
        data = tokenized(keys, tell, check=check)
        info = servers[0].info
        marked = replace(data.fingerprints, teacher=lambda: info.teacher, software=info.software)
        return replace(data, fingerprints=marked)

    def longest() -> int:
        return servers[0].info.max_length

    try:
        keys = {**config, "teacher_server": url}
        data = with_prompts(keys, prompts, say, read, lambda _: longest()) if prompts else read(keys, say)
        server = servers[0]
        info = server.info
        if settings.format == HiddenFormat.name and not info.hidden:
            raise TeacherError(
                f"`--server {url}` does not return hidden states of {info.model}: build the cache with "
                "`--format topk`."
            )

        def compute(plan: Plan, session: Session, data: Tokenized) -> None:
            vocab_size = used_ids(data.tokenizer)
            asked = ServedTeacher(server, info.hidden_format(), torch.device("cpu"))
            manifest = session.admit(asked, vocab_size, {}, DTYPES[info.dtype])
            examples = batch_size or data.run.training.per_device_train_batch_size
            with filling(plan, session, data, manifest.kept()) as common:
                fill_from_server(**common, server=server, batch_size=examples, in_flight=in_flight)

        def expected() -> Any:
            return settings.manifest(
                vocab_size=used_ids(data.tokenizer),
                rows=info.rows,
                width=info.width,
                computed_in=DTYPES[info.dtype],
                head=info.head,
            )

        run_session(data, out, settings, compute, expected, say)
    finally:
        for opened in servers:
            opened.close()
