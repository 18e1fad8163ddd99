"""Several caches are several teachers: each example has the one that holds it, in both paths, whatever the batch."""

from __future__ import annotations

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from helpers import tiny
from helpers.cached_runs import assert_same_content, build
from helpers.forks import forked
from helpers.runs import base_config, logged, train, write_yaml

from llamafactory_sekd.argument_checks import check_distillation_arguments
from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.errors import ArgumentError, TeacherError
from llamafactory_sekd.host.cache_command import build_caches
from llamafactory_sekd.teacher.cache.cache_manifest import Settings
from llamafactory_sekd.teacher.source import MixedLogits


SIZES = {"first": 11, "second": 13}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two teachers, a student, and one data set for each teacher; `both` holds an example of each."""
    root = tmp_path_factory.mktemp("several")
    used = len(tiny.save_tokenizer(root / "tokenizer"))  # top-k keeps no other ids: the heads have none either
    tiny.save_llama(root / "teacher", seed=1, width=48, layers=3, vocab_size=used)
    tiny.save_llama(root / "other", seed=3, width=32, layers=2, vocab_size=used)
    tiny.save_llama(root / "student", seed=2, vocab_size=used)
    tiny.save_dataset(root / "data")
    records = json.loads((root / "data" / "tiny.json").read_text())
    sets = {"first": records[:11], "second": records[11:24], "both": [records[0], records[11]]}
    for name, content in sets.items():
        (root / "data" / f"{name}.json").write_text(json.dumps(content))
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    return root


def config_of(root, tmp_path, **overrides):
    """A student that does not move, so that a micro-batch's loss does not depend on those before it."""
    settings = {"dataset": "first,second", "learning_rate": 1e-30, **overrides}
    return base_config(root, output_dir=str(tmp_path / "out"), **settings)


