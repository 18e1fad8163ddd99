"""What several tests of the trainer share."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture
def said(caplog, monkeypatch):
    """What the trainer logs as warnings; `warning_once` forgets what earlier tests made it say."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("llamafactory_sekd"), "propagate", True)
    return caplog
