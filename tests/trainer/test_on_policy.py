"""On-policy training: which responses are replaced, by what, and that everything else of a step stays as it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny
from helpers.runs import base_config, logged, train, weights
from helpers.small_board_models import teach
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import prompt
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.trainer.on_policy import OwnSamples
from llamafactory_sekd.trainer.own_sample_logs import Look, OwnSampleLog
from llamafactory_sekd.trainer.sampling import Sampling, as_generator, draw


def run(root: Path, out: Path, **keys: Any) -> Path:
    return train(base_config(root, output_dir=str(out), kd_loss="forward_kl", **{"max_new_tokens": 12, **keys}))


def prompt_of(source: str) -> str:
    return prompt(source, parse_direction("en-de"))


def same(one: Path, two: Path, tolerance: float = 0.0) -> bool:
    left, right = weights(one), weights(two)
    return all(torch.allclose(left[name], right[name], rtol=0, atol=tolerance) for name in left)


def test_share_0_is_bit_equal_to_a_run_without_the_key(tiny_root, tmp_path):
    plain = run(tiny_root, tmp_path / "plain")
    assert same(run(tiny_root, tmp_path / "zero", kd_on_policy=0.0), plain)
    assert not same(run(tiny_root, tmp_path / "half", kd_on_policy=0.5), plain)


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `tiny_root` whose models have learned to end their translations."""
    root = tmp_path_factory.mktemp("translators")
    teach(tiny.save_llama(root / "teacher", seed=1, width=64, initializer_range=0.05), steps=60)
    teach(tiny.save_llama(root / "student", seed=2, width=48, initializer_range=0.05), steps=60)
    tiny.save_dataset(root / "data")
    return root


def test_greedy_step_1_equals_training_on_the_students_translations_at_lambda_1(translators, tmp_path):
    keys = {"max_steps": 1, "max_samples": 4, "max_new_tokens": 40}
    own = run(translators, tmp_path / "own", kd_on_policy=1.0, do_sample=False, **keys)

    student = AutoModelForCausalLM.from_pretrained(translators / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(translators / "student")
    records = json.loads((translators / "data" / "tiny.json").read_text())[:4]
    shown = [json.loads(line) for line in (own / "samples" / "step-1.jsonl").read_text().splitlines()]
    assert {entry["reference"] for entry in shown} == {f"{record['output']}</s>" for record in records}
    for record in records:
        prompt = prompt_of(record["input"])
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
        output = student.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=tokenizer.eos_token_id)
        record["output"] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert f"{record['output']}</s>" in {entry["sample"] for entry in shown}

    folder = tmp_path / "translated"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text((translators / "data" / "dataset_info.json").read_text())
    fixed = run(translators, tmp_path / "fixed", dataset_dir=str(folder), kd_lambda=1.0, **keys)
    assert same(own, fixed, 1e-6)
    assert logged(own, "loss") == pytest.approx(logged(fixed, "loss"), abs=1e-6)


def test_accumulation_and_order_of_micro_batches_change_nothing(tiny_root, tmp_path):
    keys = {"kd_on_policy": 0.5, "max_steps": 2}
    one = run(tiny_root, tmp_path / "one", per_device_train_batch_size=4, **keys)
    two = run(tiny_root, tmp_path / "two", per_device_train_batch_size=1, gradient_accumulation_steps=4, **keys)
    assert same(one, two, 1e-5)
    assert logged(one, "kd/on_policy") == logged(two, "kd/on_policy")
    assert logged(one, "gen/length") == logged(two, "gen/length")


def test_the_teacher_that_is_the_student_gives_loss_0(tiny_root, tmp_path):
    out = run(tiny_root, tmp_path / "out", teacher_model=str(tiny_root / "student"), kd_on_policy=1.0, max_steps=1)
    assert logged(out, "loss") == pytest.approx([0.0], abs=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_root, tmp_path):
    keys = {"kd_on_policy": 0.5, "save_strategy": "steps", "save_steps": 2}
    complete = run(tiny_root, tmp_path / "complete", **keys)
    resumed = run(tiny_root, tmp_path / "resumed", resume_from_checkpoint=str(complete / "checkpoint-2"), **keys)
    assert same(complete, resumed)


