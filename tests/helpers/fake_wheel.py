"""A wheel with a few translations in it, laid out as Home Assistant lays out its own."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

from llamafactory_sekd.demo.data import WHEEL


def save_wheel(folder: Path, components: dict[str, tuple[dict, dict | None]]) -> Path:
    """Save a wheel; ``components`` maps a name to its English and its German strings (nested, or None)."""
    folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(folder / WHEEL, "w") as archive:
        for name, (english, german) in components.items():
            for language, strings in (("en", english), ("de", german)):
                if strings is not None:
                    archive.writestr(
                        f"homeassistant/components/{name}/translations/{language}.json", json.dumps(strings)
                    )
        archive.writestr("homeassistant/components/light/manifest.json", "{}")
    return folder / WHEEL
