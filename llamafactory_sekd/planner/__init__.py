"""The memory of a training run before any weight is read: rehearsed on tensors without content, then added up."""

from __future__ import annotations

from .estimate import Estimate, Row, estimate
from .run import Blueprint, Run, TeacherPlace
from .sharding import Sharding


__all__ = ["Blueprint", "Estimate", "Row", "Run", "Sharding", "TeacherPlace", "estimate"]
