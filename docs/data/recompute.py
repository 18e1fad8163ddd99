"""The figures of docs/demo.md that a study measured: kept as CSV, and written into the page.

    python docs/data/recompute.py                        the tables of the page, from the CSV files
    python docs/data/recompute.py --export NAME FOLDER   the CSV files of a study, from its folder (then the tables)

An export replaces the rows of the data that the folder's study ran on, and keeps those of other data.

Each study has two files. `NAME_runs.csv`: one row a run. `NAME_differences.csv`: pairs of systems, difference, 95 %
interval and p of the paired bootstrap over the test sentences. A block of a page starts with
`<!-- data: NAME TABLE -->` and ends with `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
PAGES = (HERE.parent / "demo.md", HERE.parent / "replication.md")
METRICS = {"bleu": "BLEU", "chrf": "chrF2"}
# The pairs that are tested, at each point of the matrix; Holm's correction is over those of a point and a metric.
PAIRS = {
    "demo": (
        ("Forward KD", "SFT"),
        ("Forward KD, λ 1", "SFT"),
        ("Self-Evolution KD", "SFT"),
        ("Sequence-level KD", "SFT"),
        ("Self-Evolution KD", "Forward KD"),
        ("Self-Evolution KD", "Forward KD, λ 1"),
        ("Self-Evolution KD", "Sequence-level KD"),
    ),
    # The two questions of the study's file; they are asked of chrF2.
    "unreliable": (("Self-Evolution KD", "Forward KD"), ("Forward KD", "SFT")),
    # The three questions of the study's file.
    "sources": (
        ("Sequence-level KD", "Forward KD"),
        ("Sequence- and word-level KD", "Forward KD"),
        ("On-policy, JSD", "Forward KD"),
    ),
}
# The data that a study's questions are about, where it has others too, which are only described.
ASKED_OF = {"unreliable": "exchanged_40"}
# Described without a test: the control, and the size of the gap that can be distilled.
DESCRIBED = {
    "demo": (("Teacher", "SFT"), ("Student, before", "SFT")),
    "unreliable": (
        ("Forward KD, λ 1", "Forward KD"),
        ("Self-Evolution KD", "Forward KD, λ 1"),
        ("Verified reference", "Forward KD"),
        ("Verified reference", "Forward KD, λ 1"),
        ("Verified reference", "Self-Evolution KD"),
        ("SFT, best checkpoint", "SFT"),
        ("Reverse KD", "Forward KD"),
        ("SKEW KD", "Forward KD"),
        ("Self-Evolution KD", "SKEW KD"),
        ("Self-Evolution KD, Γ 2", "Self-Evolution KD"),
        ("Self-Evolution KD, Γ auto", "Self-Evolution KD"),
        ("Teacher", "SFT"),
    ),
    "sources": (
        ("Forward KD", "SFT"),
        ("Self-Evolution KD", "Forward KD"),
        ("Sequence-level KD, monolingual", "Sequence-level KD"),
        ("Sequence-level KD, monolingual", "Forward KD"),
        ("Reverse KD", "Forward KD"),
        ("On-policy, reverse KL", "Forward KD"),
        ("On-policy, reverse KL", "Reverse KD"),
        ("On-policy, JSD", "On-policy, reverse KL"),
        ("Sequence- and word-level KD", "Sequence-level KD"),
        ("Teacher", "SFT"),
    ),
}
_BLOCK = re.compile(r"(<!-- data: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_CLEAN = "clean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", nargs=2, metavar=("NAME", "FOLDER"))
    arguments = parser.parse_args()
    if arguments.export is not None:
        export(arguments.export[0], Path(arguments.export[1]))
    for page in PAGES:
        page.write_text(recomputed(page.read_text(encoding="utf-8")), encoding="utf-8")


def recomputed(page: str) -> str:
    """Return a page with its blocks made from the CSV files."""
    return _BLOCK.sub(lambda block: block[1] + "\n" + TABLES[block[3]](block[2]) + "\n\n" + block[4], page)


def export(name: str, folder: Path) -> None:
    """Write the two CSV files of a study from its results."""
    from llamafactory_sekd.files import read_json
    from llamafactory_sekd.study.report.cells import read_study
    from llamafactory_sekd.study.report.views import Views

    study = read_study(read_json(folder / "results.json") or {}, folder)
    views = Views(study)
    (direction,) = study.directions
    measured = dict.fromkeys(_data(group) for group in views.groups)
    # A model that is only evaluated belongs to every data of its study, and to no other study's.
    groups = [(group, data) for group in study.models for data in measured]
    groups += [(group, _data(group)) for group in views.groups]
    runs = []
    for group, data in groups:
        for seed, cell in group.cells.items():
            scores = cell["scores"][direction]
            validation = cell.get("validation") or {}
            runs.append(
                {
                    "system": group.system,
                    "data": data,
                    "learning_rate": group.value("learning_rate") or "",
                    "seed": "" if seed is None else seed,
                    **{metric: f"{scores[metric]:.4f}" for metric in METRICS},
                    "nll": f"{validation['nll']:.4f}" if "nll" in validation else "",
                    "hard": f"{validation['eval_kd/hard_ratio']:.4f}" if "eval_kd/hard_ratio" in validation else "",
                }
            )
    differences = []
    for data in measured:
        at = {group.system: group for group in views.groups if _data(group) == data}
        at.update({group.system: group for group in study.models})
        for pair in (*PAIRS[name], *DESCRIBED[name]):
            for metric in METRICS if all(system in at for system in pair) else ():
                found = views.between(at[pair[0]], at[pair[1]], direction, metric)
                if found is not None:
                    numbers = {"difference": found.value, "low": found.low, "high": found.high, "p": found.p}
                    seeds = f"{sum(value > 0 for value in found.seeds)} of {len(found.seeds)}"
                    row = {"data": data, "system": pair[0], "against": pair[1], "metric": metric, "ahead": seeds}
                    differences.append({**row, **{key: f"{value:.4f}" for key, value in numbers.items()}})
    if not differences:
        raise SystemExit(f"{folder}: no test set to compare systems on; run this where the study ran.")
    _replace(f"{name}_runs", runs)
    _replace(f"{name}_differences", differences)


def _data(group: object) -> str:
    value = group.value("dataset")  # type: ignore[attr-defined]
    return str(value).removesuffix("_{seed}") if value is not None else ""


def _replace(name: str, rows: list[dict[str, Any]]) -> None:
    path = HERE / f"{name}.csv"
    measured = {row["data"] for row in rows}
    kept = [row for row in _read(name) if row["data"] not in measured] if path.exists() else []
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, *kept])


def _read(name: str) -> list[dict[str, str]]:
    with open(HERE / f"{name}.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def scores(name: str) -> str:
    """Return mean ± standard deviation over the seeds of each system, in columns by data."""
    rows = _read(f"{name}_runs")
    data = sorted(dict.fromkeys(row["data"] for row in rows), key=_share)
    found: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        for metric in METRICS:
            found[row["system"], row["data"], metric].append(float(row[metric]))
    heads = [f"{METRICS[metric]}{', ' + _words(one) if one else ''}" for one in data for metric in METRICS]
    lines = [f"| | seeds | {' | '.join(heads)} |", f"|---|---:|{'---:|' * len(heads)}"]
    for system in dict.fromkeys(row["system"] for row in rows):
        cells = [found.get((system, one, metric), []) for one in data for metric in METRICS]
        seeds = max(map(len, cells))
        is_model = not any(row["seed"] for row in rows if row["system"] == system)
        shown = " | ".join(_mean(cell) for cell in cells)
        lines.append(f"| {system} | {'' if is_model else seeds} | {shown} |")
    return "\n".join(lines)


def _share(data: str) -> int:
    """Return how many of a hundred references are wrong."""
    return 0 if data in ("", _CLEAN) else int(data.rpartition("_")[2])


def _words(data: str) -> str:
    if data == _CLEAN:
        return "all right"
    kind, _, share = data.rpartition("_")
    return f"{share} % {kind}"


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def tests(name: str) -> str:
    """Return the differences with their intervals, and p corrected by Holm's method where it was to be tested."""
    from llamafactory_sekd.evaluation.significance import holm

    rows = sorted(_read(f"{name}_differences"), key=lambda row: _share(row["data"]))
    corrected = {}
    for data, metric in dict.fromkeys((row["data"], row["metric"]) for row in rows):
        tested = [row for row in rows if (row["data"], row["metric"]) == (data, metric) and _is_tested(name, row)]
        corrected.update(holm({_key(row): float(row["p"]) for row in tested}))
    with_data = any(row["data"] for row in rows)
    lines = [
        f"| {'data | ' if with_data else ''}difference | metric | | 95 % interval | seeds ahead | p (Holm) |",
        f"|{'---|' if with_data else ''}---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        p = corrected.get(_key(row))
        shown = "not tested" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
        data = f"{_words(row['data'])} | " if with_data else ""
        low, high, value = (float(row[key]) for key in ("low", "high", "difference"))
        lines.append(
            f"| {data}{row['system']} − {row['against']} | {METRICS[row['metric']]} | {value:+.2f} | {low:+.2f} to "
            f"{high:+.2f} | {row['ahead']} | {shown} |"
        )
    return "\n".join(lines).replace("-0.", "−0.").replace(" -", " −")


def _is_tested(name: str, row: dict[str, str]) -> bool:
    asked_of = ASKED_OF.get(name, row["data"])
    return row["data"] == asked_of and (row["system"], row["against"]) in PAIRS[name]


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("data", "system", "against", "metric"))


TABLES = {"scores": scores, "tests": tests}


if __name__ == "__main__":
    main()