@pytest.fixture(scope="module")
def caches(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    config = config_of(root, folder)
    build({**config, "dataset": "first"}, folder / "first")
    build({**config, "dataset": "second", "teacher_model": str(root / "other")}, folder / "second")
    top = {"format": "topk", "k": 256, "dtype": "float32"}
    build({**config, "dataset": "second", "teacher_model": str(root / "other")}, folder / "topk", **top)
    build({**config, "teacher_model": str(root / "other")}, folder / "all")
    return folder


def reading(config, *folders, **overrides):
    config = {key: value for key, value in config.items() if key != "teacher_model"}
    return {**config, "teacher_cache": ",".join(map(str, folders)), **overrides}


def batches(config):
    """Train, and return of each micro-batch its loss, and of each of its examples text and response tokens."""
    from llamafactory_sekd.trainer import DistillationTrainer

    seen = []
    original = DistillationTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        texts = [tuple(row[row != self.processing_class.pad_token_id].tolist()) for row in inputs["input_ids"]]
        counts = (inputs["labels"] != -100).sum(-1).tolist()
        loss = original(self, model, inputs, *args, **kwargs)
        value = float((loss[0] if isinstance(loss, tuple) else loss).detach())
        seen.append((value, list(zip(texts, counts, strict=True))))
        return loss

    with patch.object(DistillationTrainer, "compute_loss", spy):
        train(config)

    return seen


@pytest.mark.parametrize("path", ["fused", "logits"])
@pytest.mark.parametrize("second", ["second", "topk"])
def test_every_example_has_the_loss_of_the_teacher_that_holds_it(root, tmp_path, caches, path, second):
    more = (
        {"finetuning_type": "lora", "lora_target": "all", "additional_target": "lm_head"} if path == "logits" else {}
    )
    config = config_of(root, tmp_path, **more)
    one_epoch = {"per_device_train_batch_size": 1, "max_steps": 24}
    expected = {}
    for dataset, folder in (("first", "first"), ("second", second)):
        alone = reading(config, caches / folder, dataset=dataset, **{**one_epoch, "max_steps": SIZES[dataset]})
        expected |= {examples[0][0]: loss for loss, examples in batches(alone)}

    together = reading(config, caches / "first", caches / second, max_steps=6)
    seen = batches(together)
    assert len({text for _, examples in seen for text, _ in examples}) == 24
    for loss, examples in seen:
        tokens = sum(count for _, count in examples)
        naive = sum(expected[text] * count for text, count in examples) / tokens
        assert loss == pytest.approx(naive, rel=2e-5)


def test_metrics_of_each_teacher_are_those_of_a_run_with_it_alone(root, tmp_path, caches):
    config = config_of(root, tmp_path, max_steps=6, logging_steps=6)
    together = train(reading(config, caches / "first", caches / "second"))
    shares = [logged(together, f"kd/{name}/share")[0] for name in SIZES]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    for name in SIZES:
        alone = train(
            reading(config, caches / name, dataset=name, per_device_train_batch_size=1, max_steps=SIZES[name])
            | {"logging_steps": SIZES[name], "output_dir": str(tmp_path / name)}
        )
        for metric in ("teacher_kl", "teacher_ce"):
            ours = logged(together, f"kd/{name}/{metric}")[0]
            assert ours == pytest.approx(logged(alone, f"kd/{metric}")[0], rel=1e-4)


def test_the_mean_is_that_of_the_distributions_of_both_models(root, tmp_path, caches):
    from transformers import AutoModelForCausalLM

    config = config_of(root, tmp_path, dataset="first", max_steps=1, per_device_train_batch_size=11)
    models = [AutoModelForCausalLM.from_pretrained(root / name).double() for name in ("teacher", "other")]
    for mix, weights in (("mean", (0.5, 0.5)), ("3,1", (0.75, 0.25))):
        out = train(reading(config, caches / "first", caches / "all", teacher_mix=mix))
        ((_, examples),) = batches(reading(config, caches / "first", caches / "all", teacher_mix=mix))
        total, tokens = 0.0, 0
        for text, count in examples:
            ids = torch.tensor([text])
            with torch.no_grad():
                parts = [model(ids).logits[0].softmax(-1) for model in models]
            mean = weights[0] * parts[0] + weights[1] * parts[1]
            places = range(len(text) - 1 - count, len(text) - 1)
            total -= sum(float(mean[place, text[place + 1]].log()) for place in places)
            tokens += count
        assert logged(out, "kd/teacher_ce")[0] == pytest.approx(total / tokens, rel=1e-5)
        assert logged(out, "kd/first/share") == logged(out, "kd/all/share") == [1.0]


def test_with_the_mean_an_example_of_one_cache_alone_is_answered_by_it(root, tmp_path, caches):
    config = config_of(root, tmp_path, dataset="second")
    alone = batches(reading(config, caches / "all"))
    assert [loss for loss, _ in batches(reading(config, caches / "first", caches / "all", teacher_mix="5,1"))] == (
        pytest.approx([loss for loss, _ in alone], rel=1e-6)
    )


def test_mixed_logits_are_the_naive_ones_for_slices_and_for_numbers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 5, generator=generator)

    class Rows:
        vocab_size, dtype, may_be_infinite = 5, torch.float32, False

        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def logits(self, tokens, out):
            part = self.rows[tokens]
            return out[: len(part)].copy_(part)

    knows = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 1], [1, 0], [1, 1], [0, 1], [0, 1], [0, 1]]).bool()
    for mask in (knows, knows & (torch.tensor([[1, 0]]).bool() | ~knows[:, :1])):
        sources = [Rows(logits[number][mask[:, number]]) for number in (0, 1)]
        mixed = MixedLogits(sources, mask, (1.0, 3.0))
        shares = mask * torch.tensor([1.0, 3.0])
        naive = (shares / shares.sum(-1, keepdim=True)).T.unsqueeze(-1) * logits.softmax(-1)
        for tokens in (slice(0, 4), slice(6, 9), torch.tensor([8, 3, 0])):
            result = mixed.logits(tokens, torch.full((6, 5), 7.0))
            torch.testing.assert_close(result.softmax(-1), naive.sum(0)[tokens])


def test_an_example_in_no_cache_or_in_two_is_refused_with_its_text_before_any_step(root, tmp_path, caches):
    config = config_of(root, tmp_path, max_steps=1, dataset="both")
    with pytest.raises(TeacherError, match=r"lacks the example '.*Hund.*into one of the folders\.") as none:
        train(reading(config, caches / "second", caches / "topk", teacher_mix="mean"))
    with pytest.raises(TeacherError, match=r"first` and `.*all` hold the example '.*Hund.*`teacher_mix: mean`") as two:
        train(reading(config, caches / "first", caches / "all"))
    assert "\n" not in str(none.value) + str(two.value)
    assert not (tmp_path / "out" / "trainer_log.jsonl").exists()


