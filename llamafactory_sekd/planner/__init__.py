"""The memory of a training run before any weight is read: rehearsed on tensors without content, then added up."""

from __future__ import annotations

from llamafactory_sekd.planner.estimate import Estimate, Row, estimate
from llamafactory_sekd.planner.planned_run import Blueprint, Run, TeacherPlace
from llamafactory_sekd.planner.sharding import Sharding


__all__ = ["Blueprint", "Estimate", "Row", "Run", "Sharding", "TeacherPlace", "estimate"]
