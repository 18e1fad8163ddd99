"""The example YAML files that the package ships, and ``sekd init``, which writes them into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamafactory_sekd.errors import DataError
from llamafactory_sekd.files import write_atomic


app = typer.Typer(help="Write the example YAML files into a folder.", add_completion=False)
_PACKAGE = Path(__file__).parent
# What `sekd init` writes: files and folders, relative to the root of the repository.
SHIPPED = ("examples", "docs/schema", "data/dataset_info.json")


def shipped_root() -> Path:
    """Return the folder that holds ``examples/`` and the rest: in a wheel inside the package, else the repository."""
    packaged = _PACKAGE / "shipped"
    return packaged if packaged.is_dir() else _PACKAGE.parent


def shipped_files() -> list[Path]:
    """Return the files that ``sekd init`` writes, relative to :func:`shipped_root`."""
    root = shipped_root()
    found = [path for name in SHIPPED for path in [root / name, *(root / name).rglob("*")]]
    return sorted(path.relative_to(root) for path in found if path.is_file() and "__pycache__" not in path.parts)


def write_examples(folder: Path, *, overwrite: bool = False) -> tuple[list[Path], list[Path]]:
    """Write the examples below ``folder`` and return the files written and those that were the same already.

    Nothing is written when a file with other contents is in the way.

    Raises:
        DataError: There is such a file and ``overwrite`` is off, or the system refuses.
    """
    contents = {folder / path: (shipped_root() / path).read_bytes() for path in shipped_files()}
    same = [path for path, data in contents.items() if path.is_file() and path.read_bytes() == data]
    changed = [path for path in contents if path.exists() and path not in same]
    if changed and not overwrite:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DataError(
            f"{changed[0]}{others} has other contents than the example: choose another folder, or pass --overwrite."
        )
    written = [path for path in contents if path not in same]
    for path in written:
        write_atomic(path, contents[path])

    return written, same


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write; paths in the examples are relative to it.")] = Path(),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files with other contents.")] = False,
) -> None:
    """Write example YAML files for training, evaluation and studies, and ``data/dataset_info.json``."""
    written, same = write_examples(folder, overwrite=overwrite)
    print(f"{folder}: {len(written)} files written" + (f", {len(same)} already there" if same else ""))
    print("Run the commands at the top of each file from this folder, for example:")
    print("  llamafactory-cli train examples/yamls/sekd_llama7b.yaml")
