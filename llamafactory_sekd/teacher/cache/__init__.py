"""The offline teacher: its answers on disk, by example, read while training."""

from __future__ import annotations

from llamafactory_sekd.ranks import on_any_rank
from llamafactory_sekd.teacher.cache.build import Plan, collate, fill, make_plan
from llamafactory_sekd.teacher.cache.cache_manifest import Manifest
from llamafactory_sekd.teacher.cache.cache_opening import Fingerprints, Settings, open_for_reading
from llamafactory_sekd.teacher.cache.collator import CacheCollator
from llamafactory_sekd.teacher.cache.formats import (
    DTYPES,
    FORMATS,
    Format,
    HiddenFormat,
    TopKFormat,
    TopKLogits,
    bytes_per_token,
)
from llamafactory_sekd.teacher.cache.informed import check_responses
from llamafactory_sekd.teacher.cache.record_store import ShardReader, ShardWriter
from llamafactory_sekd.teacher.cache.recorded_teacher import CachedTeacher, FillingTeacher, padding_of_head
from llamafactory_sekd.teacher.cache.session import Session
from llamafactory_sekd.teacher.cache.several import OpenCache, first_unanswered, open_caches, unanswered


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
    "OpenCache",
    "Plan",
    "Session",
    "Settings",
    "ShardReader",
    "ShardWriter",
    "TopKFormat",
    "TopKLogits",
    "bytes_per_token",
    "check_responses",
    "collate",
    "fill",
    "first_unanswered",
    "make_plan",
    "on_any_rank",
    "open_caches",
    "open_for_reading",
    "padding_of_head",
    "unanswered",
]
