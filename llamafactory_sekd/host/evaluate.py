"""``llamafactory-cli eval``: the host's loaders for the evaluation, and the host's way of starting several ranks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llamafactory_sekd.children import end_rank_with_launcher, end_with_parent
from llamafactory_sekd.config import read_config
from llamafactory_sekd.errors import EvaluationError, SekdError, one_line, suggestion
from llamafactory_sekd.evaluation.evaluation_settings import Settings, System, parse_settings
from llamafactory_sekd.evaluation.harness import (
    Harness,
    HarnessSettings,
    evaluate_by_harness,
    is_of_harness,
    own_tasks,
    parse_harness,
    scores_of,
)
from llamafactory_sekd.evaluation.systems import Description, Host, ModelSource, Translator, system_fingerprint
from llamafactory_sekd.files import no_room
from llamafactory_sekd.fingerprints import Digests, sha256_of, sha256_of_json
from llamafactory_sekd.host.templates import check_template, encoder, template_of, text_arguments, thought_tokens


# What the harness takes at a time where nobody says how much.
_BATCH = 8
USAGE = "usage: llamafactory-cli eval CONFIG.yaml [KEY=VALUE …]   (keys: docs/evaluation.md)"


def run_eval(argv: list[str]) -> None:
    """Run the evaluation that ``argv`` asks for: a YAML (or JSON) file and ``key=value`` overrides, dotted ones too.

    Where the host would train on several devices, torchrun starts as many ranks. Errors that the user can fix are
    printed as one line, with exit status 2.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    # What was found and what is skipped should be seen whether or not something else set up a handler.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llamafactory_sekd").setLevel(logging.INFO)
    end_rank_with_launcher()
    try:
        config = read_config(Path(argv[0]), argv[1:], error=EvaluationError)
        if is_of_harness(config):
            asked = parse_harness(config, argv[0])
            refuse_ranks(asked)
            evaluate_on_tasks(asked)
            return
        settings = parse_settings(config, argv[0])
        if wants_torchrun(settings):
            from llamafactory_sekd.evaluation.evaluation_run import prepare

            # Whatever is wrong is reported here, once, and not by every rank.
            prepare(settings, build_host(settings))
            sys.exit(start_ranks("llamafactory_sekd", "eval", *argv))
        evaluate_settings(settings)
    except SekdError as error:
        print(f"llamafactory-cli eval: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if "RANK" not in os.environ:  # ranks leave it to the command that they were started by
            print(
                "\nllamafactory-cli eval: interrupted; what is translated is kept, and the same command goes on from "
                "there.",
                file=sys.stderr,
            )
        sys.exit(130)
    except Exception as error:
        words = no_room(error)
        if not words:
            raise
        print(
            f"llamafactory-cli eval: error: no room to write ({words}): free some, and start the same command again.",
            file=sys.stderr,
        )
        sys.exit(2)


def evaluate_on_tasks(asked: HarnessSettings) -> dict[str, Any]:
    """Run an evaluation by EleutherAI's harness in this process and return the contents of ``results.json``.

    Raises:
        EvaluationError: the harness is not installed, or cannot run.
    """
    settings = asked.settings
    host = build_host(settings)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"`task: {settings.task}` needs the harness (pip install 'llamafactory-sekd[lm-eval]'): "
            f"{one_line(str(error))}."
        ) from None
    folder = own_tasks(settings)
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    digests = Digests(settings.save_dir / ".digests.json")
    versions = {**host.versions, "lm_eval": version("lm_eval")}

    def fingerprint(system: System) -> str:
        model = system_fingerprint(system, host.describe(system), settings.decoding, [], digests, versions)
        texts = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()} if folder else {}
        others = [model, asked.tasks, asked.num_fewshot, asked.apply_chat_template, settings.seed, texts]
        return sha256_of_json(others)

    known = frozenset(manager.all_tasks)
    harness = Harness(known, lambda system: _scores_of_tasks(asked, system, manager), fingerprint, versions)
    return evaluate_by_harness(asked, harness)


