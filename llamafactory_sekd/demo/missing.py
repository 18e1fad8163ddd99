"""What the demo's YAML files need, and which command makes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llamafactory_sekd.errors import DataError


PREPARED = frozenset({"demo/data", "demo/models/teacher_init", "demo/models/teacher", "demo/models/student_init"})


def check_prepared(names: Iterable[object]) -> None:
    """Check that what `sekd demo --prepare` makes is there, where a run names it; other names pass.

    Args:
        names: model names and folders of a run, as its YAML file has them.

    Raises:
        DataError: one of the demo's folders is missing.
    """
    for name in names:
        if isinstance(name, str) and name.rstrip("/") in PREPARED and not Path(name).exists():
            raise DataError(
                f"{name} is not there yet: run `sekd demo --prepare` (or `make demo`), in this folder, to make it."
            )
