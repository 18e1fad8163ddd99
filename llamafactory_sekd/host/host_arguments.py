"""The host's argument classes with our keys, and the checks that need more than one of them."""

import ast
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any, Literal, get_args

from llamafactory_sekd.argument_checks import (
    check_distillation_arguments,
    check_no_distillation_arguments,
    refuse_keys,
)
from llamafactory_sekd.arguments import KEYS, STAGE, DistillationArguments
from llamafactory_sekd.children import end_rank_with_launcher
from llamafactory_sekd.errors import ArgumentError, suggestion
from llamafactory_sekd.host.ledger import check_in_effect, sekd_requested
from llamafactory_sekd.host.patches import STAGE_LABEL
from llamafactory_sekd.host.run_arguments import (
    HostArguments,
    check_devices,
    check_placement,
    check_quantizing,
    check_teacher_choice,
    choose_checkpoint,
)


# The distribution that the loss is an expectation over. The host's own defaults (0.95, 0.7, 50) are for chatting.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def with_our_stage(stages: dict[str, str]) -> dict[str, str]:
    """Return the host's stages, label to name, and ours."""
    return {**stages, STAGE_LABEL: STAGE}


def extend_finetuning_arguments(host_class: type) -> type:
    """Return a subclass of the host's FinetuningArguments that knows our keys and ``stage: sekd``.

    Distillation is supervised fine-tuning with a teacher: after the checks such arguments present themselves as
    ``stage: sft`` with the flag ``use_sekd``, so that all of the host's own rules for SFT apply.
    """
    host_stages = get_args(host_class.__dataclass_fields__["stage"].type)  # type: ignore[attr-defined]

    @dataclass
    class FinetuningArguments(DistillationArguments, host_class):
        __doc__ = host_class.__doc__

        stage: Literal[(*host_stages, STAGE)] = field(  # type: ignore[valid-type]
            default="sft",
            metadata={"help": "Which stage will be performed in training."},
        )

        def __new__(cls, *args: Any, **kwargs: Any) -> "FinetuningArguments":
            instance = super().__new__(cls)
            instance.given_keys = frozenset(kwargs)  # tells a key that was set to its default from one that was not
            return instance

        def __post_init__(self) -> None:
            DistillationArguments.__post_init__(self)
            if self.stage not in (*host_stages, STAGE):  # a YAML file's value is checked by nobody
                meant = suggestion(str(self.stage).lower(), [STAGE, *host_stages]) or "."
                raise ArgumentError(f"`stage: {self.stage}` does not exist{meant}")
            self.use_sekd: bool = self.stage == STAGE
            if self.use_sekd:
                check_distillation_arguments(self)
                _check_other_finetuning_arguments(self)
                self.stage = "sft"
            else:
                check_no_distillation_arguments(self, self.stage, self._named_by_user())

            host_class.__post_init__(self)  # type: ignore[attr-defined]

        def to_dict(self) -> dict[str, Any]:
            # What trackers record: our stage by its name, and nothing of ours in a run of another stage.
            record = super().to_dict()
            if self.use_sekd:
                return {**record, "stage": STAGE}

            return {
                key: value for key, value in record.items() if key not in DistillationArguments.__dataclass_fields__
            }

        def _named_by_user(self) -> frozenset[str]:
            # The command line hands over every field, a YAML file only what it holds.
            everything = self.given_keys >= set(DistillationArguments.__dataclass_fields__)
            return frozenset() if everything else self.given_keys

    FinetuningArguments.__module__ = host_class.__module__  # pickle finds it where the host's stood
    FinetuningArguments.__qualname__ = host_class.__qualname__
    return FinetuningArguments


def _try_own_divergences(finetuning_args: Any) -> None:
    """Call a divergence of the user's own once, before anything is loaded."""
    from llamafactory_sekd.objectives import try_user_function

    names = {name for side in finetuning_args.formula().sides for name, _ in side.divergences}
    for name in sorted(names):
        if ":" in name:
            try_user_function(name)


def _check_other_finetuning_arguments(args: Any) -> None:
    loss = f"replaces the loss that `stage: {STAGE}` computes: remove one of the two"
    reasons = dict.fromkeys(("use_dft_loss", "use_eaft_loss", "use_asft_loss"), loss)
    reasons["use_hyper_parallel"] = f"has a trainer of its own: remove it for `stage: {STAGE}`"
    refuse_keys(args, reasons, "`{key}: true` {reason}.")

    if os.getenv("USE_MCA", "0").lower() in ("true", "y", "1"):
        raise ArgumentError(
            f"USE_MCA=1 selects the Megatron trainer, which has no teacher: unset it for `stage: {STAGE}`."
        )


