"""Every key that cannot work is refused in one line that names the key, the value and the remedy."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers.runs import base_config, write_yaml
from llamafactory.hparams.parser import _TRAIN_ARGS, get_train_args

from llamafactory_sekd.argument_checks import check_distillation_arguments, idle_keys
from llamafactory_sekd.arguments import (
    KEYS,
    DistillationArguments,
    keys_read_by,
)
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives import distillation_loss
from llamafactory_sekd.presets import PRESETS
from llamafactory_sekd.study.matrix import has_effect
from llamafactory_sekd.webui.page import unused_keys


KNOWN = {name for group in _TRAIN_ARGS for name in group.__dataclass_fields__}
ZERO_3 = str(Path(__file__).parents[2] / "examples" / "deepspeed" / "ds_z3_config.json")
SELF = {"teacher_model": "self", "finetuning_type": "lora"}
BAD_KEYS = [
    ({"teacher_model": None}, ["teacher_model", "missing", "hub id"]),
    ({"kd_loss": "sft"}, ["kd_loss: sft", *PRESETS]),
    ({"kd_lambda": 1.5}, ["kd_lambda: 1.5", "0 to 1"]),
    ({"kd_lambda": -0.1}, ["kd_lambda: -0.1"]),
    ({"kd_lambda": math.nan}, ["kd_lambda: nan"]),
    ({"kd_lambda": "half"}, ["kd_lambda: half"]),
    ({"kd_beta": 2}, ["kd_beta: 2", "0 to 1"]),
    ({"kd_beta_end": 1.1}, ["kd_beta_end: 1.1"]),
    ({"kd_beta_end": 1.0, "kd_loss": "forward_kl"}, ["kd_beta_end: 1.0", "forward_kl", "has no β", "skew"]),
    ({"kd_gamma": "hard"}, ["kd_gamma: hard", "number"]),
    ({"kd_gamma": math.nan}, ["kd_gamma: nan"]),
    ({"kd_gamma": "nan"}, ["kd_gamma: nan"]),
    ({"kd_gamma": "auto", "kd_loss": "skew"}, ["kd_gamma: auto", "skew", "has no Γ", "self_evolution"]),
    ({"kd_hard_scale": "equal"}, ["kd_hard_scale: equal", "none, balanced"]),
    ({"kd_hard_scale": "balanced", "kd_loss": "no_evolution"}, ["kd_hard_scale: balanced", "self_evolution_topk"]),
    ({"kd_loss": "self_evolution_topk"}, ["kd_topk", "missing"]),
    ({"kd_topk": 0.5}, ["kd_topk: 0.5", "self_evolution_topk"]),
    ({"kd_loss": "self_evolution_topk", "kd_topk": 0.0}, ["kd_topk: 0.0", "above 0"]),
    ({"kd_loss": "self_evolution_topk", "kd_topk": 1.2}, ["kd_topk: 1.2"]),
    ({"kd_temperature": 0}, ["kd_temperature: 0", "above 0"]),
    ({"kd_temperature": math.inf}, ["kd_temperature: inf"]),
    ({"kd_chunk_size": 0}, ["kd_chunk_size: 0"]),
    ({"kd_compile": "maybe"}, ["kd_compile"]),
    ({"kd_compile": True, "kd_beta_end": 1.0}, ["kd_compile: True", "kd_beta_end"]),
    ({"teacher_model_quantization_bit": 3}, ["teacher_model_quantization_bit: 3", "4 or 8"]),
    ({"teacher_model_device": "gpu"}, ["teacher_model_device: gpu", "auto, cpu, or cuda:N"]),
    ({"teacher_model_device": "cuda:99"}, ["teacher_model_device: cuda:99", "CUDA", "cpu"]),
    ({"teacher_model_device": "cpu", "teacher_offload": True}, ["teacher_offload: True", "device: cpu", "remove one"]),
    ({"teacher_model_device": "cpu", "deepspeed": ZERO_3}, ["teacher_model_device: cpu", "ZeRO-3", "remove the key"]),
    ({"teacher_model_device": "cpu", "fsdp": "full_shard"}, ["teacher_model_device: cpu", "FSDP"]),
    ({"teacher_offload": "yes"}, ["teacher_offload: yes", "true or false"]),
    ({"teacher_offload": True, "fsdp": "full_shard"}, ["teacher_offload: true", "fsdp_offload_params"]),
    ({"teacher_offload": True, "teacher_model_quantization_bit": 4}, ["teacher_offload: True", "quantized", "remove"]),
    ({"teacher_deepspeed": ZERO_3}, ["teacher_deepspeed: ", "set `deepspeed`"]),
    ({"teacher_deepspeed": "no.json", "deepspeed": ZERO_3}, ["teacher_deepspeed: no.json", "cannot be read"]),
    ({"teacher_model": None, "teacher_cache": "x", "teacher_offload": True}, ["teacher_offload: True", "missing"]),
    ({"teacher_model": "self"}, ["teacher_model: self", "finetuning_type: lora", "is full"]),
    ({**SELF, "teacher_offload": True}, ["teacher_offload: True", "shares its device"]),
    ({**SELF, "teacher_model_quantization_bit": 4}, ["teacher_model_quantization_bit: 4", "set `quantization_bit`"]),
    ({**SELF, "train_from_scratch": True}, ["train_from_scratch: true", "teacher_model: self", "learned"]),
    ({**SELF, "pissa_init": True}, ["pissa_init: true", "teacher_model: self"]),
    ({**SELF, "adapter_name_or_path": "a,b"}, ["adapter_name_or_path: a,b", "merged"]),
    ({**SELF, "adapter_name_or_path": "a", "create_new_adapter": True}, ["adapter_name_or_path: a", "merged"]),
    ({**SELF, "fsdp": "full_shard"}, ["teacher_model: self", "FSDP 1", "fsdp_version: 2"]),
    ({"use_dft_loss": True}, ["use_dft_loss", "sekd"]),
    ({"use_eaft_loss": True}, ["use_eaft_loss"]),
    ({"use_asft_loss": True}, ["use_asft_loss"]),
    ({"use_hyper_parallel": True}, ["use_hyper_parallel"]),
    ({"use_kt": True}, ["use_kt", "KTransformers"]),
    ({"use_unsloth": True, "finetuning_type": "lora"}, ["use_unsloth", "logits"]),
    ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor: 0.1", "kd_lambda"]),
]


def test_the_objective_is_compiled_only_where_the_key_says_so():
    assert not DistillationArguments().kd_compile


@pytest.fixture(autouse=True)
def environment():
    """transformers leaves a run's engine there for the next one."""
    with patch.dict(os.environ):
        yield


