"""What LLaMA-Factory itself makes of our records: its own data pipeline, its own template registry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch  # noqa: F401 - first: it registers the plug-in's hooks
from helpers.alma_files import TRICKY, write_alma
from jinja2 import Environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llamafactory_sekd.data.alma import DirectorySource, make_plan, prepare_alma
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import PARROT
from llamafactory_sekd.errors import DataError, HostError


REPOSITORY = Path(__file__).parents[2]
IGNORE = -100
# Written out from the design, not put together from the code's own pieces.
BEFORE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nTranslate the following sentences from "
    "German to English.\n\n### Input:\n"
)
AFTER = "\n\n### Response:"


def _tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([BEFORE + AFTER, *(side for pair in TRICKY for side in pair)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>" if bos else None, eos_token="<|end|>"
    )


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``data`` directory as a user has it: the shipped declarations and what ``sekd data alma`` wrote."""
    directory = tmp_path_factory.mktemp("project") / "data"
    directory.mkdir()
    shutil.copy(REPOSITORY / "data" / "dataset_info.json", directory)
    source = DirectorySource(write_alma(tmp_path_factory.mktemp("source")))
    prepare_alma(source, make_plan(["de-en"]), directory / "alma")
    return directory


def _host_dataset(
    dataset_dir: Path | str, tmp_path: Path, tokenizer: Any, dataset: str, **keys: Any
) -> dict[str, Any]:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args

    model_args, data_args, training_args, _, _ = get_train_args(
        {
            "model_name_or_path": "built-in-process",
            "stage": "sft",
            "do_train": True,
            "dataset": dataset,
            "dataset_dir": str(dataset_dir),
            "template": "parrot",
            "cutoff_len": 512,
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "out"),
            "overwrite_cache": True,
            "use_cpu": True,
            "report_to": "none",
            **keys,
        }
    )
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    return get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("bos", [True, False])
def test_ids_of_the_hosts_pipeline_are_the_prompt_the_translation_and_eos(
    dataset_dir: Path, tmp_path: Path, bos: bool
) -> None:
    tokenizer = _tokenizer(bos)
    rows = _host_dataset(dataset_dir, tmp_path, tokenizer, "alma_de_en")["train_dataset"]

    assert len(rows) == len(TRICKY)
    for row, (source, target) in zip(rows, TRICKY, strict=True):
        prompt, response = BEFORE + source + AFTER, target
        start = "<|begin|>" if bos else ""
        assert tokenizer.decode(row["input_ids"]) == f"{start}{prompt}{response}<|end|>"
        prompt_ids = [tokenizer.bos_token_id] * bos + _encode(tokenizer, prompt)
        response_ids = [*_encode(tokenizer, response), tokenizer.eos_token_id]
        assert row["input_ids"] == prompt_ids + response_ids
        assert row["labels"] == [IGNORE] * len(prompt_ids) + response_ids


