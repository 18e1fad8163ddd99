"""The offline teacher: its answers on disk, by example, read while training."""

from __future__ import annotations

from .build import Plan, collate, fill, first_missing, make_plan
from .collator import CacheCollator
from .formats import DTYPES, FORMATS, Format, HiddenFormat, TopKFormat, TopKLogits, bytes_per_token
from .manifest import Manifest
from .opening import Fingerprints, Settings, open_for_reading
from .ranks import on_any_rank
from .session import Session
from .store import ShardReader, ShardWriter
from .teacher import CachedTeacher, FillingTeacher, missing_example


__all__ = [
    "DTYPES",
    "FORMATS",
    "CacheCollator",
    "CachedTeacher",
    "FillingTeacher",
    "Fingerprints",
    "Format",
    "HiddenFormat",
    "Manifest",
    "Plan",
    "Session",
    "Settings",
    "ShardReader",
    "ShardWriter",
    "TopKFormat",
    "TopKLogits",
    "bytes_per_token",
    "collate",
    "fill",
    "first_missing",
    "make_plan",
    "missing_example",
    "on_any_rank",
    "open_for_reading",
]
