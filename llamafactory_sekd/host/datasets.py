"""Where the host does not find one of our data sets, say which command makes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.alma import DEFAULT_OUT, command_for
from llamafactory_sekd.errors import DataError


def explain_undefined(get_dataset_list: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's look-up in ``dataset_info.json``: our names get a :class:`DataError`, others what they got."""

    @wraps(get_dataset_list)
    def look_up(dataset_names: list[str] | None, dataset_dir: Any) -> Any:
        try:
            return get_dataset_list(dataset_names, dataset_dir)
        except ValueError as error:
            ours = [name for name in dataset_names or [] if command_for(name)]
            unreadable = str(error).startswith("Cannot open")
            for name in ours:
                if unreadable or f"Undefined dataset {name} in" in str(error):
                    raise DataError(
                        f"Data set {name!r} is not declared in `dataset_dir: {dataset_dir}`: "
                        f"run `{command_for(name)}` and set `dataset_dir: {DEFAULT_OUT}`."
                    ) from error
            raise

    return look_up


def explain_missing_file(load_single_dataset: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's loader of one data set: for a missing file of ours it raises a :class:`DataError`."""

    @wraps(load_single_dataset)
    def load(dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any) -> Any:
        if dataset_attr.load_from == "file":
            path = Path(data_args.dataset_dir, dataset_attr.dataset_name)
            command = command_for(path.stem, path.parent)
            if command is not None and path.suffix == ".json" and not path.exists():
                raise DataError(
                    f"The file {path} of data set {path.stem!r} does not exist yet: run `{command}` to create it."
                )
        return load_single_dataset(dataset_attr, model_args, data_args, training_args)

    return load
