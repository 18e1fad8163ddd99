"""``sekd doctor``: the host's classes and functions decide what is planned, and no weight is read for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny
from helpers.forks import forked
from helpers.runs import base_config, command, write_yaml
from transformers import AutoTokenizer

from llamafactory_sekd.config import read_config
from llamafactory_sekd.errors import ArgumentError, TeacherError
from llamafactory_sekd.host.memory_plan import missing_tokenizer, parse, run_of, vocabulary_line
from llamafactory_sekd.planner.estimate import estimate
from llamafactory_sekd.planner.planned_run import TeacherPlace
from llamafactory_sekd.planner.rehearsal import rehearse


SEKD = ["sekd", "doctor"]
ROOT = Path(__file__).parents[2]
TRAINING = sorted(
    path for path in (ROOT / "examples" / "yamls").glob("*.yaml") if "stage" in yaml.safe_load(path.read_text())
)


@pytest.fixture(scope="module")
def weightless(tiny_root, tmp_path_factory):
    """The tiny models without their weights."""
    root = tmp_path_factory.mktemp("weightless")
    shutil.copytree(tiny_root, root, dirs_exist_ok=True)
    for path in root.glob("*/model.safetensors"):
        path.unlink()
    return root


def plan(config, devices=1, accelerator=False):
    return run_of(parse(config), devices, accelerator=accelerator)


@pytest.mark.parametrize(
    "keys",
    [
        {"finetuning_type": "full"},
        {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4},
        {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "additional_target": "lm_head"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_extra_modules": "norm"},
        {"finetuning_type": "full", "resize_vocab": True, "add_tokens": ",".join(f"<x{i}>" for i in range(80))},
    ],
    ids=["full", "lora", "lora with head", "freeze", "resized vocabulary"],
)
def test_what_is_trained_is_what_the_host_trains(tiny_root, weightless, keys):
    from llamafactory.extras.misc import count_parameters
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    model_args, _, _, finetuning_args, _ = get_train_args(base_config(tiny_root, output_dir="unused", **keys))
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    model = load_model(tokenizer, model_args, finetuning_args, is_trainable=True)
    student = rehearse(plan(base_config(weightless, **keys))).student
    assert (student.trainable, student.parameters) == count_parameters(model)
    assert student.bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_types_are_the_hosts(weightless, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(weightless / "student", half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    keys = {"model_name_or_path": str(half), "bf16": True}
    full = plan(base_config(weightless, **keys))
    assert full.autocast == torch.bfloat16
    student = rehearse(full).student
    assert student.bytes == 4 * student.parameters  # trained parameters are float32 under mixed precision
    pure = plan(base_config(weightless, **keys, pure_bf16=True))
    assert pure.autocast is None
    assert rehearse(pure).student.bytes == 2 * student.parameters
    lora = rehearse(plan(base_config(weightless, **keys, finetuning_type="lora"))).student
    assert lora.bytes == 4 * lora.trainable + 2 * (lora.parameters - lora.trainable)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_every_example_can_be_planned_on_a_machine_without_its_devices(path, weightless, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load(path.read_text())
    config["model_name_or_path"] = str(weightless / "student")
    if "teacher_model" in config:
        config["teacher_model"] = str(weightless / "teacher")
    run = plan(config, devices=8, accelerator=True)
    assert (run.sharding is not None) == ("deepspeed" in config)
    assert run.length == config["cutoff_len"]
    assert (run.teacher is not None) == ("teacher_model" in config)
    result = estimate(run)
    assert not result.notes
    assert result.device > 2**30


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kd_gama": 0.4}, "kd_gama"),
        ({"stage": "dpo", "teacher_model": None}, "`stage: dpo` cannot be planned"),
        ({"fsdp": "full_shard"}, "knows DDP and DeepSpeed"),
        ({"deepspeed": "no/such.json"}, "`deepspeed: no/such.json` cannot be read"),
        ({"model_name_or_path": "/no/such/model"}, r"model_name_or_path=PATH"),
        ({"teacher_model": "/no/such/model"}, r"teacher_model=PATH"),
        ({"kd_lambda": 2.0}, "use a number from 0 to 1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"quantization_bit": 4}, "only compatible with the LoRA"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(weightless, keys, message):
    with pytest.raises(ArgumentError, match=message) as error:
        plan(base_config(weightless, **keys))
    assert "\n" not in str(error.value)


def test_a_file_or_an_override_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"none\.yaml cannot be read"):
        read_config(tmp_path / "none.yaml", [])
    (tmp_path / "x.yaml").write_text("a: 1\nb: [")
    with pytest.raises(ArgumentError, match=r"x\.yaml cannot be parsed"):
        read_config(tmp_path / "x.yaml", [])
    (tmp_path / "x.yaml").write_text("a: 1")
    assert read_config(tmp_path / "x.yaml", ["a=2", "b=c"]) == {"a": 2, "b": "c"}
    with pytest.raises(ArgumentError, match="'--a' is not an override"):
        read_config(tmp_path / "x.yaml", ["--a"])


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({}, TeacherPlace()),
        ({"teacher_model_device": "cpu"}, TeacherPlace("main memory")),
        ({"teacher_model_device": "cuda:7"}, TeacherPlace("another device")),
        ({"teacher_offload": True}, TeacherPlace("main memory", streamed=True)),
        ({"teacher_model": "self", "finetuning_type": "lora"}, TeacherPlace("student")),
    ],
    ids=str,
)
def test_a_teacher_is_planned_where_it_will_stand(weightless, keys, place):
    assert plan(base_config(weightless, **keys), accelerator=True).place == place
    # Without accelerators there is only main memory.
    if place.kind != "student":
        assert plan(base_config(weightless, **keys)).place == TeacherPlace()


def test_a_base_that_student_and_teacher_share_is_counted_once(weightless, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1000))
    keys = {"finetuning_type": "lora", "teacher_model_adapters": str(tmp_path / "adapter")}
    shared = estimate(plan(base_config(weightless, teacher_model="self", **keys)))
    apart = estimate(plan(base_config(weightless, teacher_model=str(weightless / "student"), **keys)))
    base = next(row.step for row in apart.rows if row.name == "teacher")
    assert next(row.step for row in shared.rows if row.name == "teacher") == 1000
    assert apart.step - shared.step == base - 1000


def test_batches_are_padded_to_multiples_of_eight_and_the_length_can_be_given(weightless):
    parsed = parse(base_config(weightless, cutoff_len=401))
    assert run_of(parsed, 1, accelerator=False).length == 408
    assert run_of(parsed, 1, accelerator=False, length=100).length == 104


def test_the_command_prints_table_and_fit_without_weights(weightless, tmp_path):
    path = write_yaml(tmp_path / "x.yaml", base_config(weightless, cutoff_len=3000))
    done = command([*SEKD, str(path), "per_device_train_batch_size=2", "--length", "64"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 device, 2 × 64 tokens" in done.stdout
    assert "fits" in done.stdout
    assert "Teacher: its tokenizer is the student's" in done.stdout
    # The models have 2,048 positions; the command says so once, and not in the log as well.
    assert [text.count("`cutoff_len: 3000` goes beyond") for text in (done.stdout, done.stderr)] == [1, 0]
    assert done.stdout.splitlines()[-1].startswith("Verdict: this run fits, ")


def test_the_command_shows_remedies_where_the_device_is_too_small(weightless, tmp_path):
    path = write_yaml(tmp_path / "x.yaml", base_config(weightless, disable_gradient_checkpointing=True))
    done = forked([*SEKD, str(path), "--memory", "1GB", "--devices", "2", "per_device_train_batch_size=128"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("Verdict: this run does not fit, ")
    assert "remove disable_gradient_checkpointing" in done.stdout
    assert "DDP" in done.stdout


def test_an_error_is_one_line_and_status_2(weightless, tmp_path):
    path = write_yaml(tmp_path / "x.yaml", base_config(weightless, kd_loss="magic"))
    done = forked([*SEKD, str(path)])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sekd doctor: error: `kd_loss: magic`")


def test_a_teacher_of_another_tokenizer_is_refused_and_a_missing_one_only_noted(weightless, tmp_path):
    from llamafactory_sekd.host.teacher_loading import check_fit

    other = tmp_path / "other"
    shutil.copytree(weightless / "teacher", other)
    tiny.save_tokenizer(other, vocab_size=300)
    parsed = parse(base_config(weightless, teacher_model=str(other)))
    assert missing_tokenizer(parsed) == ""
    with pytest.raises(TeacherError):
        check_fit(parsed)
    for path in other.glob("*token*"):
        path.unlink()
    assert f"the teacher's tokenizer cannot be read from {other}" in missing_tokenizer(parsed)


def test_heads_of_different_sizes_are_explained(weightless, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(weightless / "teacher", wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "vocab_size": 448}))
    used = len(AutoTokenizer.from_pretrained(wide))
    line = vocabulary_line(parse(base_config(weightless, teacher_model=str(wide))))
    assert f"reads the first {used:,} of both" in line
    assert vocabulary_line(parse(base_config(weightless))) == ""
