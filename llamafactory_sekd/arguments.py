"""Every key that the stage adds to a training YAML, once: type, default, help, range and the paper's equation.

Equation numbers are those of "Self-Evolution Knowledge Distillation for LLM-based Machine Translation" (arXiv
2412.15303). The host shows the help in ``llamafactory-cli train -h``; the web UI and the docs read it from here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

from llamafactory_sekd.errors import ArgumentError, one_line
from llamafactory_sekd.formula import FIRST_MEANS, MEAN, TEMPERATURES, Formula
from llamafactory_sekd.presets import PRESETS, expand, preset_of


STAGE = "sekd"
AUTO = "auto"
SELF = "self"  # as `teacher_model`
GAMMA = FIRST_MEANS["difficulty"]  # the paper's
TOKEN_TABLE = "token_difficulty.csv"  # written into `output_dir`
HARD_SCALES: tuple[str, ...] = ("none", "balanced")


@dataclass
class DistillationArguments:
    """The keys of ``stage: sekd``; the host's FinetuningArguments gains them by inheritance."""

    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": (
                "Path or hub id of the teacher, any causal language model; required without teacher_cache. 'self': "
                "the base of the LoRA student, loaded once, with teacher_model_adapters or without any."
            )
        },
    )
    teacher_model_adapters: str | None = field(
        default=None,
        metadata={"help": "Path to the adapters of the teacher. Use commas to separate several."},
    )
    teacher_model_quantization_bit: int | None = field(
        default=None,
        metadata={"help": "The number of bits to quantize the teacher to with bitsandbytes: 4 or 8 (CUDA only)."},
    )
    teacher_model_device: str = field(
        default=AUTO,
        metadata={
            "help": (
                "Device of the teacher: auto (the student's), cpu, or cuda:N. With several ranks it is the "
                "place of each rank's own teacher, on its machine."
            )
        },
    )
    teacher_offload: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether the teacher's weights rest in main memory and come to the device for each forward pass, "
                "layer by layer (under ZeRO-3: its `offload_param`)."
            )
        },
    )
    teacher_deepspeed: str | None = field(
        default=None,
        metadata={
            "help": (
                "DeepSpeed file of the teacher's own engine, of ZeRO stage 0 or 3, instead of the student's "
                "`deepspeed`."
            )
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": (
                "Folder with the teacher's answers (`sekd cache`), read instead of loading a teacher. With "
                "teacher_model as well, what the folder lacks is computed and added in the first epoch. Use commas to "
                "separate several, each with another teacher: the one that holds an example answers it."
            )
        },
    )
    teacher_mix: str | None = field(
        default=None,
        metadata={
            "help": (
                "What answers an example that several folders of teacher_cache hold: `mean`, the mean of their "
                "distributions, or one weight for each folder, such as 2,1. Without it such an example is refused."
            )
        },
    )
    teacher_server: str | None = field(
        default=None,
        metadata={
            "help": (
                "Address of a teacher behind `sekd serve`, http://HOST:PORT, asked while training instead of loading "
                "one; its token is in the environment variable SEKD_SERVER_TOKEN."
            )
        },
    )
    teacher_server_topk: int | None = field(
        default=None,
        metadata={
            "help": (
                "Ask teacher_server for so many log-probabilities per token, 8 to 512, and the mass of the others. "
                "Default: its hidden states, which are exact."
            )
        },
    )
    teacher_server_patience: float = field(
        default=600.0,
        metadata={
            "help": (
                "For how many seconds a request to teacher_server is repeated, with growing pauses, while the server "
                "is gone, slow or busy."
            )
        },
    )
    teacher_max_nonfinite: float = field(
        default=0.01,
        metadata={
            "help": (
                "The share of response tokens of a logging window, from 0 to 1, at which the teacher's logits may be "
                "NaN or infinite; such tokens are left out, and more of them stop the run."
            )
        },
    )
    # With `str` in the middle the host's parser takes text from the command line, whatever else a YAML may hold.
    kd_loss: dict[str, Any] | str | None = field(
        default="self_evolution",
        metadata={
            "help": (
                "The distillation objective, a name or a mapping of the formula (docs/objectives.md): "
                + "; ".join(f"{name}: {preset.equation}" for name, preset in PRESETS.items()).replace("%", "%%")
                + "."
            )
        },
    )
    kd_lambda: float = field(
        default=0.5,
        metadata={"help": "λ, the teacher's share of the target y~ = (1-λ)y + λp (equation 4), from 0 to 1."},
    )
    kd_beta: float = field(
        default=0.5,
        metadata={"help": "β, the student's share of the proxy q^ = βq + (1-β)y~ (equation 6), from 0 to 1."},
    )
    kd_beta_end: float | None = field(
        default=None,
        metadata={
            "help": (
                "Where β ends: it moves there from kd_beta linearly over the training steps (Figure 3). The paper's "
                "'0.5 to 0.0' is the share of the target, 1-β: kd_beta 0.5, kd_beta_end 1.0."
            )
        },
    )
    # None is no value of it: with None among the types the host's parser takes text from the command line.
    kd_gamma: float | str | None = field(
        default=GAMMA,
        metadata={
            "help": (
                "Γ, the difficulty d = KL(y~ ‖ q) (equation 5) above which a token is hard. `auto` (ours, not the "
                f"paper's): the running mean of d over the steps before, {GAMMA} at the first."
            )
        },
    )
    kd_topk: float | None = field(
        default=None,
        metadata={"help": "The share of tokens of a batch that are hard, above 0 up to 1 (self_evolution_topk only)."},
    )
    kd_hard_scale: str = field(
        default="none",
        metadata={
            "help": (
                "`balanced` (ours, not the paper's) multiplies the hard tokens' loss by a factor, from the steps "
                "before, that gives their gradients the mean norm that the easy loss would give them. The paper's is "
                "`none`."
            )
        },
    )
    kd_temperature: float = field(
        default=1.0,
        metadata={
            "help": (
                "T, above 0: p and q of every KL term are taken at temperature T and the term is multiplied by T². "
                "The paper uses 1."
            )
        },
    )
    kd_on_policy: float = field(
        default=0.0,
        metadata={
            "help": (
                "The share of the training examples, from 0 to 1, whose response is replaced in each step by the "
                "present student's own sample, which the teacher judges (λ is 1 there). Decoding: do_sample, "
                "max_new_tokens, and temperature, top_p and top_k, which default to 1, 1 and 0 here."
            )
        },
    )
    kd_on_policy_truncated: str = field(
        default="keep",
        metadata={"help": "Own samples that hit the limit without an end token: keep, or drop them from the loss."},
    )
    kd_max_cut: float = field(
        default=0.5,
        metadata={
            "help": (
                "The share of the training examples, from 0 to 1, that may be longer than cutoff_len and so lose the "
                "end of their prompt or response; more of them stop the run before it starts."
            )
        },
    )
    kd_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": (
                "Response tokens per chunk of the objective inside the LM head. Default: chosen from the vocabulary "
                "size and a memory budget; smaller saves memory, larger saves a little time."
            )
        },
    )

    kd_compile: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether torch.compile takes the objective between the logits and their gradient, which costs seconds "
                "at the start and makes each step faster. Default: false."
            )
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.kd_gamma, str):  # as the command line and a field of the web UI hold it
            with suppress(ValueError):
                self.kd_gamma = float(self.kd_gamma)
        if isinstance(self.kd_loss, str) and self.kd_loss.lstrip().startswith("{"):
            self.kd_loss = _flow_mapping(self.kd_loss)

    @property
    def follows_mean(self) -> bool:
        """Whether tokens are hard by the running mean of a signal."""
        gate = self.formula().gate
        return gate is not None and gate.threshold == MEAN

    def formula(self) -> Formula:
        """Return what `kd_loss` means, with the numbers that move as they are in the YAML.

        Raises:
            ArgumentError: it cannot work.
        """
        moving_beta = {"from": self.kd_beta, "to": self.kd_beta_end}
        keys = {
            "kd_lambda": self.kd_lambda,
            "kd_beta": self.kd_beta if self.kd_beta_end is None else moving_beta,
            "kd_gamma": MEAN if self.kd_gamma == AUTO else self.kd_gamma,
            "kd_topk": self.kd_topk,
            "kd_temperature": self.kd_temperature,
        }
        return expand(self.kd_loss, keys)

    def objective_keywords(self, move: Callable[[float, float], float] = lambda start, _: start) -> dict[str, Any]:
        """Return the keyword arguments of ``objectives.distillation_loss``.

        Args:
            move: from where a number starts and ends to where it is; without it they are as at the start, and so are
                the keys that follow the training.
        """
        formula = None if isinstance(self.kd_loss, str) else self.formula().at(move)
        gate = None if formula is None else formula.gate
        return {
            "kd_loss": formula or self.kd_loss,
            "kd_lambda": self.kd_lambda,
            "kd_beta": self.kd_beta if self.kd_beta_end is None else move(self.kd_beta, self.kd_beta_end),
            "kd_gamma": FIRST_MEANS[gate.signal if gate else "difficulty"] if self.follows_mean else self.kd_gamma,
            "kd_topk": self.kd_topk,
            "kd_temperature": self.kd_temperature,
            "kd_hard_scale": None if self.kd_hard_scale == "none" else 1.0,
        }


