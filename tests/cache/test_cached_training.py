"""Training from a cache is training with the teacher: the same losses, whatever the batches, without the teacher."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from helpers.cached_runs import assert_same_content, build, content, counted_forwards, from_cache, losses
from helpers.runs import base_config, train, weights
from helpers.tiny import FAMILIES, save_scaled_or_capped
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.errors import TeacherError


@pytest.fixture(scope="module")
def cache(tiny_root, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "hidden"
    return build(base_config(tiny_root, output_dir="unused", eval_dataset="tiny_valid"), directory, batch_size=5)


def assert_same_weights(first, second, tolerance=1e-6):
    ours, theirs = weights(first), weights(second)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "overrides",
    [
        {"max_steps": 50},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 8},
        {"kd_loss": "self_evolution_topk", "kd_topk": 0.5},
        {"kd_loss": "skew_teacher", "kd_temperature": 2.0},
        {"kd_loss": {"preset": "verified_reference", "gate": {"below": 0.2}}, "kd_temperature": 2.0},
        {"kd_loss": {"preset": "entropy_gate", "target": "mixed", "hard": {"divergence": "jsd"}}},
        {"kd_loss": "reverse_kl", "dataloader_num_workers": 2, "max_samples": 9, "seed": 7},
        {"finetuning_type": "lora", "lora_target": "all", "additional_target": "lm_head"},
    ],
    ids=[
        "50 steps",
        "accumulation",
        "topk selection",
        "temperature",
        "a gate",
        "a gate by share",
        "workers and a subset",
        "logits path",
    ],
)
def test_losses_equal_those_of_the_online_teacher(tiny_root, tmp_path, cache, overrides):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), **overrides)
    assert losses(from_cache(config, cache)) == pytest.approx(losses(config), rel=1e-6)


@pytest.mark.parametrize(("kd_loss", "warns"), [("forward_kl", False), ("verified_reference", False), ("jsd", True)])
def test_a_cache_without_a_tail_warns_where_the_tail_matters(tiny_root, tmp_path, caplog, kd_loss, warns):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), kd_loss=kd_loss, max_steps=1)
    losses(from_cache(config, build(config, tmp_path / "cut", format="topk", k=8)))
    said = [record.message for record in caplog.records if "spreads the rest evenly" in record.message]
    assert bool(said) == warns


def test_bfloat16_stays_within_a_thousandth(tiny_root, tmp_path, monkeypatch):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), bf16=True, use_cpu=True, max_steps=20)
    cache = build(config, tmp_path / "cache")
    assert {values["hidden"].dtype for values in content(cache).values()} == {torch.bfloat16}
    ours, theirs = losses(from_cache(config, cache)), losses(config)
    assert sum(ours) == pytest.approx(sum(theirs), rel=1e-3)
    # A batch has 24 tokens, and another padding alone moves the teacher's bfloat16 sums by this much.
    assert ours == pytest.approx(theirs, rel=3e-3)
    # Products in bfloat16 round the hidden states, so that float32 would say nothing more; a CPU without instructions
    # for them does them in float32, where it says no more than another padding.
    in_float32 = from_cache(config, build(config, tmp_path / "float32", dtype="float32"))
    assert losses(in_float32) == pytest.approx(ours, rel=3e-3)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert losses(in_float32) == losses(from_cache(config, cache))


def test_a_float32_teacher_kept_in_bfloat16_is_close(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    cache = build(config, tmp_path / "cache", dtype="bfloat16")
    ours, theirs = losses(from_cache(config, cache)), losses(config)
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert ours != theirs


@pytest.mark.parametrize("separate", [True, False], ids=["neat_packing", "packing"])
def test_packed_sequences_are_read(tiny_root, tmp_path, separate):
    plain = base_config(tiny_root, output_dir=str(tmp_path / "out"), cutoff_len=1200, per_device_train_batch_size=1)
    packed = {**plain, "packing": True, "neat_packing": separate}
    cache = build(plain if separate else packed, tmp_path / "cache")
    assert losses(from_cache(packed, cache)) == pytest.approx(losses(packed), rel=2e-6)
    if not separate:
        with pytest.raises(TeacherError, match="was built with packing `True` and this run has packing `False`"):
            train(from_cache(plain, cache))


def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_root, tmp_path, cache):
    config = base_config(tiny_root, output_dir=str(tmp_path / "complete"), save_strategy="steps", save_steps=2)
    complete = train(from_cache(config, cache))
    checkpoint = str(complete / "checkpoint-2")
    rest = train(
        from_cache({**config, "output_dir": str(tmp_path / "rest")}, cache, resume_from_checkpoint=checkpoint)
    )
    assert_same_weights(complete, rest, tolerance=1e-7)


def test_evaluation_reads_the_cache_and_generation_needs_none(tiny_root, tmp_path, cache):
    evaluation = {"eval_dataset": "tiny_valid", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    for more in ({}, {"compute_accuracy": True, "per_device_eval_batch_size": 3}):
        config = base_config(tiny_root, output_dir=str(tmp_path / "out"), **evaluation, **more)
        assert losses(from_cache(config, cache)) == pytest.approx(losses(config), rel=1e-6)

    generation = {"eval_dataset": "tiny_valid", "do_predict": True, "predict_with_generate": True, "max_new_tokens": 4}
    out = train(from_cache(base_config(tiny_root, output_dir=str(tmp_path / "out"), max_steps=1, **generation), cache))
    assert len((out / "generated_predictions.jsonl").read_text().splitlines()) == 8


def test_topk_is_read_in_both_paths_and_comes_closer_with_k(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), kd_loss="no_evolution", max_steps=2)
    exact = torch.tensor(losses(config))
    errors = []
    for k in (8, 64, 256):
        cache = build(config, tmp_path / f"top{k}", format="topk", k=k, dtype="float32")
        errors.append(float((torch.tensor(losses(from_cache(config, cache))) - exact).abs().max()))

    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


def test_a_topk_cache_is_a_teacher_without_padding_and_says_so(tiny_root, tmp_path, caplog):
    """A hidden cache has the head's padding; top-k keeps used ids alone, so both heads are cut to them."""
    config = base_config(tiny_root, output_dir=str(tmp_path / "padded"), kd_loss="no_evolution", max_steps=3)
    hidden = from_cache(config, build(config, tmp_path / "hidden"))
    assert losses(hidden) == pytest.approx(losses(config), rel=1e-6)
    assert not caplog.messages or not any("ids; the tokenizer uses" in line for line in caplog.messages)

    used = len(AutoTokenizer.from_pretrained(tiny_root / "teacher"))
    settings = {"format": "topk", "k": used - 1, "dtype": "float32"}  # and one in the tail: nothing is lost
    topk = losses(from_cache(config, build(config, tmp_path / "topk", **settings)))
    said = [line for line in caplog.messages if "ids; the tokenizer uses" in line]
    assert len(said) == 1
    assert all(f"{number:,}" in said[0] for number in (384, used))
    assert topk != pytest.approx(losses(config), rel=1e-3)

    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(tiny_root / name)
        model.resize_token_embeddings(used)
        model.save_pretrained(tmp_path / name)
        shutil.copytree(
            tiny_root / name, tmp_path / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model*", "config*")
        )
    bare = {"model_name_or_path": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher")}
    assert topk == pytest.approx(losses({**config, **bare}), rel=1e-5)


def test_the_first_epoch_fills_and_later_epochs_read(tiny_root, tmp_path):
    config = base_config(
        tiny_root, output_dir=str(tmp_path / "out"), max_samples=12, max_steps=9, eval_dataset="tiny_valid"
    )
    config = {**config, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
    directory = tmp_path / "cache"
    with counted_forwards() as forwards:
        filled = losses({**config, "teacher_cache": str(directory)})
    assert sum(forwards) == 12 + 8  # three epochs over 12 records, three evaluations of 8
    assert filled == pytest.approx(losses(config), rel=1e-6)

    assert_same_content(directory, build(config, tmp_path / "built"))
    with counted_forwards() as forwards:
        train({**config, "teacher_cache": str(directory), "output_dir": str(tmp_path / "again")})
    assert forwards == []
    train(from_cache(config, directory))


def test_what_a_run_added_counts_for_the_next_with_more_data(tiny_root, tmp_path):
    directory = str(tmp_path / "cache")
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), teacher_cache=directory, disable_shuffling=True)
    train({**config, "max_samples": 8, "max_steps": 2})
    with counted_forwards() as forwards:
        train({**config, "max_samples": 16, "max_steps": 4})
    assert sum(forwards) == 8


