"""``sekd translate`` from its options to its files, with the host's loaders."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamafactory_sekd import __version__
from llamafactory_sekd.children import end_rank_with_launcher
from llamafactory_sekd.config import read_overrides
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import Prompt
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.decoding import hf_candidates
from llamafactory_sekd.evaluation.evaluation_settings import Settings, System
from llamafactory_sekd.evaluation.metric_models import prepare_comet
from llamafactory_sekd.evaluation.scores import SegmentScorer
from llamafactory_sekd.evaluation.systems import (
    BatchLimits,
    Description,
    Host,
    Request,
    source_digests,
    system_fingerprint,
)
from llamafactory_sekd.evaluation.translation_store import split_thought
from llamafactory_sekd.files import write_json
from llamafactory_sekd.fingerprints import Digests
from llamafactory_sekd.host.evaluate import (
    build_host,
    load_model_for_generation,
    load_vllm_engine,
    start_ranks,
    wants_torchrun,
)
from llamafactory_sekd.host.templates import encoder, text_arguments, thought_tokens
from llamafactory_sekd.ranks import Ranks, join_ranks
from llamafactory_sekd.translation.candidates import Generation, Model, Plan, Shard, collect, generate, work_folder
from llamafactory_sekd.translation.choosing import Result, findings, select, signature, write_dataset, write_text
from llamafactory_sekd.translation.source_texts import STDIN, Texts, mixed, read_alma_split, read_dataset, read_file


logger = logging.getLogger(__name__)

_NAME = "model"


@dataclass(frozen=True)
class Weights:
    """Which model: options of the command, and the host's own model arguments as ``key=value``."""

    model: str
    adapter: str | None
    template: str
    overrides: Sequence[str]


@dataclass(frozen=True)
class Inputs:
    """Which text: a file (None: stdin), a data set, or a split of ALMA."""

    text: Path | None
    dataset: str | None
    dataset_dir: Path
    alma: Path | None
    split: str
    directions: list[Direction]
    prompt: Prompt
    target: str | None
    mix: float | None

    def read(self, seed: int) -> Texts:
        """Return the sentences, with ``seed`` for those that keep their reference."""
        texts = self._read()
        return texts if self.mix is None else mixed(texts, self.mix, seed)

    def _read(self) -> Texts:
        if self.dataset is not None:
            return read_dataset(self.dataset, self.dataset_dir, self.target)
        if self.alma is not None:
            return read_alma_split(self.alma, self.split, self.directions, self.prompt)
        return read_file(self.text or STDIN, self.directions, self.prompt)


@dataclass(frozen=True)
class Outputs:
    """Where it goes, what is left out, and which part of the work this process does."""

    out: Path | None
    name: str | None
    filters: tuple[str, ...]
    work: Path | None
    overwrite: bool
    shard: Shard
    join: int | None


