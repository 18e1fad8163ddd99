"""Instructions and chats in the formats that people have train with a chat template, and the model answers."""

from __future__ import annotations

import json

import pytest
from helpers.forks import forked
from helpers.runs import CLI, base_config, logged, write_yaml
from helpers.tiny import SENTENCES


PAIRS = SENTENCES[:8]
INFO = {
    "my_alpaca": {
        "file_name": "alpaca.json",
        "columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    },
    "my_sharegpt": {
        "file_name": "sharegpt.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
    },
    "my_openai": {
        "file_name": "messages.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
}


def records(question, answer):
    """One exchange in each format, with an earlier one, or a system prompt."""
    first, reply = PAIRS[0]
    turns = [first, reply, question, answer]
    return {
        "alpaca.json": {"instruction": question, "input": "", "output": answer, "history": [[first, reply]]},
        "sharegpt.json": {
            "conversations": [
                {"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, turns, strict=True)
            ]
        },
        "messages.json": {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *({"role": who, "content": text} for who, text in zip(("user", "assistant") * 2, turns, strict=True)),
            ]
        },
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    (folder / "dataset_info.json").write_text(json.dumps(INFO))
    for name in ("alpaca.json", "sharegpt.json", "messages.json"):
        (folder / name).write_text(json.dumps([records(*pair)[name] for pair in PAIRS]))
    return folder


def test_the_recipe_names_these_entries_of_dataset_info():
    from pathlib import Path

    recipe = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    blocks = [json.loads(block.partition("```")[0]) for block in recipe.split("```json\n")[1:] if block[0] == "{"]
    assert INFO in blocks


@pytest.mark.slow
def test_chats_of_three_formats_are_distilled_validated_and_answered(data, tiny_root, tmp_path):
    out = tmp_path / "out"
    config = base_config(
        tiny_root,
        dataset="my_alpaca,my_sharegpt,my_openai",
        dataset_dir=str(data),
        template="qwen",
        val_size=0.2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="kd/ce",
        greater_is_better=False,
        output_dir=str(out),
    )
    done = forked([CLI, "train", str(write_yaml(tmp_path / "train.yaml", config))])
    assert done.returncode == 0, done.stderr
    losses = logged(out, "eval_kd/ce")
    assert len(losses) == 2
    assert losses[1] < losses[0]

    card = (out / "README.md").read_text(encoding="utf-8")
    assert "- knowledge-distillation" in card
    assert str(tiny_root / "teacher") in card
    assert "self_evolution" in card
    assert "my_alpaca, my_sharegpt, my_openai" in card

    keys = {"teacher_model": None, "do_train": None, "max_steps": None, "save_strategy": None}
    predict = {
        **base_config(tiny_root, dataset=None, dataset_dir=str(data), template="qwen", **keys),
        **{"stage": "sft", "model_name_or_path": str(out), "do_predict": True, "predict_with_generate": True},
        **{"eval_dataset": "my_openai"},
        **{"max_new_tokens": 8, "output_dir": str(tmp_path / "predicted")},
    }
    done = forked([CLI, "train", str(write_yaml(tmp_path / "predict.yaml", predict))])
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "predicted" / "generated_predictions.jsonl").read_text().splitlines()
    assert len(lines) == len(PAIRS)
    assert {json.loads(line)["label"].strip() for line in lines} >= {answer for _, answer in PAIRS[1:]}
