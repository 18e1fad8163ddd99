"""On the page, a teacher called `self` is the student's base with the student's own quantization."""

from __future__ import annotations

import torch  # noqa: F401  (registers the plug-in, as in every process of the host)


VALUES = {
    "top.model_name": "Custom",
    "top.model_path": "some/base",
    "top.quantization_bit": "4",
    "top.quantization_method": "bnb",
    "train.teacher_model": "self",
    "train.teacher_model_adapters": ["tuned"],
    "train.teacher_model_quantization_bit": "none",
}


def test_a_teacher_called_self_is_the_students_base_with_its_own_adapters():
    from llamafactory_sekd.host.webui_page import _teacher_arguments

    arguments = _teacher_arguments(VALUES)
    assert (arguments["model_name_or_path"], arguments["quantization_bit"]) == ("some/base", 4)
    assert arguments["adapter_name_or_path"].endswith("Custom/lora/tuned")
    other = _teacher_arguments({**VALUES, "train.teacher_model": "other/model"})
    assert (other["model_name_or_path"], other.get("quantization_bit")) == ("other/model", None)