@pytest.fixture
def own_cache(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "own")


REFUSED = [
    ({"cutoff_len": 300}, "cutoff_len `400` and this run has cutoff_len `300`"),
    ({"train_on_prompt": True}, "train_on_prompt `False` and this run has train_on_prompt `True`"),
    ({"mask_history": True}, "mask_history `False` and this run has mask_history `True`"),
    ({"template": "alpaca"}, "template `parrot` and this run has template `alpaca`"),
    ({"default_system": "Be brief."}, "template_text"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_cache_of_other_examples_is_refused_with_both_values(
    tiny_root, tmp_path, cache, overrides, words, monkeypatch
):
    from llamafactory.data.template import TEMPLATES

    monkeypatch.setattr(TEMPLATES["parrot"], "default_system", "")  # the host sets it for good
    with pytest.raises(TeacherError) as caught:
        train(from_cache(base_config(tiny_root, output_dir=str(tmp_path / "out"), **overrides), cache))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(tiny_root, tmp_path, cache):
    from transformers import AutoTokenizer

    student = shutil.copytree(tiny_root / "student", tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["Hund"])
    tokenizer.save_pretrained(student)
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), model_name_or_path=str(student))
    with pytest.raises(TeacherError, match=r"built with tokenizer `\w+` and this run has tokenizer `\w+`"):
        train(from_cache(config, cache))