def test_each_cache_gets_the_checks_of_one(root, tmp_path, caches):
    config = reading(config_of(root, tmp_path), caches / "first", caches / "second")
    short = build({**config_of(root, tmp_path), "dataset": "second", "cutoff_len": 300}, tmp_path / "second")
    with pytest.raises(TeacherError, match=r"second` was built with cutoff_len `300` and this run has cutoff_len"):
        train({**config, "teacher_cache": f"{caches / 'first'}, {short}"})
    damaged = shutil.copytree(caches / "second", tmp_path / "damaged")
    data = bytearray((damaged / "head.safetensors").read_bytes())
    data[-3] ^= 1
    (damaged / "head.safetensors").write_bytes(data)
    with pytest.raises(TeacherError, match=r"head.safetensors does not match its checksum"):
        train({**config, "teacher_cache": f"{caches / 'first'},{damaged}"})
    with pytest.raises(TeacherError, match="names a folder twice"):
        train({**config, "teacher_cache": f"{caches / 'first'},{caches / 'first'}"})


def test_one_call_fills_a_cache_for_each_data_set_and_its_last_line_trains(root, tmp_path, caches):
    config = {key: value for key, value in config_of(root, tmp_path).items() if key != "teacher_model"}
    teachers = {"first": str(root / "teacher"), "second": str(root / "other")}
    path = write_yaml(tmp_path / "run.yaml", {**config, "teachers": teachers})
    sekd = ["sekd", "cache", str(path), "--out", str(tmp_path / "filled")]
    result = forked(sekd)
    assert result.returncode == 0, result.stderr[-2000:]
    folders = result.stdout.strip().splitlines()[-1].rpartition("teacher_cache: ")[2]
    for name in teachers:
        assert_same_content(tmp_path / "filled" / name, caches / name)
    train({**config, "teacher_cache": folders, "max_steps": 1})

    for changed, words in (
        ({"second": "m"}, "the data set first has no teacher"),
        ({**teachers, "thrid": "m"}, "`teachers.thrid` is no data set of this YAML, which has first, second"),
        ("one", "`teachers: one` cannot be used: give a model for each data set"),
    ):
        with pytest.raises(ArgumentError, match=words):
            build_caches({**config, "teachers": changed}, tmp_path / "none", Settings())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"teacher_cache": "a,b", "teacher_model": "m"},
            "teacher_cache: a,b` cannot be used: `teacher_model` fills one",
        ),
        (
            {"teacher_cache": "a", "teacher_mix": "mean"},
            "teacher_mix: mean` cannot be used: it needs several",
        ),
        ({"teacher_cache": "a,b", "teacher_mix": "sum"}, "`teacher_mix: sum` cannot be used: use mean, or 2 weights"),
        ({"teacher_cache": "a,b", "teacher_mix": "1,2,3"}, "use mean, or 2 weights above 0"),
        ({"teacher_cache": "a,b", "teacher_mix": "1,0"}, "use mean, or 2 weights above 0"),
    ],
)
def test_keys_that_cannot_work_are_refused(keys, words):
    with pytest.raises(ArgumentError, match=words):
        check_distillation_arguments(DistillationArguments(**keys))


def test_sequences_that_only_fill_up_the_last_batch_have_no_answers(root, caches):
    from llamafactory_sekd.teacher.cache.cache_manifest import Manifest
    from llamafactory_sekd.teacher.cache.recorded_teacher import CacheCollator, CachedTeacher, open_caches
    from llamafactory_sekd.teacher.cache.segments import segments

    folders = [caches / "first", caches / "topk"]
    opened = open_caches(folders, [Manifest.load(folder) for folder in folders])
    examples = [known_example(caches, root, number) for number in (0, 1, 12)]
    batch = CacheCollator(lambda features: {}, opened)(examples)
    counts = [sum(part.tokens for part in segments(example)) for example in examples]
    length = max(len(example["input_ids"]) for example in examples)
    rows = torch.zeros(3, length, dtype=torch.bool)
    for row in (0, 2):
        rows[row, : counts[row]] = True
    teacher = CachedTeacher(opened, torch.device("cpu"), str)
    logits = teacher.logits(batch, rows)
    assert len(logits) == counts[0] + counts[2]
    rows[1, : counts[1]] = True
    everything = teacher.logits(batch, rows)
    kept = torch.cat([everything[: counts[0]], everything[counts[0] + counts[1] :]])
    torch.testing.assert_close(logits, kept)


def known_example(caches, root, number):
    """An example of the training set as the host tokenizes it."""
    from llamafactory_sekd.host.cache import tokenized

    datasets = tokenized(config_of(root, caches, disable_shuffling=True)).datasets
    return {key: datasets[0][number][key] for key in ("input_ids", "labels")}
