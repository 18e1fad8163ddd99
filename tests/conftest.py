"""Fixtures that several rooms share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings


# The suite tries the same values each time, so that a red run is the change's own fault; `make fuzz` tries new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False, print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def no_deepspeed_left() -> Iterator[None]:
    """transformers keeps the DeepSpeed configuration that was parsed last; the next test would load a ZeRO-3 model."""
    yield
    if integration := sys.modules.get("transformers.integrations.deepspeed"):
        integration.unset_hf_deepspeed_config()


@pytest.fixture(scope="session")
def alma_dir() -> Path:
    """The real ALMA files: $SEKD_ALMA, or ``shared/alma`` next to the project."""
    directory = Path(os.environ.get("SEKD_ALMA") or Path(__file__).parents[2] / "shared" / "alma")
    if not directory.is_dir():
        pytest.skip(f"the ALMA files are not at {directory}: clone fe1ixxu/ALMA and set SEKD_ALMA")
    return directory


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A folder with `teacher`, `student` and the data sets `tiny` and `tiny_valid`."""
    from helpers import tiny  # torch, which not every test needs

    root = tmp_path_factory.mktemp("tiny")
    tiny.save_llama(root / "teacher", seed=1, width=48, layers=3)
    tiny.save_llama(root / "student", seed=2)
    tiny.save_dataset(root / "data")
    return root


@pytest.fixture
def said(caplog, monkeypatch):
    """What our code logs as warnings; `warning_once` forgets what earlier tests made it say."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("llamafactory_sekd"), "propagate", True)
    return caplog
