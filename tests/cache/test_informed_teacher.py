"""A teacher with prompts of its own: its rows are those of its prompt, kept under the student's example."""

from __future__ import annotations

import json
import random

import pytest
import torch
from helpers import tiny
from helpers.cached_runs import content, losses
from helpers.forks import forked
from helpers.runs import base_config, logged, train, write_yaml

from llamafactory_sekd.errors import ArgumentError, TeacherError


INSTRUCTION = "Translate the following sentences from English to German.\n\n### Input:"
REGISTERS = ("Bitte.", "Danke.")  # ends of a translation that only the teacher's prompt tells


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A student, data whose responses cannot be told from the student's prompts, and a teacher trained on its own."""
    root = tmp_path_factory.mktemp("informed")
    tiny.save_llama(root / "untrained", seed=1, width=48, initializer_range=0.05)
    tiny.save_llama(root / "student", seed=2)
    chance = random.Random(0)
    plain, informed = [], []
    for source, target in tiny.SENTENCES[:40]:
        register = chance.choice(REGISTERS)
        output = f"{register} {target}"
        plain.append({"instruction": INSTRUCTION, "input": source, "output": output})
        informed.append({"instruction": f"{register}\n{INSTRUCTION}", "input": source, "output": output})

    sets = {"plain": plain, "informed": informed, "held_out": plain[32:], "held_out_informed": informed[32:]}
    sets["changed"] = [*informed[:16], {**informed[16], "output": "Ein anderer Satz."}, *informed[17:]]
    (root / "data").mkdir()
    for name, records in sets.items():
        (root / "data" / f"{name}.json").write_text(json.dumps(records))
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    train(
        config_of(root, root, dataset="plain,informed", model_name_or_path=str(root / "untrained"), teacher_model=None)
        | {"stage": "sft", "max_steps": 150, "learning_rate": 3e-3, "output_dir": str(root / "teacher")}
        | {"per_device_train_batch_size": 16, "logging_steps": 50}
    )
    return root


def config_of(root, tmp_path, **overrides):
    return base_config(root, output_dir=str(tmp_path / "out"), **{"dataset": "plain", **overrides})


def build(config, directory, **prompts):
    from llamafactory_sekd.host.cache import TeacherPrompts, build_cache
    from llamafactory_sekd.teacher.cache.cache_manifest import Settings

    build_cache(config, directory, Settings(), prompts=TeacherPrompts(**prompts), say=lambda _: None)
    return directory


def read(config, directory, **overrides):
    config = {key: value for key, value in config.items() if key != "teacher_model"}
    return {**config, "teacher_cache": str(directory), **overrides}


def test_a_useful_prompt_lowers_the_teachers_cross_entropy_and_the_student_learns_from_it(root, tmp_path):
    config = config_of(root, tmp_path, dataset="held_out", learning_rate=1e-30, max_steps=1, logging_steps=1)
    config["per_device_train_batch_size"] = 8
    entropy = {}
    for name, prompts in (("plain", {}), ("informed", {"dataset": "held_out_informed"})):
        directory = build(config, tmp_path / name, **prompts)
        (entropy[name],) = logged(train(read(config, directory)), "kd/teacher_ce")
    assert entropy["informed"] < 0.8 * entropy["plain"], entropy

    many = {**config, "learning_rate": 3e-3, "max_steps": 20, "kd_loss": "no_evolution"}
    lost = losses(read(many, tmp_path / "informed"))
    assert lost[-1] < lost[0]


