"""Tasks of EleutherAI's evaluation harness: ``task: lm_eval:hellaswag,arc_easy``, for models that do not translate.

The harness asks and scores; this room checks the keys, keeps what is finished, and reports. Models come from the
host, so that adapters, quantized weights and the like are those of every other evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictInt

from llamafactory_sekd.errors import EvaluationError, suggestion
from llamafactory_sekd.evaluation.evaluation_report import texts_table
from llamafactory_sekd.evaluation.evaluation_results import SCHEMA_VERSION
from llamafactory_sekd.evaluation.evaluation_settings import Settings, System, parse_settings
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.keys import Keys, check_keys, must
from llamafactory_sekd.reporting.document import NOTHING, Column, Document, Entry, Row, Section, Table, write_document
from llamafactory_sekd.reporting.metric_labels import number
from llamafactory_sekd.reporting.terminal import print_document


logger = logging.getLogger(__name__)

PREFIX = "lm_eval:"
# What an evaluation by the harness reads; the other keys are about translation.
_SHARED = ("task", "task_dir", "systems", "template", "baseline", "batch_size", "seed", "save_dir")
_DIGITS = 4


class HarnessKeys(Keys):
    """The keys that only an evaluation by the harness has."""

    num_fewshot: Annotated[StrictInt, Field(ge=0), must("be an integer of at least 0")] | None = Field(
        None, description="Of `lm_eval:…`: examples shown first."
    )
    apply_chat_template: Annotated[StrictBool, must("be true or false")] = Field(
        False, description="Of `lm_eval:…`: ask by the tokenizer's template."
    )


_OWN = HarnessKeys.names()


@dataclass(frozen=True)
class HarnessSettings:
    """A checked evaluation by the harness.

    ``settings`` holds the systems, as every evaluation's; ``num_fewshot`` is None for each task's own number.
    """

    settings: Settings
    tasks: tuple[str, ...]
    num_fewshot: int | None
    apply_chat_template: bool


@dataclass(frozen=True)
class Harness:
    """What runs the tasks.

    ``known`` are the names of the tasks, ``run`` evaluates a system, ``fingerprint`` condenses what decides its
    results, ``versions`` are those of the packages.
    """

    known: frozenset[str]
    run: Callable[[System], Mapping[str, Any]]
    fingerprint: Callable[[System], str]
    versions: Mapping[str, str]


def is_of_harness(config: Mapping[str, Any]) -> bool:
    """Tell whether the keys of an evaluation ask for the harness."""
    return isinstance(config.get("task"), str) and config["task"].startswith(PREFIX)


def parse_harness(config: Mapping[str, Any], origin: str) -> HarnessSettings:
    """Check the keys; :class:`EvaluationError` with one line for the first that cannot work."""
    given = {key: value for key, value in config.items() if value is not None}
    for key in given:
        if key not in (*_SHARED, *_OWN):
            known = suggestion(str(key), (*_SHARED, *_OWN))
            raise EvaluationError(f"{origin}: `{key}` has no effect on `task: {given['task']}`{known}")
    tasks = tuple(name.strip() for name in given["task"].removeprefix(PREFIX).split(","))
    if not all(tasks):
        raise EvaluationError(
            f"`task` must name tasks of the harness, such as {PREFIX}hellaswag, not {given['task']!r}."
        )
    own = check_keys(HarnessKeys, {key: given[key] for key in _OWN if key in given}, origin, EvaluationError)
    # A direction is asked for by all other evaluations; here it says nothing.
    shared = {key: value for key, value in given.items() if key in _SHARED}
    settings = parse_settings({"directions": ["en-de"], "metrics": ["bleu"], **shared}, origin)
    scored = next((system.name for system in settings.systems if system.model is None), None)
    if scored is not None:
        raise EvaluationError(f"`systems.{scored}`: the harness evaluates models, not `hypotheses`.")
    return HarnessSettings(settings, tasks, own.num_fewshot, own.apply_chat_template)


def evaluate_by_harness(asked: HarnessSettings, harness: Harness) -> dict[str, Any]:
    """Run what is not finished, write results and report, and return the contents of ``results.json``."""
    for task in asked.tasks:
        if task not in harness.known:
            raise EvaluationError(f"`task`: the harness has no task {task!r}{suggestion(task, sorted(harness.known))}")
    folder = asked.settings.save_dir
    found: dict[str, Mapping[str, Any]] = {}
    prints = {system.name: harness.fingerprint(system) for system in asked.settings.systems}
    for system in asked.settings.systems:
        path = folder / "harness" / f"{system.name}.json"
        kept = read_json(path)
        if isinstance(kept, dict) and kept.get("fingerprint") == prints[system.name]:
            logger.info("%s: already evaluated and unchanged; skipping.", system.name)
            found[system.name] = kept["results"]
            continue
        logger.info("%s: %s", system.name, ", ".join(asked.tasks))
        found[system.name] = harness.run(system)
        write_json(path, {"fingerprint": prints[system.name], "results": found[system.name]})
    results = _results(asked, found, prints, harness.versions)
    write_json(folder / "results.json", results)
    document = build_harness_document(results)
    write_document(document, folder)
    print_document(document)
    print(f"Report: {folder / 'report.html'}")
    return results


def _results(
    asked: HarnessSettings,
    found: Mapping[str, Mapping[str, Any]],
    prints: Mapping[str, str],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    first = next(iter(found.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "task": asked.settings.task,
        "baseline": asked.settings.baseline,
        "num_fewshot": asked.num_fewshot,
        "apply_chat_template": asked.apply_chat_template,
        "tasks": first["tasks"],
        "systems": {name: {"scores": one["scores"]} for name, one in found.items()},
        "fingerprints": dict(prints),
        "versions": dict(versions),
    }


def build_harness_document(results: Mapping[str, Any]) -> Document:
    """Put the results into the words of the report: a column for each task and metric."""
    pairs = [(task, metric) for task, one in results["tasks"].items() for metric in one["metrics"]]
    rows = tuple(
        Row(
            (name,),
            tuple(_entry(results, name, *pair) for pair in pairs),
            "baseline" if name == results["baseline"] else "",
        )
        for name in results["systems"]
    )
    columns = tuple(Column(_name(results, *pair), pair[0]) for pair in pairs)
    note = (
        "By EleutherAI's lm-evaluation-harness. ± is its standard error. The best of a column is bold. No difference "
        "is tested for significance."
    )
    if results["baseline"] is not None:
        note += f" The smaller figures are differences to {results['baseline']}."
    shots = "each task's own" if results["num_fewshot"] is None else str(results["num_fewshot"])
    facts = [
        (task, f"{one['samples']:,} examples, version {one['version']}") for task, one in results["tasks"].items()
    ]
    facts += [("shots", shots), ("chat template", "applied" if results["apply_chat_template"] else "none")]
    versions = texts_table("Versions", ("package",), list(results["versions"].items()))
    return Document(
        f"Evaluation on {', '.join(results['tasks'])}",
        tuple(facts),
        (
            Section("Scores", note, tables=(Table(("system",), columns, rows),), main=True),
            Section("How this was made", tables=(versions,)),
        ),
    )


def _name(results: Mapping[str, Any], task: str, metric: str) -> str:
    name = metric.removesuffix(",none")
    return name if results["tasks"][task]["metrics"][metric] else f"{name} ↓"


def _entry(results: Mapping[str, Any], name: str, task: str, metric: str) -> Entry:
    every = {system: entry["scores"].get(task, {}).get(metric) for system, entry in results["systems"].items()}
    own = every[name]
    if own is None:
        return NOTHING
    known = [one["value"] for one in every.values() if one is not None]
    top = (max if results["tasks"][task]["metrics"][metric] else min)(known)
    base = every.get(results["baseline"])
    small = ""
    if base is not None and name != results["baseline"]:
        small = number(own["value"] - base["value"], _DIGITS, sign=True)
    spread = "" if own["stderr"] is None else number(own["stderr"], _DIGITS)
    return Entry(number(own["value"], _DIGITS), spread, small=small, best=len(known) > 1 and own["value"] == top)


def scores_of(found: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Return what is kept of the harness's own results of ``tasks``: scores, and of each task what they are.

    A group's subtasks, of which its score is made, are left out.
    """
    scores: dict[str, dict[str, dict[str, float | None]]] = {}
    about: dict[str, dict[str, Any]] = {}
    for task in tasks:
        entry = found["results"][task]
        values = {key: value for key, value in entry.items() if "," in key and isinstance(value, int | float)}
        scores[task] = {
            key: {"value": float(value), "stderr": _stderr(entry, key)}
            for key, value in values.items()
            if not key.partition(",")[0].endswith("_stderr")
        }
        better = found["higher_is_better"].get(task) or {}
        parts = [task] if task in found["n-samples"] else found["group_subtasks"].get(task, [])
        about[task] = {
            "version": found["versions"].get(task),
            "samples": sum(found["n-samples"].get(part, {}).get("effective", 0) for part in parts),
            "metrics": {key: better.get(key.partition(",")[0]) is not False for key in scores[task]},
        }
    return {"scores": scores, "tasks": about}


def _stderr(entry: Mapping[str, Any], key: str) -> float | None:
    metric, _, kind = key.partition(",")
    value = entry.get(f"{metric}_stderr,{kind}")
    return float(value) if isinstance(value, int | float) else None


def own_tasks(settings: Settings) -> Path | None:
    """Return the folder with tasks of the user's own; None where there is none."""
    return settings.task_dir if settings.task_dir.is_dir() else None
