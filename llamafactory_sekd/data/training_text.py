"""Which metric chose the text that a model was trained on, as far as files next to the model say it."""

from __future__ import annotations

from pathlib import Path

from llamafactory_sekd.config import peek
from llamafactory_sekd.files import read_json, write_json


RECORD = "training_text.json"
# The host's web UI leaves the first next to the model, a study the second one folder up.
_CONFIGURATIONS = ("training_args.yaml", "train.yaml")


def choosing_metrics(dataset_dir: Path, names: list[str]) -> dict[str, str]:
    """Return, for each data set whose text a metric chose, the metric's signature, from the data set's manifest."""
    info = read_json(dataset_dir / "dataset_info.json")
    found = {}
    for name in names:
        entry = info.get(name) if isinstance(info, dict) else None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            continue
        data = dataset_dir / entry["file_name"]
        manifest = read_json(data.with_name(f"{data.stem}.manifest.json"))
        request = manifest.get("request") if isinstance(manifest, dict) else None
        if isinstance(request, dict) and request.get("chosen_by"):
            found[name] = str(request["chosen_by"])
    return found


def record_training_text(output_dir: Path, dataset_dir: Path, names: list[str]) -> None:
    """Leave next to a model which metrics chose its text; nothing where none did."""
    found = choosing_metrics(dataset_dir, names)
    if found:
        write_json(output_dir / RECORD, found)


def metrics_of_model(folder: Path) -> dict[str, str]:
    """Return the metrics that chose the training text of the model in ``folder``, by the data set's name."""
    found: dict[str, str] = {}
    for place in (folder, folder.parent):
        recorded = read_json(place / RECORD)
        if isinstance(recorded, dict):
            found |= recorded
        for config in (peek(place / name) for name in _CONFIGURATIONS):
            names = config.get("dataset")
            listed = names.split(",") if isinstance(names, str) else names if isinstance(names, list) else []
            found |= choosing_metrics(Path(str(config.get("dataset_dir", "data"))), [str(n).strip() for n in listed])
    return found
