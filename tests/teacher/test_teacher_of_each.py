"""A teacher for each data set, next to the student: the run equals the one that reads a cache of each."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import engines, tiny
from helpers.cached_runs import assert_same_content, build, losses
from helpers.forks import forked
from helpers.runs import CLI, base_config, logged, train, weights, write_yaml

from llamafactory_sekd.argument_checks import check_distillation_arguments
from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.errors import ArgumentError, TeacherError


SGD = {"optim": "sgd", "learning_rate": 0.05}  # of Adam, rounding decides where a gradient is nearly zero
SETS = {"first": slice(0, 11), "second": slice(11, 24), "third": slice(24, 31)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two teachers, a student, and three data sets."""
    root = tmp_path_factory.mktemp("of_each")
    tiny.save_tokenizer(root / "tokenizer")
    tiny.save_llama(root / "teacher", seed=1, width=48, layers=3)
    tiny.save_llama(root / "other", seed=3, width=32, layers=2)
    tiny.save_llama(root / "student", seed=2)
    tiny.save_dataset(root / "data")
    records = json.loads((root / "data" / "tiny.json").read_text())
    for name, part in SETS.items():
        (root / "data" / f"{name}.json").write_text(json.dumps(records[part]))
    info = {name: {"file_name": f"{name}.json"} for name in SETS}
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    return root


def models(root, *names):
    return {name: str(root / ("other" if name == "second" else "teacher")) for name in names}


def config_of(root, tmp_path, **overrides):
    keys = {"dataset": "first,second", "teacher_model": models(root, "first", "second"), **overrides}
    return base_config(root, output_dir=str(tmp_path / "out"), **keys)


@pytest.fixture(scope="module")
def caches(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    for name in SETS:
        build(config_of(root, folder, dataset=name, teacher_model=models(root, name)[name]), folder / name)
    return folder


def reading(config, caches, *names):
    config = {key: value for key, value in config.items() if key != "teacher_model"}
    return {**config, "teacher_cache": ",".join(str(caches / name) for name in names)}


@pytest.mark.parametrize("path", ["fused", "logits"])
def test_losses_weights_and_metrics_are_those_of_the_run_with_a_cache_of_each(root, tmp_path, caches, path):
    more = {"finetuning_type": "lora", "lora_target": "all", "additional_target": "lm_head"}
    config = config_of(root, tmp_path, **(more if path == "logits" else {}), max_steps=7)
    config |= {"eval_dataset": "third", "teacher_model": models(root, *SETS), "do_eval": True}
    config |= {"eval_strategy": "steps", "eval_steps": 7, "gradient_accumulation_steps": 2, **SGD}
    online = losses(config)
    cached = losses(reading({**config, "output_dir": str(tmp_path / "cached")}, caches, *SETS))
    assert online == pytest.approx(cached, rel=1e-5)
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "cached")
    assert all(ours[name].allclose(theirs[name], atol=1e-5) for name in theirs)
    for name in SETS:
        for metric in ("share", "teacher_kl", "teacher_ce"):
            key = f"kd/{name}/{metric}"
            assert logged(tmp_path / "out", key) == pytest.approx(logged(tmp_path / "cached", key), rel=1e-4), key
    assert logged(tmp_path / "out", "eval_kd/third/share") == [1.0]