def test_generation_prompt_of_the_host_is_the_training_prompt(dataset_dir: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer()
    module = _host_dataset(
        dataset_dir, tmp_path, tokenizer, "alma_de_en", eval_dataset="wmt22_de_en", do_train=False, do_predict=True,
        predict_with_generate=True,
    )  # fmt: skip
    row = module["eval_dataset"][0]

    source, target = TRICKY[0]
    assert tokenizer.decode(row["input_ids"]) == f"<|begin|>{BEFORE}{source}{AFTER}"
    assert tokenizer.decode(row["labels"]) == f"{target}<|end|>"


def test_chat_message_becomes_the_training_prompt() -> None:
    from llamafactory.data import TEMPLATES

    tokenizer = _tokenizer()
    source = TRICKY[1][0]
    messages = [
        {"role": "user", "content": PARROT.user_message(source, Direction("de", "en"))},
        {"role": "assistant", "content": ""},
    ]
    prompt_ids, _ = TEMPLATES["parrot"].encode_oneturn(tokenizer, messages)

    assert tokenizer.decode(prompt_ids) == f"<|begin|>{BEFORE}{source}{AFTER}"
    assert TEMPLATES["parrot"].get_stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_exported_chat_template_prompts_as_trained_whatever_the_base_had() -> None:
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    tokenizer = _tokenizer()
    tokenizer.chat_template = "the base model's own"
    get_template_and_fix_tokenizer(tokenizer, DataArguments(template="parrot"))
    source = TRICKY[0][0]
    messages = [{"role": "user", "content": PARROT.user_message(source, Direction("de", "en"))}]

    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == f"<|begin|>{BEFORE}{source}{AFTER}"
    assert Environment().from_string(tokenizer.chat_template).render(messages=messages) == rendered


def test_web_ui_offers_the_template() -> None:
    from llamafactory.data import TEMPLATES, template

    assert list(TEMPLATES)[-1] == "parrot"  # the dropdown lists the registry's keys
    assert template.TEMPLATES is TEMPLATES
    assert "alpaca" in TEMPLATES


def test_template_name_taken_by_the_host_is_an_error() -> None:
    from llamafactory.data import template

    from llamafactory_sekd.host.templates import register_parrot

    with pytest.raises(HostError, match="LLaMA-Factory has a template named 'parrot' already"):
        register_parrot(template)


def test_registry_of_the_host_stays_as_it_was() -> None:
    from llamafactory_sekd.host.templates import with_parrot

    template = pytest.importorskip("llamafactory.data.template")
    with pytest.MonkeyPatch.context() as patch:
        original = {name: value for name, value in template.TEMPLATES.items() if name != "parrot"}
        patch.setattr(template, "TEMPLATES", original)
        extended = with_parrot(original)

    assert "parrot" not in original
    assert list(extended) == [*original, "parrot"]


@pytest.mark.parametrize(
    ("dataset", "command"),
    [
        ("alma_en_de_cs", "sekd data alma --out {out}"),
        ("wmt22_is_en", "sekd data alma --pairs de-en,cs-en,is-en --out {out}"),
    ],
)
def test_missing_file_of_ours_names_the_command(dataset_dir: Path, tmp_path: Path, dataset: str, command: str) -> None:
    out = dataset_dir / "alma"
    with pytest.raises(DataError) as caught:
        _host_dataset(dataset_dir, tmp_path, _tokenizer(), dataset)
    assert str(caught.value) == (
        f"The file {out}/{dataset}.json of data set {dataset!r} does not exist yet: "
        f"run `{command.format(out=out)}` to create it."
    )


def test_undeclared_set_of_ours_names_command_and_directory(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"'alma_en_de' is not declared in .* run `sekd data alma` and set `dataset_dir"
    ):
        _host_dataset(tmp_path / "nowhere", tmp_path, _tokenizer(), "alma_en_de")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"'wmt21_valid' is not declared"):
        _host_dataset(tmp_path, tmp_path, _tokenizer(), "wmt21_valid")


def test_other_data_sets_get_the_hosts_own_errors(dataset_dir: Path, tmp_path: Path) -> None:
    declared = {"identity": {"file_name": "identity.json"}, "alma_en_de": {"file_name": "mine/other.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(declared))
    for dataset, message in (
        ("identity", rf"^File {tmp_path}/identity\.json not found\.$"),
        ("alma_en_de", rf"^File {tmp_path}/mine/other\.json not found\.$"),
        ("alma_en_de,unheard_of", r"^Undefined dataset unheard_of in dataset_info\.json\.$"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            _host_dataset(tmp_path, tmp_path, _tokenizer(), dataset)
        assert type(caught.value) is ValueError


def test_look_up_and_loader_pass_everything_else_through_unchanged() -> None:
    from llamafactory_sekd.host.run_arguments import explain_missing_file, explain_undefined

    assert explain_undefined(lambda names, directory: (names, directory))(["a"], {"a": 1}) == (["a"], {"a": 1})
    attr, data = SimpleNamespace(load_from="hf_hub", dataset_name="alma_en_de.json"), SimpleNamespace(dataset_dir="d")
    assert explain_missing_file(lambda *arguments: arguments)(attr, 1, data, 2) == (attr, 1, data, 2)
