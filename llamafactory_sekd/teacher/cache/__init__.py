"""The offline teacher: its answers on disk, by example, read while training."""

from __future__ import annotations

from .build import Plan, collate, fill, first_missing, make_plan
from .collator import CacheCollator
from .formats import DTYPES, Format, HiddenFormat, TopKFormat, bytes_per_token
from .manifest import Manifest
from .store import ShardReader, ShardWriter
from .teacher import CachedTeacher, FillingTeacher


__all__ = [
    "DTYPES",
    "CacheCollator",
    "CachedTeacher",
    "FillingTeacher",
    "Format",
    "HiddenFormat",
    "Manifest",
    "Plan",
    "ShardReader",
    "ShardWriter",
    "TopKFormat",
    "bytes_per_token",
    "collate",
    "fill",
    "first_missing",
    "make_plan",
]
