"""``task: lm_eval:…``: the host's models in EleutherAI's evaluation harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from llamafactory_sekd.errors import EvaluationError, one_line
from llamafactory_sekd.evaluation.evaluation_settings import System
from llamafactory_sekd.evaluation.harness import Harness, HarnessSettings, evaluate_by_harness, own_tasks, scores_of
from llamafactory_sekd.evaluation.systems import Host, system_fingerprint
from llamafactory_sekd.fingerprints import Digests, sha256_of, sha256_of_json


# What the harness takes at a time where nobody says how much.
_BATCH = 8


# A system to its model, tokenizer and template.
Load = Callable[[System], tuple[Any, Any, Any]]


def run_harness(asked: HarnessSettings, host: Host, load: Load) -> dict[str, Any]:
    """Evaluate all systems in this process; :class:`EvaluationError` where the harness is not there or cannot run."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"`task: {asked.settings.task}` needs the harness (pip install 'llamafactory-sekd[lm-eval]'): "
            f"{one_line(str(error))}."
        ) from None
    folder = own_tasks(asked.settings)
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    digests = Digests(asked.settings.save_dir / ".digests.json")
    versions = {**host.versions, "lm_eval": version("lm_eval")}

    def fingerprint(system: System) -> str:
        settings = asked.settings
        model = system_fingerprint(system, host.describe(system), settings.decoding, [], digests, versions)
        texts = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()} if folder else {}
        others = [model, asked.tasks, asked.num_fewshot, asked.apply_chat_template, settings.seed, texts]
        return sha256_of_json(others)

    known = frozenset(manager.all_tasks)
    harness = Harness(known, lambda system: _run(asked, system, load, manager), fingerprint, versions)
    return evaluate_by_harness(asked, harness)


def _run(asked: HarnessSettings, system: System, load: Load, manager: Any) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, _ = load(system)
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
