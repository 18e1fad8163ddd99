"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def alma_dir() -> Path:
    """The real ALMA files: $SEKD_ALMA, or ``shared/alma`` beside the project."""
    directory = Path(os.environ.get("SEKD_ALMA") or Path(__file__).parents[2] / "shared" / "alma")
    if not directory.is_dir():
        pytest.skip(f"the ALMA files are not at {directory}: clone fe1ixxu/ALMA and set SEKD_ALMA")
    return directory