@pytest.mark.parametrize(
    "prompts",
    [{"dataset": "informed"}, {"system": "Answer with care."}, {"template": "alpaca", "dataset": "informed"}],
    ids=["dataset", "system", "template"],
)
def test_rows_are_those_of_the_teachers_prompt_with_the_students_response_cut_or_not(root, tmp_path, prompts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cutoff = 28 if prompts.get("dataset") else 400  # 28 cuts responses as well
    config = config_of(root, tmp_path, cutoff_len=cutoff, kd_max_cut=1.0, max_samples=6)
    directory = build(config, tmp_path / "cache", **prompts)
    tokenizer = AutoTokenizer.from_pretrained(root / "student")
    model = AutoModelForCausalLM.from_pretrained(root / "teacher").model
    records = json.loads((root / "data" / f"{prompts.get('dataset', 'plain')}.json").read_text())[:6]
    found = sorted(content(directory).values(), key=lambda record: record["hidden"].sum().item())
    first = {}  # of examples that are equal for the student, the first one's prompt counts
    for record, (ids, tokens) in zip(records, students(config), strict=True):
        if ids in first:
            continue
        before = tokenizer.encode(prompt_of(record, **prompts), add_special_tokens=False)
        start = [tokenizer.bos_token_id] if prompts.get("template", "parrot") == "parrot" else []
        with torch.no_grad():
            hidden = model(torch.tensor([start + before + tokens])).last_hidden_state[0]
        first[ids] = hidden[-len(tokens) - 1 : -1]
    expected = sorted(first.values(), key=lambda values: values.sum().item())
    assert all(map(len, expected))
    for record, values in zip(found, expected, strict=True):
        torch.testing.assert_close(record["hidden"], values, atol=1e-4, rtol=1e-4)


def students(config):
    """Token ids and response of the student's examples, as the host cuts them."""
    from llamafactory_sekd.host.cache import tokenized

    examples = tokenized(config, str).datasets[0]
    return [(tuple(item["input_ids"]), [t for t in item["labels"] if t != -100]) for item in examples]


def prompt_of(record, template="parrot", system=None, dataset=None):
    query = f"{record['instruction']}\n{record['input']}"
    if template == "alpaca":
        preface = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        )
        return f"{preface}\n\n### Instruction:\n{query}\n\n### Response:\n"

    from llamafactory_sekd.data.prompts import CLOSING, PREFACE

    return f"{system or ''}{PREFACE}{query}{CLOSING}"


def test_a_response_that_differs_is_refused_with_its_number_and_both_texts(root, tmp_path):
    with pytest.raises(TeacherError, match=r"example 17 has different responses .*'Ein anderer Satz\.") as caught:
        build(config_of(root, tmp_path), tmp_path / "cache", dataset="changed")
    assert "\n" not in str(caught.value)
    with pytest.raises(TeacherError, match=r"have 8 examples and the student's 40: each of the student's needs one"):
        build(config_of(root, tmp_path), tmp_path / "cache", dataset="held_out_informed")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_other_prompts_are_never_mixed_into_a_cache(root, tmp_path):
    config = config_of(root, tmp_path)
    directory = build(config, tmp_path / "cache", dataset="informed")
    before = content(directory).keys()
    assert content(build(config, directory, dataset="informed")).keys() == before
    for prompts in ({}, {"system": "Another one."}):
        with pytest.raises(TeacherError, match=r"was built with prompts `\w+` and this run has prompts"):
            build(config, directory, **prompts)
    with pytest.raises(TeacherError, match=r"was built with prompts `\w+` and this run has prompts none"):
        train({**config, "teacher_cache": str(directory)})


@pytest.mark.parametrize(
    ("keys", "prompts", "words"),
    [
        ({"packing": True}, {"dataset": "informed"}, "`packing: True` cannot be used .* an unpacked cache serves"),
        ({"train_on_prompt": True}, {"system": "x"}, "`train_on_prompt: True` cannot be used"),
        (
            {},
            {"dataset": "informed,plain"},
            "informed,plain` names 2 data sets: name 1 for `dataset",
        ),
    ],
)
def test_what_has_no_responses_to_compare_is_refused(root, tmp_path, keys, prompts, words):
    with pytest.raises(ArgumentError, match=words):
        build(config_of(root, tmp_path, **keys), tmp_path / "cache", **prompts)


def test_a_prompt_that_is_too_long_for_the_teacher_is_refused(root, tmp_path):
    with pytest.raises(TeacherError, match=r"example 1 has [\d,]+ tokens .* and the teacher reads 2,048: shorten"):
        build(config_of(root, tmp_path), tmp_path / "cache", system="long " * 2100)


def test_the_command_takes_data_sets_for_training_and_for_evaluation(root, tmp_path):
    config = config_of(root, tmp_path, dataset="held_out", eval_dataset="plain")
    path = write_yaml(tmp_path / "run.yaml", config)
    cache = tmp_path / "cache"
    sekd = ["sekd", "cache", str(path), "--out", str(cache), "--teacher-dataset"]
    result = forked([*sekd, "held_out_informed,informed"])
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(content(cache)) == 40