def _scores_of_tasks(asked: HarnessSettings, system: System, manager: Any) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, _ = load_model_for_generation(asked.settings, system)
    seed = asked.settings.seed
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=asked.settings.batch_size or _BATCH),
            tasks=list(asked.tasks),
            num_fewshot=asked.num_fewshot,
            apply_chat_template=asked.apply_chat_template,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:
        # Data sets that cannot be had raise whatever their hub's client does.
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise EvaluationError(f"`systems.{system.name}`: the harness cannot run: {reason}") from error
    return scores_of(found, asked.tasks)


def refuse_ranks(asked: HarnessSettings) -> None:
    """Refuse an evaluation by the harness on several ranks: each of them would do all of it."""
    from llamafactory.extras.misc import is_env_enabled

    if is_env_enabled("FORCE_TORCHRUN") or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvaluationError(
            f"`task: {asked.settings.task}` runs in one process, which spreads a model over all visible GPUs: start "
            "it without torchrun and unset FORCE_TORCHRUN."
        )


def evaluate_settings(settings: Settings) -> dict[str, Any] | None:
    """Run an evaluation in this process (or rank) and return the contents of ``results.json`` on the first rank."""
    import transformers

    from llamafactory_sekd.evaluation.evaluation_run import evaluate

    transformers.set_seed(settings.seed)
    return evaluate(settings, build_host(settings))


def _is_vllm(settings: Settings) -> bool:
    return settings.decoding.backend == "vllm"


def wants_torchrun(settings: Settings) -> bool:
    """Tell whether several ranks have to be started, as the host would for its training."""
    from llamafactory.extras.misc import get_device_count, is_env_enabled

    if "LOCAL_RANK" in os.environ:
        return False
    if _is_vllm(settings) or all(system.model is None for system in settings.systems):
        return False
    return is_env_enabled("FORCE_TORCHRUN") or get_device_count() > 1


def start_ranks(*words: str) -> int:
    """Start a module of ours on every device, with the variables that the host takes for its training."""
    from llamafactory.extras.misc import find_available_port, get_device_count

    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", os.getenv("NNODES", "1")),
        *("--node-rank", os.getenv("NODE_RANK", "0")),
        *("--nproc-per-node", os.getenv("NPROC_PER_NODE", str(max(1, get_device_count())))),
        *("--master-addr", os.getenv("MASTER_ADDR", "127.0.0.1")),
        *("--master-port", os.getenv("MASTER_PORT", str(find_available_port()))),
        *("-m", *words),
    ]
    return subprocess.run(command, check=False, preexec_fn=end_with_parent).returncode


def build_host(settings: Settings) -> Host:
    """Return the host's side of the evaluation: argument checks, templates, loaders."""
    import torch
    import transformers
    from llamafactory.extras.env import VERSION
    from llamafactory.extras.logging import get_logger

    get_logger(__name__)  # makes the host's handler where nothing has logged yet
    for handler in logging.getLogger("llamafactory").handlers:
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr  # standard output is for the tables

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "llamafactory": VERSION}
    if _is_vllm(settings):
        try:
            versions["vllm"] = version("vllm")
        except PackageNotFoundError:
            raise EvaluationError(
                "`backend: vllm` needs vLLM (pip install 'llamafactory-sekd[vllm]'); `backend: hf` does without."
            ) from None
    return Host(
        describe=lambda system: _describe(settings, system),
        load=lambda system: _load_vllm(settings, system) if _is_vllm(settings) else _load_hf(settings, system),
        versions=versions,
    )


def _host_arguments(settings: Settings, system: System) -> tuple[Any, Any, Any, Any]:
    """Let the host parse and check a system's arguments."""
    import transformers
    from llamafactory.hparams import get_infer_args
    from llamafactory.model.loader import try_download_model_from_other_hub

    given = {"template": settings.template, **(system.model or {})}
    check_template("template", given["template"], EvaluationError)
    _check_keys(system)
    if _is_vllm(settings):
        given["infer_backend"] = "vllm"
    try:
        arguments = get_infer_args(given)
    except (ValueError, ImportError, TypeError) as error:
        raise EvaluationError(f"`systems.{system.name}`: {' '.join(str(error).split())}") from None
    # The host turns on the libraries' chatter for a user at a console; here it would drown the progress and the
    # tables.
    transformers.utils.logging.set_verbosity_warning()
    arguments[0].model_name_or_path = try_download_model_from_other_hub(arguments[0])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from llamafactory.extras.misc import get_current_device

        arguments[0].device_map = {"": get_current_device()}
    return arguments