def test_another_teacher_or_adapter_or_software_is_refused_where_it_would_be_mixed_in(tiny_root, tmp_path, own_cache):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), teacher_cache=str(own_cache))
    with pytest.raises(TeacherError, match=r"built with teacher_weights `\w+` and this run has teacher_weights `\w+`"):
        train({**config, "teacher_model": str(tiny_root / "student")})

    adapter = tmp_path / "adapter"
    train(
        base_config(
            tiny_root,
            output_dir=str(adapter),
            max_steps=1,
            finetuning_type="lora",
            model_name_or_path=str(tiny_root / "teacher"),
        )
    )
    with pytest.raises(TeacherError, match=r"teacher_adapters none and this run has teacher_adapters `\w+`"):
        build({**config, "teacher_model_adapters": str(adapter)}, own_cache)

    from llamafactory_sekd.teacher.cache.cache_manifest import Manifest

    manifest = Manifest.load(own_cache)
    manifest.software["torch"] = "1.0"
    manifest.save(own_cache)
    with pytest.raises(TeacherError, match=r"built with torch `1.0` and this run has torch"):
        train({**config, "max_samples": 4})
    train(from_cache({**config, "max_steps": 1}, own_cache))  # reading does not compute


def test_other_settings_than_the_caches_are_refused(tiny_root, tmp_path, own_cache):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    with pytest.raises(TeacherError, match="holds a cache with format `hidden`, not `topk`"):
        build(config, own_cache, format="topk")
    with pytest.raises(TeacherError, match="holds a cache with dtype `float32`, not `bfloat16`"):
        build(config, own_cache, dtype="bfloat16")


def test_a_missing_example_names_its_text_and_the_remedy_before_any_step(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), disable_shuffling=True)
    cache = build({**config, "max_samples": 8}, tmp_path / "cache")
    with pytest.raises(TeacherError) as caught:
        train(from_cache(config, cache))
    message = str(caught.value)
    assert "The dog is near the book. ### Response:Hund steht bei Buch." in message
    assert "run `sekd cache` with this YAML" in message
    assert "\n" not in message
    assert not (tmp_path / "out_cached" / "trainer_log.jsonl").exists()
    build(config, cache)
    train(from_cache(config, cache))


@pytest.mark.parametrize("file", ["shard-00000-00000.safetensors", "head.safetensors"])
def test_a_flipped_bit_is_found_before_training_and_building_again_repairs_it(tiny_root, tmp_path, own_cache, file):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), eval_dataset="tiny_valid", max_steps=1)
    intact = content(own_cache)
    data = bytearray((own_cache / file).read_bytes())
    data[-5] ^= 4
    (own_cache / file).write_bytes(data)
    with pytest.raises(TeacherError, match=rf"{file} does not match its checksum: run `sekd cache` with this YAML"):
        train(from_cache(config, own_cache))

    build(config, own_cache)
    assert content(own_cache).keys() == intact.keys()
    train(from_cache(config, own_cache))