def test_temperature_is_1_over_the_complete_vocabulary_unless_the_yaml_says_otherwise(tiny_root, tmp_path):
    def sampled(name: str, **keys: Any) -> str:
        out = run(tiny_root, tmp_path / name, kd_on_policy=1.0, max_steps=1, **keys)
        return (out / "samples" / "step-1.jsonl").read_text()

    default = sampled("default")
    assert sampled("named", temperature=1.0, top_p=1.0, top_k=0) == default
    assert sampled("hosts", temperature=0.95, top_p=0.7, top_k=50) != default


def rows(out: Path) -> list[list[str]]:
    """The own samples of each step, in the order of the steps."""
    files = sorted((out / "samples").glob("step-*.jsonl"), key=lambda path: int(path.stem.removeprefix("step-")))
    return [sorted(json.loads(line)["sample"] for line in path.read_text().splitlines()) for path in files]


def test_n_steps_use_the_samples_of_the_first_and_then_new_ones_are_drawn(tiny_root, tmp_path):
    """Three steps of an epoch in its twelve, and three of the next."""
    keys = {"kd_on_policy": 1.0, "max_steps": 15, "max_samples": 12, "learning_rate": 0.01}
    used = run(tiny_root, tmp_path / "used", kd_on_policy_every=4, **keys)
    each = run(tiny_root, tmp_path / "each", **keys)
    steps = rows(used)
    windows = [steps[start : start + 4] for start in range(0, 15, 4)]
    assert all(window == [window[0]] * len(window) for window in windows)
    assert len({str(window[0]) for window in windows}) == 4
    assert steps[0] == rows(each)[0]
    history = json.loads((used / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "gen/seconds" in entry] == [1, 5, 9, 13]
    assert all("gen/length" in entry and "kd/entropy" not in entry for entry in history if "loss" in entry)
    judged = [json.loads((used / "samples" / f"step-{step}.jsonl").read_text().splitlines()[0]) for step in (1, 4)]
    assert all(entry["teacher_logprob"] < 0 for entry in judged)


def test_n_steps_at_a_tiny_rate_have_the_loss_of_the_first(tiny_root, tmp_path):
    keys = {"kd_on_policy": 0.7, "max_steps": 9, "learning_rate": 1e-30, "gradient_accumulation_steps": 2}
    keys |= {"disable_shuffling": True}
    used = run(tiny_root, tmp_path / "used", kd_on_policy_every=3, **keys)
    each = run(tiny_root, tmp_path / "each", **{**keys, "max_steps": 3})
    for key in ("loss", "kd/on_policy", "gen/length", "gen/truncated", "kd/difficulty"):
        assert logged(used, key) == [value for value in logged(each, key) for _ in range(3)], key


@pytest.mark.parametrize(
    ("records", "keys", "steps"),
    [
        (16, {}, 4),  # of 4 examples each
        (16, {"gradient_accumulation_steps": 2}, 2),
        (20, {"gradient_accumulation_steps": 2}, 3),  # the last has one micro-batch
        (18, {"gradient_accumulation_steps": 2}, 3),  # of two examples
        (14, {"gradient_accumulation_steps": 2}, 2),  # the last has one of four and one of two
        (18, {"gradient_accumulation_steps": 4}, 2),
        (18, {"gradient_accumulation_steps": 4, "group_by_length": True}, 2),
        (14, {"dataloader_drop_last": True}, 3),
        (3, {"gradient_accumulation_steps": 2}, 1),
    ],
)
def test_an_epoch_trains_each_example_n_times_in_n_times_the_steps(tiny_root, tmp_path, capsys, records, keys, steps):
    """In the last steps as well, whose micro-batches are fewer or hold fewer examples; with the loss of each."""
    keys = {"max_samples": records, "max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-30, **keys}
    keys |= {"kd_on_policy": 0.5, "do_sample": False}
    once = run(tiny_root, tmp_path / "once", **keys)
    assert "Own samples: each is used" not in capsys.readouterr().out
    used = run(tiny_root, tmp_path / "used", kd_on_policy_every=3, **keys)
    said = f"Own samples: each is used in 3 steps, so an epoch has {3 * steps} steps in place of {steps}"
    assert capsys.readouterr().out.count(said) == 1
    state = json.loads((used / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 2 * 3 * steps
    assert state["epoch"] == 2
    for key in ("loss", "kd/on_policy"):
        assert logged(used, key) == [value for value in logged(once, key) for _ in range(3)], key
    counts = [table(out) for out in (used, once)]
    assert counts[0] == {token: 3 * count for token, count in counts[1].items()}


def test_a_streamed_data_set_is_repeated_as_well(tiny_root, tmp_path):
    """Two steps of ten examples, and the first of the next pass over them."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "tiny.json").write_text(json.dumps(json.loads((tiny_root / "data" / "tiny.json").read_text())[:10]))
    (data / "dataset_info.json").write_text((tiny_root / "data" / "dataset_info.json").read_text())
    keys = {"kd_on_policy": 1.0, "kd_on_policy_every": 2, "streaming": True, "dataset_dir": str(data), "max_steps": 6}
    keys |= {"dataloader_num_workers": 1}  # a stream without any has no parts, and no examples
    steps = rows(run(tiny_root, tmp_path / "out", gradient_accumulation_steps=2, learning_rate=0.01, **keys))
    assert [len(step) for step in steps] == [8, 8, 2, 2, 8, 8]
    assert steps[::2] == steps[1::2]


def table(out: Path) -> dict[str, int]:
    """How often each token was trained on."""
    with (out / "token_difficulty.csv").open(newline="") as file:
        return {row["id"]: int(row["count"]) for row in csv.DictReader(file)}


def test_a_student_that_shares_the_teachers_base_samples_with_its_adapter(tiny_root, tmp_path):
    keys = {"finetuning_type": "lora", "lora_target": "all", "teacher_model": "self", "kd_on_policy": 0.5}
    keys |= {"max_steps": 6, "per_device_train_batch_size": 2, "kd_lambda": 0.5}
    trained = run(tiny_root, tmp_path / "trained", learning_rate=0.05, **keys)
    frozen = run(tiny_root, tmp_path / "frozen", learning_rate=1e-30, **keys)
    assert rows(trained)[0] == rows(frozen)[0]
    assert rows(trained)[1:] != rows(frozen)[1:]
    assert logged(trained, "kd/teacher_kl")[0] == pytest.approx(0.0, abs=1e-6)  # the adapter starts at zero
    assert logged(trained, "kd/teacher_kl")[-1] > 1e-3  # the teacher answers without it


@pytest.fixture(scope="module")
def complete(tiny_root, tmp_path_factory) -> Path:
    """Two epochs of three steps, each of which comes three times, with every checkpoint."""
    return run(tiny_root, tmp_path_factory.mktemp("complete") / "out", **REPEATED)


REPEATED = {"kd_on_policy": 0.8, "kd_on_policy_every": 3, "save_strategy": "steps", "save_steps": 1}
REPEATED |= {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.05, "max_samples": 10}
REPEATED |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


# Between two drawings, before one, in the short step at the end of the epoch, at its end, and in the next epoch.
@pytest.mark.parametrize("step", [1, 2, 3, 4, 8, 9, 11, 17])
def test_a_run_that_is_resumed_between_two_drawings_equals_an_uninterrupted_one(tiny_root, tmp_path, complete, step):
    checkpoint = str(complete / f"checkpoint-{step}")
    resumed = run(tiny_root, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **REPEATED)
    assert same(complete, resumed)
    assert rows(complete)[step:] == rows(resumed)
    assert table(complete) == table(resumed)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kd_on_policy_every": 0}, "kd_on_policy_every: 0"),
        ({"kd_on_policy_every": 1.5}, "kd_on_policy_every: 1.5"),
        ({"kd_on_policy": 0, "kd_on_policy_every": 2}, "`kd_on_policy` is 0"),
        ({"kd_on_policy": 0, "kd_on_policy_truncated": "drop"}, "`kd_on_policy` is 0"),
        ({"packing": True}, "packing: true"),
        ({"num_beams": 4}, "num_beams: 4"),
        ({"train_on_prompt": True}, "train_on_prompt: true"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: 1.2"),
        ({"kd_on_policy": 1.5}, "kd_on_policy: 1.5"),
        ({"kd_on_policy_truncated": "cut"}, "kd_on_policy_truncated: cut"),
        ({"teacher_cache": "somewhere"}, "teacher_cache"),
    ],
)
def test_what_cannot_go_with_own_samples_is_refused_by_name(tiny_root, tmp_path, keys, words):
    with pytest.raises(ArgumentError, match=words):
        run(tiny_root, tmp_path / "out", **{"kd_on_policy": 0.5, **keys})


def test_tokens_are_drawn_as_the_distribution_says():
    scores = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -3.0, -torch.inf])
    count = 200_000
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = draw(scores.expand(count, -1), uniforms).bincount(minlength=6)
    expected = scores.softmax(-1) * count
    assert drawn[1] == drawn[5] == 0
    possible = expected > 0
    chi_square = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_the_largest_uniform_number_draws_a_possible_token():
    scores = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert draw(scores, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 1


def test_an_exception_inside_generation_leaves_the_model_as_it_was(tiny_root):
    model = AutoModelForCausalLM.from_pretrained(tiny_root / "student").train()
    model.model.layers[0].eval()  # frozen
    config, state = model.generation_config, torch.get_rng_state()

    def generate() -> None:
        with as_generator(model):
            assert not model.training
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        generate()
    assert model.training
    assert not model.model.layers[0].training
    assert model.generation_config is config
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def own_samples(share: float, every: int = 1, look: Any = lambda sample, reference: Look(False, False)) -> OwnSamples:
    sampling, accelerator = Sampling(True, 1.0, 1.0, 0, 4, (2,), 0), Accelerator(cpu=True)
    log = OwnSampleLog(sampling, every, str, accelerator, ".", look)
    return OwnSamples(share, every, False, sampling, 64, 7, accelerator, log)


def test_the_share_is_the_same_choice_in_any_batch():
    """What a hash of the example decides cannot depend on its neighbors."""
    ids = torch.randint(3, 90, (64, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :6] = -100
    mask = torch.ones_like(ids)
    own = own_samples(0.3)
    chosen = {e.row for e in own._choose({"input_ids": ids, "attention_mask": mask, "labels": labels}, 0, epoch=0)}
    apart = {
        row
        for row in range(64)
        for _ in own._choose(
            {"input_ids": ids[row, None], "attention_mask": mask[row, None], "labels": labels[row, None]}, 0, epoch=0
        )
    }
    assert chosen == apart
    assert 8 < len(chosen) < 32


@pytest.mark.parametrize("every", [1, 2])
def test_loops_and_other_languages_among_own_samples_are_counted_and_warned_of_once(caplog, monkeypatch, every):
    """After sixteen different samples, however often each is used."""
    from transformers.utils import logging as host_logging

    from llamafactory_sekd.data.languages import differs_in_language
    from llamafactory_sekd.evaluation.guards import has_loop

    german = "Die alte Brücke über den Fluss war letzten Sommer wegen Reparaturen gesperrt."
    texts = {
        1: german,
        2: "The old bridge over the river was closed for repairs last summer.",
        3: "die alte Brücke über den Fluss und " * 8,
    }

    def look(sample: list[int], reference: list[int]) -> Look:
        return Look(has_loop(texts[sample[0]]), differs_in_language(texts[sample[0]], texts[reference[0]]))

    monkeypatch.setattr(host_logging.get_logger("llamafactory_sekd.trainer.own_sample_logs"), "propagate", True)
    own = own_samples(1.0, every, look)
    ids = torch.tensor([[5 + row, 6, 1, 2] for row in range(8)])
    labels = torch.tensor([[-100, -100, 1, 2]] * 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    drawn = []

    def generate(model, examples):
        drawn.append(len(examples))
        return [[1, 2]] + [[2, 2]] * 3 + [[3, 2]] * 4

    def warned() -> list[str]:
        own.log.means()
        return [record.getMessage() for record in caplog.records if "own samples" in record.getMessage()]

    monkeypatch.setattr(own, "_generate", generate)

    def train(steps: int) -> None:
        for _ in range(steps):
            own.replace(None, [dict(batches.pop())], 0)

    drawings = [{name: value.clone() for name, value in batch.items()} for _ in range(8)]
    batches = [batch for batch in drawings for _ in range(every)]
    own.restore({"of an example that is not there": [1, 2]})
    train(every + 1)  # one drawing, and the first step of the next
    assert own.log._window[-3:].tolist() == [8 * (every + 1), 4 * (every + 1), 3 * (every + 1)]
    assert len(warned()) == (every == 1)
    train(3 * every - 1)
    assert drawn == [8] * 4
    (text,) = warned()
    assert "50% of the student's own samples repeat themselves" in text
    train(4 * every)
    assert len(warned()) == 1


def test_counting_goes_on_after_samples_were_judged_on_an_accelerator():
    """On tensors without content, so that it needs no accelerator."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    ids = torch.tensor([[5, 6, 7, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[-100, -100, 7, 2]])}
    own = own_samples(0.0)
    own.replace(None, [dict(batch)], 0)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        values = torch.zeros(2, device="cuda")
        own.log.judge(torch.tensor([-1]), torch.tensor([[True, True]]), values, values)
    assert own.log._judged.device.type == "cuda"
    own.replace(None, [dict(batch)], 0)
    assert own.log._window[0] == 2


def test_the_entropy_is_that_of_the_distribution_that_was_sampled_from(tiny_root, tmp_path):
    """Of the first tokens, whose distributions are known; 32 draws estimate the mean within a few tenths."""
    keys = {"max_new_tokens": 1, "max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 12}
    out = run(tiny_root, tmp_path / "out", kd_on_policy=1.0, **keys)
    student = AutoModelForCausalLM.from_pretrained(tiny_root / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_root / "student")
    entropies = []
    for record in json.loads((tiny_root / "data" / "tiny.json").read_text()):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt_of(record["input"]), add_special_tokens=False)]
        with torch.no_grad():
            log_q = student(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        entropies.append(float(-(log_q.exp() * log_q).sum()))
    assert logged(out, "kd/entropy") == pytest.approx([sum(entropies) / len(entropies)], abs=0.35)


@pytest.mark.parametrize("do_sample", [True, False])
def test_samples_are_those_of_generate_whichever_decoder_makes_them(translators, tmp_path, monkeypatch, do_sample):
    from llamafactory_sekd.host import stage

    keys = {"kd_on_policy": 1.0, "max_steps": 1, "max_new_tokens": 40, "do_sample": do_sample}
    fast = run(translators, tmp_path / "fast", **keys)
    monkeypatch.setattr(stage, "_search", lambda sampling: None)
    plain = run(translators, tmp_path / "plain", **keys)
    shown = [json.loads((out / "samples" / "step-1.jsonl").read_text().splitlines()[0]) for out in (fast, plain)]
    assert shown[0]["sample"] == shown[1]["sample"]
    assert logged(fast, "gen/length") == logged(plain, "gen/length")
    assert same(fast, plain, 1e-5)


def test_greedy_step_1_equals_training_on_the_file_that_sekd_translate_made(translators, tmp_path, monkeypatch):
    import sys

    from llamafactory_sekd.host.translate_command import app

    keys = {"max_steps": 1, "max_samples": 4, "max_new_tokens": 40}
    own = run(translators, tmp_path / "own", kd_on_policy=1.0, do_sample=False, **keys)
    words = ["--model", str(translators / "student"), "--dataset", "tiny", "--dataset-dir", str(translators / "data")]
    words += ["--max-new-tokens", "40", "--filters", "none", "--out", str(tmp_path / "made"), "--name", "tiny"]
    monkeypatch.setattr(sys, "argv", ["sekd", "translate", *words])
    app(args=words, prog_name="sekd translate", standalone_mode=False)
    fixed = run(translators, tmp_path / "fixed", dataset_dir=str(tmp_path / "made"), kd_lambda=1.0, **keys)
    assert same(own, fixed, 1e-6)
    assert logged(own, "loss") == pytest.approx(logged(fixed, "loss"), abs=1e-6)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_template_with_thoughts_generates_what_inference_generates(tiny_root, tmp_path, monkeypatch, thinking):
    from llamafactory.chat import ChatModel

    seen: list[list[int]] = []
    generate = OwnSamples._generate

    def spy(self, model, examples):
        seen.extend(generate(self, model, examples))
        return list(seen)

    monkeypatch.setattr(OwnSamples, "_generate", spy)
    template = {"template": "qwen3", "enable_thinking": thinking}
    keys = {"max_steps": 1, "max_samples": 3, "disable_shuffling": True, "kd_on_policy": 1.0, "do_sample": False}
    out = run(tiny_root, tmp_path / "out", **template, **keys)

    chat = ChatModel(
        {
            "model_name_or_path": str(tiny_root / "student"),
            "infer_backend": "huggingface",
            **template,
            "do_sample": False,
            "max_new_tokens": 12,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    records = json.loads((tiny_root / "data" / "tiny.json").read_text())[:3]
    for record, sample in zip(records, seen, strict=True):
        message = {"role": "user", "content": f"{record['instruction']}\n{record['input']}"}
        (answer,) = chat.chat([message])
        assert tokenizer.decode(sample, skip_special_tokens=True) == answer.response_text