@pytest.mark.parametrize(("overrides", "words"), BAD_KEYS, ids=lambda value: str(value)[:60])
def test_a_bad_key_is_refused_with_key_value_and_remedy_before_any_model_is_read(tmp_path, overrides, words):
    missing = overrides.keys() - KNOWN
    if missing:
        pytest.skip(f"this host has no {', '.join(missing)}")

    config = base_config(tmp_path, output_dir=str(tmp_path / "out"), **overrides)
    with pytest.raises(ArgumentError) as caught:
        get_train_args(config)

    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_bits_of_a_teacher_that_nothing_here_can_quantize_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ArgumentError, match=r"`teacher_model_quantization_bit: 4` needs the package bitsandbytes"):
        get_train_args(base_config(tmp_path, output_dir=str(tmp_path), teacher_model_quantization_bit=4))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ({"kd_lamda": 0.5}, "`kd_lamda` is not a key of `stage: sekd`: did you mean 'kd_lambda'?"),
        ({"teacher_modell": "x"}, "`teacher_modell` is not a key of `stage: sekd`: did you mean 'teacher_model'?"),
        ({"kd_zzzzz": 1}, "`kd_zzzzz` is not a key of `stage: sekd`: use one of " + ", ".join(KEYS) + "."),
        ({"KD_LAMBDA": 0.5}, "`KD_LAMBDA` is not a key of `stage: sekd`: did you mean 'kd_lambda'?"),
        ({"learnin_rate": 1e-4}, "`learnin_rate` is not a key of `stage: sekd`: did you mean 'learning_rate'?"),
        ({"stage": "sekdd"}, "`stage: sekdd` does not exist: did you mean 'sekd'?"),
        ({"stage": "SEKD"}, "`stage: SEKD` does not exist: did you mean 'sekd'?"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistyped_key_or_stage_is_answered_with_the_one_that_was_meant(tmp_path, wrong, meant):
    with pytest.raises(ArgumentError) as caught:
        get_train_args(base_config(tmp_path, output_dir=str(tmp_path / "out"), **wrong))
    assert str(caught.value) == meant


def test_a_mistyped_key_is_refused_where_the_host_drops_unknown_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    config = base_config(tmp_path, output_dir=str(tmp_path / "out"), use_cpu=True)
    for wrong, meant in (("kd_lamda", "kd_lambda"), ("learnin_rate", "learning_rate")):
        with pytest.raises(ArgumentError, match=f"did you mean '{meant}'"):
            get_train_args({**config, wrong: 0.5})
    get_train_args({**config, "a_tracker_of_my_own": 1})  # what the variable is for
    with pytest.raises(ArgumentError, match="did you mean 'kd_gamma'"):
        get_train_args([word for key in config for word in (f"--{key}", str(config[key]))] + ["--kd_gama", "1"])


def test_a_mistyped_flag_of_ours_is_answered_as_well_and_others_stay_the_hosts(tmp_path):
    flags = ["--model_name_or_path", "x", "--stage", "sekd", "--teacher_model", "y", "--output_dir", str(tmp_path)]
    with pytest.raises(ArgumentError, match="did you mean 'kd_gamma'"):
        get_train_args([*flags, "--kd_gama", "1"])
    with pytest.raises(ValueError, match="not used by the HfArgumentParser") as caught:
        get_train_args(base_config(tmp_path, output_dir=str(tmp_path / "out"), zzzzzz=1))
    assert not isinstance(caught.value, ArgumentError)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("stage", ["sft", "dpo", "pt"])
def test_every_key_of_ours_is_refused_in_another_stage_even_at_its_default(tmp_path, key, stage):
    default = DistillationArguments.__dataclass_fields__[key].default
    config = base_config(tmp_path, output_dir=str(tmp_path / "out"), stage=stage, teacher_model=None)
    config[key] = default if default is not None else "x"
    with pytest.raises(ArgumentError, match=rf"`{key}: .*`stage: {stage}`.*`stage: sekd`"):
        get_train_args(config)


def test_megatron_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("USE_MCA", "1")
    from llamafactory.hparams import FinetuningArguments

    with pytest.raises(ArgumentError, match="USE_MCA=1"):
        FinetuningArguments(stage="sekd", teacher_model="x")


def test_sekd_presents_itself_to_the_host_as_sft_and_to_trackers_by_its_name():
    from llamafactory.hparams import FinetuningArguments

    ours = FinetuningArguments(stage="sekd", teacher_model="x", kd_gamma=0.7)
    assert (ours.stage, ours.use_sekd) == ("sft", True)
    assert (ours.to_dict()["stage"], ours.to_dict()["kd_gamma"]) == ("sekd", 0.7)
    assert not set(FinetuningArguments(stage="sft").to_dict()) & set(KEYS)


@pytest.mark.parametrize(("text", "gamma"), [("auto", "auto"), ("0.3", 0.3), ("-1", -1.0)])
def test_gamma_on_the_command_line_is_auto_or_a_number(tmp_path, monkeypatch, text, gamma):
    monkeypatch.setattr(
        "sys.argv",
        [
            "train",
            str(write_yaml(tmp_path / "x.yaml", base_config(tmp_path, output_dir=str(tmp_path)))),
            f"kd_gamma={text}",
        ],
    )
    from llamafactory.hparams.parser import read_args

    config = read_args()
    assert get_train_args(config)[3].kd_gamma == gamma
    options = [part for key, value in config.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr("sys.argv", ["train", *options])
    assert get_train_args(None)[3].kd_gamma == gamma


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "must hold a JSON object"), ("{", "is not JSON"), ('{"zero_optimization": {"stage": 2}}', "3, or 0")],
)
def test_a_deepspeed_file_that_no_teacher_can_use_is_refused(tmp_path, content, words):
    own = tmp_path / "own.json"
    own.write_text(content)
    keys = {"teacher_deepspeed": str(own), "deepspeed": ZERO_3}
    with pytest.raises(ArgumentError, match=f"`teacher_deepspeed: {own}`.*{words}") as caught:
        get_train_args(base_config(tmp_path, output_dir=str(tmp_path / "out"), **keys))
    assert "\n" not in str(caught.value)


