"""`sekd init` writes what the repository holds, and a wheel holds the same."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llamafactory_sekd.errors import DataError
from llamafactory_sekd.examples import shipped_files, write_examples


REPOSITORY = Path(__file__).parents[2]


def read_all(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_example_is_written_and_a_second_time_nothing(tmp_path):
    written, same = write_examples(tmp_path)
    assert (len(written), same) == (len(shipped_files()), [])
    found = read_all(tmp_path)
    examples = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "examples").rglob("*.yaml")}
    assert found.keys() >= examples | {"data/dataset_info.json", "examples/deepspeed/ds_z3_config.json"}
    assert all(data == (REPOSITORY / name).read_bytes() for name, data in found.items())
    written, same = write_examples(tmp_path)
    assert (written, len(same)) == ([], len(found))


def test_a_file_with_other_contents_is_kept_and_nothing_else_is_written(tmp_path):
    (tmp_path / "data").mkdir()
    own = tmp_path / "data" / "dataset_info.json"
    own.write_text('{"mine": {}}')
    with pytest.raises(DataError, match=r"data/dataset_info\.json has other contents.*--overwrite"):
        write_examples(tmp_path)
    assert read_all(tmp_path) == {"data/dataset_info.json": b'{"mine": {}}'}
    write_examples(tmp_path, overwrite=True)
    assert own.read_bytes() == (REPOSITORY / "data" / "dataset_info.json").read_bytes()


def test_a_wheel_holds_the_examples_and_writes_them(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(REPOSITORY)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    prefix = "llamafactory_sekd/shipped/"
    shipped = {name.removeprefix(prefix) for name in read_all(tmp_path / "site") if name.startswith(prefix)}
    assert shipped == {path.as_posix() for path in shipped_files()}

    init = "from llamafactory_sekd.cli import main; main()"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", init, "init", "here"], cwd=tmp_path, env=environment, check=True)
    assert read_all(tmp_path / "here").keys() == shipped
