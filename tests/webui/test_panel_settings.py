from __future__ import annotations

import pytest

from llamafactory_sekd.argument_checks import check_distillation_arguments
from llamafactory_sekd.arguments import KEYS, DistillationArguments
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.presets import PRESETS
from llamafactory_sekd.webui.page import check_keys, distillation_keys, unused_keys


FIELDS = {
    **dict.fromkeys(KEYS, ""),  # a field that is not filled in
    "teacher_model": " some/teacher ",
    "teacher_model_adapters": [],
    "teacher_model_quantization_bit": "none",
    "teacher_model_device": "auto",
    "teacher_offload": False,
    "kd_loss": "self_evolution",
    "kd_lambda": 0.5,
    "kd_beta": 0.5,
    "kd_gamma": "0.4",
    "kd_topk": "0.5",
    "kd_hard_scale": "none",
    "kd_temperature": "1.0",
    "kd_compile": "auto",
}


@pytest.mark.parametrize("kd_loss", PRESETS)
def test_the_untouched_panel_gives_keys_that_every_objective_accepts(kd_loss):
    keys = distillation_keys({**FIELDS, "kd_loss": kd_loss})
    check_distillation_arguments(DistillationArguments(**keys))
    assert not unused_keys(kd_loss) & keys.keys()
    assert PRESETS[kd_loss].keys <= keys.keys()


def test_fields_become_numbers_lists_become_commas_and_empty_fields_nothing():
    fields = {
        "teacher_model_adapters": ["a", "b/c"],
        "teacher_model_quantization_bit": "4",
        "kd_gamma": "inf",
        "kd_beta_end": "1",
        "kd_chunk_size": "64",
        "kd_compile": "true",
        "teacher_cache": "cache/dir",
    }
    assert distillation_keys({**FIELDS, **fields}) == {
        "teacher_model": "some/teacher",
        "teacher_model_adapters": "a,b/c",
        "teacher_model_quantization_bit": 4,
        "teacher_model_device": "auto",
        "teacher_offload": False,
        "teacher_cache": "cache/dir",
        "kd_loss": "self_evolution",
        "kd_lambda": 0.5,
        "kd_beta": 0.5,
        "kd_beta_end": 1.0,
        "kd_gamma": float("inf"),
        "kd_hard_scale": "none",
        "kd_temperature": 1.0,
        "kd_chunk_size": 64,
        "kd_compile": True,
    }


def test_a_share_of_zero_is_a_value_and_not_an_empty_field():
    assert (
        distillation_keys({**FIELDS, "kd_lambda": 0, "kd_beta": 0.0}).items() >= {"kd_lambda": 0, "kd_beta": 0}.items()
    )


def test_the_threshold_is_a_number_or_auto():
    keys = distillation_keys({**FIELDS, "kd_gamma": " auto ", "kd_hard_scale": "balanced"})
    assert (keys["kd_gamma"], keys["kd_hard_scale"]) == ("auto", "balanced")
    check_keys(keys)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("kd_temperature", "0", "`kd_temperature: 0.0` cannot be used"),
        ("kd_temperature", "warm", "`kd_temperature: warm` cannot be used"),
        ("kd_gamma", "nan", "`kd_gamma: nan` cannot be used"),
        ("kd_gamma", "automatic", "`kd_gamma: automatic` cannot be used"),
        ("kd_beta_end", "1.5", "`kd_beta_end: 1.5` cannot be used"),
        ("kd_chunk_size", "2.5", "`kd_chunk_size: 2.5` cannot be used"),
        ("teacher_model", " ", "`teacher_model` is missing"),
    ],
)
def test_a_wrong_field_is_refused_in_the_words_of_the_command_line(field, text, message):
    with pytest.raises(ArgumentError, match=message):
        check_keys({"stage": "sekd", "learning_rate": 1e-5, **distillation_keys({**FIELDS, field: text})})


def test_a_mapping_in_the_field_of_the_objective_becomes_one_in_the_yaml():
    text = "{preset: verified_reference, gate: {below: 0.2}}"
    keys = distillation_keys({**FIELDS, "kd_loss": text})
    assert keys["kd_loss"] == {"preset": "verified_reference", "gate": {"below": 0.2}}
    assert not {"kd_beta", "kd_gamma", "kd_hard_scale"} & keys.keys()
    check_keys(keys)
    with pytest.raises(ArgumentError, match=r"`kd_loss.gate: blow` is unknown: did you mean 'below'"):
        check_keys(distillation_keys({**FIELDS, "kd_loss": "{preset: verified_reference, gate: {blow: 0.2}}"}))


@pytest.mark.parametrize("text", ["{gate: [", "jds"])
def test_what_is_no_objective_is_refused_when_the_run_starts(text):
    with pytest.raises(ArgumentError, match="kd_loss"):
        check_keys(distillation_keys({**FIELDS, "kd_loss": text}))