def check_together(host_parse: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wrap the host's parser of training arguments with the checks that span several argument classes.

    They run before the host's own checks, which would name a package to install for a feature that cannot work.
    """

    @wraps(host_parse)
    def parse(args: Any = None) -> tuple[Any, ...]:
        with _unknown_keys_explained(args):
            parsed = host_parse(args)
        run = HostArguments(*parsed)
        if run.finetuning.use_sekd:
            _refuse_mistyped(_unknown_names(args), ours=True)
            check_in_effect()
            _try_own_divergences(run.finetuning)
            if run.finetuning.kd_on_policy:
                set_sampling_defaults(args, run.generating)
                check_own_samples(run.data, run.generating)

            check_teacher_choice(run.data, run.finetuning)
            _check_model_arguments(run.model)
            _check_training_arguments(run.training)
            if run.training.do_train:
                for arguments in (run.data, run.training, run.finetuning):
                    _check_amounts(arguments)
            check_placement(run)
            _check_quantization(run.model, run.finetuning)
            check_devices(run.finetuning)
            choose_checkpoint(run.training)
            end_rank_with_launcher()

        return parsed

    return parse


@contextmanager
def _unknown_keys_explained(args: Any) -> Iterator[None]:
    """Name a mistyped key of a run of our stage and the one that was meant, or one of ours in a run of another stage.

    Mistakes in other keys of other stages stay the host's to report.
    """
    try:
        yield
    except ValueError as error:
        found = re.search(r"not used by the HfArgumentParser: (\[.*\])", str(error), re.DOTALL)
        if found is None:
            raise
        names = [str(word).lstrip("-").split("=")[0] for word in ast.literal_eval(found[1])]
        ours = (isinstance(args, Mapping) and args.get("stage") == STAGE) or sekd_requested(sys.argv[1:])
        _refuse_mistyped(names, ours)
        raise


def _refuse_mistyped(names: Iterable[str], ours: bool) -> None:
    """Refuse the first of the unknown names that looks like a key of ours, or of the host in a run of our stage."""
    for name in names:
        meant = suggestion(name.lower(), KEYS)
        if ours and "did you mean" not in meant and not name.lower().startswith(("kd_", "teacher_")):
            meant = suggestion(name.lower(), _keys_of_the_host())
        if "did you mean" in meant or name.lower().startswith(("kd_", "teacher_")):
            raise ArgumentError(f"`{name}` is not a key of `stage: {STAGE}`{meant or '.'}") from None


def _unknown_names(args: Any) -> list[str]:
    """Return the keys that no class of arguments has, which the host drops silently with `ALLOW_EXTRA_ARGS=1`."""
    from llamafactory.hparams.parser import read_args

    given = read_args(args)
    flags = given if isinstance(given, Mapping) else [word for word in given if word.startswith("--")]
    known = set(_keys_of_the_host())
    return [name for name in (str(flag).lstrip("-").split("=")[0] for flag in flags) if name not in known]


def _keys_of_the_host() -> list[str]:
    from llamafactory.hparams import parser

    classes = ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
    return [item.name for name in classes for item in fields(getattr(parser, name)) if item.init]


def check_run(args: Any, *, machine: bool = True) -> None:
    """Run the same checks on the keys of a run as attributes of one object, before the host parses them (web UI).

    Args:
        args: the keys.
        machine: whether this is the machine that the run is for.
    """
    _check_other_finetuning_arguments(args)
    _check_model_arguments(args)
    _check_training_arguments(args)
    check_placement(HostArguments(args, args, args, args, args))
    if machine:
        _check_quantization(args, args)
        check_devices(args)


def _check_model_arguments(model_args: Any) -> None:
    reasons = {
        "use_kt": "KTransformers has no second model in training",
        "use_unsloth": "unsloth's fused loss swallows the logits that the teacher is compared with",
        "mixture_of_depths": "its models route tokens differently from the teacher",
    }
    refuse_keys(
        model_args, reasons, f"`{{key}}: {{value}}` cannot be used with `stage: {STAGE}` ({{reason}}): remove it."
    )


def _check_amounts(args: Any) -> None:
    """Refuse amounts with which nothing is trained, or of which the host complains without naming the key.

    Args:
        args: arguments of the host, of any class.
    """
    least = {
        "learning_rate": "a number above 0, with which the weights move",
        "per_device_train_batch_size": "at least 1",
        "gradient_accumulation_steps": "at least 1",
        "cutoff_len": "at least 1 token",
        "max_samples": "at least 1 example, or leave it out",
        "lora_rank": "at least 1",
    }
    for key, remedy in least.items():
        value = getattr(args, key, None)
        if isinstance(value, (int, float)) and not value > 0:
            raise ArgumentError(f"`{key}: {value}` cannot be used with `stage: {STAGE}`: use {remedy}.")
    if getattr(args, "freeze_trainable_layers", None) == 0 and getattr(args, "finetuning_type", None) == "freeze":
        raise ArgumentError(
            "`freeze_trainable_layers: 0` trains no layer: use the number of the last or first layers."
        )
    if getattr(args, "max_steps", -1) == 0 or (
        getattr(args, "max_steps", -1) < 0 and getattr(args, "num_train_epochs", 1) <= 0
    ):
        key = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise ArgumentError(f"`{key}: {getattr(args, key)}` trains no step: use a number above 0, or leave it out.")


def _check_training_arguments(training_args: Any) -> None:
    past_index = getattr(training_args, "past_index", None)
    if past_index is not None and int(past_index) >= 0:
        raise ArgumentError(
            f"`past_index: {past_index}` cannot be used with `stage: {STAGE}`, whose models keep no "
            "state from one batch to the next: remove it."
        )

    _check_metric_of_best_model(training_args)
    if getattr(training_args, "label_smoothing_factor", 0):
        raise ArgumentError(
            f"`label_smoothing_factor: {training_args.label_smoothing_factor}` has no effect with `stage: {STAGE}`, "
            "whose target is smoothed by the teacher: remove it and set `kd_lambda`."
        )


def _check_metric_of_best_model(training_args: Any) -> None:
    """Refuse to choose the best model by a loss in whose place an evaluation generates."""
    if not getattr(training_args, "predict_with_generate", False):
        return
    metric = getattr(training_args, "metric_for_best_model", None) or "loss"
    selects = getattr(training_args, "load_best_model_at_end", False)
    if selects and metric.removeprefix("eval_").startswith(("loss", "kd/")):
        raise ArgumentError(
            f"`metric_for_best_model: {metric}` does not exist with `predict_with_generate: true`, which generates in "
            "place of computing `eval_loss` and `eval_kd/…`: set `predict_with_generate: false`, or choose one of "
            "rouge-1, rouge-2, rouge-l, bleu-4."
        )


def _check_quantization(model_args: Any, finetuning_args: Any) -> None:
    bits = getattr(finetuning_args, "teacher_model_quantization_bit", None)
    method = getattr(model_args, "quantization_method", "bnb")
    check_quantizing(f"teacher_model_quantization_bit: {bits}", bits, method)


def set_sampling_defaults(args: Any, generating_args: Any) -> None:
    """Replace the host's defaults of temperature, top_p and top_k by those of training; a key that is given stays.

    Args:
        args: what the host's parser was called with: a mapping, a list of flags, or None for the command line.
        generating_args: the parsed arguments, changed in place.
    """
    if isinstance(args, Mapping):
        given = set(args)
    else:
        words = sys.argv[1:] if args is None else args
        given = {word.lstrip("-").split("=")[0] for word in words if word.startswith("--")}
    for key, value in _DEFAULTS.items():
        if key not in given:
            setattr(generating_args, key, value)


def check_own_samples(data_args: Any, generating_args: Any) -> None:
    """Check what ``kd_on_policy`` cannot go with.

    Raises:
        ArgumentError: a key that it cannot go with.
    """
    reasons = {
        "packing": "own samples have lengths of their own, and packed texts have no prompt each",
        "neat_packing": "own samples have lengths of their own, and packed texts have no prompt each",
        "train_on_prompt": "a sample continues a prompt, so the prompt has no label",
    }
    refuse_keys(
        data_args,
        reasons,
        "`{key}: true` cannot be used with `kd_on_policy` ({reason}): set it to false, or `kd_on_policy: 0`.",
    )
    if generating_args.num_beams != 1:
        raise ArgumentError(
            f"`num_beams: {generating_args.num_beams}` cannot be used with `kd_on_policy`, which samples: remove it."
        )
    if generating_args.do_sample and generating_args.temperature <= 0:
        raise ArgumentError(
            f"`temperature: {generating_args.temperature}` cannot be sampled with: use a number above 0, or "
            "`do_sample: false` for greedy decoding."
        )
    if generating_args.repetition_penalty != 1.0:
        raise ArgumentError(
            f"`repetition_penalty: {generating_args.repetition_penalty}` cannot be used with `kd_on_policy` of "
            f"`stage: {STAGE}`: the loss assumes samples of the student itself; remove it."
        )