def test_infinite_gamma_is_a_number():
    from llamafactory.hparams import FinetuningArguments

    for gamma in (math.inf, -math.inf, -1):
        assert FinetuningArguments(stage="sekd", teacher_model="x", kd_gamma=gamma).kd_gamma == gamma


@pytest.mark.parametrize("kd_loss", PRESETS)
def test_a_beta_of_zero_is_refused_where_the_objective_reads_it_and_nowhere_else(kd_loss):
    topk = 0.5 if kd_loss == "self_evolution_topk" else None
    args = DistillationArguments(teacher_model="t", kd_loss=kd_loss, kd_topk=topk, kd_beta=0.0)
    if "kd_beta" in keys_read_by(kd_loss):
        with pytest.raises(ArgumentError, match=r"`kd_beta: 0\.0` cannot be used"):
            check_distillation_arguments(args)
    else:
        check_distillation_arguments(args)


@pytest.mark.parametrize("kd_loss", PRESETS)
def test_the_web_ui_and_a_study_agree_with_the_checks_about_what_an_objective_reads(kd_loss):
    config = {"stage": "sekd", "kd_loss": kd_loss}
    assert {key for key in KEYS if has_effect(key, config)} == keys_read_by(kd_loss)
    assert unused_keys(kd_loss) == frozenset(KEYS) - keys_read_by(kd_loss)
    assert ("kd_beta_end" in keys_read_by(kd_loss)) == ("kd_beta" in PRESETS[kd_loss].keys)
    assert PRESETS[kd_loss].keys | {"teacher_model", "kd_temperature"} <= keys_read_by(kd_loss)


