"""The teacher: is it a fit, where it stands, what it hands out."""

from __future__ import annotations

from .files import check_teacher_files
from .model import Teacher
from .source import TeacherSource
from .vocabulary import check_tokenizers, common_vocabulary


__all__ = ["Teacher", "TeacherSource", "check_teacher_files", "check_tokenizers", "common_vocabulary"]
