"""The offline teacher: its answers on disk, by example, read while training."""

from __future__ import annotations

from llamafactory_sekd.teacher.cache.cache_manifest import Fingerprints, Manifest, Settings, open_for_reading
from llamafactory_sekd.teacher.cache.filling import Plan, Session, collate, fill, make_plan
from llamafactory_sekd.teacher.cache.formats import (
    DTYPES,
    FORMATS,
    Format,
    HiddenFormat,
    TopKFormat,
    TopKLogits,
    bytes_per_token,
)
from llamafactory_sekd.teacher.cache.record_store import ShardReader, ShardWriter
from llamafactory_sekd.teacher.cache.recorded_teacher import (
    CacheCollator,
    CachedTeacher,
    FillingTeacher,
    OpenCache,
    first_unanswered,
    open_caches,
    padding_of_head,
    unanswered,
)
from llamafactory_sekd.teacher.cache.segments import check_responses


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
    "open_caches",
    "open_for_reading",
    "padding_of_head",
    "unanswered",
]
