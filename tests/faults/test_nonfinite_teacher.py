"""NaN and infinity in the teacher's logits: these tokens alone are left out, counted, and too many stop the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.runs import base_config, logged, train, weights
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.objectives import fused_linear_distillation
from llamafactory_sekd.presets import PRESETS


TOKENS, WIDTH, VOCABULARY = 9, 8, 32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kd_loss", PRESETS)
def test_the_other_tokens_lose_and_learn_as_if_the_broken_ones_were_not_there(kd_loss, value):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, head, teacher_hidden, teacher_head = (
        draw(TOKENS, WIDTH),
        draw(VOCABULARY, WIDTH),
        draw(TOKENS, WIDTH),
        draw(VOCABULARY, WIDTH),
    )
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    broken = torch.zeros(TOKENS, dtype=torch.bool)
    broken[[1, 4, 8]] = True
    damaged = teacher_hidden.clone()
    damaged[broken, 3] = value

    def gradients(keep: torch.Tensor, teacher: torch.Tensor, topk: float) -> list[torch.Tensor]:
        leaves = [hidden[keep].clone().requires_grad_(), head.clone().requires_grad_()]
        output = fused_linear_distillation(
            leaves[0],
            leaves[1],
            teacher[keep],
            teacher_head,
            labels[keep],
            num_items=TOKENS,
            chunk_size=4,
            kd_loss={"preset": kd_loss, "gate": {"share": topk}} if kd_loss == "entropy_gate" else kd_loss,
            kd_topk=topk if kd_loss == "self_evolution_topk" else None,
        )
        output.loss.backward()
        return [output.loss.detach(), leaves[1].grad, leaves[0].grad]

    loss, weight, rows = gradients(torch.ones_like(broken), damaged, topk=3 / TOKENS)
    expected_loss, expected_weight, expected_rows = gradients(~broken, teacher_hidden, topk=3 / 6)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(weight, expected_weight)
    torch.testing.assert_close(rows[~broken], expected_rows)
    assert not rows[broken].any()


@pytest.fixture
def root(tmp_path, tiny_root) -> Path:
    """The shared student and data, and a teacher that breaks as soon as a sentence holds the word tree."""
    for name in ("student", "data"):
        (tmp_path / name).symlink_to(tiny_root / name)
    tiny.save_llama(tmp_path / "teacher", seed=1, width=48, layers=3)
    path = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(path)
    (token,) = AutoTokenizer.from_pretrained(tmp_path / "teacher").encode(" tree", add_special_tokens=False)
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    "student", [{}, {"finetuning_type": "lora", "additional_target": "lm_head"}], ids=["fused", "plain"]
)
def test_training_equals_one_without_these_sentences(root, tiny_root, tmp_path, student):
    # The first three sentences are about dog, tree, book; the second breaks the teacher at every response token.
    tokenizer = AutoTokenizer.from_pretrained(root / "student")
    lengths = [len(tokenizer.encode(target, add_special_tokens=False)) + 1 for _, target in tiny.SENTENCES[:3]]
    broken = lengths[1]
    together = {"optim": "sgd", "max_steps": 1, "weight_decay": 0.0, "max_grad_norm": 0.0, **student}
    config = base_config(
        root,
        output_dir=str(tmp_path / "broken"),
        max_samples=3,
        learning_rate=0.05,
        teacher_max_nonfinite=0.9,
        **together,
    )
    train(config)
    assert logged(tmp_path / "broken", "kd/teacher_nonfinite") == pytest.approx([broken / sum(lengths)], abs=1e-6)

    healthy = tmp_path / "healthy"
    healthy.mkdir()
    records = json.loads((tiny_root / "data" / "tiny.json").read_text())
    (healthy / "tiny.json").write_text(json.dumps([records[0], records[2]]))
    (healthy / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))
    share = 1 - broken / sum(lengths)  # the divisor stays the number of response tokens
    config = base_config(
        tiny_root,
        output_dir=str(tmp_path / "without"),
        dataset_dir=str(healthy),
        learning_rate=0.05 * share,
        **together,
    )
    train(config)
    assert logged(tmp_path / "broken", "kd/difficulty") == pytest.approx(
        logged(tmp_path / "without", "kd/difficulty"), abs=2e-6
    )
    for name, value in weights(tmp_path / "without").items():
        torch.testing.assert_close(weights(tmp_path / "broken")[name], value, atol=1e-6, rtol=1e-6)


def test_past_the_set_share_the_run_stops_and_names_the_share(root, tmp_path):
    config = base_config(root, output_dir=str(tmp_path / "out"), save_strategy="steps", save_steps=1, max_samples=3)
    with pytest.raises(TeacherError, match=r"NaN or infinite at \d\d\.\d\d% of the response tokens.*0\.01"):
        train(config)
    assert not list((tmp_path / "out").glob("checkpoint-*"))  # nothing was saved past it


def test_a_head_of_nan_stops_the_first_window(root, tmp_path):
    tiny.save_llama(root / "teacher", seed=1, width=48, layers=3)
    path = root / "teacher" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"at 100\.00% of the response tokens"):
        train(base_config(root, output_dir=str(tmp_path / "out"), max_samples=3))
