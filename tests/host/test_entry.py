"""The plug-in is there in every process, before the host binds its names, and can be switched off or removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers.forks import forked
from helpers.runs import base_config, command, logged, write_yaml

from llamafactory_sekd import autoload
from llamafactory_sekd.host.patches import PATCHES


REPOSITORY = Path(__file__).parents[2]
HAS_OUR_KEYS = "from llamafactory.hparams import FinetuningArguments as F; print(hasattr(F, 'kd_loss'))"


def python(
    code: str, env: dict[str, str] | None = None, executable: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    return command([executable, "-c", code], env=env)


def forked_python(code: str) -> subprocess.CompletedProcess[str]:
    """Like `python`, where torch and the host have been imported in the usual order already."""
    return forked([sys.executable, "-c", code])


def test_the_hooks_are_registered_for_exactly_the_modules_of_the_ledger():
    patched = {patch.module for patch in PATCHES}
    assert set(autoload.TARGETS) == patched


@pytest.mark.parametrize(
    ("code", "env", "expected"),
    [
        (
            "import torch;" + HAS_OUR_KEYS,
            {},
            "True",
        ),
        (
            "from llamafactory.train.tuner import get_train_args as g; F = g.__globals__['FinetuningArguments'];"
            "print(hasattr(F, 'kd_loss'))",
            {},
            "True",
        ),
        (
            HAS_OUR_KEYS,
            {"LLAMAFACTORY_SEKD": "0"},
            "False",
        ),
        (
            HAS_OUR_KEYS,
            {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            "False",
        ),
        (
            "from llamafactory_sekd.cli import apply_plugin; apply_plugin(); apply_plugin();" + HAS_OUR_KEYS,
            {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            "True",
        ),
        (
            "import torch; from llamafactory_sekd.host import ledger;"
            "from llamafactory.hparams import finetuning_args as m;"
            "patched = m.FinetuningArguments; ledger.undo(); print(hasattr(patched, 'kd_loss'),"
            "hasattr(m.FinetuningArguments, 'kd_loss'), ledger.applied())",
            {},
            "True False []",
        ),
    ],
    ids=["torch first", "through the tuner", "switched off", "torch's switch", "explicit, twice", "undo"],
)
def test_every_order_of_import_patch_and_undo(code, env, expected):
    assert python(code, env).stdout.strip().splitlines()[-1] == expected


def test_a_look_up_of_a_module_uses_no_patch_up():
    code = (
        "import torch, importlib.util as u; from llamafactory_sekd import autoload\n"
        "for name in autoload.TARGETS:\n"
        "    spec = u.find_spec(name); assert spec.loader.get_source(name) is not None, name\n"
        "from llamafactory.train import sft; print(sft.run_sft.__wrapped__ is not None)\n"
        "from llamafactory_sekd.host import ledger; import llamafactory.train.tuner; ledger.check_in_effect()"
    )
    result = python(code)
    assert result.stdout.strip().splitlines()[-1] == "True", result.stderr
    assert result.returncode == 0, result.stderr


def test_a_module_that_is_reloaded_is_patched_again():
    code = (
        "import torch, importlib; from llamafactory.train import sft; importlib.reload(sft)\n"
        "print(hasattr(sft.run_sft, '__wrapped__'), sft.__loader__.__class__.__name__)"
    )
    assert forked_python(code).stdout.strip().splitlines()[-1] == "True SourceFileLoader"


def test_threads_that_import_the_host_at_once_do_not_wait_for_each_other_forever():
    code = (
        "import torch, threading, importlib; from llamafactory_sekd import autoload\n"
        "names = [n for n in autoload.TARGETS if 'webui' not in n and 'v1' not in n]\n"
        "start = threading.Barrier(8)\n"
        "def work(i):\n"
        "    start.wait()\n"
        "    for k in range(len(names)): importlib.import_module(names[(i + k) % len(names)])\n"
        "threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]\n"
        "[t.start() for t in threads]; [t.join(1200) for t in threads]\n"
        "print(any(t.is_alive() for t in threads))"
    )
    result = command([sys.executable, "-c", code], timeout=1800)
    assert result.stdout.strip().splitlines()[-1] == "False", result.stderr


def test_a_run_of_our_stage_ends_where_a_patch_is_not_in_effect(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    path = write_yaml(tmp_path / "run.yaml", config)
    code = (
        "import torch, sys, yaml; from llamafactory.train import sft, tuner\n"
        "from llamafactory_sekd.host import ledger\n"
        "{damage}\n"
        f"tuner.run_exp(yaml.safe_load(open({str(path)!r})))"
    )
    for damage in (
        "sft.run_sft = ledger.original('llamafactory.train.sft.run_sft')",
        "tuner.run_sft = ledger.original('llamafactory.train.sft.run_sft')",
        "import importlib; autoload = sys.meta_path.pop(0); importlib.reload(sft)",
    ):
        result = forked_python(code.format(damage=damage))
        assert result.returncode != 0
        assert "llamafactory_sekd: error: llamafactory.train." in result.stderr, result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_hosts_own_trainer_refuses_a_run_of_our_stage(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    path = write_yaml(tmp_path / "run.yaml", config)
    code = (
        "import torch, yaml; from llamafactory.hparams import get_train_args as g\n"
        "from llamafactory.train.sft.workflow import run_sft\n"
        f"m, d, t, f, n = g(yaml.safe_load(open({str(path)!r}))); run_sft(m, d, t, f, n)"
    )
    result = forked_python(code)
    assert "`stage: sekd` has reached the host's own trainer" in result.stderr
    assert result.returncode != 0


def test_a_run_of_another_stage_that_starts_while_ours_goes_on_stays_what_it_is(tiny_root, tmp_path):
    for stage, keys in (("sekd", {}), ("sft", {"stage": "sft", "teacher_model": None})):
        write_yaml(
            tmp_path / f"{stage}.yaml", base_config(tiny_root, output_dir=str(tmp_path / stage), max_steps=1, **keys)
        )
    code = (
        "import yaml; from transformers import TrainerCallback; from llamafactory.train.tuner import run_exp\n"
        "def start(stage, *callbacks):\n"
        f"    run_exp(yaml.safe_load(open({str(tmp_path)!r} + f'/{{stage}}.yaml')), callbacks=[*callbacks])\n"
        "class Inner(TrainerCallback):\n"
        "    def on_train_begin(self, *args, **kwargs): start('sft')\n"
        "start('sekd', Inner())"
    )
    result = forked_python(code)
    assert result.returncode == 0, result.stderr
    assert len(logged(tmp_path / "sft", "loss")) == len(logged(tmp_path / "sekd", "kd/ce")) == 1
    assert not logged(tmp_path / "sft", "kd/ce")


@pytest.mark.parametrize(
    ("late", "env"),
    [
        ("import llamafactory.extras.constants; from llamafactory_sekd.cli import apply_plugin; apply_plugin()", "0"),
        ("import sys; sys.argv += ['--stage', 'sekd']; import llamafactory.hparams", "1"),
    ],
    ids=["explicit", "by the entry point"],
)
def test_too_late_is_an_error_in_one_line_that_says_so(late, env):
    result = python(late, {"TORCH_DEVICE_BACKEND_AUTOLOAD": env})
    assert result.returncode != 0
    assert "was loaded too late and is disabled: llamafactory." in result.stderr
    assert "python -m llamafactory_sekd" in result.stderr
    assert "Traceback" not in result.stderr or env == "0"


def test_too_late_leaves_other_stages_alone_with_a_warning():
    result = python(HAS_OUR_KEYS)
    assert result.stdout.strip().endswith("False")
    assert "was loaded too late" in result.stderr


def test_a_second_application_is_an_error():
    code = (
        "import torch, llamafactory.extras.constants as m; from llamafactory_sekd.host import ledger\n"
        "try: ledger.apply(m)\nexcept Exception as e: print(type(e).__name__, e)"
    )
    assert "HostError llamafactory.extras.constants.TRAINING_STAGES is patched already" in forked_python(code).stdout


def test_a_host_that_lacks_a_patched_name_is_refused_with_the_remedy():
    code = (
        "import torch, types; from llamafactory_sekd.host import ledger\n"
        "try: ledger.apply(types.ModuleType('llamafactory.hparams.parser'))\nexcept Exception as e: print(e)"
    )
    printed = forked_python(code).stdout
    assert "has no llamafactory.hparams.parser._parse_train_args" in printed
    assert "pip install" in printed
    assert "LLAMAFACTORY_SEKD=0" in printed


@pytest.fixture
def old_host(tmp_path) -> dict[str, str]:
    """An environment in which the installed host says that it is version 0.8.0."""
    metadata = tmp_path / "llamafactory-0.8.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llamafactory\nVersion: 0.8.0\n")
    return {"PYTHONPATH": str(tmp_path)}


def test_an_unsupported_host_keeps_working_and_our_stage_is_refused_with_the_remedy(old_host):
    other = python(
        "import torch;" + HAS_OUR_KEYS,
        old_host,
    )
    assert other.stdout.strip().endswith("False")
    assert "does not support LLaMA-Factory 0.8.0" in other.stderr

    ours = python(
        "import sys; sys.argv = ['x', 'train', '--stage', 'sekd']; import torch, llamafactory.hparams", old_host
    )
    assert ours.returncode != 0
    assert "llamafactory>=0.9.4,<0.10" in ours.stderr
    assert "Traceback" not in ours.stderr


def test_import_torch_costs_under_five_milliseconds_more():
    code = (
        "import time, torch, sys, json; from llamafactory_sekd import autoload\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, autoload.PostImportFinder)]\n"
        "del sys.modules['llamafactory_sekd.autoload'], sys.modules['llamafactory_sekd']\n"
        "from importlib.metadata import entry_points\n"
        "(entry,) = [e for e in entry_points(group='torch.backends') if e.name == 'llamafactory_sekd']\n"
        "start = time.perf_counter(); entry.load()(); print(time.perf_counter() - start)"
    )
    assert min(float(python(code).stdout) for _ in range(3)) < 0.005


def test_a_wheel_brings_the_stage_and_its_removal_takes_it_away(tmp_path):
    wheel_dir = tmp_path / "wheel"
    built = command(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(wheel_dir),
            str(REPOSITORY),
        ]
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheel_dir.glob("*.whl")

    # A fresh environment that sees everything installed here except us, without installing gigabytes again.
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    executable = str(tmp_path / "venv" / "bin" / "python")
    installed = Path(sysconfig.get_paths()["purelib"])
    target = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for entry in installed.iterdir():
        if "sekd" not in entry.name and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)

    env = {"PYTHONPATH": ""}
    stages = "from llamafactory.extras.constants import TRAINING_STAGES as S; import torch; print(sorted(S.values()))"
    assert "sekd" not in python("import torch;" + stages, env, executable).stdout

    subprocess.run([executable, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    assert "'sekd'" in python("import torch;" + stages, env, executable).stdout

    subprocess.run([executable, "-m", "pip", "uninstall", "-q", "-y", "llamafactory-sekd"], check=True)
    after = python("import torch;" + stages, env, executable)
    assert after.returncode == 0
    assert "sekd" not in after.stdout


def test_env_and_help_name_the_plugin_its_version_its_patches_and_eval():
    executable = str(Path(sys.executable).with_name("llamafactory-cli"))
    env = command([executable, "env"]).stdout
    assert "`llamafactory_sekd` version" in env
    assert all(patch.name in env for patch in PATCHES)
    assert "llamafactory-cli eval" in command([executable, "help"]).stdout


def test_v1_refuses_our_stage_and_nothing_else(tmp_path):
    code = (
        "import sys; sys.argv = ['x', 'train', {!r}]\n"
        "import types, torch; from llamafactory_sekd.host.launcher import refuse_v1\n"
        "refuse_v1(lambda: print('host ran'))()"
    )
    for stage, expected in (("sekd", "USE_V1=1"), ("sft", "host ran")):
        path = tmp_path / f"{stage}.yaml"
        path.write_text(json.dumps({"stage": stage}))
        result = python(code.format(str(path)), {"USE_V1": "1"})
        assert expected in result.stdout + result.stderr


def test_use_v1_reaches_our_refusal_through_the_real_command(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({"stage": "sekd"}))
    executable = str(Path(sys.executable).with_name("llamafactory-cli"))
    result = command([executable, "train", str(path)], env={"USE_V1": "1"})
    assert result.returncode != 0
    assert "USE_V1=1 selects trainers without a teacher" in result.stderr
    assert os.linesep.join(result.stderr.splitlines()[-1:]).startswith("llamafactory_sekd: error:")
