"""The teacher: is it a fit, where it stands, what it hands out."""

from __future__ import annotations

from .files import check_teacher_files
from .model import Teacher
from .placement import Placement, engine_config
from .shared import SharedTeacher, add_teacher_adapters
from .source import TeacherSource
from .vocabulary import check_tokenizers, common_vocabulary


__all__ = [
    "Placement",
    "SharedTeacher",
    "Teacher",
    "TeacherSource",
    "add_teacher_adapters",
    "check_teacher_files",
    "check_tokenizers",
    "common_vocabulary",
    "engine_config",
]
