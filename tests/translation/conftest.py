"""A tiny model that ends its sentences, and what calls the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.length_model import save_length_model
from helpers.sentences import ENGLISH

from llamafactory_sekd.errors import SekdError


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_length_model(tmp_path_factory.mktemp("model") / "one", ENGLISH, seed=0)


@pytest.fixture
def sekd_translate(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`sekd translate --model MODEL …` in this process; a user's error is raised."""
    from llamafactory_sekd.host.translate_command import app

    def run(*words: object) -> None:
        argv = ["--model", str(model), "--max-new-tokens", "48", *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["sekd", "translate", *argv])
        app(args=argv, prog_name="sekd translate", standalone_mode=False)

    return run


@pytest.fixture
def refused(sekd_translate: Callable[..., None]) -> Callable[..., str]:
    """What the command says where it refuses."""

    def run(*words: object) -> str:
        with pytest.raises(SekdError) as caught:
            sekd_translate(*words)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run