def test_what_is_no_cache_is_refused(tiny_root, tmp_path):
    with pytest.raises(TeacherError, match=r"holds no manifest.json: build it with `sekd cache X.yaml --out"):
        train(from_cache(base_config(tiny_root, output_dir=str(tmp_path / "out")), tmp_path / "nothing"))


def test_two_writers_are_kept_apart(tiny_root, tmp_path, own_cache):
    from llamafactory_sekd.files import locked

    with locked(own_cache / ".sekd.lock"), pytest.raises(TeacherError, match="Another run is writing to"):
        build(base_config(tiny_root, output_dir=str(tmp_path / "out")), own_cache)


def test_a_disk_that_is_too_small_is_refused_before_the_teacher_is_loaded(tiny_root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    with pytest.raises(TeacherError, match=r"the cache needs \d+ KiB and .* has 1,000 bytes: choose another --out"):
        build(config, tmp_path / "cache")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hidden_cache_of_scaled_or_capped_logits_trains_as_the_teacher_does(tiny_root, tmp_path, family):
    teacher = save_scaled_or_capped(tmp_path / "teacher", family)
    keys = {"teacher_model": str(teacher), "max_samples": 8, "max_steps": 2}
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), **keys)
    cache = build(config, tmp_path / "cache")
    assert json.loads((cache / "manifest.json").read_text())["content"]["transform"]
    online = losses(config)
    assert losses(from_cache(config, cache)) == pytest.approx(online, rel=1e-6)
    # While training: the first run fills the cache, and the second reads it.
    filling = {**config, "teacher_cache": str(tmp_path / "filled"), "output_dir": str(tmp_path / "filling")}
    assert losses(filling) == pytest.approx(online, rel=1e-6)
    assert losses(from_cache(config, tmp_path / "filled")) == pytest.approx(online, rel=1e-6)


def test_another_scale_is_another_teacher(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), max_steps=1)
    first, second = (
        {**config, "teacher_model": str(save_scaled_or_capped(tmp_path / str(scale), "cohere", logit_scale=scale))}
        for scale in (0.25, 0.5)
    )
    cache = build(first, tmp_path / "cache")
    with pytest.raises(TeacherError, match="was built with"):
        train({**second, "teacher_cache": str(cache)})


def test_a_plain_teachers_manifest_is_that_of_0_1_0(own_cache):
    assert "transform" not in json.loads((own_cache / "manifest.json").read_text())["content"]


def test_a_teacher_whose_head_says_not_all_is_kept_as_topk_only(tiny_root, tmp_path):
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM

    from llamafactory_sekd.teacher import Teacher
    from llamafactory_sekd.teacher.cache.cache_manifest import Fingerprints, Settings
    from llamafactory_sekd.teacher.cache.filling import Session

    class Biased(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[-1])
            return output

    teacher = Teacher(Biased.from_pretrained(tiny_root / "teacher"), Accelerator(cpu=True))
    probe = {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
    session = Session(tmp_path / "hidden", Fingerprints({}))
    with pytest.raises(TeacherError, match=r"more than a product of its LM head.*--format topk"):
        session.admit(teacher, 384, probe)
    session.close()
    session = Session(tmp_path / "topk", Fingerprints({}), Settings(format="topk", k=256, dtype="float32"))
    assert session.admit(teacher, 384, probe).format == "topk"
    session.close()


def test_duplicates_are_computed_once_and_the_count_says_so(tiny_root, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    records = json.loads((tiny_root / "data" / "tiny.json").read_text())[:5]
    (data / "twice.json").write_text(json.dumps(records * 2))
    (data / "dataset_info.json").write_text(json.dumps({"twice": {"file_name": "twice.json"}}))
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), dataset="twice", dataset_dir=str(data))
    told: list[str] = []
    with counted_forwards() as forwards:
        cache = build(config, tmp_path / "cache", say=told.append)
    assert sum(forwards) == 5
    assert "holds 5 examples (the data sets have 10; equal ones count once)" in told[-1]
    train(from_cache(config, cache))
    assert len(content(cache)) == 5
