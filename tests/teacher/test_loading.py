"""How the teacher's keys reach the host's loader."""

from __future__ import annotations

import torch  # noqa: F401  (registers the plug-in, as in every process of the host)
from llamafactory.hparams import FinetuningArguments, ModelArguments


def test_the_teachers_path_adapters_and_bits_take_the_place_of_the_students():
    from llamafactory_sekd.host.model_arguments import teacher_model_arguments

    student = ModelArguments(model_name_or_path="student", adapter_name_or_path="a", trust_remote_code=True)
    keys = FinetuningArguments(
        stage="sekd", teacher_model="teacher", teacher_model_adapters="x,y", teacher_model_quantization_bit=4
    )
    teacher = teacher_model_arguments(student, keys)
    assert (teacher.model_name_or_path, teacher.adapter_name_or_path, teacher.quantization_bit) == (
        "teacher",
        ["x", "y"],
        4,
    )
    assert (student.model_name_or_path, student.adapter_name_or_path, student.quantization_bit) == (
        "student",
        ["a"],
        None,
    )
