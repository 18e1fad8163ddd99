"""The manifest: what was made, from what, and how to see that it is still complete.

It is written last, so its presence says that a run was finished. Its keys:

``request``
    what was asked for, the hashes of local source files included; another request is another data set.
``source``
    kind and revision of the source; ``licence``: a note on it.
``files``
    for each file, relative to the manifest: ``records`` (pairs), ``bytes`` and ``sha256``.
``findings``
    what was left out, kept or repaired: problem, outcome, file, count, and the first thousand lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import llamafactory_sekd
from llamafactory_sekd.data.checks import Findings
from llamafactory_sekd.data.resumable import Written
from llamafactory_sekd.errors import DataError, one_line
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.fingerprints import sha256, sha256_of


FORMAT = 1


@dataclass(frozen=True)
class Product:
    """What a run makes: for each relative path its bytes, or where they were written, and its number of pairs."""

    files: Mapping[str, tuple[bytes | Written, int]]
    findings: Findings
    source: dict[str, Any] = field(default_factory=dict)
    licence: str = ""


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest, or None where there is none; :class:`DataError` when it is not one of ours."""
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot read the manifest {path} ({one_line(str(error))}): delete it to write the data again."
        ) from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise DataError(f"{path} is not a manifest of this version: delete it to write the data again.")
    return manifest


def same_request(out: Path, made: Any, asked: dict[str, Any]) -> None:
    """Raise :class:`DataError` when what a manifest says was asked for is not what is asked for now."""
    if made == asked:
        return
    before = made if isinstance(made, dict) else {}
    differing = [key for key in asked | before if key not in asked or before.get(key) != asked[key]]
    raise DataError(
        f"{out} was created with different options ({', '.join(differing)}): "
        "add --overwrite to write it again, or choose another --out."
    )


def verify(path: Path, manifest: dict[str, Any]) -> None:
    """Compare every file that the manifest at ``path`` names with its hash; the first difference is an error.

    A name that leads out of the manifest's directory is refused. Raises :class:`DataError`.
    """
    for name, entry in manifest["files"].items():
        file = inside(path.parent, name)
        if not file.is_file():
            raise DataError(f"{file} is missing although {path} names it: add --overwrite to write the data again.")
        if not isinstance(entry, dict) or sha256_of(file) != entry.get("sha256"):
            raise DataError(
                f"{file} was changed after it was written (its SHA-256 is not the one in {path}): "
                "add --overwrite to write the data again, or choose another --out."
            )


def write_product(path: Path, request: dict[str, Any], product: Product, overwrite: bool) -> dict[str, Any]:
    """Write the files, then the manifest at ``path``; return the manifest.

    A file that is there already with the same content (from a run that was killed) is left alone. One with other
    content is an error, and nothing is written, unless ``overwrite`` is set; then the files of the former manifest
    that are no longer wanted go too. Raises :class:`DataError`.
    """
    directory = path.parent
    wanted = {inside(directory, name): data for name, (data, _) in product.files.items()}
    to_write = {file: data for file, data in wanted.items() if not _holds(file, data)}
    for file in to_write:
        if file.exists() and not overwrite:
            raise DataError(
                f"{file} exists with other content: add --overwrite to replace it, or choose another --out."
            )

    former = read_manifest(path)
    for name in former["files"] if former else ():
        if (file := inside(directory, name)) not in wanted:
            file.unlink(missing_ok=True)
    path.unlink(missing_ok=True)  # from here to the end, the data is incomplete
    for file, data in to_write.items():
        if isinstance(data, Written):
            data.partial.replace(file)
        else:
            write_atomic(file, data)

    manifest = _manifest(request, product)
    write_atomic(path, json.dumps(manifest, ensure_ascii=False, indent=2).encode("utf-8") + b"\n")
    return manifest


def inside(directory: Path, name: str) -> Path:
    """Return ``directory / name``; :class:`DataError` when ``..``, an absolute path or a link leads outside."""
    pure = PurePosixPath(name)
    file = directory / pure
    if pure.is_absolute() or ".." in pure.parts or not file.resolve().is_relative_to(directory.resolve()):
        raise DataError(f"The file name {name!r} in the manifest leads out of {directory}: the manifest is not ours.")
    return file


def _holds(file: Path, data: bytes | Written) -> bool:
    size, digest = _measures(data)
    return file.is_file() and file.stat().st_size == size and sha256_of(file) == digest


def _measures(data: bytes | Written) -> tuple[int, str]:
    if isinstance(data, Written):
        return data.size, data.sha256
    return len(data), sha256(data)


def _manifest(request: dict[str, Any], product: Product) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "made_by": f"llamafactory-sekd {llamafactory_sekd.__version__}",
        "request": request,
        "source": product.source,
        "licence": product.licence,
        "files": {
            name: {"records": records, **dict(zip(("bytes", "sha256"), _measures(data), strict=True))}
            for name, (data, records) in product.files.items()
        },
        "findings": product.findings.as_json(),
    }
