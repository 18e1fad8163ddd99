"""`teacher_model: self`: one base with two sets of adapters is the run with the same teacher loaded apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.cached_runs import build, from_cache, losses
from helpers.runs import base_config, logged, train, weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher import SharedTeacher, add_teacher_adapters
from llamafactory_sekd.teacher.cache.cache_manifest import Settings


STUDENT = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj,down_proj", "lora_dropout": 0.3}
LEARNING = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3}
ADAPTERS = {
    "same": {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.5},
    "other": {"target_modules": ["o_proj", "up_proj"], "r": 2},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "complete_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory) -> Path:
    """The shared models, and adapters for the student's base."""
    directory = tmp_path_factory.mktemp("shared")
    for name in ("teacher", "student", "data"):
        (directory / name).symlink_to(tiny_root / name)
    for number, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(directory / "student")
        model = get_peft_model(model, LoraConfig(**{"r": 4, "init_lora_weights": False, **config}))
        if name == "complete_head":
            model.get_output_embeddings().weight.data.add_(0.1 * torch.randn(384, 32))
        model.save_pretrained(directory / name)
    return directory


def config_of(root: Path, out: Path, teacher: str, adapters: str, **overrides) -> dict:
    folders = ",".join(str(root / name) for name in adapters.split("+")) if adapters else None
    keys = {"output_dir": str(out), "teacher_model": teacher, "teacher_model_adapters": folders}
    return base_config(root, **{**keys, **STUDENT, **LEARNING, **overrides})


def assert_same(first: Path, second: Path, tolerance: float = 1e-6) -> None:
    for key in ("kd/ce", "kd/difficulty", "kd/teacher_ce", "kd/hard_ratio"):
        assert logged(first, key) == pytest.approx(logged(second, key), abs=2e-6), key
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("adapters", ["", *ADAPTERS, "same+other"])
def test_it_is_the_run_with_that_teacher_loaded_apart(root, tmp_path, adapters):
    apart = train(config_of(root, tmp_path / "apart", str(root / "student"), adapters))
    shared = train(config_of(root, tmp_path / "shared", "self", adapters))
    assert_same(shared, apart, tolerance=1e-6 if adapters else 0)
    assert logged(shared, "kd/teacher_ce")[0] != pytest.approx(logged(shared, "kd/ce")[0], abs=1e-4) or not adapters


@pytest.mark.parametrize(
    "overrides",
    [
        {"disable_gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"additional_target": "lm_head"},
        {"use_dora": True, "kd_loss": "reverse_kl", "neftune_noise_alpha": 5},
        {"bf16": True, "use_cpu": True},
    ],
    ids=["accumulation", "student trains its head", "dora and noise", "bf16"],
)
def test_whatever_the_student_is_the_teacher_is_the_same(root, tmp_path, overrides):
    apart = train(config_of(root, tmp_path / "apart", str(root / "student"), "", **overrides))
    shared = train(config_of(root, tmp_path / "shared", "self", "", **overrides))
    assert_same(shared, apart)


def test_checkpoints_hold_the_students_adapter_alone_and_a_resumed_run_ends_like_an_uninterrupted_one(root, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    complete = train(config_of(root, tmp_path / "complete", "self", "same", **saving))
    checkpoint = complete / "checkpoint-2"
    assert not [path for folder in (complete, checkpoint) for path in folder.rglob("*teacher*")]
    assert json.loads((checkpoint / "adapter_config.json").read_text())["lora_dropout"] == 0.3
    trained = torch.load(checkpoint / "optimizer.pt")["state"]
    assert len(trained) == len(weights(checkpoint))

    resuming = {**saving, "resume_from_checkpoint": str(checkpoint)}
    resumed = train(config_of(root, tmp_path / "resumed", "self", "same", **resuming))
    for name, value in weights(complete).items():
        torch.testing.assert_close(weights(resumed)[name], value, atol=1e-7, rtol=1e-7)

    with pytest.raises(TeacherError, match=r"is not the teacher that .*checkpoint-2 was trained with"):
        train(config_of(root, tmp_path / "changed", "self", "other", **resuming))


def test_a_cache_of_it_is_the_run_with_it(root, tmp_path):
    from llamafactory_sekd.host.cache import build_cache

    config = config_of(root, tmp_path / "shared", "self", "same")
    build_cache(config, tmp_path / "cache", Settings(), say=lambda _: None)
    shared = train(config)
    cached = {"teacher_model": None, "teacher_model_adapters": None, "teacher_cache": str(tmp_path / "cache")}
    read = {key: value for key, value in {**config, **cached}.items() if value is not None}
    assert_same(train({**read, "output_dir": str(tmp_path / "read")}), shared)
    filled = {**config, "teacher_cache": str(tmp_path / "filled"), "output_dir": str(tmp_path / "filling")}
    assert_same(train(filled), shared)


@pytest.fixture
def student(root):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(root / "student")
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))