def run_translate(
    weights: Weights,
    inputs: Inputs,
    plan: Plan,
    outputs: Outputs,
    *,
    comet_model: str,
    seed: int,
    batch_tokens: int,
    batch_size: int | None,
) -> None:
    """Translate and write; several ranks where the host would train on several devices.

    Raises:
        SekdError: one line for what cannot work.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llamafactory_sekd").setLevel(logging.INFO)
    end_rank_with_launcher()
    with _own_stdout() as stdout, _work(outputs) as work:
        settings = _settings(weights, plan, work, seed, batch_tokens, batch_size)
        try:
            host = build_host(settings)
            if outputs.join is None and wants_torchrun(settings):
                host.describe(settings.systems[0])  # reports whatever is wrong once, and not on every rank
                sys.exit(_on_several(inputs, work, stdout))
            limits = BatchLimits(batch_tokens, batch_size)
            with join_ranks() as ranks:
                _translate(settings, host, inputs, plan, outputs, work, limits, comet_model, ranks, stdout)
        except EvaluationError as error:
            raise EvaluationError(str(error).replace(f"`systems.{_NAME}`", "--model")) from None


def _translate(
    settings: Settings,
    host: Host,
    inputs: Inputs,
    plan: Plan,
    outputs: Outputs,
    work: Path,
    limits: BatchLimits,
    comet_model: str,
    ranks: Ranks,
    stdout: int,
) -> None:
    system = settings.systems[0]
    texts, identity, made_of = ranks.from_first(
        _identify(settings, system, host, inputs, work) if ranks.is_first else None
    )
    scorer: SegmentScorer | None = None
    if plan.choice.consensus == "comet" and ranks.is_first and outputs.shard.count == 1:
        scorer = prepare_comet(comet_model, Digests(work / ".digests.json"))
    messages = [sentence.message for sentence in texts.sentences if sentence.is_translated]
    generation = Generation(messages, identity, plan.count, plan.drawing, settings.seed)
    if outputs.join is None and messages:
        generate(generation, outputs.shard, work, lambda: _load(settings, system, plan), limits, ranks)
    if not ranks.is_first:
        return
    if outputs.shard.count > 1:
        logger.info(
            "Part %d of %d is done; with all of them: the same command with `--join %d`.",
            outputs.shard.number,
            outputs.shard.count,
            outputs.shard.count,
        )
        return
    candidates = collect(generation, outputs.join or 1, work) if messages else []
    words = host.describe(system).thought_words
    candidates = [[replace(one, text=split_thought(one.text, words)[0]) for one in found] for found in candidates]
    results = select(texts.sentences, candidates, plan.choice, outputs.filters, scorer, work)
    request = {
        "command": "translate",
        **made_of,
        "prompt": texts.prompt,
        "method": plan.method,
        "candidates": plan.count,
        "n_best": plan.choice.n_best,
        "decoding": plan.decoding.model_dump(),
        "drawing": asdict(plan.drawing) | {"seed": settings.seed} if plan.drawing else None,
        "chosen_by": signature(plan.choice, scorer),
        "keep": "reference" if plan.choice.closest else None,
        "mix": inputs.mix,
        "filters": list(outputs.filters),
        "source": [{"name": name, "sha256": digest} for name, digest in texts.files.items()],
    }
    _write(results, outputs, request, host.versions, work, stdout)


def _write(
    results: list[Result],
    outputs: Outputs,
    request: dict[str, Any],
    versions: dict[str, str],
    work: Path,
    stdout: int,
) -> None:
    software = {**versions, "llamafactory_sekd": __version__}
    found = findings(results)
    if outputs.name is not None and outputs.out is not None:
        source = {"kind": "translated", "revision": None, "software": software}
        manifest = write_dataset(results, outputs.name, outputs.out, request, source, outputs.overwrite)
        records = manifest["files"][f"{outputs.name}.json"]["records"]
        logger.info("%d records in %s/%s.json", records, outputs.out, outputs.name)
        template = "parrot" if request["prompt"] == "parrot" else "that of your model (qwen, llama3, …)"
        logger.info(
            "In LLaMA-Factory: dataset_dir: %s, dataset: %s, template: %s", outputs.out, outputs.name, template
        )
    else:
        with os.fdopen(os.dup(stdout), "wb") as stream:
            write_text(results, outputs.out, stream)
        write_json(work / "provenance.json", {"request": request, "software": software, "findings": found.as_json()})
    if found.items:
        count = sum(len(result.chosen) for result in results)
        logger.warning("Of %d translations%s: %s", count, ", left out" if outputs.name else "", found.summary())


def _identify(
    settings: Settings, system: System, host: Host, inputs: Inputs, work: Path
) -> tuple[Texts, str, dict[str, Any]]:
    """Return the text, what condenses all of the model, and the digests for the manifest."""
    texts = inputs.read(settings.seed)
    description: Description = host.describe(system)
    digests = Digests(work / ".digests.json")
    identity = system_fingerprint(system, description, settings.decoding, [], digests, host.versions)
    weights = [
        {"location": source.location, "files": source_digests(source, system.name, digests)}
        for source in description.sources
    ]
    return texts, identity, {"model": weights, "template": settings.template}


def _of_messages(tokenizer: Any, template: Any) -> Callable[[str], list[int]]:
    encode = encoder(tokenizer, template)
    return lambda message: encode(Request(message))


def _load(settings: Settings, system: System, plan: Plan) -> Model:
    if plan.decoding.backend == "vllm":
        from llamafactory_sekd.evaluation.vllm_backend import vllm_candidates

        engine, lora, tokenizer, template = load_vllm_engine(settings, system)
        stop_ids, kept = template.get_stop_token_ids(tokenizer), thought_tokens(tokenizer, template)
        return Model(
            _of_messages(tokenizer, template),
            vllm_candidates(engine, stop_ids, plan.decoding, plan.drawing, lora, skip_special_tokens=not kept),
        )
    model, tokenizer, template = load_model_for_generation(settings, system)
    candidates = hf_candidates(
        model,
        **text_arguments(tokenizer, template),
        decoding=plan.decoding,
        drawing=plan.drawing,
        best=1 if plan.drawing else plan.count,
    )
    return Model(_of_messages(tokenizer, template), candidates)


def _settings(
    weights: Weights, plan: Plan, work: Path, seed: int, batch_tokens: int, batch_size: int | None
) -> Settings:
    """Word the options as an evaluation's, whose loaders they go to."""
    model: dict[str, Any] = {"model_name_or_path": weights.model}
    if weights.adapter is not None:
        model["adapter_name_or_path"] = weights.adapter
    model |= read_overrides(weights.overrides)
    return Settings.model_construct(
        task="translate",
        directions=(),
        systems=(System(_NAME, model=model),),
        save_dir=work,
        template=weights.template,
        decoding=plan.decoding,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        seed=seed,
    )


@contextmanager
def _work(outputs: Outputs) -> Iterator[Path]:
    """Return the folder of the candidates: a lasting one where the output has a place, else a temporary one."""
    folder = work_folder(outputs.out, outputs.name, outputs.work)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    temporary = Path(tempfile.mkdtemp(prefix="sekd-translate-"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _own_stdout() -> Iterator[int]:
    """Keep stdout for the translations: what the host and its libraries print there goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield kept
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _on_several(inputs: Inputs, work: Path, stdout: int) -> int:
    """Start the same command on every rank; the text of stdin, which cannot be read twice, becomes a file."""
    words = sys.argv[sys.argv.index("translate") + 1 :] if "translate" in sys.argv else sys.argv[1:]
    if inputs.text is None and inputs.dataset is None and inputs.alma is None:
        text = work / "stdin.txt"
        text.write_bytes(sys.stdin.buffer.read())
        words += ["--in", str(text)]
    words += ["--work", str(work)]  # one folder for all ranks, a temporary one too
    os.dup2(stdout, 1)  # the ranks keep it apart themselves
    return start_ranks("llamafactory_sekd.cli", "translate", *words)
