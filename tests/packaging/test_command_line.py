"""`sekd` itself: one help page, a version, shell completion, and a hand for mistyped names."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.runs import command

from llamafactory_sekd import __version__, cli
from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.cli import COMMANDS
from llamafactory_sekd.presets import PRESETS


SEKD = [sys.executable, "-m", "llamafactory_sekd.cli"]


def test_one_page_shows_every_command_in_its_group_without_importing_torch():
    page = command([*SEKD, "--help"])
    assert page.returncode == 0
    assert page.stdout == command(SEKD).stdout
    for name, entry in COMMANDS.items():
        assert name in page.stdout
        assert entry.group in page.stdout
    imported = command([sys.executable, "-X", "importtime", "-m", "llamafactory_sekd.cli", "--help"]).stderr
    assert " typer" in imported
    assert " torch\n" not in imported


def test_every_command_has_a_help_page_of_its_own_without_gaps():
    for place, name in enumerate([*COMMANDS, "data alma", "data pairs", "data check"]):
        page = command([*SEKD, *name.split(), ("--help", "-h")[place % 2]])
        assert page.returncode == 0, page.stderr
        assert f"Usage: sekd {name} " in page.stdout
        # Text in square brackets is markup, which is swallowed and leaves a blank before the full stop.
        assert not re.search(r" \.( |$)", page.stdout, flags=re.MULTILINE), page.stdout


def test_a_mistyped_command_is_refused_with_the_nearest_name():
    done = command([*SEKD, "stdy", "x.yaml"])
    assert done.returncode == 2
    assert "No such command 'stdy'. Did you mean 'study'?" in done.stderr


@pytest.mark.parametrize("name", ["cache", "translate", "data"])
def test_ctrl_c_says_that_the_same_command_goes_on(monkeypatch, capsys, name):
    def app(**_):
        sys.exit(130)  # what typer makes of it, without a word

    monkeypatch.setattr(sys, "argv", ["sekd", name])
    monkeypatch.setattr(cli, "apply_plugin", lambda: None)
    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(app=app))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith(f"\nsekd {name}: interrupted; nothing is half-written, and the same ")


def test_the_version_is_the_packages():
    assert command([*SEKD, "--version"]).stdout == f"sekd {__version__}\n"


def test_completion_is_installed_and_completes_the_commands(tmp_path):
    env = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    sekd = [sys.executable, "-c", "import sys; sys.argv[0] = 'sekd'; from llamafactory_sekd.cli import main; main()"]
    installed = command([*sekd, "--install-completion", "bash"], env=env)
    assert installed.returncode == 0, installed.stderr
    assert (tmp_path / ".bash_completions" / "sekd.sh").is_file()
    asked = {"_SEKD_COMPLETE": "complete_bash", "COMP_WORDS": "sekd d", "COMP_CWORD": "1"}
    assert command(sekd, env={**env, **asked}).stdout.split() == [name for name in COMMANDS if name.startswith("d")]


@pytest.mark.parametrize(
    ("entry", "words"),
    [("main", "sekd doctor"), ("main", "sekd cache"), ("host_main", "llamafactory_sekd train")],
)
def test_without_the_host_a_command_ends_in_one_line_with_the_remedy(entry, words):
    name, verb = words.split()
    yaml = str(Path(__file__).parents[2] / "examples" / "yamls" / "sekd_llama7b.yaml")
    code = (
        "import sys; sys.modules['llamafactory'] = None\n"
        f"sys.argv = [{name!r}, {verb!r}, {yaml!r}]\n"
        f"from llamafactory_sekd.cli import {entry}; {entry}()"
    )
    result = command([sys.executable, "-c", code])
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert "LLaMA-Factory is not installed" in last
    assert "pip install" in last
    assert "Traceback" not in result.stderr


def test_every_preset_is_listed_with_a_mapping_that_is_the_same_objective():
    listed = command([*SEKD, "objectives"])
    assert listed.returncode == 0, listed.stderr
    mappings = re.findall(r"^(\w+)\n(?:  .*\n)*?  mapping  kd_loss: (.*)$", listed.stdout, flags=re.MULTILINE)
    assert [name for name, _ in mappings] == list(PRESETS)
    for name, mapping in mappings:
        assert PRESETS[name].equation in listed.stdout
        assert PRESETS[name].source in listed.stdout
        keys = {"kd_topk": 0.5} if "kd_topk" in PRESETS[name].keys else {}
        own = DistillationArguments(kd_loss=name, **keys).formula()
        assert DistillationArguments(kd_loss=yaml.safe_load(mapping)).formula() == own
    refused = command([*SEKD, "objectives", "jds"])
    assert refused.returncode == 2
    assert "did you mean 'jsd'" in refused.stderr