@pytest.mark.parametrize(
    "keys",
    [
        {"packing": True},
        {"packing": True, "neat_packing": True},
        {"mix_strategy": "interleave_under", "interleave_probs": "0.5,0.5"},
        {"streaming": True, "dataloader_num_workers": 1},
        {"val_size": 5, "do_eval": True},
        {"kd_on_policy": 0.5, "max_new_tokens": 12},
    ],
    ids=["packing", "neat packing", "interleaved", "streaming", "split", "own samples"],
)
def test_with_one_teacher_in_both_places_the_run_is_that_with_it_alone(root, tmp_path, keys):
    config = config_of(root, tmp_path, **SGD, **keys)
    one = str(root / "other")
    if keys.get("packing"):  # rows of one data set, where the host packs both together
        config["dataset"] = "first"
    names = config["dataset"].split(",")
    out = train({**config, "teacher_model": dict.fromkeys(names, one)})
    alone = train({**config, "teacher_model": one, "output_dir": str(tmp_path / "alone")})
    for key in ("loss", "kd/teacher_kl", "kd/ce"):
        assert logged(out, key) == pytest.approx(logged(alone, key), rel=1e-5), key
    shares = [sum(values) for values in zip(*(logged(out, f"kd/{name}/share") for name in names), strict=True)]
    assert shares == pytest.approx([1.0] * 4, abs=1e-5)


def test_packed_rows_of_two_data_sets_have_one_teacher_each(root, tmp_path):
    out = train(config_of(root, tmp_path, packing=True, per_device_train_batch_size=1, max_steps=6))
    for name in ("first", "second"):
        assert set(logged(out, f"kd/{name}/share")) == {0.0, 1.0}


def test_a_model_of_two_data_sets_is_loaded_once(root, tmp_path, monkeypatch):
    from llamafactory_sekd.host import teacher_loading

    loaded, original = [], teacher_loading.load_teacher

    def spy(run):
        loaded.append(run.finetuning.teacher_model)
        return original(run)

    monkeypatch.setattr(teacher_loading, "load_teacher", spy)
    train(config_of(root, tmp_path, dataset="first,second,third", teacher_model=models(root, *SETS), max_steps=1))
    assert loaded == [str(root / "teacher"), str(root / "other")]


@pytest.mark.slow
def test_two_ranks_are_one_where_a_rank_has_no_example_of_a_teacher(root, tmp_path):
    keys = {**SGD, "max_steps": 3, "disable_shuffling": True}
    one = train(config_of(root, tmp_path, per_device_train_batch_size=8, **keys))
    two = {**keys, "per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    jobs = [config_of(root, tmp_path / "ddp", **two)]
    jobs.append(config_of(root, tmp_path / "zero3", deepspeed=engines.zero_config(tmp_path, 3), **two))
    engines.launch(jobs, tmp_path)
    fsdp = [config_of(root, tmp_path / "fsdp2", use_cpu=True, **two)]
    engines.launch(fsdp, tmp_path, env=engines.fsdp_environment(tmp_path, 2))
    for engine in ("ddp", "zero3", "fsdp2"):
        out = tmp_path / engine / "out"
        for key in ("loss", "kd/first/share", "kd/first/teacher_kl", "kd/second/teacher_ce"):
            assert logged(out, key) == pytest.approx(logged(one, key), abs=2e-4), (engine, key)
        ours = weights(out)
        for name, value in weights(one).items():
            torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one_and_keeps_its_teachers(root, tmp_path):
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    complete = train(config_of(root, tmp_path, **keys))
    half = tmp_path / "half" / "out"
    half.mkdir(parents=True)
    shutil.copytree(complete / "checkpoint-3", half / "checkpoint-3")
    config = config_of(root, tmp_path / "half", **keys, overwrite_output_dir=False)
    with pytest.raises(
        TeacherError, match=r"teacher_model: .*is not the teacher that .*checkpoint-3 was trained with"
    ):
        train({**config, "teacher_model": dict.fromkeys(("first", "second"), str(root / "teacher"))})

    resumed = train(config)
    for name, value in weights(complete).items():
        torch.testing.assert_close(weights(resumed)[name], value, atol=1e-7, rtol=1e-7)
    assert logged(resumed, "kd/first/teacher_kl") == pytest.approx(logged(complete, "kd/first/teacher_kl"), abs=2e-6)


def test_the_command_line_names_them_dotted_and_the_start_block_names_each(root, tmp_path):
    config = {**config_of(root, tmp_path, max_steps=1), "teacher_model": None}
    path = write_yaml(tmp_path / "run.yaml", config)
    dotted = [f"teacher_model.{name}={model}" for name, model in models(root, "first", "second").items()]
    result = forked([CLI, "train", str(path), *dotted])
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("  teacher ")]
    assert f"{root / 'teacher'} for first, {root / 'other'} for second" in line
    assert line.endswith("parameters in 2 models")


