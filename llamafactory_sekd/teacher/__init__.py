"""The teacher: compatibility, placement and outputs."""

from __future__ import annotations

from llamafactory_sekd.teacher.compatibility import (
    check_model_files,
    check_teacher_files,
    check_tokenizers,
    common_vocabulary,
    readable_rows,
    used_ids,
)
from llamafactory_sekd.teacher.model import Placement, SharedTeacher, Teacher, add_teacher_adapters, engine_config
from llamafactory_sekd.teacher.source import NumberCollator, SeveralTeachers, TeacherSource


__all__ = [
    "NumberCollator",
    "Placement",
    "SeveralTeachers",
    "SharedTeacher",
    "Teacher",
    "TeacherSource",
    "add_teacher_adapters",
    "check_model_files",
    "check_teacher_files",
    "check_tokenizers",
    "common_vocabulary",
    "engine_config",
    "readable_rows",
    "used_ids",
]
