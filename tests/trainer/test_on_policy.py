"""On-policy training: which responses are replaced, by what, and that everything else of a step stays as it is."""

from __future__ import annotations

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
from llamafactory_sekd.trainer.sampling import as_generator, draw


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


def test_samples_that_are_drawn_ahead_are_those_of_the_weights_at_that_step(tiny_root, tmp_path):
    """Six steps of an epoch and two of the next: drawings for 4, 2 and 2 steps."""
    keys = {"kd_on_policy": 1.0, "max_steps": 8, "per_device_train_batch_size": 2, "max_samples": 12}
    keys |= {"disable_shuffling": True, "learning_rate": 0.05}
    ahead = run(tiny_root, tmp_path / "ahead", kd_on_policy_every=4, **keys)
    frozen = run(tiny_root, tmp_path / "frozen", **{**keys, "learning_rate": 1e-30})
    each = run(tiny_root, tmp_path / "each", **keys)
    assert rows(ahead)[:4] == rows(frozen)[:4]
    assert rows(ahead)[4:6] != rows(frozen)[4:6]
    assert rows(ahead)[0] == rows(each)[0]
    assert rows(ahead)[1:4] != rows(each)[1:4]
    seconds = logged(ahead, "gen/seconds")
    assert {step for step, value in enumerate(seconds) if value > max(seconds) / 20} >= {0, 4, 6}
    assert "kd/entropy" not in json.loads((ahead / "trainer_state.json").read_text())["log_history"][0]


def test_one_drawing_for_all_steps_at_a_tiny_rate_equals_one_for_each(tiny_root, tmp_path):
    keys = {"kd_on_policy": 0.7, "max_steps": 5, "learning_rate": 1e-30, "gradient_accumulation_steps": 2}
    each = run(tiny_root, tmp_path / "each", **keys)
    ahead = run(tiny_root, tmp_path / "ahead", kd_on_policy_every=3, **keys)
    assert rows(ahead) == rows(each)
    assert logged(ahead, "loss") == logged(each, "loss")
    assert logged(ahead, "kd/on_policy") == logged(each, "kd/on_policy")


def test_a_student_that_shares_the_teachers_base_samples_with_its_adapter(tiny_root, tmp_path):
    keys = {"finetuning_type": "lora", "lora_target": "all", "teacher_model": "self", "kd_on_policy": 0.5}
    keys |= {"max_steps": 6, "per_device_train_batch_size": 2, "kd_lambda": 0.5}
    trained = run(tiny_root, tmp_path / "trained", learning_rate=0.05, **keys)
    frozen = run(tiny_root, tmp_path / "frozen", learning_rate=1e-30, **keys)
    assert rows(trained)[0] == rows(frozen)[0]
    assert rows(trained)[1:] != rows(frozen)[1:]
    assert logged(trained, "kd/teacher_kl")[0] == pytest.approx(0.0, abs=1e-6)  # the adapter starts at zero
    assert logged(trained, "kd/teacher_kl")[-1] > 1e-3  # the teacher answers without it


@pytest.mark.parametrize("every", [3, 100])
def test_a_run_that_is_resumed_between_two_drawings_equals_an_uninterrupted_one(tiny_root, tmp_path, every):
    keys = {"kd_on_policy": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 0.05}
    keys |= {"kd_on_policy_every": every, "per_device_train_batch_size": 2}
    complete = run(tiny_root, tmp_path / "complete", **keys)
    resumed = run(tiny_root, tmp_path / "resumed", resume_from_checkpoint=str(complete / "checkpoint-2"), **keys)
    assert same(complete, resumed)
    assert rows(complete)[2:] == rows(resumed)


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


def test_the_share_is_the_same_choice_in_any_batch():
    """What a hash of the example decides cannot depend on its neighbors."""
    ids = torch.randint(3, 90, (64, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :6] = -100
    mask = torch.ones_like(ids)
    own = OwnSamples(0.3, 1, False, None, 64, 7, str, Accelerator(cpu=True), ".")  # type: ignore[arg-type]
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


def test_loops_and_other_languages_among_own_samples_are_counted_and_warned_of_once(caplog, monkeypatch):
    from transformers.utils import logging as host_logging

    from llamafactory_sekd.data.languages import differs_in_language
    from llamafactory_sekd.evaluation.guards import has_loop
    from llamafactory_sekd.trainer.on_policy import Look
    from llamafactory_sekd.trainer.sampling import Sampling

    german = "Die alte Brücke über den Fluss war letzten Sommer wegen Reparaturen gesperrt."
    texts = {
        1: german,
        2: "The old bridge over the river was closed for repairs last summer.",
        3: "die alte Brücke über den Fluss und " * 8,
    }

    def look(sample: list[int], reference: list[int]) -> Look:
        return Look(has_loop(texts[sample[0]]), differs_in_language(texts[sample[0]], texts[reference[0]]))

    monkeypatch.setattr(host_logging.get_logger("llamafactory_sekd.trainer.on_policy"), "propagate", True)
    sampling = Sampling(True, 1.0, 1.0, 0, 4, (2,), 0)
    own = OwnSamples(1.0, 1, False, sampling, 64, 7, str, Accelerator(cpu=True), ".", look)
    ids = torch.tensor([[5 + row, 6, 1, 2] for row in range(8)])
    labels = torch.tensor([[-100, -100, 1, 2]] * 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    monkeypatch.setattr(own, "_generate", lambda model, examples: [[1, 2]] + [[2, 2]] * 3 + [[3, 2]] * 4)
    for _ in range(3):
        own.draw(None, [batch], 0)
        own.replace([dict(batch)], 0)
    logs = own.logs()
    assert logs["gen/loops"] == 0.5
    assert logs["gen/other_language"] == 0.375
    own.draw(None, [batch], 0)
    own.replace([dict(batch)], 0)
    own.replace([dict(batch)], 0)
    own.logs()
    warned = [record.getMessage() for record in caplog.records if "own samples" in record.getMessage()]
    assert len(warned) == 1
    assert "50% of the student's own samples repeat themselves" in warned[0]


def test_counting_goes_on_after_samples_were_judged_on_an_accelerator():
    """On tensors without content, so that it needs no accelerator."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    ids = torch.tensor([[5, 6, 7, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[-100, -100, 7, 2]])}
    own = OwnSamples(0.0, 1, False, None, 64, 7, str, Accelerator(cpu=True), ".")  # type: ignore[arg-type]
    own.replace([dict(batch)], 0)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        values = torch.zeros(2, device="cuda")
        own.judge(torch.tensor([-1]), torch.tensor([[True, True]]), values, values)
    assert own._judged.device.type == "cuda"
    own.replace([dict(batch)], 0)
    assert own._window[0] == 2


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
