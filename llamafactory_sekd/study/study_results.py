"""What a study found: ``results.json`` and ``results.csv`` below its ``output_dir``.

Schema 1 of ``results.json``; within a version keys are only ever added. Every path is relative to the folder of
``results.json``, so the folder may be moved; paths inside of ``spec`` and ``config`` are as the user wrote them.

==================================  ==================================================================================
``schema_version``, ``study``       1, and the study file's name without its suffix
``spec``                            the complete study as it ran: file, its `base`, overrides of the command line
``directions``, ``metrics``         of the evaluation, such as ``["en-de"]`` and ``["bleu", "chrf"]``
``test_set``                        ``{"task", "task_dir"}``, what ``data.testsets.load_test_set`` takes; `task_dir`
                                    is relative to the working directory; also ``bleu_tokenizer``, and (not in older
                                    files) ``metric_models``, ``{"comet": "Unbabel/wmt22-comet-da"}``; null without
                                    an evaluation
``cells[]``                         one per system, point of the matrix and seed, in the study's order
- ``id``, ``system``, ``seed``      the folder's name, the name in `systems`, the seed
- ``axes``                          ``{key: value}``; keys of the matrix that have no effect on the system are absent
- ``folder``, ``model``             paths
- ``config``                        the complete ``train.yaml``
- ``training``                      null before the training is done, else ``seconds``, ``steps``,
                                    ``samples_per_second`` (null where unknown) and ``resumed``: true where it was
                                    interrupted, and the two times are those of the last piece alone
- ``validation``                    null before; the ``eval_*`` entries of the model that was saved: the log's last, or
                                    with `load_best_model_at_end` the best; and ``nll``: ``eval_kd/ce``, or
                                    ``eval_loss`` of a system that is trained by the host's SFT; with
                                    `select.evaluation` also ``bleu``, ``chrf``, ``comet`` there, the average
- ``history``                       path of ``trainer_state.json``, whose ``log_history`` holds loss and ``kd/*``
- ``scores``                        null before the evaluation is done ({} in a study without one, once it is trained),
                                    else as in the evaluation's results.json:
                                    ``{direction or "average": {"bleu", "chrf", "comet"}}``
- ``similarity``                    ``{direction or "average": BLEU against the teacher's translations}`` or null
- ``guards``                        ``{direction: {"empty", "wrong_language", …}}``
- ``hypotheses``                    ``{direction: path}``, one translation per line
- ``segment_scores``                ``{direction: path}`` of COMET's scores (``{"scores": [...]}``), {} without COMET
``models[]``                        ``name``, ``folder``, ``scores`` to ``segment_scores`` as above; `similarity` is
                                    null for the teacher
``selection[]``                     empty without `select`, else per system and point of the other keys: ``system``,
                                    ``axes`` (without the selected key), ``key``, ``value`` (the best; null where no
                                    cell has the metric), ``metric``, ``mode`` and ``by_value``: a list of
                                    ``{"value", "mean", "seeds"}``, the metric averaged over ``seeds`` seeds
==================================  ==================================================================================
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamafactory_sekd.evaluation.evaluation_settings import METRICS
from llamafactory_sekd.files import write_atomic


SCHEMA_VERSION = 1
JSON, CSV = "results.json", "results.csv"
Cell = Mapping[str, Any]


def write_results(results: Mapping[str, Any], folder: Path) -> Path:
    """Write both files, each complete or not at all, and return the path of results.json."""
    write_atomic(folder / CSV, _table(results).encode("utf-8"))
    text = json.dumps(_plain(results), ensure_ascii=False, indent=1, allow_nan=False, default=str)
    write_atomic(folder / JSON, f"{text}\n".encode())
    return folder / JSON


def _plain(value: Any) -> Any:
    """Return the value with what JSON has no number for, such as Γ = inf, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def select(cells: Iterable[Cell], key: str, metric: str, mode: str) -> list[dict[str, Any]]:
    """Choose each system's best value of a matrix key by a validation metric, averaged over the seeds.

    Args:
        cells: as in results.json.
        key: a key of the matrix.
        metric: a key of ``validation``.
        mode: ``min`` or ``max``.
    """
    groups: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if key not in cell["axes"]:
            continue
        others = {name: value for name, value in cell["axes"].items() if name != key}
        name = json.dumps([cell["system"], others], default=str)
        group = groups.setdefault(name, {"system": cell["system"], "axes": others, "found": {}})
        found = group["found"].setdefault(json.dumps(cell["axes"][key]), [])
        value = (cell["validation"] or {}).get(metric)
        if value is not None:
            found.append(value)
    return [_best(group, key, metric, mode) for group in groups.values()]


def _best(group: dict[str, Any], key: str, metric: str, mode: str) -> dict[str, Any]:
    by_value = [
        {"value": json.loads(value), "mean": statistics.fmean(found) if found else None, "seeds": len(found)}
        for value, found in group["found"].items()
    ]
    known = [row for row in by_value if row["mean"] is not None]
    choose = min if mode == "min" else max
    best = choose(known, key=lambda row: row["mean"])["value"] if known else None
    return {
        **{name: group[name] for name in ("system", "axes")},
        **{"key": key, "value": best, "metric": metric, "mode": mode, "by_value": by_value},
    }


def _table(results: Mapping[str, Any]) -> str:
    """Return the flat table: one row per cell, one column per figure."""
    rows = [dict(_flat(cell, results)) for cell in results["cells"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flat(cell: Cell, results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, cell[name]) for name in ("id", "system", "seed"))
    for key in results["spec"].get("matrix") or {}:
        yield key, cell["axes"].get(key)
    for name in ("seconds", "steps", "samples_per_second"):
        yield name, (cell["training"] or {}).get(name)
    for name, value in (cell["validation"] or {}).items():
        yield (f"validation {name}" if name in METRICS else name), value
    for column in (*results["directions"], "average"):
        for metric in results["metrics"]:
            yield f"{column} {metric}", ((cell["scores"] or {}).get(column) or {}).get(metric)
        yield f"{column} similarity", (cell["similarity"] or {}).get(column)
