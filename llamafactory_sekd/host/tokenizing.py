"""While the host tokenizes a run's examples: what it cuts is counted, and the number of each one's teacher is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from importlib import import_module
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np

from llamafactory_sekd.errors import DataError, one_line
from llamafactory_sekd.host.run_arguments import HostArguments
from llamafactory_sekd.teacher.source import TEACHER_NUMBER


_COLUMN = "sekd_cut"  # in the host's data set between its tokenizer and ours; an example is a length and flags
UNREADABLE = "not counted ("  # how the line begins that gives the reason
_START = 1000  # examples of a stream that are counted
_OF_STREAM = f"`streaming: true`, of which the first {_START:,} at most are counted: "
_FLAGS = _PROMPT, _RESPONSE, _TEACHER, _EMPTY = 1, 2, 4, 8


@dataclass(frozen=True)
class CutText:
    """The counts over one data set.

    Attributes:
        examples: how many there are.
        longest: tokens of the longest, uncut.
        over: examples longer than `cutoff_len`.
        prompts: those that lose the end of a prompt, or all of it.
        responses: those that lose the end of a response that is trained on, or all of it.
        teacher: those with a cut prompt of which some response is left, which the teacher judges all the same.
        empty: those whose response has no text, so that the end of text alone is learned.
    """

    examples: int
    longest: int
    over: int
    prompts: int
    responses: int
    teacher: int
    empty: int

    def line(self, what: str, cutoff_len: int) -> str:
        """Return the counts as one line about the examples for `what`."""
        start = f"{self.examples:,} examples for {what}, the longest of {self.longest:,} tokens"
        empty = f" {self.empty:,} have a response without text." if self.empty else ""
        if not self.over:
            return f"{start}: none exceeds `cutoff_len: {cutoff_len}`.{empty}"
        return (
            f"{start}: {self.over:,} exceed `cutoff_len: {cutoff_len}`; {self.prompts:,} lose the end of the prompt "
            f"(the teacher sees a cut prompt in {self.teacher:,}), {self.responses:,} the end of the response.{empty}"
        )


def measure(pairs: list[tuple[int, int]], empty: bool, data_args: Any, *, end: int) -> tuple[int, int]:
    """Return an example's uncut length and flags of what is cut, by the host's own rule.

    Args:
        pairs: tokens of prompt and response, turn by turn.
        empty: whether the last response has no text.
        data_args: the host's, with `cutoff_len` and `mask_history`.
        end: tokens that the host keeps free for the template's end.
    """
    from llamafactory.data.processor.processor_utils import infer_seqlen

    used, cut, kept = end, [], []
    for prompt, response in pairs[::-1] if data_args.mask_history else pairs:
        room = data_args.cutoff_len - used
        kept_prompt, kept_response = infer_seqlen(prompt, response, room) if room > 0 else (0, 0)
        used += kept_prompt + kept_response
        cut.append((kept_prompt < prompt, kept_response < response))
        kept.append(kept_response > 0)

    prompts = [prompt for prompt, _ in cut]
    responses = [response for _, response in cut]
    # A response follows the prompts before it; with `mask_history` there is one, which comes first here.
    follows_cut_prompt = [any(prompts[: turn + 1]) for turn in range(len(cut))]
    if data_args.mask_history:
        responses, kept, follows_cut_prompt = responses[:1], kept[:1], [any(prompts)]
    teacher = any(one and other for one, other in zip(kept, follows_cut_prompt, strict=True))
    flags = _PROMPT * any(prompts) | _RESPONSE * any(responses) | _TEACHER * teacher | _EMPTY * empty
    return end + sum(map(sum, pairs)), flags


@contextmanager
def counting_cut_text(max_cut: float, say: Callable[[str], None] | None) -> Iterator[None]:
    """For the duration, the host counts what it cuts and says so.

    Args:
        max_cut: the share of the training examples that may be longer than `cutoff_len`.
        say: called with one line per data set; None on ranks that stay silent.

    Raises:
        DataError: more of them are.
    """
    loader: Any = import_module("llamafactory.data.loader")
    preprocess, choose, read = loader._get_preprocessed_dataset, loader._get_dataset_processor, loader.load_from_disk

    @wraps(preprocess)
    def counted(dataset: Any, data_args: Any, *args: Any, is_eval: bool = False, **kwargs: Any) -> Any:
        if dataset is None:
            return None
        what = "evaluation" if is_eval else "training"
        made: list[Any] = []

        def chosen(*given: Any, **keys: Any) -> Any:
            made.append(choose(*given, **keys))
            return made[0] if data_args.streaming else _Counting(made[0])

        loader._get_dataset_processor = chosen
        try:
            result = preprocess(dataset, data_args, *args, is_eval=is_eval, **kwargs)
        finally:
            loader._get_dataset_processor = choose
        if data_args.streaming:
            _judge(_counts_of_start(dataset, made[0]), what, data_args, _OF_STREAM)
            return result
        if _COLUMN not in result.column_names:  # the host has kept no example
            return result

        chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in result.data.column(_COLUMN).chunks]
        _judge(np.concatenate(chunks), what, data_args)
        return result.remove_columns(_COLUMN)

    def _judge(counts: np.ndarray, what: str, data_args: Any, start: str = "") -> None:
        if not len(counts):
            return
        found = _total(counts, data_args.cutoff_len)
        cutoff_len = data_args.cutoff_len + bool(data_args.packing)  # the host takes one off for packing
        _say(start + found.line(what, cutoff_len))
        if what == "evaluation":
            return
        if found.empty == found.examples:
            raise DataError(
                f"None of the {found.examples:,} examples has text in its response, so that nothing but the end of "
                "text would be learned: look at the column that `dataset_info.json` names as `response`."
            )
        if found.over > max_cut * found.examples:
            raise DataError(
                f"`cutoff_len: {cutoff_len}` cuts {found.over:,} of {found.examples:,} examples, {found.prompts:,} in "
                f"the prompt and {found.responses:,} in the response, and `kd_max_cut: {max_cut:g}` allows a share of "
                f"{max_cut:g}: set a larger `cutoff_len` (the longest example has {found.longest:,} tokens), or "
                "`kd_max_cut: 1` to train on what is left."
            )

    @wraps(read)
    def loaded(path: Any, *args: Any, **kwargs: Any) -> Any:
        _say(f"`tokenized_path: {path}` holds text that was cut when it was made: what it lost is not counted.")
        return read(path, *args, **kwargs)

    def _say(line: str) -> None:
        if say is not None:
            say(line)

    loader._get_preprocessed_dataset, loader.load_from_disk = counted, loaded
    try:
        yield
    finally:
        loader._get_preprocessed_dataset, loader.load_from_disk = preprocess, read


def cut_text_of(run: HostArguments) -> list[str]:
    """Return the lines about the data sets of arguments that were parsed for planning.

    The host tokenizes as it does in training, and what `datasets` keeps of it is used by the training. Where the data
    or the tokenizer cannot be read, one line says why.

    Raises:
        DataError: too many examples of a run of our stage are cut.
    """
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    if not run.data.dataset and not run.data.tokenized_path:
        return ["not counted, the YAML names no `dataset`."]

    # What the host reads of its training arguments here, without the devices that they look for.
    training = SimpleNamespace(
        main_process_first=lambda **_: nullcontext(),
        should_log=False,
        should_save=False,
        local_process_index=0,
        **{
            key: getattr(run.training, key)
            for key in ("predict_with_generate", "seed", "dataloader_num_workers", "do_predict")
        },
    )
    lines: list[str] = []
    max_cut = run.finetuning.kd_max_cut if run.finetuning.use_sekd else 1.0
    try:
        tokenizer_module = load_tokenizer(run.model)
        template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], run.data)
        with counting_cut_text(max_cut, lines.append):
            get_dataset(template, run.model, run.data, training, stage="sft", **tokenizer_module)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError) and lines:  # it has been counted
            raise
        return [f"{UNREADABLE}{one_line(str(error)).rstrip('.')})."]
    return lines


class _Counting:
    """The host's processor of a data set, whose rows have a column more: what was cut in their batch.

    The first row of a batch holds the counts of all its examples, since packing makes fewer rows than examples.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # Nothing of this object may change here: `datasets` finds the result of an earlier run by its digest.
        template = _Recording(self.inner.template)
        rows = replace(self.inner, template=template).preprocess_dataset(examples)
        if not rows:
            return rows
        end = 1 if template.efficient_eos else 0
        counts = [number for item in template.recorded for number in measure(*item, self.inner.data_args, end=end)]
        return {**rows, _COLUMN: [counts, *([] for _ in rows["input_ids"][1:])]}

    def print_data_example(self, example: dict[str, Any]) -> None:
        self.inner.print_data_example({key: value for key, value in example.items() if key != _COLUMN})