def keys_read_by(kd_loss: Any) -> frozenset[str]:
    """Return the keys of the stage that say anything to an objective, those that every objective reads included.

    Raises:
        ArgumentError: there is no such preset.
    """
    name = preset_of(kd_loss)
    read = frozenset({"kd_lambda"}) if name is None else PRESETS[name].keys
    if not isinstance(kd_loss, str):
        read -= {"kd_hard_scale"}
    of_some = frozenset().union(*(preset.keys for preset in PRESETS.values()))
    moves_beta = frozenset({"kd_beta_end"})  # follows `kd_beta`, so the table need not name it
    return (frozenset(KEYS) - of_some - moves_beta) | read | (moves_beta if "kd_beta" in read else frozenset())


_PLACING = ("teacher_model_device", "teacher_offload", "teacher_deepspeed")
KEYS: tuple[str, ...] = tuple(item.name for item in fields(DistillationArguments))


def check_distillation_arguments(args: DistillationArguments) -> None:
    """Check the keys of a run with ``stage: sekd``.

    Raises:
        ArgumentError: a key is missing, out of range, or set where it has no effect.
    """
    if not args.teacher_model:
        if not args.teacher_cache and not args.teacher_server:
            raise ArgumentError(
                "`teacher_model` is missing: name the teacher's path or hub id, a `teacher_cache`, or a "
                "`teacher_server`, as `stage: sekd` needs one."
            )

        for key in ("teacher_model_adapters", "teacher_model_quantization_bit", *_PLACING):
            if _is_set(args, key):
                _refuse(args, key, "it belongs to `teacher_model`, which is missing; leave both out or set both")

    for key in ("teacher_model", "teacher_model_adapters", "teacher_cache", "teacher_server", "teacher_deepspeed"):
        if not isinstance(getattr(args, key), (str, type(None))):
            _refuse(args, key, "use one path" if key == "teacher_deepspeed" else "use one path or hub id")

    if args.teacher_model_quantization_bit not in (None, 4, 8):
        _refuse(args, "teacher_model_quantization_bit", "use 4 or 8, or leave it out")

    _check_caches(args)
    _check_server(args)
    _check_placement(args)
    preset_of(args.kd_loss)
    _check_range(args, "teacher_max_nonfinite", 0, 1)
    _check_range(args, "kd_lambda", 0, 1)
    _check_range(args, "kd_beta", 0, 1)
    if args.kd_beta_end is not None:
        _check_range(args, "kd_beta_end", 0, 1)
        _check_read(args, "kd_beta_end", "has no β")

    reads_beta = "kd_beta" in keys_read_by(args.kd_loss)
    if reads_beta and args.kd_beta == 0 and args.kd_beta_end in (None, 0):
        _refuse(
            args, "kd_beta", "β is the student's share of the proxy, and without it no loss depends on the student"
        )

    if args.kd_gamma == AUTO:
        _check_read(args, "kd_gamma", "has no Γ")
    elif not _is_number(args.kd_gamma) or math.isnan(args.kd_gamma):
        _refuse(args, "kd_gamma", f"use a number, for example {GAMMA}, or {AUTO}")

    if args.kd_hard_scale not in HARD_SCALES:
        _refuse(args, "kd_hard_scale", f"choose one of {', '.join(HARD_SCALES)}")

    if args.kd_hard_scale != "none":
        _check_read(args, "kd_hard_scale", "does not tell hard tokens from easy ones")

    _check_topk(args)
    _check_temperature(args)
    formula = args.formula()
    _check_range(args, "kd_on_policy", 0, 1)
    if args.kd_on_policy_truncated not in ("keep", "drop"):
        _refuse(args, "kd_on_policy_truncated", "choose keep or drop")

    if args.kd_on_policy and args.teacher_cache:
        _refuse(
            args, "kd_on_policy", "own samples are new text, which no `teacher_cache` holds; set `teacher_model` alone"
        )

    _check_range(args, "kd_max_cut", 0, 1)
    size = args.kd_chunk_size
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        _refuse(args, "kd_chunk_size", "use an integer of at least 1, or leave it out")

    if not isinstance(args.kd_compile, (bool, type(None))):
        _refuse(args, "kd_compile", "use true or false, or leave it out")

    if args.kd_compile and formula.moves:
        what = "a β that moves (`kd_beta_end`)" if args.kd_beta_end is not None else "a number of `kd_loss` that moves"
        _refuse(args, "kd_compile", f"{what} would recompile in every step; remove one of them")


