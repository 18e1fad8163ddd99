"""What the page makes of every other stage is, byte for byte, what it makes without the plug-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


# The complete page is built as `llamafactory-cli webui` builds it; the values are those of its fields.
SCRIPT = """
import json, sys, torch
from llamafactory.extras.constants import TRAINING_STAGES
from llamafactory.webui import interface
from llamafactory.webui.common import gen_cmd
from llamafactory.webui.control import change_stage

engines = []
class Engine(interface.Engine):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        engines.append(self)

interface.Engine = Engine
page = interface.create_ui()
manager, runner = engines[0].manager, engines[0].runner

def data(**chosen):
    values = {elem: getattr(elem, "value", None) for name, elem in manager._id_to_elem.items()}
    given = {"top.lang": "en", "top.model_name": "Custom", "top.model_path": "m", "train.dataset": ["d"],
             "train.output_dir": "o", "eval.dataset": ["d"], "eval.output_dir": "e", **chosen}
    return {**values, **{manager.get_elem_by_id(name): value for name, value in given.items()}}

def of(event, values):  # what this event's button hands over
    inputs = next(fn.inputs for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == event)
    return {elem: values[elem] for elem in inputs}

pages = {}
for label, stage in TRAINING_STAGES.items():
    if stage == "sekd":
        continue
    for method in ("lora", "full", "freeze"):
        reward_model = ["r"] if method == "lora" else "r"
        chosen = {"train.training_stage": label, "top.finetuning_type": method, "train.reward_model": reward_model}
        values = of("preview_train", data(**chosen))
        pages[f"{stage} {method}"] = {
            "refusal": runner._initialize(values, True, True),
            "command": gen_cmd(runner._parse_train_args(values)),
            "saved": {key: str(value) for key, value in sorted(runner._build_config_dict(values).items())},
            "after choosing": str(change_stage(label)),
        }
values = of("preview_eval", data())
pages["eval"] = {
    "refusal": runner._initialize(values, False, True),
    "command": gen_cmd(runner._parse_eval_args(values)),
    "saved": {key: str(value) for key, value in sorted(runner._build_config_dict(values).items())},
}
json.dump(pages, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_commands_and_configurations_of_other_stages_are_those_without_the_plugin(tmp_path: Path) -> None:
    started = {}
    for switch in ("0", "1"):
        env = {**os.environ, "LLAMAFACTORY_SEKD": switch, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / f"{switch}.json")]
        folder = tmp_path / switch
        folder.mkdir()
        started[switch] = subprocess.Popen(command, env=env, cwd=folder, stderr=subprocess.PIPE, text=True)

    for process in started.values():
        assert process.wait(timeout=1800) == 0, process.stderr and process.stderr.read()

    without, with_plugin = ((tmp_path / f"{switch}.json").read_text(encoding="utf-8") for switch in ("0", "1"))
    assert json.loads(with_plugin) == json.loads(without)
    assert with_plugin == without
    assert len(json.loads(without)) == 19
