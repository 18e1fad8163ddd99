"""The objectives in other loops: the programs of `docs/any_loop.md` train, as written, and torch alone is enough."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import SENTENCES
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives import DistillationLoss, distillation_loss


PAGE = (Path(__file__).parents[2] / "docs" / "any_loop.md").read_text(encoding="utf-8")
SNIPPET, LOOP, TRAINER = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
RECORDS = [{"prompt": f"{source}\n", "completion": target} for source, target in SENTENCES[:8]]


def defined_by(code: str, **known):
    exec(code, known)
    return known


@pytest.fixture
def models(tiny_root):
    return [AutoModelForCausalLM.from_pretrained(tiny_root / name) for name in ("student", "teacher")]


@pytest.fixture
def batch(tiny_root):
    tokenizer = AutoTokenizer.from_pretrained(tiny_root / "student")
    rows = [tokenizer(source + target)["input_ids"] for source, target in SENTENCES[:4]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [2] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference(models, batch, **keys):
    """The mean over the response tokens, from the models' own logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    shifted = batch["labels"][:, 1:]
    rows = shifted != -100
    logits = [model(**inputs).logits[:, :-1][rows].double() for model in models]
    return distillation_loss(*logits, shifted[rows], **keys).loss.mean()


def test_the_snippet_equals_the_objective_on_the_models_logits(models, batch):
    student, teacher = models
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = {f"{name}_hidden": model.model(**inputs).last_hidden_state for name, model in
              (("student", student), ("teacher", teacher))}  # fmt: skip
    output = defined_by(SNIPPET, student=student, teacher=teacher, labels=batch["labels"], **hidden)["output"]
    gradient = student.lm_head.weight.grad.clone()
    student.zero_grad()
    expected = reference(models, batch, kd_loss="self_evolution", kd_lambda=0.5, kd_gamma=0.4)
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, student.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


def test_the_loop_trains_and_starts_from_the_objective_on_the_models_logits(tiny_root, models, batch):
    distill = defined_by(LOOP)["distill"]
    _, losses = distill(tiny_root / "student", tiny_root / "teacher", [batch] * 8)
    first = reference(models, batch, kd_loss={"target": "teacher", "divergence": "jsd", "mix": 0.1}, kd_lambda=0.9)
    assert losses[0] == pytest.approx(first.item(), rel=1e-5)
    assert losses[-1] < losses[0]


def trained_by_trl(tiny_root, out, size):
    from datasets import Dataset
    from trl import SFTConfig

    student, teacher = (AutoModelForCausalLM.from_pretrained(tiny_root / name) for name in ("student", "teacher"))
    trainer = defined_by(TRAINER)["DistillationTrainer"](
        student,
        SFTConfig(
            output_dir=str(out),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=3,
            learning_rate=1e-2,
            optim="sgd",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            completion_only_loss=True,
            eval_strategy="steps",
            eval_steps=3,
        ),
        train_dataset=Dataset.from_list(RECORDS),
        eval_dataset=Dataset.from_list(RECORDS),
        processing_class=AutoTokenizer.from_pretrained(tiny_root / "student"),
        teacher=teacher,
        objective=DistillationLoss("forward_kl"),
    )
    trainer.train()
    return student, trainer.state.log_history


def test_trls_trainer_trains_alike_whatever_the_accumulation(tiny_root, tmp_path):
    (one, history), (two, _) = (trained_by_trl(tiny_root, tmp_path / str(size), size) for size in (8, 2))
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert next(entry["eval_loss"] for entry in history if "eval_loss" in entry) < losses[0]
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kd_loss", ["skew", {"divergence": "tvd"}], ids=["closed", "formula"])
def test_logits_and_hidden_states_give_the_same_loss_for_any_divisor(models, batch, kd_loss):
    student, teacher = models
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    objective = DistillationLoss(kd_loss, kd_lambda=0.3)
    with torch.no_grad():
        hidden = [model.model(**inputs).last_hidden_state for model in models]
        logits = [model(**inputs).logits for model in models]
        for num_items in (None, 100, torch.tensor(100)):
            fused = objective(
                hidden[0], student.lm_head, hidden[1], teacher.lm_head, batch["labels"], num_items=num_items
            )
            plain = objective.of_logits(*logits, batch["labels"], num_items=num_items)
            torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-7)


def test_numbers_that_move_follow_the_progress(models, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = [model(**inputs).logits for model in models]
    moving = DistillationLoss({"divergence": "kl", "skew": {"from": 0.2, "to": 0.6}})
    half_way = DistillationLoss({"divergence": "kl", "skew": 0.4})
    expected = half_way.of_logits(*logits, batch["labels"]).loss
    torch.testing.assert_close(moving.of_logits(*logits, batch["labels"], progress=0.5).loss, expected)


@pytest.mark.parametrize(
    "keys",
    [
        {"kd_loss": "self_evolution", "kd_gamma": "auto"},
        {"kd_loss": {"gate": {"above": "mean"}, "easy": {}, "hard": {"skew": 0.5}}},
    ],
    ids=["gamma", "gate"],
)
def test_a_threshold_that_follows_the_training_is_refused(keys):
    with pytest.raises(ArgumentError, match="kept by the trainer"):
        DistillationLoss(**keys)


ALONE = """
import sys
from importlib.abc import MetaPathFinder
import torch

class TorchAlone(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("torch", "llamafactory_sekd", "numpy") + LOADED:
            raise ModuleNotFoundError(f"{name} is not part of torch")

LOADED = tuple({name.partition(".")[0] for name in sys.modules})
assert "transformers" not in LOADED and "yaml" not in LOADED
sys.meta_path.insert(0, TorchAlone())
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives import DistillationLoss
from llamafactory_sekd.presets import PRESETS

heads = [torch.nn.Linear(width, 30, bias=False) for width in (4, 6)]
hidden = [torch.randn(2, 5, width) for width in (4, 6)]
labels = torch.randint(30, (2, 5))
for name in PRESETS:
    kd_loss = {"preset": name, "gate": {"above": 0.5}} if name == "adaptive_temperature" else name  # not the mean
    objective = DistillationLoss(kd_loss, **({"kd_topk": 0.5} if "topk" in name else {}))
    objective(hidden[0], heads[0], hidden[1], heads[1], labels).loss.backward()
try:
    DistillationLoss("self_evolutoin")
except ArgumentError as error:
    print(error)
"""


def test_torch_alone_is_enough_for_every_preset_and_for_messages():
    command = [sys.executable, "-c", ALONE]
    result = subprocess.run(
        command, capture_output=True, text=True, env={"LLAMAFACTORY_SEKD": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=1200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "`kd_loss: self_evolutoin` is unknown: did you mean 'self_evolution'?"
