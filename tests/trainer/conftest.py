"""Models and data that the training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A folder with `teacher`, `student` and the data sets `tiny` and `tiny_valid`."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.save_llama(root / "teacher", seed=1, width=48, layers=3)
    tiny.save_llama(root / "student", seed=2)
    tiny.save_dataset(root / "data")
    return root