def check_no_distillation_arguments(args: DistillationArguments, stage: str, given: Iterable[str] = ()) -> None:
    """Check that a run of another stage sets none of our keys.

    Args:
        args: the parsed arguments.
        stage: the stage of the run.
        given: the names that the user set, where known; without it a key that was set to its default passes.

    Raises:
        ArgumentError: a key of ours is set.
    """
    named = set(given)
    for item in fields(DistillationArguments):
        value = getattr(args, item.name)
        if value != item.default or item.name in named:
            raise ArgumentError(
                f"`{item.name}: {value}` belongs to the distillation stage and has no effect with `stage: {stage}`: "
                f"remove it, or set `stage: {STAGE}`."
            )


def cache_folders(teacher_cache: str | None) -> list[str]:
    """Return the folders that ``teacher_cache`` names."""
    return [name.strip() for name in (teacher_cache or "").split(",") if name.strip()]


def mixing_weights(args: DistillationArguments) -> list[float] | None:
    """Return the weight of each folder of ``teacher_cache``, None without ``teacher_mix``.

    Raises:
        ArgumentError: it is neither ``mean`` nor one positive number for each folder.
    """
    if args.teacher_mix is None:
        return None

    folders = cache_folders(args.teacher_cache)
    if args.teacher_mix == MEAN:
        return [1.0] * len(folders)

    try:
        weights = [float(text) for text in str(args.teacher_mix).split(",")]
    except ValueError:
        weights = []

    if len(weights) != len(folders) or not all(0 < weight < math.inf for weight in weights):
        _refuse(args, "teacher_mix", f"use {MEAN}, or {len(folders)} weights above 0, one for each `teacher_cache`")

    return weights