class _Recording:
    """The run's template, which remembers how long its conversations are, and whether they end without text."""

    def __init__(self, template: Any) -> None:
        self.template = template
        self.recorded: list[tuple[list[tuple[int, int]], bool]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "template":  # asked for before it is set, while unpickling
            raise AttributeError(name)
        return getattr(self.template, name)

    def encode_multiturn(self, tokenizer: Any, messages: list[dict[str, str]], *args: Any, **kwargs: Any) -> Any:
        pairs = self.template.encode_multiturn(tokenizer, messages, *args, **kwargs)
        self.recorded.append(([(len(prompt), len(response)) for prompt, response in pairs], _is_empty(messages)))
        return pairs

    def encode_oneturn(self, tokenizer: Any, messages: list[dict[str, str]], *args: Any, **kwargs: Any) -> Any:
        prompt, response = self.template.encode_oneturn(tokenizer, messages, *args, **kwargs)
        self.recorded.append(([(len(prompt), len(response))], _is_empty(messages)))
        return prompt, response


def _is_empty(messages: list[dict[str, str]]) -> bool:
    return not str(messages[-1]["content"]).strip()


def _counts_of_start(stream: Any, processor: Any) -> np.ndarray:
    """Return the counts of the first examples of a stream, which has no length and is read once.

    Returns:
        length and flags of each example, one after the other, int64 ``[2 * examples]``.
    """
    examples = list(stream.take(_START))
    batch = {name: [example[name] for example in examples] for name in (examples[0] if examples else ())}
    rows = _Counting(processor).preprocess_dataset(batch) if examples else {}
    return np.array(rows[_COLUMN][0] if rows else [], dtype=np.int64)


def _total(counts: np.ndarray, limit: int) -> CutText:
    """Add up the length and the flags of each example, one after the other, int64 ``[2 * examples]``."""
    lengths, flags = counts.reshape(-1, 2).T
    over = int(np.count_nonzero(lengths > limit))
    return CutText(len(lengths), int(lengths.max()), over, *(int(np.count_nonzero(flags & flag)) for flag in _FLAGS))


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