FIXED = {"divergence": "kl", "lambda": 0.3, "temperature": 2.0}
NUMBERS = {"kd_lambda": 0.9, "kd_beta": 0.9, "kd_gamma": 1.5, "kd_topk": 0.2, "kd_temperature": 3.0}


def loss_of(**keys):
    """Return the loss of random tokens under the keys of a run."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 24, generator=generator).mul(2) for _ in range(2))
    labels = torch.randint(24, (64,), generator=generator)
    args = DistillationArguments(teacher_model="t", **keys)
    check_distillation_arguments(args)
    return distillation_loss(student, teacher, labels, **args.objective_keywords()).loss, idle_keys(args)


@pytest.mark.parametrize(
    ("keys", "idle"),
    [
        *(({"kd_loss": name, "kd_topk": 0.5 if "topk" in name else None}, [*NUMBERS]) for name in PRESETS),
        ({"kd_loss": FIXED}, ["kd_lambda", "kd_temperature"]),
        ({"kd_loss": {"preset": "self_evolution", "gate": {"above": 1.0}}}, ["kd_gamma", "kd_beta"]),
        ({"kd_loss": {"preset": "self_evolution", "gate": {"share": 0.2}}}, ["kd_gamma"]),
        ({"kd_loss": {"preset": "self_evolution", "hard": {"skew": 0.2}}}, ["kd_beta", "kd_gamma", "kd_lambda"]),
        ({"kd_loss": "self_evolution", "kd_beta": 1.0}, ["kd_gamma"]),
        ({"kd_loss": "forward_kl", "kd_lambda": 0.0}, ["kd_temperature", "kd_beta"]),
        ({"kd_loss": "skew_teacher", "kd_lambda": 0.0}, ["kd_temperature", "kd_beta"]),
        ({"kd_loss": "verified_reference", "kd_lambda": 0.0}, ["kd_temperature", "kd_gamma"]),
    ],
    ids=str,
)
def test_a_number_is_told_as_idle_exactly_where_it_changes_no_tokens_loss(keys, idle):
    before, _ = loss_of(**keys)
    for key in idle:
        try:
            after, lines = loss_of(**{**keys, key: NUMBERS[key]})
        except ArgumentError:  # refused, which is louder
            assert key not in keys_read_by(keys["kd_loss"])
            continue
        told = [line for line in lines if line.startswith(f"`{key}: {NUMBERS[key]}` has no effect")]
        assert bool(told) == torch.equal(before, after), (key, lines)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kd_loss": "self_evolution_topk", "kd_topk": 1.0}, "its gate selects every token"),
        ({"kd_beta": 1.0}, "hard tokens have the loss of the easy ones"),
        ({"kd_loss": {"preset": "entropy_gate", "gate": {"share": 1}}}, "its gate selects every token"),
        ({"kd_loss": "tvd", "kd_lambda": 0.0}, "the teacher has no share"),
        ({"kd_loss": {"preset": "skew", "easy": {"lambda": 0}}}, "the teacher has no share"),
    ],
    ids=str,
)
def test_an_objective_that_is_another_in_all_but_name_is_told(keys, words):
    (line,) = loss_of(**keys)[1]
    assert words in line


@pytest.mark.parametrize("name", PRESETS)
def test_an_objective_with_the_keys_as_they_come_has_nothing_idle(name):
    assert not loss_of(kd_loss=name, kd_topk=0.5 if "topk" in name else None)[1]
