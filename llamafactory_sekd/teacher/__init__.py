"""The teacher: compatibility, placement and outputs."""

from __future__ import annotations

from llamafactory_sekd.teacher.model import Teacher
from llamafactory_sekd.teacher.placement import Placement, engine_config
from llamafactory_sekd.teacher.several_teachers import NumberCollator, SeveralTeachers
from llamafactory_sekd.teacher.shared import SharedTeacher, add_teacher_adapters
from llamafactory_sekd.teacher.source import TeacherSource
from llamafactory_sekd.teacher.teacher_files import check_model_files, check_teacher_files
from llamafactory_sekd.teacher.vocabulary import check_tokenizers, common_vocabulary, readable_rows, used_ids


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