def _check_keys(system: System) -> None:
    """Refuse a key of a system that is close to one that the host reads; others stay the host's to report."""
    from llamafactory.hparams import parser

    known = [item.name for arguments in parser._INFER_ARGS for item in fields(arguments) if item.init]
    for key in system.model or {}:
        meant = suggestion(key, known)
        if key not in known and "did you mean" in meant:
            raise EvaluationError(f"`systems.{system.name}`: unknown key {key!r}{meant}")


def _describe(settings: Settings, system: System) -> Description:
    from llamafactory.data.template import TEMPLATES

    model_args, data_args, _, _ = _host_arguments(settings, system)
    adapters = model_args.adapter_name_or_path or []
    return Description(
        sources=(
            ModelSource(model_args.model_name_or_path, model_args.model_revision),
            *(ModelSource(adapter, config="adapter_config.json") for adapter in adapters),
        ),
        template=repr(TEMPLATES[data_args.template]),
        thought_words=TEMPLATES[data_args.template].thought_words,
    )


def load_model_for_generation(settings: Settings, system: System) -> tuple[Any, Any, Any]:
    """Return a system's model, tokenizer and template."""
    from llamafactory.model import load_model, load_tokenizer

    model_args, data_args, finetuning_args, _ = _host_arguments(settings, system)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = template_of(tokenizer, data_args)
    model = load_model(tokenizer, model_args, finetuning_args, is_trainable=False)
    return model, tokenizer, template


def _load_hf(settings: Settings, system: System) -> Translator:
    from llamafactory_sekd.evaluation.decoding import hf_translate

    model, tokenizer, template = load_model_for_generation(settings, system)
    translate = hf_translate(model, **text_arguments(tokenizer, template), decoding=settings.decoding)
    return Translator(encoder(tokenizer, template), translate)


def load_vllm_engine(settings: Settings, system: System) -> tuple[Any, Any, Any, Any]:
    """Return vLLM's engine with the options that the host's chat engine takes, its adapter, tokenizer and template."""
    from llamafactory.extras.misc import get_device_count
    from llamafactory.model import load_tokenizer
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    model_args, data_args, _, _ = _host_arguments(settings, system)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = template_of(tokenizer, data_args)
    adapters = model_args.adapter_name_or_path
    options = {
        "model": model_args.model_name_or_path,
        "trust_remote_code": model_args.trust_remote_code,
        "download_dir": model_args.cache_dir,
        "dtype": model_args.infer_dtype,
        "max_model_len": model_args.vllm_maxlen,
        "tensor_parallel_size": get_device_count() or 1,
        "gpu_memory_utilization": model_args.vllm_gpu_util,
        "enforce_eager": model_args.vllm_enforce_eager,
        "enable_lora": adapters is not None,
        "max_lora_rank": model_args.vllm_max_lora_rank,
    }
    if isinstance(model_args.vllm_config, dict):
        options.update(model_args.vllm_config)
    request = LoRARequest("default", 1, adapters[0]) if adapters else None
    return LLM(**options), request, tokenizer, template


def _load_vllm(settings: Settings, system: System) -> Translator:
    from llamafactory_sekd.evaluation.vllm_backend import vllm_translate

    engine, request, tokenizer, template = load_vllm_engine(settings, system)
    stop_ids, kept = template.get_stop_token_ids(tokenizer), thought_tokens(tokenizer, template)
    translate = vllm_translate(engine, stop_ids, settings.decoding, request, skip_special_tokens=not kept)
    return Translator(encoder(tokenizer, template), translate)