def _check_caches(args: DistillationArguments) -> None:
    folders = cache_folders(args.teacher_cache)
    if args.teacher_model and len(folders) > 1:
        _refuse(args, "teacher_cache", "`teacher_model` fills one folder; name that one, or remove `teacher_model`")

    if args.teacher_mix is not None and len(folders) < 2:
        _refuse(args, "teacher_mix", "it needs several folders in `teacher_cache`, separated by commas")

    mixing_weights(args)


def _check_server(args: DistillationArguments) -> None:
    for key in ("teacher_model", "teacher_cache"):
        if args.teacher_server and _is_set(args, key):
            _refuse(args, key, "`teacher_server` is the teacher; remove one of the two")

    for key in ("teacher_server_topk", "teacher_server_patience"):
        if not args.teacher_server and _is_set(args, key):
            _refuse(args, key, "it belongs to `teacher_server`, which is missing; leave both out or set both")

    k = args.teacher_server_topk
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or not 8 <= k <= 512):
        _refuse(args, "teacher_server_topk", "use an integer from 8 to 512, or leave it out")

    _check_range(args, "teacher_server_patience", 1, 7 * 86400)


def _check_placement(args: DistillationArguments) -> None:
    device = args.teacher_model_device
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda:\d{1,4}", device):
        _refuse(args, "teacher_model_device", "use auto, cpu, or cuda:N with the number of a device")

    if not isinstance(args.teacher_offload, bool):
        _refuse(args, "teacher_offload", "use true or false")

    placing = [key for key in _PLACING if _is_set(args, key)]
    if args.teacher_model == SELF and args.teacher_model_quantization_bit is not None:
        _refuse(
            args,
            "teacher_model_quantization_bit",
            f"`teacher_model: {SELF}` is the student's base; set `quantization_bit` for both",
        )

    if args.teacher_model == SELF and placing:
        _refuse(args, placing[0], f"`teacher_model: {SELF}` is the student's base and shares its device; remove it")

    if args.teacher_model_quantization_bit is not None and placing:
        _refuse(args, placing[0], "bitsandbytes places a quantized teacher on the student's device; remove it")

    if args.teacher_offload and device == "cpu":
        _refuse(args, "teacher_offload", "`teacher_model_device: cpu` keeps the weights there anyway; remove one")

    if args.teacher_deepspeed is not None and device != AUTO:
        _refuse(args, "teacher_deepspeed", f"`teacher_model_device: {device}` is a device of its own; remove one")