def test_sekd_cache_fills_a_cache_for_each_from_the_same_yaml(root, tmp_path, caches):
    path = write_yaml(tmp_path / "run.yaml", config_of(root, tmp_path))
    result = forked(["sekd", "cache", str(path), "--out", str(tmp_path / "filled")])
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("first", "second"):
        assert_same_content(tmp_path / "filled" / name, caches / name)


def test_doctor_counts_all_of_them(root, tmp_path):
    from llamafactory_sekd.host.memory_plan import parse, run_of
    from llamafactory_sekd.planner.rehearsal import rehearse

    def teacher_of(**overrides):
        return rehearse(run_of(parse(config_of(root, tmp_path, **overrides)), 1, accelerator=False)).teacher

    each = [teacher_of(dataset=name, teacher_model=models(root, name)[name]) for name in ("first", "second")]
    both = teacher_of()
    assert both.bytes == each[0].bytes + each[1].bytes
    assert both.parameters == each[0].parameters + each[1].parameters
    assert teacher_of(teacher_model=dict.fromkeys(("first", "second"), str(root / "other"))) == each[1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"teacher_model": {"first": "m"}, "teacher_cache": "c"},
            "`teacher_cache: c` cannot be used: .*fill no cache",
        ),
        ({"teacher_model": {"first": "m"}, "teacher_model_adapters": "a"}, "`teacher_model_adapters: a` .*merge them"),
        ({"teacher_model": {"first": "m"}, "teacher_server": "http://x"}, "`teacher_server` is the teacher"),
        ({"teacher_model": {"first": "m"}, "teacher_mix": "mean"}, "it needs several folders in `teacher_cache`"),
        ({"teacher_model": {"first": "self"}}, "`teacher_model.first: self` cannot be used: name the base model"),
        ({"teacher_model": {"first": ["m"]}}, r"`teacher_model.first: \['m'\]` cannot be used: use one path"),
        ({"teacher_model": ["m"]}, "use one path or hub id, or a mapping from data set to model"),
        ({"teacher_model": "{first: m"}, "`teacher_model: {first: m` cannot be read as a mapping"),
    ],
    ids=["cache", "adapters", "server", "mix", "self", "list inside", "list", "half a mapping"],
)
def test_keys_that_cannot_work_are_refused(keys, words):
    with pytest.raises(ArgumentError, match=words):
        check_distillation_arguments(DistillationArguments(**keys))


def test_names_that_do_not_match_and_models_that_do_not_fit_are_refused_before_anything_is_loaded(root, tmp_path):
    config = config_of(root, tmp_path)
    for changed, words in (
        ({"teacher_model": models(root, "first")}, "the data set second has no teacher: name its model under"),
        (
            {"teacher_model": models(root, *SETS)},
            "`teacher_model.third` is no data set of this YAML, which has first,",
        ),
        ({"tokenized_path": str(tmp_path / "ids")}, "does not tell which data set an example is from"),
    ):
        with pytest.raises(ArgumentError, match=words):
            train({**config, **changed})

    tiny.save_llama(tmp_path / "strange", seed=4)
    tokens = json.loads((tmp_path / "strange" / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (tmp_path / "strange" / "tokenizer.json").write_text(json.dumps(tokens))
    strange = {**models(root, "first"), "second": str(tmp_path / "strange")}
    with pytest.raises(TeacherError, match="the teacher's tokenizer is not the student's"):
        train({**config, "teacher_model": strange})
