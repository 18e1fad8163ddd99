"""Every key that the stage adds to a training YAML, once: type, default, help, range and the paper's equation.

Equation numbers are those of "Self-Evolution Knowledge Distillation for LLM-based Machine Translation" (arXiv
2412.15303). The host shows the help in ``llamafactory-cli train -h``; the web UI and the docs read it from here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from llamafactory_sekd.errors import ArgumentError, one_line
from llamafactory_sekd.formula import FIRST_MEANS, MEAN, Formula
from llamafactory_sekd.presets import DEFAULT_LOSS, DEFAULTS, PRESETS, expand, preset_of


STAGE = "sekd"
AUTO = "auto"
SELF = "self"  # as `teacher_model`
GAMMA: float = DEFAULTS["kd_gamma"]
TOKEN_TABLE = "token_difficulty.csv"  # written into `output_dir`
HARD_SCALES: tuple[str, ...] = ("none", "balanced")


def _key(default: Any, text: str) -> Any:
    """Return a key of the YAML with its default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class DistillationArguments:
    """The keys of ``stage: sekd``; the host's FinetuningArguments gains them by inheritance."""

    teacher_model: dict[str, Any] | str | None = _key(
        None,
        "Path or hub id of the teacher, any causal language model; required without teacher_cache. 'self': "
        "the base of the LoRA student, loaded once, with teacher_model_adapters or without any. A mapping "
        "from data set to model, {en-de: PATH, cs-en: PATH}: each example has the teacher of its data set.",
    )
    teacher_model_adapters: str | None = _key(
        None, "Path to the adapters of the teacher. Use commas to separate several."
    )
    teacher_model_quantization_bit: int | None = _key(
        None, "The number of bits to quantize the teacher to with bitsandbytes: 4 or 8."
    )
    teacher_model_device: str = _key(
        AUTO,
        "Device of the teacher: auto (the student's), cpu, or cuda:N. With several ranks it is the "
        "place of each rank's own teacher, on its machine.",
    )
    teacher_offload: bool = _key(
        False,
        "Keep the teacher's weights in main memory and move them to the device for each forward pass, layer "
        "by layer (under ZeRO-3: its `offload_param`).",
    )
    teacher_deepspeed: str | None = _key(
        None, "DeepSpeed file of the teacher's own engine, of ZeRO stage 0 or 3, instead of the student's `deepspeed`."
    )
    teacher_cache: str | None = _key(
        None,
        "Folder with the teacher's answers (`sekd cache`), read instead of loading a teacher. With "
        "teacher_model as well, what the folder lacks is computed and added in the first epoch. Use commas to "
        "separate several, each with another teacher: the one that holds an example answers it.",
    )
    teacher_mix: str | None = _key(
        None,
        "What answers an example that several folders of teacher_cache hold: `mean`, the mean of their "
        "distributions, or one weight for each folder, such as 2,1. Without it such an example is refused.",
    )
    teacher_server: str | None = _key(
        None,
        "Address of a teacher behind `sekd serve`, http://HOST:PORT, asked while training instead of loading "
        "one; its token is in the environment variable SEKD_SERVER_TOKEN.",
    )
    teacher_server_topk: int | None = _key(
        None,
        "Ask teacher_server for this many log-probabilities per token, 8 to 512, and the mass of the others. "
        "Default: its hidden states, which are exact.",
    )
    teacher_server_patience: float = _key(
        600.0,
        "How long, in seconds, a request to teacher_server is repeated, with growing pauses, while the server "
        "is gone, slow or busy.",
    )
    teacher_max_nonfinite: float = _key(
        0.01,
        "The share of response tokens of a logging window, from 0 to 1, at which the teacher's logits may be "
        "NaN or infinite; such tokens are left out, and more of them stop the run.",
    )
    # With `str` in the middle the host's parser takes text from the command line, whatever else a YAML may hold.
    kd_loss: dict[str, Any] | str | None = _key(
        DEFAULT_LOSS,
        "The distillation objective, a name or a mapping of the formula (docs/objectives.md): "
        + "; ".join(f"{name}: {preset.equation}" for name, preset in PRESETS.items()).replace("%", "%%")
        + ".",
    )
    kd_lambda: float = _key(
        DEFAULTS["kd_lambda"], "λ, the teacher's share of the target y~ = (1-λ)y + λp (equation 4), from 0 to 1."
    )
    kd_beta: float = _key(
        DEFAULTS["kd_beta"], "β, the student's share of the proxy q^ = βq + (1-β)y~ (equation 6), from 0 to 1."
    )
    kd_beta_end: float | None = _key(
        None,
        "Where β ends: it moves there from kd_beta linearly over the training steps (Figure 3). The paper's "
        "'0.5 to 0.0' is the share of the target, 1-β: kd_beta 0.5, kd_beta_end 1.0.",
    )
    # None is no value of it: with None among the types the host's parser takes text from the command line.
    kd_gamma: float | str | None = _key(
        GAMMA,
        "Γ, the difficulty d = KL(y~ ‖ q) (equation 5) above which a token is hard. `auto` (ours, not the "
        f"paper's): the running mean of d over the steps before, {GAMMA} at the first.",
    )
    kd_topk: float | None = _key(
        None, "The share of tokens of a batch that are hard, above 0 up to 1 (self_evolution_topk only)."
    )
    kd_hard_scale: str = _key(
        "none",
        "`balanced` (ours, not the paper's) multiplies the hard tokens' loss by a factor, from the steps "
        "before, that gives their gradients the mean norm that the easy loss would give them. The paper's is "
        "`none`.",
    )
    kd_temperature: float = _key(
        DEFAULTS["kd_temperature"],
        "T, above 0: p and q of every KL term are taken at temperature T and the term is multiplied by T². "
        "The paper uses 1.",
    )
    kd_on_policy: float = _key(
        0.0,
        "The share of the training examples, from 0 to 1, whose response is replaced in each step by the "
        "current student's own sample, which the teacher judges (λ is 1 there). Decoding: do_sample, "
        "max_new_tokens, and temperature, top_p and top_k, which default to 1, 1 and 0 here.",
    )
    kd_on_policy_truncated: str = _key(
        "keep", "Own samples that hit the limit without an end token: keep, or drop them from the loss."
    )
    kd_on_policy_every: int = _key(
        1,
        "Use each own sample in so many steps, one after the other, which train on the same examples: an "
        "epoch has so many times the steps, and generation a smaller share of each.",
    )
    kd_max_cut: float = _key(
        0.5,
        "The share of the training examples, from 0 to 1, that may be longer than cutoff_len and so lose the "
        "end of their prompt or response; more of them stop the run before it starts.",
    )
    kd_chunk_size: int | None = _key(
        None,
        "Response tokens per chunk of the objective inside the LM head. Default: chosen from the vocabulary "
        "size and a memory budget; smaller saves memory, larger saves a little time.",
    )

    kd_compile: bool | None = _key(
        None,
        "Compile the part of the objective between the logits and their gradient with torch.compile, which "
        "costs seconds at the start and makes each step faster. Default: false.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.kd_gamma, str):  # as the command line and a field of the web UI hold it
            with suppress(ValueError):
                self.kd_gamma = float(self.kd_gamma)
        if isinstance(self.kd_loss, str) and self.kd_loss.lstrip().startswith("{"):
            self.kd_loss = _flow_mapping("kd_loss", self.kd_loss)
        if isinstance(self.teacher_model, str) and self.teacher_model.lstrip().startswith("{"):
            self.teacher_model = _flow_mapping("teacher_model", self.teacher_model)

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
        formula = self.formula()
        # A preset goes by its name, but for one with a number of its own that moves; β moves as a key.
        by_name = isinstance(self.kd_loss, str) and (not formula.moves or self.kd_beta_end is not None)
        gate = formula.gate
        return {
            "kd_loss": self.kd_loss if by_name else formula.at(move),
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


KEYS: tuple[str, ...] = tuple(item.name for item in fields(DistillationArguments))


def cache_folders(teacher_cache: str | None) -> list[str]:
    """Return the folders that ``teacher_cache`` names."""
    return [name.strip() for name in (teacher_cache or "").split(",") if name.strip()]


def _flow_mapping(key: str, text: str) -> Any:
    """Read a mapping on one line, as the command line and a field of the web UI hold it."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = one_line(str(error))
        raise ArgumentError(f"`{key}: {one_line(text)}` cannot be read as a mapping: {reason}.") from None