def _check_temperature(args: DistillationArguments) -> None:
    low, high = TEMPERATURES
    if not _is_number(args.kd_temperature) or not low <= args.kd_temperature <= high:
        _refuse(args, "kd_temperature", f"use a number above 0, from {low} to {high:g}; the paper uses 1.0")


def _check_topk(args: DistillationArguments) -> None:
    wants_topk = "kd_topk" in keys_read_by(args.kd_loss)
    if wants_topk and args.kd_topk is None:
        raise ArgumentError(
            "`kd_topk` is missing: `kd_loss: self_evolution_topk` needs the share of hard tokens, e.g. 0.5."
        )

    if args.kd_topk is None:
        return

    if not wants_topk:
        _refuse(args, "kd_topk", f"`kd_loss: {_named(args)}` does not use it; leave it out or use self_evolution_topk")

    if not _is_number(args.kd_topk) or not 0 < args.kd_topk <= 1:
        _refuse(args, "kd_topk", "use a share above 0 and up to 1, for example 0.5 for half of the tokens")


def _check_read(args: DistillationArguments, key: str, lack: str) -> None:
    """Refuse a key that the objective does not read."""
    if key not in keys_read_by(args.kd_loss):
        others = ", ".join(name for name in PRESETS if key in keys_read_by(name))
        _refuse(args, key, f"`kd_loss: {_named(args)}` {lack}; leave it out or use one of {others}")


def _named(args: DistillationArguments) -> str:
    """Return the preset, or a word for a mapping of the user's own."""
    return preset_of(args.kd_loss) or "{…}"


def _flow_mapping(text: str) -> Any:
    """Read a mapping on one line, as the command line and a field of the web UI hold it."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = one_line(str(error))
        raise ArgumentError(f"`kd_loss: {one_line(text)}` cannot be read as a mapping: {reason}.") from None


def _check_range(args: DistillationArguments, key: str, low: float, high: float) -> None:
    value = getattr(args, key)
    if not _is_number(value) or not low <= value <= high:
        _refuse(args, key, f"use a number from {low} to {high}")


def _is_set(args: DistillationArguments, key: str) -> bool:
    return getattr(args, key) != DistillationArguments.__dataclass_fields__[key].default


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse(args: DistillationArguments, key: str, remedy: str) -> None:
    value = " ".join(str(getattr(args, key)).split())  # the message stays on one line
    raise ArgumentError(f"`{key}: {value}` cannot be used: {remedy}.")
