"""A teacher that does not fit is refused before any weight is read, with the first difference shown."""

from __future__ import annotations

import json

import pytest
from helpers import tiny
from tokenizers import AddedToken
from transformers import AutoTokenizer, BertConfig, LlamaConfig, T5Config

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.compatibility import (
    check_is_causal,
    check_teacher_files,
    check_tokenizers,
    common_vocabulary,
    positions_line,
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(directory)
    return directory


def edited(directory, tmp_path, edit):
    """A copy of the tokenizer whose tokenizer.json went through `edit`."""
    content = json.loads((directory / "tokenizer.json").read_text())
    edit(content)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text((directory / name).read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(tmp_path)


def test_the_same_tokenizer_fits_even_where_the_teacher_has_an_extra_padding_token(tokenizer_dir):
    student, teacher = (AutoTokenizer.from_pretrained(tokenizer_dir) for _ in range(2))
    teacher.add_special_tokens({"pad_token": AddedToken("<extra>")})
    check_tokenizers(student, teacher)


def test_a_token_that_the_teacher_lacks_is_named(tokenizer_dir):
    student, teacher = (AutoTokenizer.from_pretrained(tokenizer_dir) for _ in range(2))
    student.add_tokens(["Rindfleisch"])
    with pytest.raises(
        TeacherError, match=r"student's token 'Rindfleisch' has the id \d+, and the teacher does not know"
    ):
        check_tokenizers(student, teacher)


def test_two_exchanged_ids_are_the_first_difference_shown(tokenizer_dir, tmp_path):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    student = AutoTokenizer.from_pretrained(tokenizer_dir)
    first = min(student.get_vocab()["a"], student.get_vocab()["b"])
    with pytest.raises(TeacherError, match=rf"has the id {first}, and the teacher gives it the id {first + 1}"):
        check_tokenizers(student, edited(tokenizer_dir, tmp_path, swap))


def test_other_merges_over_the_same_vocabulary_are_shown_on_a_sample_text(tokenizer_dir, tmp_path):
    def forget_merges(content):
        content["model"]["merges"] = []

    student = AutoTokenizer.from_pretrained(tokenizer_dir)
    with pytest.raises(TeacherError, match=r"for the student and .* for the teacher.* model family"):
        check_tokenizers(student, edited(tokenizer_dir, tmp_path, forget_merges))


def test_another_end_token_is_named(tokenizer_dir):
    student, teacher = (AutoTokenizer.from_pretrained(tokenizer_dir) for _ in range(2))
    teacher.eos_token = "<s>"
    with pytest.raises(TeacherError, match="student's eos_token is '</s>' and the teacher's is '<s>'"):
        check_tokenizers(student, teacher)


def test_heads_of_one_size_are_read_in_full_and_padded_ones_are_cut_to_the_used_ids(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    used = len(tokenizer)
    assert common_vocabulary(tokenizer, used + 8, used + 8) == (None, "")
    rows, line = common_vocabulary(tokenizer, used + 8, used + 64)
    assert rows == used
    assert all(f"{number:,}" in line for number in (used, used + 8, used + 64))
    with pytest.raises(TeacherError, match="teacher's head has 100 rows"):
        common_vocabulary(tokenizer, used, 100)


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_an_end_or_padding_token_without_a_row_is_refused_by_its_name(tokenizer_dir, name):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<unused>"])
    assert common_vocabulary(tokenizer, rows, rows) == (None, "")
    tokenizer.add_special_tokens({name: "<|im_end|>"})
    with pytest.raises(TeacherError, match=rf"{rows} rows and the {name} '<\|im_end\|>' has the id {rows + 1}: "):
        common_vocabulary(tokenizer, rows, rows)


def test_what_is_not_a_causal_language_model_is_refused_by_its_name():
    for config, name in ((BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM"), (T5Config(), "t5")):
        with pytest.raises(TeacherError, match=f"is a {name}, not a causal language model"):
            check_is_causal("some/model", config)
    check_is_causal("some/model", LlamaConfig(architectures=["LlamaForCausalLM"]))


def test_a_folder_with_only_an_adapter_a_missing_folder_and_an_empty_one_are_told_apart(tmp_path):
    with pytest.raises(TeacherError, match="does not exist"):
        check_teacher_files(str(tmp_path / "nowhere"))
    with pytest.raises(TeacherError, match=r"holds no config\.json"):
        check_teacher_files(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"holds only an adapter.*teacher_model_adapters"):
        check_teacher_files(str(tmp_path))
    check_teacher_files("meta-llama/Llama-2-13b-hf")


@pytest.mark.parametrize(
    ("keys", "cutoff_len", "words"),
    [
        ({}, 64, []),
        ({}, 65, ["`cutoff_len: 65`", "64 positions", "a guess"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 65, ["a guess"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 64, []),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 65, ["`rope_type: dynamic`", "64 tokens"]),
        (
            {
                "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2},
                "original_max_position_embeddings": 16,
            },
            32,
            ["`rope_type: longrope`", "16 tokens"],
        ),
    ],
)
def test_examples_beyond_a_teachers_positions_are_said(keys, cutoff_len, words):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 64}
    line = positions_line("t", LlamaConfig(**sizes, **keys), cutoff_len)
    assert bool(line) == bool(words)
    assert all(word in line for word in words)
