"""A teacher for each data set, loaded next to the student: which models, and which example is whose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from importlib import import_module
from itertools import groupby
from typing import Any

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.host.teacher_prompts import names_of_data_sets
from llamafactory_sekd.teacher.several_teachers import TEACHER_NUMBER


def check_teacher_of_each(key: str, teachers: Mapping[str, str], dataset: Any, eval_dataset: Any) -> None:
    """Check that every data set of a run has a teacher, and every teacher a data set.

    Raises:
        ArgumentError: one has none.
    """
    names = names_of_data_sets(dataset) + names_of_data_sets(eval_dataset)
    for name in names:
        if name not in teachers:
            raise ArgumentError(f"the data set {name} has no teacher: name its model under `{key}`.")

    for name in teachers:
        if name not in names:
            raise ArgumentError(
                f"`{key}.{name}` is no data set of this YAML, which has {', '.join(names)}: correct the name."
            )


def check_teacher_choice(data_args: Any, finetuning_args: Any) -> None:
    """Check a run's data against its ``teacher_model``, where that is one for each data set.

    Raises:
        ArgumentError: a data set has no teacher, or the data do not tell which set an example is from.
    """
    teachers = finetuning_args.teacher_model
    if not isinstance(teachers, Mapping):
        return

    if data_args.tokenized_path:
        raise ArgumentError(
            f"`tokenized_path: {data_args.tokenized_path}` does not tell which data set an example is from, and "
            "`teacher_model` is one for each: remove it, or use `teacher_cache`."
        )
    check_teacher_of_each("teacher_model", teachers, data_args.dataset, data_args.eval_dataset)


@contextmanager
def numbered_examples(finetuning_args: Any) -> Iterator[None]:
    """For the duration, where each data set has its teacher, the host's examples keep the number of theirs."""
    teachers = finetuning_args.teacher_model
    if not isinstance(teachers, Mapping):
        yield
        return

    loader: Any = import_module("llamafactory.data.loader")
    merge, load, choose = loader._get_merged_dataset, loader._load_single_dataset, loader._get_dataset_processor
    number_of = {name: number for number, name in enumerate(teachers)}
    coming: list[int] = []

    @wraps(merge)
    def merged(dataset_names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        coming[:] = [number_of[name] for name in dataset_names or []]
        return merge(dataset_names, *args, **kwargs)

    @wraps(load)
    def loaded(dataset_attr: Any, model_args: Any, data_args: Any, *args: Any) -> Any:
        dataset, number = load(dataset_attr, model_args, data_args, *args), coming.pop(0)
        if data_args.streaming:
            return dataset.map(_numbered, fn_kwargs={"number": number})
        return dataset.add_column(TEACHER_NUMBER, [number] * len(dataset))

    loader._get_merged_dataset, loader._load_single_dataset = merged, loaded
    loader._get_dataset_processor = lambda *args, **kwargs: _OfOneTeacher.around(choose(*args, **kwargs))
    try:
        yield
    finally:
        loader._get_merged_dataset, loader._load_single_dataset = merge, load
        loader._get_dataset_processor = choose


def _numbered(example: dict[str, Any], number: int) -> dict[str, Any]:
    return {**example, TEACHER_NUMBER: number}


@dataclass
class _OfOneTeacher:
    """The host's processor of a data set, which gets the examples of one data set at a time and numbers the rows.

    So a row of packed examples has one teacher, and no example that the host drops shifts the numbers.
    """

    template: Any
    inner: Any

    @classmethod
    def around(cls, inner: Any) -> _OfOneTeacher:
        return cls(inner.template, inner)

    @property
    def data_args(self) -> Any:
        return self.inner.data_args

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        inner = replace(self.inner, template=self.template)
        numbers = examples[TEACHER_NUMBER]
        places = list(range(len(numbers)))
        if self.data_args.packing:  # rows have an order of their own
            places.sort(key=numbers.__getitem__)

        rows: dict[str, list[Any]] = {}
        for number, found in groupby(places, key=numbers.__getitem__):
            own = list(found)
            part = {name: [values[place] for place in own] for name, values in examples.items()}
            made = inner.preprocess_dataset(part)
            for name, values in made.items():
                rows.setdefault(name, []).extend(values)
            if made:
                rows.setdefault(TEACHER_NUMBER, []).extend([number] * len(made["input_ids"]))

        return rows

    def print_data_example(self, example: dict[str, Any]) -> None:
        self.inner.print_data_example({key: value for key, value in example.items() if key != TEACHER_NUMBER})