@pytest.mark.parametrize("adapters", [[], ["same"], ["other"], ["complete_head"]])
def test_after_it_has_spoken_the_student_is_as_before(root, student, adapters):
    before = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    teacher = SharedTeacher(student, add_teacher_adapters(student, [str(root / name) for name in adapters]))
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, wanted in before.items() if wanted}

    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    rows = torch.ones(2, 6, dtype=torch.bool)
    student.train().get_base_model().model.norm.eval()  # one part that is not in the mode of the rest
    modes = {name: module.training for name, module in student.named_modules()}
    state = torch.get_rng_state()
    first, second = teacher.logits(inputs, rows), teacher.logits(inputs, rows)
    assert torch.equal(first, second)  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == trained

    student(**inputs).logits.sum().backward()
    assert {name for name, parameter in student.named_parameters() if parameter.grad is not None} == trained
    assert all("teacher" not in name for name in trained)


def test_the_base_is_in_memory_once(root, student):
    alone = sum(parameter.numel() for parameter in student.parameters())
    teacher = SharedTeacher(student, add_teacher_adapters(student, [str(root / "same")]))
    adapter = sum(value.numel() for value in weights(root / "same").values())
    storages = {parameter.data_ptr(): parameter.numel() for parameter in teacher.model.parameters()}
    assert sum(storages.values()) == alone + adapter


@pytest.mark.parametrize(
    ("teacher", "adapters", "message"),
    [
        ("self", "nowhere", r"teacher_model_adapters: .*nowhere` does not exist"),
        ("self", "student", r"teacher_model_adapters: .*student` holds no adapter_config\.json"),
        ("self", "wide", r"teacher_model_adapters: .*wide` cannot be loaded onto the student's base"),
        ("self", "same+dora", "cannot be added up"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named_in_one_line(root, tmp_path, teacher, adapters, message):
    if adapters == "wide":
        model = AutoModelForCausalLM.from_pretrained(root / "teacher")
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "wide")
        adapters = str(tmp_path / "wide")
    with pytest.raises(TeacherError, match=message) as caught:
        train(config_of(root, tmp_path / "out", teacher, adapters))
    assert "\n" not in str(caught.value)


def test_evaluation_alone_which_merges_the_students_adapter_is_refused(root, tmp_path):
    evaluation = {"do_train": False, "do_eval": True, "eval_dataset": "tiny_valid"}
    trained = {"adapter_name_or_path": str(root / "same")}
    with pytest.raises(TeacherError, match="evaluation without training merges them: name the base"):
        train(config_of(root, tmp_path / "out", "self", "other", **evaluation, **trained))


SCALED = {"rope_scaling": "linear", "cutoff_len": 4096}  # beyond the models' positions, or the host scales nothing


def test_a_cache_of_the_base_has_the_answers_of_the_base_where_the_student_scales_its_positions(root, tmp_path):
    config = config_of(root, tmp_path / "out", "self", "", **SCALED)
    cached = from_cache(config, build(config, tmp_path / "cache"))
    assert losses(cached) == pytest.approx(losses(config), abs=1e-6)


def test_another_teachers_cache_serves_a_student_that_scales_its_positions(root, tmp_path):
    config = config_of(root, tmp_path / "out", str(root / "teacher"), "")
    cache = build({**config, "cutoff_len": 4096}, tmp_path / "cache")
    train({**config, **SCALED, "teacher_cache": str(cache), "max_steps": 1})  # of another teacher it is refused
    assert losses(from_cache({**config, **SCALED}, cache)) == pytest.approx(losses({**config, **SCALED}), abs=1e-6)
